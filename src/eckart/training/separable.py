"""A kernel as a matrix, from one side of it to the other, and two convolutions along its sides from that."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.training.chains import ConvChain


def by_sides(kernel: Float[Tensor, "out in h w"]) -> Float[Tensor, "in_h out_w"]:
    """The matrix whose rank is the number of channels between the two convolutions."""
    return kernel.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)


def from_sides(M: Float[Tensor, "in_h out_w"], shape: torch.Size) -> Float[Tensor, "out in h w"]:
    """The inverse of `by_sides`."""
    out, in_, height, width = shape
    return M.view(in_, height, out, width).permute(2, 0, 1, 3)


def separated(conv: nn.Conv2d, M: Float[Tensor, "in_h out_w"], rank: int) -> ConvChain:
    """A convolution of (h, 1) to `rank` channels and one of (1, w), from the matrix of `by_sides` at that rank.

    Both kernels share its singular values evenly. Raises `ValueError` where the matrix has no such rank.
    """
    if rank > min(M.shape):
        raise ValueError(f"{rank} channels between the two convolutions: the kernel's sides have at most {min(M.shape)}")  # fmt: skip # noqa: E501
    chain = ConvChain(conv, "separable", rank, bias=conv.bias is not None, dtype=conv.weight.dtype)
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    root = S[:rank].sqrt()
    horizontal = (root[:, None] * Vh[:rank]).view(rank, conv.out_channels, -1).transpose(0, 1)
    return chain.fill([(U[:, :rank] * root).T, horizontal], conv.bias)
