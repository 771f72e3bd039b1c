"""S2-LoRA: one pair of factors for all layers of a shape, of which each layer picks and scales components."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.adapters.adapt import updates as updates_of
from eckart.adapters.base import Adapter, FactoredUpdate, Update
from eckart.adapters.host import Host, Shared, Site, seeded
from eckart.adapters.orthogonality import Factor, pull
from eckart.adapters.proximal import Proximal
from eckart.adapters.tuner import adapter
from eckart.schedules import Schedule, Together
from eckart.schedules.base import add_gradient


class Picked(FactoredUpdate):
    """scale * B diag(c) A with B and A of all layers of this shape, and c of this one."""

    def __init__(self, shared: Shared, shape: str, rank: int, scale: float):
        super().__init__()
        self.coefficients = nn.Parameter(torch.zeros(rank))
        self.scale, self.of_all, self.of_shape = scale, [shared], shape

    def factors(self, host: Host) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
        B, A = (self.of_all[0].get(f"{name}_{self.of_shape}") for name in "BA")
        return self.scale * self.coefficients * B, A


class Subgradient(Schedule):
    """Adds the gradient of strength * ||c||_1 where it has one. Under Adam no coefficient ever gets to zero so."""

    def __init__(self, updates: list[Picked], strength: float):
        super().__init__()
        self.updates, self.strength = updates, strength

    def gradients(self, step: int) -> None:
        for update in self.updates:
            add_gradient(update.coefficients, self.strength * update.coefficients.detach().sign())


class Orthonormal(Schedule):
    """Adds the gradient of gamma (||A Aᵀ - I|| + ||Bᵀ B - I||) of all shared pairs: without it, L1 on c is defeated by
    factors that grow."""

    def __init__(self, shared: Shared, gamma: float):
        super().__init__()
        self.shared, self.gamma = shared, gamma

    def gradients(self, step: int) -> None:
        factors: list[Factor] = [([p], 1 if n.startswith("B") else 0) for n, p in self.shared.named_parameters()]
        pull(factors, self.gamma * len(factors))


@adapter("s2_lora", family="shared factors", paper="S2-LoRA, Liu et al., ICASSP 2024, arXiv 2309.11756")
@dataclass
class S2LoRA(Adapter):
    """W_k + scale B diag(c_k) A: B and A are one pair for all layers of a shape, the sparse c_k is each layer's own.

    The paper asks for sparse c; here a proximal step of `sparsity` times the learning rate, which gives exact zeros,
    follows each step of the optimiser (`eckart.adapters.schedule`). The factors are kept near orthonormal, as in
    AdaLoRA. The rank that a layer uses is the number of its coefficients that are not zero: `ranks(model)`. The
    factors act in every layer at once and bear a lower learning rate than c.

    Args:
        rank: components that each shape has.
        scale: of the updates.
        sparsity: lambda, of the 1-norm of all c.
        penalty: how it acts: `proximal`, or `subgradient`, which gives no zeros.
        orthogonality: gamma, of the penalty on the factors.
    """

    rank: int = 32
    scale: float = 1.0
    sparsity: float = 1e-3
    penalty: str = "proximal"
    orthogonality: float = 0.1

    shares: ClassVar[bool] = True

    def check(self) -> None:
        self.at_least(rank=self.rank)
        self.positive(scale=self.scale)
        self.not_negative(sparsity=self.sparsity, orthogonality=self.orthogonality)
        if self.penalty not in ("proximal", "subgradient"):
            raise ValueError(f"s2_lora(penalty={self.penalty!r}): it is 'proximal' or 'subgradient'")

    def update(self, site: Site) -> Picked:
        out, in_ = site.shape
        shape = f"{out}x{in_}"
        rank = self.fitting(site, self.rank)
        for name, size in (("B", (out, rank)), ("A", (rank, in_))):
            drawn = seeded(self.seed, f"{name}_{shape}")
            site.shared.parameter(f"{name}_{shape}", lambda size=size, g=drawn: 0.02 * torch.randn(size, generator=g))  # type: ignore[misc]
        return Picked(site.shared, shape, rank, self.scale)

    def schedule(self, model: nn.Module, updates: dict[str, Update]) -> Schedule:
        picked = [u for u in updates.values() if isinstance(u, Picked)]
        parts: list[Schedule] = [Subgradient(picked, self.sparsity)]
        if self.penalty == "proximal":
            parts = [Proximal(lambda: [u.coefficients for u in picked], self.sparsity)]
        if self.orthogonality and picked:
            parts.append(Orthonormal(picked[0].of_all[0], self.orthogonality))
        return Together(parts)


def ranks(model: nn.Module, adapter_name: str | None = None) -> dict[str, int]:
    """layer -> components of the shared factors that it uses."""
    found = updates_of(model, adapter_name)
    return {n: int(u.coefficients.count_nonzero()) for n, u in found.items() if isinstance(u, Picked)}
