"""Very few bits and a low rank that learns to answer as the original does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eckart.allocation import Allocator, Optimal
from eckart.calibration.rounds import rounds
from eckart.calibration.stream import Batch
from eckart.compression.compensated import WithLowRank
from eckart.forms import Form, LowRank, Quantized
from eckart.forms.algebra import ProductMatrix, SumMatrix
from eckart.forms.gptq import GPTQ
from eckart.metrics import InputCovariance, Metric
from eckart.registry import method


@method("int2_1", family="mixture", paper="INT2.1: Towards Fine-Tunable Quantized Large Language Models with Error Correction through Low-Rank Adaptation, Chai et al., 2023, arXiv 2306.08162")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class INT2_1(WithLowRank):
    """A GPTQ base of 2 bits and more, and beside it a low rank (LREC), which `recover` then trains.

    Departs from the paper: the low rank starts at the best repair of the layer's outputs, in closed form, and not at
    zero. The training is a step of its own, on a model in memory: `recover(compressed, original, batches)`.

    Args:
        rank: of the correction.
    """

    form: Form = field(default_factory=lambda: Quantized(group=128, rounding=GPTQ()))
    metric: Metric = field(default_factory=InputCovariance)
    allocation: Allocator = field(default_factory=Optimal)
    rank: int = 32


def corrections(model: nn.Module) -> list[nn.Parameter]:
    """The factors of the low ranks that stand beside something else in a sum."""
    terms = [term for m in model.modules() if isinstance(m, SumMatrix) for term in m.terms]
    low = [t for t in terms if isinstance(t, ProductMatrix) and isinstance(t.form, LowRank)]
    return [p for term in low for p in term.parameters()]


def recover(
    model: nn.Module, original: nn.Module, batches: Sequence[Batch], *, epochs: int = 10, lr: float = 3e-5,
    kl: float = 1.0, ce: float = 0.06, weight_decay: float = 1e-5, seed: int = 0,
) -> list[float]:  # fmt: skip
    """Train the low ranks of a compressed model, and nothing else, to answer as the original does (LREC).

    The loss is kl * KL(original || model) + ce * cross-entropy of the next token, both means over tokens; the paper
    sums KL over the 2048 tokens of a window, so that its 120 for the second weight is 0.06 here.

    Args:
        model: compressed, changed where it is; its low ranks in float32.
        original: answers the same batches; never changed.
        batches: with `input_ids` and perhaps `attention_mask`.
        epochs: passes over them, each in an order of its own.
        lr: of Adam, as `weight_decay`.
        seed: of the orders.

    Returns:
        the mean loss of every epoch. Raises `ValueError` where there is nothing to train, no data, or another
        vocabulary, and `RuntimeError` where the loss is not finite.
    """
    learning = corrections(model)
    if not learning or not batches:
        raise ValueError("nothing to recover: " + ("give at least one batch" if learning else "the model has no low rank beside another form"))  # fmt: skip # noqa: E501
    if any(p.dtype != torch.float32 for p in learning):
        raise ValueError(f"the low ranks are {learning[0].dtype}: load the model in float32 to train them")
    states = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    for p in learning:
        p.requires_grad_(True)
    optimiser = torch.optim.AdamW(learning, lr=lr, weight_decay=weight_decay)
    order, means = rounds(len(batches), torch.Generator().manual_seed(seed)), []
    try:
        with torch.enable_grad():
            for _ in range(epochs):
                total = 0.0
                for i in islice(order, len(batches)):
                    loss = _loss(model, original, batches[i], kl, ce)
                    if not bool(torch.isfinite(loss)):
                        raise RuntimeError(f"the loss of batch {i} is {float(loss.detach())}: lower lr, which is {lr}")
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
                    total += float(loss.detach())
                means.append(total / len(batches))
    finally:
        for p, before in states.items():
            p.requires_grad_(before)
            p.grad = None
    return means


def _loss(model: nn.Module, original: nn.Module, batch: Batch, kl: float, ce: float) -> Tensor:
    with torch.no_grad():
        wanted = original(**batch).logits.float()
    logits = model(**batch).logits.float()
    if logits.shape != wanted.shape:
        raise ValueError(f"the original answers {tuple(wanted.shape)}, the model {tuple(logits.shape)}: they need one vocabulary")  # fmt: skip # noqa: E501
    ids = batch["input_ids"]
    real = batch.get("attention_mask", torch.ones_like(ids)).bool()
    q, p = logits.log_softmax(-1), wanted.log_softmax(-1)
    apart = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)[real].mean()
    counts = real[:, 1:] & real[:, :-1]
    return kl * apart + ce * F.cross_entropy(logits[:, :-1][counts], ids[:, 1:][counts])
