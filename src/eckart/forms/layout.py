"""How layers of different kinds lay out a matrix (out, in) in their weight."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def laid_out(module: nn.Module, W: Float[Tensor, "out in"]) -> Tensor:
    """A matrix as the weight of a layer of this kind: the inverse of `as_matrix`."""
    if isinstance(module, Conv1D):
        return W.t().contiguous()
    return W.view(W.shape[0], -1, *module.kernel_size) if isinstance(module, nn.Conv2d) else W.contiguous()


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """A tensor laid out as the layer's weight, as a matrix (out, in)."""
    if isinstance(module, Conv1D):
        return weight.t()
    return weight.flatten(1) if isinstance(module, nn.Conv2d) else weight
