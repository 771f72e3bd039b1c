"""Trained rank pruning: dense weights that are projected to low rank now and then while they are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.forms import LowRank
from eckart.forms.layers import matrix_of
from eckart.forms.layout import laid_out
from eckart.linalg.svd import truncated_svd
from eckart.linalg.whitening import check_finite
from eckart.registry import method
from eckart.remarks import remark
from eckart.schedules import Every, Schedule
from eckart.schedules.base import add_gradient
from eckart.training.base import NoSaving, StructuredSchedule, TrainingMethod, dtype_of, like, put
from eckart.training.separable import by_sides, from_sides, separated


class Leading(NamedTuple):
    """The part of a matrix that keeps a share of its energy: U (out, r), S (r,), Vh (r, in)."""

    U: Tensor
    S: Tensor
    Vh: Tensor

    @property
    def matrix(self) -> Float[Tensor, "out in"]:
        return self.U * self.S @ self.Vh

    @property
    def subgradient(self) -> Float[Tensor, "out in"]:
        """Of the sum of the singular values that are kept."""
        return self.U @ self.Vh


def leading(W: Float[Tensor, "out in"], energy: float) -> Leading:
    """The fewest singular triples whose squared values sum up to that share of all; at least one."""
    U, S, Vh, *_ = truncated_svd(W, purpose="spectrum")
    kept = S.double().square().cumsum(0)
    rank = min(len(S), int((kept < energy * kept[-1] * (1 - 1e-12)).sum()) + 1)
    return Leading(U[:, :rank], S[:rank], Vh[:rank])


@method("trp", family="low-rank", paper="Trained Rank Pruning, Xu et al., IJCAI 2020, arXiv 2004.14566")
@dataclass(frozen=True)
class TRP(TrainingMethod):
    """Every few steps W becomes its leading part of a share of the energy; between, it is free.

    On the same steps the sub-gradient of the nuclear norm, restricted to that part, may be added to the gradient. The
    optimiser's state is left alone. `finish` factors what is left. The paper's network decoupling is left out.

    Args:
        energy: share of the squared singular values that a projection keeps.
        period: steps between projections; the last one is at the end of the run.
        nuclear: weight of the sub-gradient; 0 for none.
        project: whether W is overwritten; without it only the sub-gradient acts.
        split: of kernels, by `channel` into a convolution to r channels and one of 1x1, or `spatial` into one along the
            height and one along the width.
        threshold: singular values below this share of the largest are dropped by `finish`, and those below rounding.
    """

    energy: float = 0.9
    period: int = 20
    nuclear: float = 3e-4
    project: bool = True
    split: Literal["channel", "spatial"] = "channel"
    threshold: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1:
            raise ValueError(f"trp(energy={self.energy!r}): it is a share above 0, up to 1")
        if not isinstance(self.period, int) or self.period < 1:
            raise ValueError(f"trp(period={self.period!r}): it is a positive number of steps")
        if not self.nuclear >= 0:
            raise ValueError(f"trp(nuclear={self.nuclear!r}): the weight of the sub-gradient is not negative")
        if self.split not in ("channel", "spatial"):
            raise ValueError(f"trp(split={self.split!r}): it is 'channel' or 'spatial'")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"trp(threshold={self.threshold!r}): it is a share from 0 to 1")

    def place(self, model: nn.Module, names: list[str], seed: int) -> Schedule:
        return RankPruning(model, names, self)


class RankPruning(StructuredSchedule):
    """Projections and sub-gradients of TRP."""

    def __init__(self, model: nn.Module, names: list[str], settings: TRP):
        super().__init__(model, names)
        self.settings = settings

    @property
    def needs_optimizer(self) -> bool:
        return self.settings.nuclear > 0

    def due(self, step: int) -> bool:
        return Every(self.settings.period, end=self.total)(step)

    def after(self, step: int) -> None:
        if not (self.settings.project and self.due(step)):
            return
        for name in self.names:
            module: Any = self.model.get_submodule(name)
            kept = leading(self.matrix(module), self.settings.energy).matrix
            module.weight.data.copy_(self.kernel(module, kept))

    def gradients(self, step: int) -> None:
        """The sub-gradient from the weight as it is: keeping the SVD since its projection would take its memory."""
        if not (self.settings.nuclear and self.due(step)):
            return
        for name in self.names:
            module: Any = self.model.get_submodule(name)
            # what a projection has left is all there is, but for rounding
            energy = 1 - max(1e-10, 4 * rounding(module) ** 2) if self.settings.project else self.settings.energy
            found = leading(self.matrix(module), energy).subgradient
            add_gradient(module.weight, self.settings.nuclear * self.kernel(module, found))

    def spatial(self, module: nn.Module) -> bool:
        return self.settings.split == "spatial" and isinstance(module, nn.Conv2d)

    def matrix(self, module: Any) -> Tensor:
        """What is projected: the layer's matrix, or its kernel by sides."""
        return by_sides(module.weight.detach()) if self.spatial(module) else matrix_of(module).detach()

    def kernel(self, module: Any, M: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        return from_sides(M, module.weight.shape) if self.spatial(module) else laid_out(module, M)

    def settle(self) -> None:
        for name in self.names:
            module: Any = self.model.get_submodule(name)
            M = self.matrix(module)
            check_finite(M, f"the weight of {name}")
            M = M.to(torch.promote_types(M.dtype, torch.float32))
            values = truncated_svd(M, purpose="spectrum").S
            floor = max(self.settings.threshold, rounding(module)) * values[0]
            rank = max(1, int((values > floor).sum()))
            if rank * sum(M.shape) >= M.numel():
                remark(f"{name} stays dense: two factors of its rank {rank} would be no smaller", NoSaving)
            elif self.spatial(module):
                put(self.model, name, separated(module, M, rank))
            else:
                put(self.model, name, like(module, LowRank(rank).fit(M, dtype=dtype_of(module))))


def rounding(module: nn.Module) -> float:
    """Relative, of the numbers that a layer's weight is stored in."""
    return float(torch.finfo(dtype_of(module)).eps)
