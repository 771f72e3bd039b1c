"""Compress, then prompt: soft tokens learned through a compressed model, which fit all models of the same base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from peft import PeftConfig, PeftModel, PromptTuningConfig, TaskType
from torch import Tensor, nn

from eckart.adapters.native import Native, drawn_from, put
from eckart.calibration.rounds import rounds
from eckart.calibration.stream import Batch
from eckart.registry import method
from eckart.settings import check_whole

STARTS = ("vocabulary", "uniform")


@method("compress_then_prompt", family="prompts", paper="Compress, Then Prompt: Improving Accuracy-Efficiency Trade-off of LLM Inference with Transferable Prompt, Xu et al., 2023, arXiv 2305.11186")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class CompressThenPrompt(Native):
    """PEFT's prompt tuning on a compressed model: embeddings E (n, width) before those of the text, in float32.

    Nothing else is trained, so that any backend will do whose layers pass gradients on to their inputs. `learn_prompt`
    trains E by the loss of next words, and `moved` puts a saved one on another model of the same base, compressed
    otherwise. E takes n positions of the context. A model with learned absolute positions loses more by the shift than
    a short prompt wins back.

    Args:
        tokens: n.
        start_from: `vocabulary`, the embeddings of the first n words, or `uniform` from -0.5 to 0.5.
    """

    tokens: int = 100
    start_from: str = "vocabulary"

    of: ClassVar[type[PeftConfig]] = PromptTuningConfig

    def check(self) -> None:
        check_whole(self, tokens=1)
        if self.start_from not in STARTS:
            raise ValueError(f"compress_then_prompt(start_from={self.start_from!r}): it is one of {', '.join(STARTS)}")
        for name in ("target_modules", "exclude_modules", "modules_to_save", "dropout"):
            if getattr(self, name):
                raise ValueError(f"compress_then_prompt({name}={getattr(self, name)!r}): a prompt sits on no layer, and has none; leave it out")  # fmt: skip # noqa: E501

    def config(self) -> PromptTuningConfig:
        return PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=self.tokens)

    def put(self, model: nn.Module, data: list[Any] | None, adapter_name: str) -> Any:
        words = embedding_of(model)
        positions = positions_of(model)
        if positions is not None and self.tokens >= positions:
            raise ValueError(f"compress_then_prompt(tokens={self.tokens}): the model has {positions} positions, which leaves none for text: take fewer")  # fmt: skip # noqa: E501
        with torch.no_grad(), drawn_from(self.seed):
            adapted = aware(put(model, self.config(), adapter_name), words)
            prompt = prompt_of(adapted, adapter_name)
            if self.start_from == "uniform":
                prompt.copy_(torch.rand(prompt.shape) - 0.5)
            else:
                first = torch.arange(self.tokens) % adapted.get_base_model().config.get_text_config().vocab_size
                prompt.copy_(words(first.to(prompt.device)).float())
        return adapted


def learn_prompt(
    model: Any, data: Sequence[Batch], held_out: Sequence[Batch] | None = None, *, steps: int = 30_000,
    learning_rate: float = 1e-3, weight_decay: float = 1e-5, warmup: int = 500, every: int = 100, seed: int = 0,
) -> list[float]:  # fmt: skip
    """Train the active prompt by the loss of next words: AdamW, gradients of norm 1 at most, a rate that falls to zero.

    Args:
        model: what `adapt(compressed, "compress_then_prompt")` gave.
        data: batches with `input_ids`, and `attention_mask` where they are padded, on the right; of equal length or
            not. They come in a drawn order, round after round.
        held_out: batches of the same kind; the prompt that is best on them at any multiple of `every` steps is kept.
        warmup: steps in which the rate rises.

    Returns:
        The mean loss of each `every` steps, or on `held_out` after them.

    Raises `ValueError` on no data, left padding, and text that leaves the prompt no room; `RuntimeError` where a layer
    passes no gradient on, or the loss is not finite.
    """
    if not data or steps < 1 or every < 1:
        raise ValueError(f"learn_prompt needs data and steps: there are {len(data)} batches, steps={steps} and every={every}")  # fmt: skip # noqa: E501
    for batch in (*data, *(held_out or ())):
        check_room(model, batch)
    prompt = prompt_of(model, model.active_adapter)
    optimizer = torch.optim.AdamW([prompt], learning_rate, weight_decay=weight_decay)
    rise = min(warmup, steps // 2)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / (rise + 1), (steps - s) / (steps - rise)))  # fmt: skip # noqa: E501
    order = rounds(len(data), torch.Generator().manual_seed(seed))
    best, kept, told, recent = math.inf, None, [], []
    with ExitStack() as stack:
        stack.callback(model.train, model.training)
        model.eval()  # dropout of a model that is used without would be noise to the prompt alone
        for step in range(1, steps + 1):
            loss = word_loss(model, data[next(order)])
            if not bool(loss.isfinite()):
                raise RuntimeError(f"the loss at step {step} is not finite: check the model and the data, or lower the learning rate")  # fmt: skip # noqa: E501
            (prompt.grad,) = _gradient(loss, prompt)
            torch.nn.utils.clip_grad_norm_([prompt], 1.0)
            optimizer.step()
            rate.step()
            recent.append(float(loss.detach()))
            if step % every == 0 or step == steps:
                told.append(sum(recent) / len(recent) if held_out is None else held_out_loss(model, held_out))
                recent = []
                if held_out is not None and told[-1] < best:
                    best, kept = told[-1], prompt.detach().clone()
    prompt.grad = None
    if kept is not None:
        prompt.data.copy_(kept)
    return told


def _gradient(loss: Tensor, prompt: nn.Parameter) -> tuple[Tensor]:
    found = torch.autograd.grad(loss, [prompt], allow_unused=True) if loss.requires_grad else (None,)
    if found[0] is None or not bool(found[0].any()):
        raise RuntimeError("no gradient reaches the prompt: a layer of the compressed model does not pass gradients on to its input; learn through another backend, such as the dense weights of eckart.densify(model)")  # fmt: skip # noqa: E501
    return (found[0],)


def moved(folder: str | Path, model: nn.Module, adapter_name: str = "default") -> PeftModel:
    """A saved prompt on another model of the same base: dense, or compressed to another size or in another way.

    Raises `ValueError` where the model's embeddings have another width, which tells another base.
    """
    config = PeftConfig.from_pretrained(str(folder))
    words = embedding_of(model)
    if not isinstance(config, PromptTuningConfig):
        raise ValueError(f"{folder} holds no prompt but {config.peft_type}: load it with PeftModel.from_pretrained")
    if config.token_dim != width_of(model):
        raise ValueError(f"the prompt in {folder} has embeddings of width {config.token_dim}, and those of this model have {width_of(model)}: it was learned on another base ({config.base_model_name_or_path})")  # fmt: skip # noqa: E501
    return aware(PeftModel.from_pretrained(model, str(folder), adapter_name=adapter_name), words)


def aware(adapted: Any, words: nn.Module) -> Any:
    """Let PEFT read words where the model does: it looks for a parameter with as many rows as there are words."""
    adapted.word_embeddings = words
    return adapted


def prompt_of(model: Any, adapter_name: str) -> nn.Parameter:
    """E (n, width)."""
    encoder = getattr(model, "prompt_encoder", {})
    if adapter_name not in encoder:
        raise ValueError("this model carries no prompt: put one on it, adapt(model, 'compress_then_prompt')")
    found: nn.Parameter = encoder[adapter_name].embedding.weight
    return found


def word_loss(model: Any, batch: Batch) -> Float[Tensor, ""]:
    """Mean loss of the next words of a batch, in nats; the first one follows the prompt, if there is one."""
    ids: Int[Tensor, "b length"] = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    labels = batch.get("labels", ids).masked_fill(mask == 0, -100)
    loss: Tensor = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    return loss


@torch.no_grad()
def held_out_loss(model: Any, batches: Sequence[Batch]) -> float:
    """Mean of `word_loss` over batches."""
    return sum(float(word_loss(model, batch)) for batch in batches) / len(batches)


def check_room(model: Any, batch: Batch) -> None:
    """Raises `ValueError` where a batch is padded on the left, or too long for the model beside its prompt."""
    mask, length = batch.get("attention_mask"), batch["input_ids"].shape[1]
    if mask is not None and not bool((mask[:, 1:] <= mask[:, :-1]).all()):
        raise ValueError("a batch is padded on the left, where padding would stand between the prompt and the text: pad it on the right (tokenizer.padding_side)")  # fmt: skip # noqa: E501
    n, positions = len(prompt_of(model, model.active_adapter)), positions_of(model)
    if positions is not None and n + length > positions:
        raise ValueError(f"{length} tokens of text after {n} of the prompt are more than the model's {positions} positions: cut the text to {positions - n}, or take a shorter prompt")  # fmt: skip # noqa: E501


def embedding_of(model: Any) -> nn.Module:
    """What turns words into vectors. Raises `ValueError` where a model has no such thing."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
    if found is None:
        raise ValueError(f"{type(base).__name__} has no embeddings of words, before which a prompt could stand")
    embedding: nn.Module = found
    return embedding


def width_of(model: Any) -> int:
    """Of the vectors that words become."""
    with torch.no_grad():
        device = next(model.parameters()).device
        return int(embedding_of(model)(torch.zeros(1, dtype=torch.long, device=device)).shape[-1])


def positions_of(model: Any) -> int | None:
    """How many tokens a model can read at once, where its settings say so."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found: int | None = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    return found
