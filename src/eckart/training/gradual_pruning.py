"""Automated gradual pruning: the smallest weights go while training goes on, many early and few late."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from eckart.forms import Sparse
from eckart.forms.layout import as_matrix, laid_out
from eckart.forms.patterns import Anywhere
from eckart.registry import method
from eckart.remarks import remark
from eckart.schedules import Every, Ramp, Schedule, at_step
from eckart.training.base import NoSaving, TrainingMethod
from eckart.training.parametrised import ParametrisedTraining, original, store_sparse


class Masked(nn.Module):
    """W ∘ M, with M in the state of the model."""

    mask: Tensor

    def __init__(self, like: Tensor):
        super().__init__()
        self.register_buffer("mask", torch.ones_like(like, dtype=torch.bool))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


@method("gradual_pruning", family="sparse", paper="To prune, or not to prune, Zhu and Gupta, 2017, arXiv 1710.01878")
@dataclass(frozen=True)
class GradualPruning(TrainingMethod):
    """W ∘ M, M the largest entries of every layer, fewer by s_f + (s_i - s_f) (1 - t')³ (section 3, equation 1).

    Exactly max(round((1 - s) numel), 1) entries stay. Pruning should begin when training has begun to converge, and end
    while the learning rate is large enough to recover. `finish` stores the entries and their places.

    Args:
        sparsity: s_f, the share that is pruned in the end.
        initial: s_i.
        begin, end: first and last step of the ramp; whole numbers are steps, 0.0 to 1.0 are shares of the run.
        every: steps between prunings; the last one is exactly at the end.
        exponent: of the ramp.
        hard: pruned weights are zeroed after every step, and so stay pruned. Otherwise they keep the value they had
            (momentum is taken from them, weight decay is not) and return when others have become smaller.
    """

    sparsity: float = 0.9
    initial: float = 0.0
    begin: int | float = 0.1
    end: int | float = 0.7
    every: int = 100
    exponent: float = 3.0
    hard: bool = True

    def __post_init__(self) -> None:
        for name in ("sparsity", "initial"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"gradual_pruning({name}={getattr(self, name)!r}): it is a share from 0, below 1")
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"gradual_pruning(every={self.every!r}): it is a positive number of steps")
        if not self.exponent > 0:
            raise ValueError(f"gradual_pruning(exponent={self.exponent!r}): it is positive")
        ends = [at_step(getattr(self, n), 10**9, f"gradual_pruning: {n}") for n in ("begin", "end")]
        if type(self.begin) is type(self.end) and ends[1] < ends[0]:
            raise ValueError(f"gradual_pruning(begin={self.begin}, end={self.end}): it ends before it begins")

    def place(self, model: nn.Module, names: list[str], seed: int) -> Schedule:
        modules: dict[str, Any] = {name: model.get_submodule(name) for name in names}
        return Pruning(model, {name: Masked(module.weight) for name, module in modules.items()}, self)


class Pruning(ParametrisedTraining[Masked]):
    """Masks that follow the ramp."""

    def __init__(self, model: nn.Module, masks: dict[str, Masked], settings: GradualPruning):
        super().__init__(model, masks)
        self.settings = settings
        self.needs_total = isinstance(settings.begin, float) or isinstance(settings.end, float)

    @property
    def ramp(self) -> Ramp:
        begin, end = (at_step(p, self.total, "gradual_pruning") for p in (self.settings.begin, self.settings.end))
        return Ramp(begin, end, self.settings.initial, self.settings.sparsity, self.settings.exponent)

    def after(self, step: int) -> None:
        ramp = self.ramp
        due = Every(self.settings.every, ramp.begin, ramp.end)(step)
        for name, module, masked in self.layers:
            if due:
                self.prune(name, module, masked, ramp(step))
            if self.settings.hard:
                original(module).data.mul_(masked.mask)

    @torch.no_grad()
    def prune(self, name: str, module: nn.Module, masked: Masked, sparsity: float) -> None:
        """Choose the entries of one layer that stay. Raises `ValueError` where its weight is not finite."""
        trained = original(module)
        if not bool(torch.isfinite(trained).all()):
            raise ValueError(f"the weight of {name} is no longer finite: training has diverged, lower the learning rate")  # fmt: skip # noqa: E501
        kept = largest(as_matrix(module, trained.detach()), sparsity)
        masked.mask.copy_(laid_out(module, kept))
        if not self.settings.hard and self.optimizer is not None:
            for state in self.optimizer.state.get(trained, {}).values():
                if isinstance(state, Tensor) and state.shape == trained.shape:
                    state.mul_(masked.mask)

    def settle(self) -> None:
        for name, module, masked in list(self.layers):
            mask = as_matrix(module, masked.mask).clone()
            self.plain(name)
            shape = (mask.shape[0], mask.shape[1])
            if not store_sparse(self.model, name, mask, Sparse(max(1, int(mask.sum())) / mask.numel())):
                remark(f"{name} stays dense, with zeros: as a sparse matrix of shape {shape} it would be no smaller", NoSaving)  # fmt: skip # noqa: E501


def largest(W: Tensor, sparsity: float) -> Bool[Tensor, "out in"]:
    """Where the max(round((1 - sparsity) numel), 1) entries of largest magnitude are; of equal ones the first."""
    count = max(round(W.numel() * (1 - sparsity)), 1)
    return Anywhere((W.shape[0], W.shape[1]), count=count).keep(W.abs())
