"""LoKU: LoRA that starts from the rows of a weight that matter to what is to be forgotten, and not to the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.adapters.base import Adapter, FactoredUpdate
from eckart.adapters.frames import own
from eckart.adapters.gradients import weight_gradients
from eckart.adapters.host import Host, Site
from eckart.adapters.tuner import adapter
from eckart.adapters.unlearning import check_apart
from eckart.calibration.stream import Batch, single_rows
from eckart.linalg.svd import truncated_svd

FLOOR = 1e-4  # of row weights beside their root mean square; float32 divides by no less


class Retained(dict[str, Any]):
    """A batch of what is to be kept, among the data that LoKU starts from."""


class FromStart(FactoredUpdate):
    """scale * (B A - B₀ A₀) with B and A trained from B₀ and A₀.

    Args:
        B: the start, (out, r).
        A: the start, (r, in).
        scale: of both products.
    """

    B0: Tensor
    A0: Tensor

    def __init__(self, B: Float[Tensor, "out r"], A: Float[Tensor, "r in"], scale: float):
        super().__init__()
        self.B, self.A, self.scale = nn.Parameter(own(B)), nn.Parameter(own(A)), scale
        self.register_buffer("B0", own(B))
        self.register_buffer("A0", own(A))

    def factors(self, host: Host) -> tuple[Float[Tensor, "out s"], Float[Tensor, "s in"]]:
        return self.scale * torch.cat([self.B, -self.B0], 1), torch.cat([self.A, self.A0])

    def delta(self, host: Host) -> Float[Tensor, "out in"]:
        return self.scale * (self.B @ self.A - self.B0 @ self.A0)

    def forward(self, x: Tensor, y0: Tensor, host: Host) -> Tensor:
        now = host.up(self.scale * host.down(x, self.A), self.B)
        return now - host.up(self.scale * host.down(x, self.A0), self.B0)


@adapter("loku", family="unlearning", paper="Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs, Cha et al., ICLR 2025, arXiv 2408.06621")  # fmt: skip # noqa: E501
@dataclass
class LoKU(Adapter):
    """W + (alpha / r) (B A - B₀ A₀), started by FILA: (alpha / r) B₀ A₀ is the rank r nearest to W, rows weighted by d.

    d_i² = sum_j F_ij / (G_ij + damping), F and G being the Fisher information of W on what is to be forgotten and on
    what is to be kept: means over rows of data of squared gradients. Data are batches to forget, and, in the same list,
    batches `Retained(...)` to keep; without any, d_i² = sum_j F_ij. `eckart.adapters.unlearning.unlearn` trains it.

    The paper freezes W less the start; here that is subtracted in the update, W stays as it is, and a saved adapter
    fits the original model. d is divided by its root mean square, so that neither factor depends on the size of
    gradients, and is no less than 0.0001 of it.

    Args:
        rank: r.
        alpha: of the scale alpha / r; None takes twice the rank.
        damping: added to G.
        relative: whether damping is a share of G's mean, and not a number; then it does not depend on the model's size.
        at_once: layers of which squared gradients are held, for which the data is run as many times; None holds all.
    """

    rank: int = 8
    alpha: float | None = None
    damping: float = 1e-5
    relative: bool = False
    at_once: int | None = None

    needs_data: ClassVar[bool] = True

    def check(self) -> None:
        self.at_least(rank=self.rank)
        self.positive(damping=self.damping)
        if self.alpha is not None:
            self.positive(alpha=self.alpha)
        if self.at_once is not None:
            self.at_least(at_once=self.at_once)

    def collect(self, model: nn.Module, names: list[str], data: list[Batch]) -> dict[str, Float[Tensor, " out"]]:
        forget = [batch for batch in data if not isinstance(batch, Retained)]
        retain = [batch for batch in data if isinstance(batch, Retained)]
        check_apart(forget, retain)
        count = len(names) if self.at_once is None else self.at_once
        found: dict[str, Tensor] = {}
        for start in range(0, len(names), count):
            some = names[start : start + count]
            wrong = fisher(model, some, forget, self.seed)
            right = fisher(model, some, retain, self.seed) if retain else {}
            found |= {name: self.row_weights(name, wrong.pop(name), right.pop(name, None)) for name in some}
        return found

    def row_weights(
        self, name: str, forget: Float[Tensor, "out in"], retain: Float[Tensor, "out in"] | None
    ) -> Float[Tensor, " out"]:
        """d, of which the mean square is 1. Raises `ValueError` where nothing to forget depends on the layer."""
        if not bool(forget.any()):
            raise ValueError(f"{name}: its gradient on what is to be forgotten is zero everywhere; leave the layer out")
        if retain is not None:
            damping = self.damping * float(retain.mean()) if self.relative else self.damping
            forget = forget / (retain + max(damping, torch.finfo(torch.float32).tiny))
        d = forget.double().sum(1).sqrt()
        d /= d.square().mean().sqrt()
        return d.clamp_min(FLOOR).float()

    def update(self, site: Site) -> FromStart:
        rank = self.fitting(site)
        scale = (2 * rank if self.alpha is None else self.alpha) / rank
        if site.statistics is None:
            out, in_ = site.shape
            empty = FromStart(torch.zeros(out, rank), torch.zeros(rank, in_), scale)
            empty.ready = False
            return empty
        d = site.statistics.to(site.host.device)[:, None]
        svd = truncated_svd(d * site.host.weight(), rank)
        root = (svd.S / scale).sqrt()
        return FromStart(svd.U * root / d, root[:, None] * svd.Vh, scale)


def fisher(
    model: nn.Module, names: Sequence[str], data: Sequence[Batch], seed: int = 0
) -> dict[str, Float[Tensor, "out in"]]:
    """layer -> mean over rows of data of the squared gradient of a row's mean loss."""
    rows = len(single_rows(data))
    return {name: total / rows for name, total in weight_gradients(model, names, data, squared=True, seed=seed).items()}
