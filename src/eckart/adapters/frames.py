"""A frozen frame around a small trained core: what methods that train singular values and their kin have in common."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.adapters.base import FactoredUpdate
from eckart.adapters.host import Host


class Framed(FactoredUpdate):
    """scale * left (core - start) right, of which only the core is trained.

    Args:
        left: (out, r).
        core: its start: (r) for a diagonal, or (r, s).
        right: (s, in).
        scale: of the update.
        subtracted: whether the update begins at zero; else at left core right.
    """

    left: Tensor
    right: Tensor
    start: Tensor | None

    def __init__(
        self, left: Float[Tensor, "out r"], core: Float[Tensor, "*r"], right: Float[Tensor, "s in"],
        scale: float = 1.0, subtracted: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.register_buffer("left", own(left))
        self.register_buffer("right", own(right))
        self.register_buffer("start", own(core) if subtracted else None)
        self.core = nn.Parameter(own(core))
        self.scale = scale

    def moved(self) -> Float[Tensor, "*r"]:
        """How far the core is from where the update is zero."""
        return self.core if self.start is None else self.core - self.start

    def factors(self, host: Host) -> tuple[Float[Tensor, "out s"], Float[Tensor, "s in"]]:
        core = self.scale * self.moved()
        return (self.left * core if core.dim() == 1 else self.left @ core), self.right


class Factors(FactoredUpdate):
    """scale * B A with both factors trained, as in LoRA; start: B = 0, A as PyTorch draws linear layers.

    Args:
        B: (out, r).
        A: (r, in).
        scale: of the product.
    """

    def __init__(self, B: Float[Tensor, "out r"], A: Float[Tensor, "r in"], scale: float = 1.0):
        super().__init__()
        self.B, self.A, self.scale = nn.Parameter(B), nn.Parameter(A), scale

    def factors(self, host: Host) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
        return self.scale * self.B, self.A

    def forward(self, x: Tensor, y0: Tensor, host: Host) -> Tensor:
        # scaled where it is smallest: neither a scaled factor nor the unscaled product is kept for backward
        return host.up(self.scale * host.down(x, self.A), self.B)


def own(tensor: Tensor) -> Tensor:
    """A contiguous float32 copy that shares no memory, to be kept and saved."""
    return tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
