"""Dense updates that are made for the forward pass, forgotten, and made again for the backward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from eckart.adapters.base import Update
from eckart.adapters.host import Host


class Regenerated(Update, ABC):
    """An update whose matrix is a function of few numbers. A subclass gives `made`.

    Between the passes only the layer's input and the trained tensors are kept: no tensor (out, in).
    """

    @abstractmethod
    def made(self, *trained: Tensor) -> Float[Tensor, "out in"]:
        """The matrix, from the trained tensors in the order of `parameters`."""

    def delta(self, host: Host) -> Float[Tensor, "out in"]:
        return self.made(*self.parameters())

    def forward(self, x: Tensor, y0: Tensor, host: Host) -> Tensor:
        y: Tensor = _Product.apply(x, host, self.made, *self.parameters())
        return y


class _Product(torch.autograd.Function):
    """The product with a matrix that is made twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, host: Host, make: Callable[..., Tensor], *trained: Tensor) -> Tensor:
        ctx.save_for_backward(x, *trained)
        ctx.host, ctx.make = host, make
        return host.apply(x, make(*trained))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *trained = ctx.saved_tensors
        leaves = [t.detach().requires_grad_(n) for t, n in zip(trained, ctx.needs_input_grad[3:], strict=True)]
        learning = [t for t in leaves if t.requires_grad]
        with torch.set_grad_enabled(bool(learning)):
            M = ctx.make(*leaves)
        dx, dM = ctx.host.pulled_back(x, M.detach(), g.to(M.dtype), ctx.needs_input_grad[0], bool(learning))
        found = iter(torch.autograd.grad(M, learning, dM) if learning else ())
        return dx, None, None, *(next(found) if t.requires_grad else None for t in leaves)
