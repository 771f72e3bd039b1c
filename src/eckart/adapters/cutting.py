"""LoRA factors of which components can be cut for good, down to none."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor, nn

from eckart.adapters.base import FactoredUpdate
from eckart.adapters.frames import Factors
from eckart.adapters.host import Host


class Cuttable(Factors):
    """scale * B A, which without a component adds nothing, costs nothing and learns nothing.

    What a subclass returns as `factors` is what its `forward` uses.
    """

    @property
    def rank(self) -> int:
        """Components that are left."""
        return len(self.A)

    def keep(self, components: Int[Tensor, " kept"]) -> None:
        """Cut all others. An optimiser's state of the factors is void after that."""
        cut(self.B, components, 1)
        cut(self.A, components, 0)

    def held(self) -> tuple[nn.Parameter, ...]:
        return () if self.rank else tuple(self.parameters())

    def forward(self, x: Tensor, y0: Tensor, host: Host) -> Tensor:
        return FactoredUpdate.forward(self, x, y0, host) if self.rank else torch.zeros_like(y0)


def cut(parameter: nn.Parameter, kept: Int[Tensor, " kept"], dim: int) -> None:
    """Keep some rows (0) or columns (1) of a parameter, which stays the same object; without any, it does not learn."""
    parameter.data = parameter.data.index_select(dim, kept.to(parameter.device)).contiguous()
    parameter.grad = None
    if not len(kept):
        parameter.requires_grad_(False)
