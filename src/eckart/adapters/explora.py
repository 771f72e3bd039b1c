"""ExPLoRA: pre-training goes on in a new domain with one or two blocks free and LoRA in the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftConfig
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from eckart.adapters.matching import inner
from eckart.adapters.native import BESIDE, Native, put
from eckart.calibration.rounds import rounds
from eckart.calibration.stream import Batch
from eckart.calibration.subject import block_names
from eckart.forms.layers import kind_of
from eckart.registry import method
from eckart.settings import check_whole

QUERIES_AND_VALUES = ("q_proj", "v_proj", "query", "value", "q", "v", "q_lin", "v_lin")
CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")

Objective = Callable[[Any, Batch], Float[Tensor, ""]]


@method("explora", family="extended pre-training", paper="ExPLoRA: Parameter-Efficient Extended Pre-Training to Adapt Vision Transformers under Domain Shifts, Khanna et al., ICML 2025, arXiv 2406.10973")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class ExPLoRA(Native):
    """PEFT's LoRA on queries and values of all blocks but one or two, which are trained whole, as all norms are.

    `pretrain` goes on with the objective that the model was pre-trained by, on the new domain and without labels;
    `extend` does that and merges, which leaves a model as it was before in all but its numbers. The second stage is a
    new LoRA on all blocks, `adapt(model, "explora", blocks=(), rank=8, modules_to_save=["classifier"])`. A saved
    adapter is the difference alone: free blocks, norms, the class token's module, and LoRA.

    Args:
        rank: of LoRA.
        alpha: of the scale alpha / rank; 0 takes alpha = rank.
        blocks: that are free, counted from 0, or from the last one backwards with -1; none in the second stage.
        norms: train the norms of the other blocks, and those outside, too; only where some block is free.
        class_token: train it, too, and nothing else of the embeddings; only where some block is free. PEFT sets free
            the whole module that holds it where another adapter is switched on and this one again.
        target_modules: of LoRA, in the blocks that are not free; if not given, queries and values.
        modules_to_save: further modules that are trained whole, such as a decoder, or the head of the second stage.
    """

    rank: int = 64
    alpha: float = 0.0
    blocks: Sequence[int] = (-1,)
    norms: bool = True
    class_token: bool = True

    of: ClassVar[type[PeftConfig]] = LoraConfig
    sits_on: ClassVar[tuple[type[nn.Module], ...]] = BESIDE

    def check(self) -> None:
        check_whole(self, rank=1)
        if not self.alpha >= 0:
            raise ValueError(f"explora(alpha={self.alpha!r}): it is a number above 0, or 0 for the rank")
        if not all(isinstance(b, int) and not isinstance(b, bool) for b in self.blocks):
            raise ValueError(f"explora(blocks={self.blocks!r}): they are whole numbers, such as [-1], or none")

    def fits(self, name: str, module: nn.Module, shape: tuple[int, int]) -> None:
        if self.rank > min(shape):
            raise ValueError(f"{name}: rank {self.rank} is more than a matrix of shape {shape} can have: lower it to {min(shape)} or leave the layer out")  # fmt: skip # noqa: E501

    def put(self, model: nn.Module, data: list[Any] | None, adapter_name: str) -> Any:
        if self.blocks:
            self.alone(model)
        holder = self._holder(model) if self.blocks and self.class_token else None
        adapted = super().put(model, data, adapter_name)
        if holder and holder not in (self.modules_to_save or ()):
            only_class_token(adapted, holder)
        return adapted

    def start(self, model: nn.Module, config: PeftConfig, data: list[Any] | None, adapter_name: str) -> Any:
        made = LoraConfig(
            r=self.rank, lora_alpha=self.alpha or self.rank, lora_dropout=self.dropout, bias="none",
            target_modules=self.targets(model), modules_to_save=self.whole(model) or None,
        )  # fmt: skip
        return put(model, made, adapter_name)

    def config(self) -> LoraConfig:
        return LoraConfig(r=self.rank, **self.targeting())

    def targets(self, model: nn.Module) -> list[str]:
        """Names of the layers that get LoRA. Raises `ValueError` where there are none."""
        free = self.free(model)
        if self.target_modules is not None:
            names = super().targets(model)
        else:
            blocks = tuple(f"{b}." for b in chain_of(model))
            names = [
                n for n, m in inner(model).named_modules()
                if n.startswith(blocks) and n.rpartition(".")[2] in QUERIES_AND_VALUES and kind_of(m) is not None
            ]  # fmt: skip
            if not names:
                raise ValueError(f"{type(inner(model)).__name__} has no layers in its blocks that are called as queries and values are ({', '.join(QUERIES_AND_VALUES)}): name them, explora(target_modules=...). In a fused layer of queries, keys and values, keys would be adapted, too")  # fmt: skip # noqa: E501
        kept = [n for n in names if not n.startswith(tuple(f"{b}." for b in free))]
        if not kept:
            raise ValueError(f"explora(blocks={list(self.blocks)}) leaves no block for LoRA: free fewer, or train the model whole")  # fmt: skip # noqa: E501
        return kept

    def free(self, model: nn.Module) -> list[str]:
        """Names of the blocks that are trained whole. Raises `ValueError` where there are no such blocks."""
        names = chain_of(model)
        wrong = [b for b in self.blocks if not -len(names) <= b < len(names)]
        if wrong:
            raise ValueError(f"explora(blocks={list(self.blocks)}): the model has {len(names)} blocks, from 0 to {len(names) - 1}, and none is {wrong[0]}")  # fmt: skip # noqa: E501
        return list(dict.fromkeys(names[b] for b in self.blocks))

    def whole(self, model: nn.Module) -> list[str]:
        """Names of all modules that are trained whole."""
        free, given = self.free(model), list(self.modules_to_save or [])
        if not free:
            return given
        own = tuple(f"{name}." for name in free)
        norms = [n for n, m in inner(model).named_modules() if self.norms and is_norm(m) and not n.startswith(own)]
        holder = self._holder(model) if self.class_token else None
        inside = tuple(f"{name}." for name in [*given, *([holder] if holder else [])])
        return [*free, *(n for n in norms if not n.startswith(inside)), *([holder] if holder else []), *given]

    def _holder(self, model: nn.Module) -> str | None:
        """The module that the class token is a parameter of."""
        found = (n for n, m in inner(model).named_modules() if n and any(t in m._parameters for t in CLASS_TOKENS))
        return next(found, None)


def chain_of(model: nn.Module) -> list[str]:
    """Names of a model's blocks. Raises `ValueError` where they are not known."""
    names = block_names(inner(model))
    if not names:
        raise ValueError(f"{type(inner(model)).__name__} has no list of blocks that is known, of which explora could free some")  # fmt: skip # noqa: E501
    return names


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation with a scale of its own."""
    return type(module).__name__.endswith("Norm") and bool(module._parameters)


def only_class_token(model: nn.Module, holder: str) -> None:
    """Freeze what the class token's module holds beside it."""
    module = inner(model).get_submodule(holder)
    if isinstance(module, ModulesToSaveWrapper):
        for name, parameter in module.named_parameters():
            if name.rpartition(".")[2] not in CLASS_TOKENS:
                parameter.requires_grad_(False)


def pretrain(
    model: Any, data: Sequence[Batch], objective: Objective, *, steps: int, learning_rate: float = 1e-3,
    weight_decay: float = 0.05, warmup: int | None = None, seed: int = 0,
    after: Callable[[int], None] | None = None,
) -> list[float]:  # fmt: skip
    """Train what learns of a model by an objective without labels, with AdamW; returns the loss of each step.

    Weight decay is of matrices of free blocks alone: not of LoRA, whose decay would not be the weight's, nor of norms.

    Args:
        data: batches, which come in a drawn order, round after round.
        objective: of the model and a batch, such as `lambda model, batch: model(**batch).loss`, masked or not. What it
            draws comes from torch's generator, which begins at `seed` and is put back afterwards.
        warmup: steps in which the rate rises, before it falls as a cosine; a tenth of all, if not given.
        after: called after each step with its number, for a teacher that follows the student, for instance.

    Raises `ValueError` on no data and where nothing learns, `RuntimeError` where the loss is not finite.
    """
    if not data or steps < 1:
        raise ValueError(f"pretrain needs data and steps: there are {len(data)} batches, and steps={steps}")
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not learning:
        raise ValueError("nothing of this model learns: put an adapter on it, adapt(model, 'explora')")
    decayed = [p for n, p in learning.items() if p.dim() > 1 and ".modules_to_save." in n and not n.endswith(CLASS_TOKENS)]  # fmt: skip # noqa: E501
    chosen = {id(p) for p in decayed}
    rest = [p for p in learning.values() if id(p) not in chosen]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], learning_rate)
    rise = max(1, steps // 10 if warmup is None else warmup)

    def rate(step: int) -> float:
        through = max(0.0, (step + 1 - rise) / max(1, steps - rise))
        return min(1.0, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * min(1.0, through)))

    follows = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    order = rounds(len(data), torch.Generator().manual_seed(seed))
    losses: list[float] = []
    with ExitStack() as stack:
        stack.callback(model.train, model.training)
        stack.enter_context(torch.random.fork_rng())
        torch.manual_seed(seed)
        model.train()
        for step in range(1, steps + 1):
            loss = objective(model, data[next(order)])
            if not bool(loss.isfinite()):
                raise RuntimeError(f"the loss at step {step} is not finite: check the data, or lower the learning rate")
            loss.backward()
            optimizer.step()
            follows.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            if after is not None:
                after(step)
    return losses


def extend(
    model: Any, data: Sequence[Batch], objective: Objective, *, settings: ExPLoRA | None = None, folder: str = "",
    **training: Any,
) -> Any:  # fmt: skip
    """The first stage: adapt, `pretrain`, and merge. The model is changed in place, and returned without an adapter.

    Args:
        settings: of the method; its defaults, if not given.
        folder: to save the difference in, before it is merged.
        training: words of `pretrain`, such as `steps=1000`.
    """
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    adapted = (settings or ExPLoRA()).put(model, None, "default")
    pretrain(adapted, data, objective, **training)
    if folder:
        adapted.save_pretrained(folder)
    merged = adapted.merge_and_unload(safe_merge=True)
    for name, parameter in merged.named_parameters():
        parameter.requires_grad_(wanted[name])
    return merged
