"""The frozen layer that an adapter sits on: its shape, its weight, and how a matrix acts in its place."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from eckart.forms.layers import kind_of, matrix_of, matrix_shape
from eckart.forms.layout import as_matrix, laid_out
from eckart.linalg.whitening import check_finite


class Host:
    """A frozen linear layer, Conv1D of transformers or convolution.

    Attributes:
        name: of the layer in the model.
        module: the layer; None after it was let go.
        shape: (out, in) of its matrix; a kernel is unfolded to (out, in * height * width).
    """

    def __init__(self, module: nn.Module, name: str):
        if kind_of(module) not in ("linear", "conv1d", "conv2d"):
            what = "a grouped convolution" if getattr(module, "groups", 1) != 1 else f"a {type(module).__name__}"
            raise ValueError(f"{name} is {what}, which no adapter of eckart can sit on: target linear layers, Conv1D or convolutions of one group")  # fmt: skip # noqa: E501
        if isinstance(module, NonDynamicallyQuantizableLinear):
            raise ValueError(f"{name} belongs to an nn.MultiheadAttention, which reads its weight and never calls it: an adapter there would do nothing; name it in exclude_modules")  # fmt: skip # noqa: E501
        self.module, self.name = module, name
        self.shape = matrix_shape(module)
        self._before: tuple[Tensor, Tensor | None] | None = None

    @property
    def out(self) -> int:
        return self.shape[0]

    @property
    def width(self) -> int:
        """Columns of the matrix."""
        return self.shape[1]

    @property
    def conv(self) -> nn.Conv2d | None:
        """The layer, where it is a convolution."""
        return self.module if isinstance(self.module, nn.Conv2d) else None

    @property
    def device(self) -> torch.device:
        tensor = next(iter(self.module.parameters()), None)
        return torch.device("cpu") if tensor is None else tensor.device

    def weight(self) -> Float[Tensor, "out in"]:
        """A copy of the frozen matrix in float32, as it was before any merge. Raises `ValueError` on NaN."""
        module: Any = self.module
        W = matrix_of(module).detach() if self._before is None else as_matrix(module, self._before[0])
        check_finite(W, f"the weight of {self.name}")
        return W.to(torch.float32, copy=True)

    def bias(self) -> Float[Tensor, " out"] | None:
        """The frozen bias in float32, as it was before any merge."""
        bias = getattr(self.module, "bias", None) if self._before is None else self._before[1]
        return None if bias is None else bias.detach().float()

    def apply(self, x: Tensor, M: Float[Tensor, "rows in"]) -> Tensor:
        """A matrix in the place of the layer's own: of `in` columns, with any number of rows; no bias."""
        if self.conv is None:
            return F.linear(x, M)
        kernel = M.view(M.shape[0], self.conv.in_channels, *self.conv.kernel_size)
        return self.conv._conv_forward(x, kernel, None)

    def frozen(self, x: Tensor) -> Tensor:
        """The frozen matrix, without the bias, of something else than the layer's input."""
        weight = next((p for p in self.module.parameters() if p.is_floating_point()), x)
        return self.unbiased(self.module(x.to(weight.dtype)).to(x.dtype))

    def unbiased(self, y: Tensor) -> Tensor:
        """The frozen layer's output without its bias."""
        bias: Tensor | None = getattr(self.module, "bias", None)
        return y if bias is None else self.shift(y, -bias.to(y.dtype))

    def mix(self, h: Tensor, M: Float[Tensor, "rows channels"]) -> Tensor:
        """A matrix on the channels of what `apply` returns."""
        if self.conv is None:
            return F.linear(h, M)
        return F.conv2d(h, M[:, :, None, None])

    def shift(self, y: Tensor, vector: Float[Tensor, " channels"]) -> Tensor:
        """y plus a number for every channel."""
        return y + (vector if self.conv is None else vector[:, None, None])

    def write(self, W: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> None:
        """Replace the weights, keeping the old ones for `restore`."""
        module: Any = self.module
        if self._before is None:
            own = None if module.bias is None else module.bias.detach().clone()
            self._before = (module.weight.detach().clone(), own)
        module.weight.data.copy_(laid_out(module, W))
        if bias is not None and module.bias is not None:
            module.bias.data.copy_(bias)
        elif bias is not None:
            module.bias = nn.Parameter(bias.to(module.weight.dtype), requires_grad=False)

    def restore(self) -> None:
        """Put back, to the bit, the weights that were there before the first `write`."""
        module: Any = self.module
        if self._before is None:
            return
        weight, bias = self._before
        module.weight.data.copy_(weight)
        if bias is None:
            module.bias = None
        else:
            module.bias.data.copy_(bias)
        self._before = None


@dataclass
class Site:
    """Where an adapter is being made.

    Attributes:
        host: the frozen layer.
        generator: seeded by the adapter's seed and the layer's name.
        shared: what all layers of this adapter have in common.
        rank: of this layer, where the adapter has one.
        statistics: what the adapter collected of this layer; None where it collects nothing, or is being loaded.
    """

    host: Host
    generator: torch.Generator
    shared: Shared
    rank: int = 0
    statistics: Any = None

    @property
    def name(self) -> str:
        return self.host.name

    @property
    def shape(self) -> tuple[int, int]:
        return self.host.shape

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        """Gaussian numbers."""
        return torch.randn(shape, generator=self.generator) * std

    def uniform(self, *shape: int, bound: float) -> Tensor:
        """Numbers between -bound and bound."""
        return (2 * torch.rand(shape, generator=self.generator) - 1) * bound


class Shared(nn.Module):
    """Parameters and buffers that all layers of one adapter use: kept, trained and saved once.

    Layers keep a reference to this object and ask for a tensor by name at every step, so that casts and moves, which
    replace tensors, cannot part them.
    """

    def parameter(self, name: str, make: Callable[[], Tensor]) -> None:
        """Make a trained tensor, unless it is there."""
        if name not in self._parameters:
            self.register_parameter(name, nn.Parameter(make()))

    def buffer(self, name: str, make: Callable[[], Tensor], persistent: bool = True) -> None:
        """Make a frozen tensor, unless it is there."""
        if name not in self._buffers:
            self.register_buffer(name, make(), persistent=persistent)

    def get(self, name: str) -> Tensor:
        """A tensor that was made before."""
        tensor: Tensor = getattr(self, name)
        return tensor


def seeded(seed: int, name: str) -> torch.Generator:
    """A generator that a seed and a name determine; torch's reads 32 bits of what it is given."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
