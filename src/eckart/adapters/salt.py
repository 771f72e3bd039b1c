"""SALT: the largest singular values scaled and shifted, and a low rank among the others."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.adapters.base import Adapter, FactoredUpdate, Update
from eckart.adapters.frames import own
from eckart.adapters.host import Host, Site
from eckart.adapters.tuner import adapter
from eckart.linalg.svd import TruncatedSVD, truncated_svd
from eckart.schedules import Schedule
from eckart.schedules.base import add_gradient


class Core(FactoredUpdate):
    """U (relu(C) - diag(S)) Vᵀ, with C = diag(a S + c) on the first k values and diag(S) + X Y on the others.

    Args:
        svd: all of the weight's.
        scaled: k.
        X: the start of X (m - k, q); that of Y is zero.
        whole: whether relu is applied to all of C, or to its diagonal alone.
        kept: whether the frame is saved, or made again from the weight.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor

    def __init__(self, svd: TruncatedSVD, scaled: int, X: Float[Tensor, "rest q"], whole: bool, kept: bool):
        super().__init__()
        for name, factor in (("U", svd.U), ("S", svd.S), ("Vh", svd.Vh)):
            self.register_buffer(name, own(factor), persistent=kept)
        self.a, self.c = nn.Parameter(torch.ones(scaled)), nn.Parameter(torch.zeros(scaled))
        self.X, self.Y = nn.Parameter(X), nn.Parameter(torch.zeros(X.shape[1], X.shape[0]))
        self.whole = whole

    def moved(self) -> Float[Tensor, "m m"]:
        """relu(C) - diag(S)."""
        top, rest = self.S[: len(self.a)], self.S[len(self.a) :]
        first, product = self.a * top + self.c, self.X @ self.Y
        if self.whole:
            others = (product + rest.diag()).relu() - rest.diag()
        else:
            diagonal = rest + product.diagonal()
            others = product + (diagonal.relu() - diagonal).diag()
        return torch.block_diag((first.relu() - top).diag(), others)

    def penalty(self) -> Float[Tensor, ""]:
        """||diag(a S + c) - diag(S)||_F + ||X Y||_F."""
        top = self.S[: len(self.a)]
        return torch.linalg.vector_norm(self.a * top + self.c - top) + torch.linalg.vector_norm(self.X @ self.Y)

    def factors(self, host: Host) -> tuple[Float[Tensor, "out m"], Float[Tensor, "m in"]]:
        return self.U @ self.moved(), self.Vh

    def forward(self, x: Tensor, y0: Tensor, host: Host) -> Tensor:
        h = host.mix(host.down(x, self.Vh.to(x.dtype)), self.moved().to(x.dtype))
        return host.up(h, self.U.to(x.dtype))


class Regularised(Schedule):
    """Adds the gradients of mu times the penalties of all layers."""

    def __init__(self, cores: list[Core], mu: float):
        super().__init__()
        self.cores, self.mu = cores, mu

    def gradients(self, step: int) -> None:
        for core in self.cores:
            trained = [p for p in core.parameters() if p.requires_grad]
            if trained:
                with torch.enable_grad():
                    found = torch.autograd.grad(self.mu * core.penalty(), trained)
                for parameter, gradient in zip(trained, found, strict=True):
                    add_gradient(parameter, gradient)


@adapter("salt", family="frozen frame", paper="SALT: Singular Value Adaptation with Low-Rank Transformation, Elsayed et al., BMVC 2025, arXiv 2503.16055")  # fmt: skip # noqa: E501
@dataclass
class SALT(Adapter):
    """U relu(C) Vᵀ in the frame of W = U diag(S) Vᵀ: a scale and a shift for large values, a low rank for the others.

    Y starts at zero, so that the model is as before. The paper's code applies relu to all of the core, which cuts off
    the negative half of X Y and lets no gradient through where X Y is exactly zero, as at the start off its diagonal;
    `rectified="diagonal"` keeps X Y whole. The regulariser reaches the optimiser through `eckart.adapters.schedule`,
    and no layer returns anything but its output.

    The frame of a square matrix holds twice as many numbers as the matrix. It is saved, for signs and bases of
    singular vectors differ between machines; `save_frame=False` makes it again from the weight at loading.

    Args:
        rank: q, of X Y; 0 leaves the scales and shifts alone.
        scaled: k, how many values get a scale and a shift: a count, or a share of all where it has a fraction.
        rectified: what relu is applied to: `core` or `diagonal`.
        regularisation: mu.
        save_frame: whether the singular vectors are saved with the adapter.
    """

    rank: int = 16
    scaled: int | float = 0.1
    rectified: str = "core"
    regularisation: float = 0.01
    save_frame: bool = True

    def check(self) -> None:
        self.not_negative(rank=self.rank, scaled=self.scaled, regularisation=self.regularisation)
        if not isinstance(self.rank, int):
            raise ValueError(f"salt(rank={self.rank!r}): it is a whole number, 0 or more")
        if isinstance(self.scaled, float) and self.scaled > 1:
            raise ValueError(f"salt(scaled={self.scaled!r}): it is a count of values, or a share of them up to 1.0")
        if self.rectified not in ("core", "diagonal"):
            raise ValueError(f"salt(rectified={self.rectified!r}): it is 'core' or 'diagonal'")

    def update(self, site: Site) -> Core:
        m = min(site.shape)
        k = round(self.scaled * m) if isinstance(self.scaled, float) else self.scaled
        if k > m:
            raise ValueError(f"{site.name}: scaled={k}, but a matrix of shape {site.shape} has {m} singular values: lower it or leave the layer out")  # fmt: skip # noqa: E501
        if site.rank > m - k:
            raise ValueError(f"{site.name}: rank {site.rank} is more than the {m - k} singular values that are not scaled: lower rank or scaled, or leave the layer out")  # fmt: skip # noqa: E501
        X = site.uniform(m - k, site.rank, bound=math.sqrt(6 / max(1, site.rank)))
        return Core(truncated_svd(site.host.weight()), k, X, self.rectified == "core", self.save_frame)

    def schedule(self, model: nn.Module, updates: dict[str, Update]) -> Schedule:
        cores = [u for u in updates.values() if isinstance(u, Core)]
        return Regularised(cores, self.regularisation) if self.regularisation else Schedule()
