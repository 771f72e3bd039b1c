"""A kernel as two convolutions, one along the height and one along the width."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from eckart.forms.layers import StandIn, kind_of, stand_in


def by_sides(kernel: Float[Tensor, "out in h w"]) -> Float[Tensor, "in_h out_w"]:
    """The matrix whose rank is the number of channels between the two convolutions."""
    return kernel.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)


def from_sides(M: Float[Tensor, "in_h out_w"], shape: torch.Size) -> Float[Tensor, "out in h w"]:
    """The inverse of `by_sides`."""
    out, in_, height, width = shape
    return M.view(in_, height, out, width).permute(2, 0, 1, 3)


def check_padding(conv: nn.Conv2d) -> tuple[int, int]:
    """Zeros above and below, left and right. Raises `ValueError` on any other padding."""
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise ValueError(f"padding {conv.padding!r} of mode {conv.padding_mode!r} is not split: give numbers of zeros")
    above, left = conv.padding
    return above, left


@stand_in
class SeparableConv2d(StandIn):
    """A convolution of (h, 1) to `rank` channels, then one of (1, w), strides, padding and dilation split likewise.

    Args:
        like: the convolution that it stands in for.
        rank: channels in between.
    """

    kind = "separable_conv2d"

    def __init__(self, like: nn.Conv2d, rank: int, bias: bool, dtype: torch.dtype):
        super().__init__()
        height, width = like.kernel_size
        self.shape, self.rank = (like.out_channels, like.in_channels, height, width), rank
        self.vertical = nn.Parameter(torch.empty(rank, like.in_channels, height, 1, dtype=dtype, device="meta"))
        self.horizontal = nn.Parameter(torch.empty(like.out_channels, rank, 1, width, dtype=dtype, device="meta"))
        self.register_parameter("bias", nn.Parameter(torch.empty(like.out_channels, dtype=dtype, device="meta")) if bias else None)  # fmt: skip # noqa: E501
        self.strides, self.paddings, self.dilations = like.stride, check_padding(like), like.dilation

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "shape": list(self.shape), "rank": self.rank, "bias": self.bias is not None}

    @classmethod
    def from_spec(cls, model: nn.Module, name: str, spec: dict[str, Any], dtype: torch.dtype) -> nn.Module:
        module, rank = model.get_submodule(name), spec.get("rank")
        if kind_of(module) != "conv2d":
            raise ValueError(f"{name}: the checkpoint says {cls.kind}, the model has {type(module).__name__}")
        conv = cast(nn.Conv2d, module)
        shape = [conv.out_channels, conv.in_channels, *conv.kernel_size]
        most = min(shape[1] * shape[2], shape[0] * shape[3])
        if spec.get("shape") != shape or not isinstance(rank, int) or not 1 <= rank <= most:
            raise ValueError(f"{name}: {rank!r} channels between convolutions of {spec.get('shape')} do not fit {shape}")  # fmt: skip # noqa: E501
        return cls(conv, rank, bool(spec.get("bias")), dtype)

    @classmethod
    def of(cls, conv: nn.Conv2d, M: Float[Tensor, "in_h out_w"], rank: int) -> SeparableConv2d:
        """From the matrix of `by_sides`, which has that rank; both kernels share its singular values evenly."""
        new = cls(conv, rank, conv.bias is not None, conv.weight.dtype).to_empty(device=M.device)
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        out, in_, height, width = new.shape
        root = S[:rank].sqrt()
        new.vertical.data.copy_((U[:, :rank] * root).T.reshape(rank, in_, height, 1))
        new.horizontal.data.copy_((root[:, None] * Vh[:rank]).view(rank, out, 1, width).transpose(0, 1))
        if conv.bias is not None:
            cast(nn.Parameter, new.bias).data.copy_(conv.bias.data)
        return new

    def forward(self, x: Float[Tensor, "*batch in h w"]) -> Float[Tensor, "*batch out h2 w2"]:
        (s, t), (p, q), (d, e) = self.strides, self.paddings, self.dilations
        bias: Any = self.bias
        y = F.conv2d(x, self.vertical, None, (s, 1), (p, 0), (d, 1))
        return F.conv2d(y, self.horizontal, bias, (1, t), (0, q), (1, e))

    def extra_repr(self) -> str:
        return f"{self.shape}, rank={self.rank}, bias={self.bias is not None}"
