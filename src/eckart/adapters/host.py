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

from eckart.adapters.kinds import Convolution, as_matrix, check_carries, is_convolution, laid_out, matrix_shape
from eckart.linalg.whitening import check_finite

SLIDE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
"""By how many sides the kernel has."""


class Host:
    """A frozen linear layer, Conv1D of transformers or convolution of any kind.

    A convolution of g groups holds one matrix with the rows of all its outputs, which see the inputs of their own group
    alone. What lies between two factors, as `down` makes it, has r channels for every group.

    Attributes:
        name: of the layer in the model.
        module: the layer; None after it was let go.
        shape: (out, in) of its matrix; a kernel is unfolded to (out, in / groups * places).
        conv: the layer, where it is a convolution.
        groups: of a convolution; else 1.
        channels: the axis of inputs and outputs that the matrix acts on.
    """

    def __init__(self, module: nn.Module, name: str):
        check_carries(module, name)
        if isinstance(module, NonDynamicallyQuantizableLinear):
            raise ValueError(f"{name} belongs to an nn.MultiheadAttention, which reads its weight and never calls it: an adapter there would do nothing; name it in exclude_modules")  # fmt: skip # noqa: E501
        self.module, self.name = module, name
        self.shape = matrix_shape(module)
        self.groups, self.channels = 1, -1
        self._slides = is_convolution(module)
        if is_convolution(module):
            self.groups, self.channels = module.groups, -1 - len(module.kernel_size)
        self._before: tuple[Tensor, Tensor | None] | None = None

    @property
    def out(self) -> int:
        return self.shape[0]

    @property
    def width(self) -> int:
        """Columns of the matrix."""
        return self.shape[1]

    @property
    def conv(self) -> Convolution | None:
        module: Any = self.module
        return module if self._slides else None

    @property
    def device(self) -> torch.device:
        tensor = next(iter(self.module.parameters()), None)
        return torch.device("cpu") if tensor is None else tensor.device

    def weight(self) -> Float[Tensor, "out in"]:
        """A copy of the frozen matrix in float32, as it was before any merge. Raises `ValueError` on NaN."""
        module: Any = self.module
        W = as_matrix(module, module.weight.detach() if self._before is None else self._before[0])
        check_finite(W, f"the weight of {self.name}")
        return W.to(torch.float32, copy=True)

    def bias(self) -> Float[Tensor, " out"] | None:
        """The frozen bias in float32, as it was before any merge."""
        bias = getattr(self.module, "bias", None) if self._before is None else self._before[1]
        return None if bias is None else bias.detach().float()

    def apply(self, x: Tensor, M: Float[Tensor, "out in"]) -> Tensor:
        """A matrix in the place of the layer's own; no bias."""
        if self.conv is None:
            return F.linear(x, M)
        if self.groups > 1 and len(M) != self.out:
            raise ValueError(f"{self.name} is a grouped convolution, where a matrix of {len(M)} rows cannot take the place of its own, of {self.out}: let `down` apply the thin factor, and `up` the other")  # fmt: skip # noqa: E501
        return self._slid(x, laid_out(self.conv, M), self.groups)

    def down(self, x: Tensor, A: Float[Tensor, "r in"]) -> Tensor:
        """What r rows in the layer's place make of x: r channels for every group; no bias."""
        if self.conv is None:
            return F.linear(x, A)
        return self.slid(x, laid_out(self.conv, A))

    def up(self, h: Tensor, B: Float[Tensor, "out r"]) -> Tensor:
        """The layer's outputs from what `down` made: from r channels of their group each."""
        return self._mixed(h, B)

    def mix(self, h: Tensor, M: Float[Tensor, "s r"]) -> Tensor:
        """A matrix on the r channels of every group, which gives it s others."""
        return self._mixed(h, M if self.groups == 1 else M.repeat(self.groups, 1))

    def slid(self, h: Tensor, kernel: Float[Tensor, "s r *places"], each: bool = False) -> Tensor:
        """A kernel from r to s channels of every group, with the layer's stride, padding and dilation; no bias.

        Args:
            kernel: without the sides of the layer's kernel that are 1, or with them; a matrix on linear layers.
            each: `kernel` (r, 1, *places) has one for each of the channels instead.
        """
        if self.conv is None:
            return F.linear(h, kernel)
        kernel = kernel.reshape(*kernel.shape[:2], *self.conv.kernel_size)
        groups = self.groups * len(kernel) if each else self.groups
        if self.groups > 1:
            kernel = kernel.repeat(self.groups, *[1] * (kernel.dim() - 1))
        return self._slid(h, kernel, groups)

    def _slid(self, h: Tensor, kernel: Tensor, groups: int) -> Tensor:
        conv: Any = self.module
        padding = conv.padding
        if conv.padding_mode != "zeros":
            h, padding = F.pad(h, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
        return SLIDE[kernel.dim() - 2](h, kernel, None, conv.stride, padding, conv.dilation, groups)

    def _mixed(self, h: Tensor, M: Tensor) -> Tensor:
        if not self._slides:
            return F.linear(h, M)
        sides = -1 - self.channels
        return SLIDE[sides](h, M.view(*M.shape, *[1] * sides), groups=self.groups)

    def pulled_back(
        self, x: Tensor, M: Float[Tensor, "out in"], g: Tensor, to_x: bool, to_M: bool
    ) -> tuple[Tensor | None, Float[Tensor, "out in"] | None]:
        """The gradients of `apply(x, M)`, whose own is g, with respect to x and to M."""
        if self.conv is None:
            dx = g @ M if to_x else None
            return dx, g.reshape(-1, M.shape[0]).T @ x.reshape(-1, M.shape[1]) if to_M else None
        x, M = x.detach().requires_grad_(to_x), M.detach().requires_grad_(to_M)
        with torch.enable_grad():
            y = self.apply(x, M)
        wanted = [t for t in (x, M) if t.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, g))
        return next(found) if to_x else None, next(found) if to_M else None

    def frozen(self, x: Tensor) -> Tensor:
        """The frozen matrix, without the bias, of something else than the layer's input."""
        weight = next((p for p in self.module.parameters() if p.is_floating_point()), x)
        return self.unbiased(self.module(x.to(weight.dtype)).to(x.dtype))

    def unbiased(self, y: Tensor) -> Tensor:
        """The frozen layer's output without its bias."""
        bias: Tensor | None = getattr(self.module, "bias", None)
        return y if bias is None else self.shift(y, -bias.to(y.dtype))

    def shift(self, y: Tensor, vector: Float[Tensor, " channels"]) -> Tensor:
        """y plus a number for every channel."""
        return y + self.along(vector)

    def along(self, vector: Float[Tensor, " channels"]) -> Tensor:
        """A number for every channel, as a factor of what the layer takes or gives."""
        return vector if not self._slides else vector.view(-1, *[1] * (-1 - self.channels))

    def write(self, W: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> None:
        """Replace the weights, keeping the old ones for `restore`.

        Raises `ValueError` where the weight is made anew in every pass, as under weight normalisation.
        """
        module: Any = self.module
        if module._parameters.get("weight") is None:
            raise ValueError(f"{self.name}: its weight is computed from other tensors, and what is merged into it would be lost: call torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') (remove_weight_norm for the older kind) before the adapter is put there, or keep the adapter beside the layer")  # fmt: skip # noqa: E501
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
