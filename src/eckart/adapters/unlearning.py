"""Unlearning: chosen text is made as unlikely as if a causal model had never seen it, and other text is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from eckart.adapters.adapt import schedule
from eckart.calibration.rounds import rounds
from eckart.calibration.stream import Batch
from eckart.schedules import Schedule

IGNORED = -100
Loss = Callable[[Float[Tensor, "batch length vocab"], Int[Tensor, "batch length"]], Float[Tensor, ""]]


def inverted_hinge(logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """1 + p(target) - the largest p of another word, of every token, from 0 to 2 (LoKU, equation 4).

    Its gradient fades once another word holds the mass, where that of -log p grows without bound. Softmax in float32.
    """
    p = logits.float().softmax(-1)
    own = p.gather(-1, targets[:, None])
    others = p.scatter(-1, targets[:, None], -1.0)
    return 1 + own[:, 0] - others.max(-1).values


def inverted_hinge_loss(
    logits: Float[Tensor, "batch length vocab"], labels: Int[Tensor, "batch length"]
) -> Float[Tensor, ""]:
    """The mean of `inverted_hinge` over labels; as in transformers, logits foretell the label one position ahead."""
    return inverted_hinge(*counted(logits, labels)).mean()


def next_word_loss(
    logits: Float[Tensor, "batch length vocab"], labels: Int[Tensor, "batch length"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy of labels, each foretold one position before."""
    kept, targets = counted(logits, labels)
    return F.cross_entropy(kept.float(), targets)


def gradient_ascent_loss(
    logits: Float[Tensor, "batch length vocab"], labels: Int[Tensor, "batch length"]
) -> Float[Tensor, ""]:
    """Minus the mean cross-entropy, which has no lower bound: the baseline."""
    return -next_word_loss(logits, labels)


LOSSES: dict[str, Loss] = {"inverted_hinge": inverted_hinge_loss, "gradient_ascent": gradient_ascent_loss}
"""What `unlearn` lowers on what is to be forgotten. Gradient ascent with rows to retain is gradient difference."""


def counted(
    logits: Float[Tensor, "batch length vocab"], labels: Int[Tensor, "batch length"]
) -> tuple[Float[Tensor, "tokens vocab"], Int[Tensor, " tokens"]]:
    """Logits that foretell a label, and those labels. Raises `ValueError` where all are -100."""
    targets = labels[:, 1:].to(logits.device)
    keep = targets != IGNORED
    if not bool(keep.any()):
        raise ValueError("no token of the batch has a label: from the second position on, all are -100")
    return logits[:, :-1][keep], targets[keep]


@dataclass(frozen=True)
class Step:
    """One step of unlearning.

    Attributes:
        number: from 1 on.
        forget: the loss that was lowered on what is to be forgotten.
        retain: cross-entropy of what is to be kept, in nats; None where nothing was given.
    """

    number: int
    forget: float
    retain: float | None


def unlearn(
    model: nn.Module, forget: Sequence[Batch], retain: Sequence[Batch] | None = None, *,
    loss: str | Loss = "inverted_hinge", epochs: int = 5, learning_rate: float = 1e-4, weight_decay: float = 0.01,
    warmup: float = 1.0, retain_weight: float = 1.0, seed: int = 0, after: Callable[[Step], bool | None] | None = None,
) -> list[Step]:  # fmt: skip
    """Train what learns of a causal model, such as an adapter of `adapt(model, "loku", ...)`, with AdamW.

    A step takes one batch to forget and one to retain, drawn anew in each epoch, and lowers loss(forget) +
    retain_weight * cross-entropy(retain). Neither the hinge nor gradient ascent knows when the text is as unlikely as
    one that was never seen: compare `row_losses` with those of like text, and stop there by `after`.

    Args:
        model: gives logits of the next word. What learns is changed in place; the mode is put back.
        forget: batches with `input_ids`; without `labels`, all real tokens count. Labels of -100 do not.
        retain: the same of text to keep; None lets the model go where the loss takes it.
        loss: `inverted_hinge`, `gradient_ascent`, or a function of logits and labels, shifted by itself.
        epochs: over `forget`.
        warmup: epochs in which the learning rate rises.
        after: called after each step; the run ends where it returns True.

    Returns:
        What each step lowered.

    Raises `ValueError` on nothing to forget, rows that are to be both forgotten and kept, batches without a label, and
    where nothing learns; `RuntimeError` where a loss is no longer finite.
    """
    measure = _loss_called(loss)
    check_apart(forget, retain or [])
    learning = [p for p in model.parameters() if p.requires_grad]
    if not learning:
        raise ValueError("nothing of this model learns: put an adapter on it, adapt(model, 'loku', ...), or set requires_grad")  # fmt: skip # noqa: E501
    if epochs < 1 or not learning_rate > 0:
        raise ValueError(f"unlearn(epochs={epochs}, learning_rate={learning_rate}): at least one epoch, and a rate above 0")  # fmt: skip # noqa: E501
    optimizer = torch.optim.AdamW(learning, learning_rate, weight_decay=weight_decay)
    rise = max(1.0, warmup * len(forget))
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / rise))
    follows = schedule(model) if hasattr(model, "peft_config") else Schedule()
    steps: list[Step] = []
    with ExitStack() as stack:
        stack.callback(model.train, model.training)
        stack.callback(follows.release)
        stack.enter_context(torch.random.fork_rng())
        torch.manual_seed(seed)
        model.train()
        follows.begin(optimizer, epochs * len(forget))
        for number, (wrong, right) in enumerate(pairs(forget, retain or [], epochs, seed), 1):
            lowered = _backward(model, wrong, measure, 1.0, number)
            kept = None if right is None else _backward(model, right, next_word_loss, retain_weight, number)
            optimizer.step()
            rate.step()
            follows.step()
            optimizer.zero_grad()
            steps.append(Step(number, lowered, kept))
            if after is not None and after(steps[-1]):
                break
        follows.finish()
    return steps


def pairs(
    forget: Sequence[Batch], retain: Sequence[Batch], epochs: int, seed: int = 0
) -> Iterator[tuple[Batch, Batch | None]]:
    """Every batch to forget once an epoch, in a drawn order, each with a drawn batch to retain.

    All batches to retain have come before one comes again.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = rounds(len(retain), generator)
    for i in islice(rounds(len(forget), generator), epochs * len(forget)):
        yield forget[i], retain[next(kept)] if retain else None


@torch.no_grad()
def row_losses(model: nn.Module, batches: Sequence[Batch]) -> Float[Tensor, " rows"]:
    """Mean cross-entropy of the labels of every row, in nats, in evaluation mode; NaN of a row without labels."""
    before = model.training
    model.eval()
    found = []
    for batch in batches:
        logits, labels = _logits(model, batch)[:, :-1].float(), labels_of(batch)[:, 1:]
        losses = F.cross_entropy(logits.transpose(1, 2), labels.to(logits.device), ignore_index=IGNORED, reduction="none")  # fmt: skip # noqa: E501
        found.append(losses.sum(1) / (labels != IGNORED).sum(1).to(losses))
    model.train(before)
    return torch.cat(found).cpu()


def labels_of(batch: Batch) -> Int[Tensor, "batch length"]:
    """A batch's labels, -100 where a token does not count; without any, its tokens but for padding."""
    labels: Tensor | None = batch.get("labels")
    if labels is not None:
        return labels
    ids: Tensor = batch["input_ids"]
    mask = batch.get("attention_mask")
    return ids if mask is None else ids.masked_fill(mask == 0, IGNORED)


def check_apart(forget: Sequence[Batch], retain: Sequence[Batch]) -> None:
    """Raises `ValueError` on nothing to forget, batches without a label, and rows that both have."""
    if not forget:
        raise ValueError("there is nothing to forget: give at least one batch of it")
    for what, batches in (("forget", forget), ("retain", retain)):
        for number, batch in enumerate(batches):
            if "input_ids" in batch and not bool((labels_of(batch)[:, 1:] != IGNORED).any()):
                raise ValueError(f"no token of batch {number} to {what} has a label: from the second position on, all are -100")  # fmt: skip # noqa: E501
    rows = [row for batch in forget for row in _rows(batch)]
    both = len(rows) - sum(row not in kept for row in rows) if (kept := {r for b in retain for r in _rows(b)}) else 0
    if both:
        raise ValueError(f"{both} of {len(rows)} rows to forget are among the rows to retain, too: leave them out of one of the two")  # fmt: skip # noqa: E501


def _rows(batch: Batch) -> Iterator[tuple[int, ...]]:
    """The tokens of every row, without padding."""
    if "input_ids" in batch:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        yield from (tuple(ids[real].tolist()) for ids, real in zip(batch["input_ids"], mask, strict=True))


def _loss_called(loss: str | Loss) -> Loss:
    if not isinstance(loss, str):
        return loss
    if loss not in LOSSES:
        raise ValueError(f"unlearn(loss={loss!r}): it is one of {', '.join(LOSSES)}, or a function of logits and labels")  # fmt: skip # noqa: E501
    return LOSSES[loss]


def _logits(model: nn.Module, batch: Batch) -> Float[Tensor, "batch length vocab"]:
    output: Any = model(**{name: value for name, value in batch.items() if name != "labels"})
    logits: Tensor = output.logits
    return logits


def _backward(model: nn.Module, batch: Batch, measure: Loss, weight: float, step: int) -> float:
    loss = measure(_logits(model, batch), labels_of(batch))
    if not bool(loss.isfinite()):
        raise RuntimeError(f"the loss at step {step} is not finite: lower the learning rate, or let the inverted hinge forget, which is bounded")  # fmt: skip # noqa: E501
    (weight * loss).backward()
    return float(loss.detach())
