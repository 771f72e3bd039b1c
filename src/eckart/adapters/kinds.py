"""The layers that an adapter can sit on, and the matrices that they hold: convolutions of any kind, too."""

from __future__ import annotations

from typing import TypeGuard

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from eckart.forms import layers, layout

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def is_convolution(module: nn.Module | None) -> TypeGuard[Convolution]:
    """Of one, two or three dimensions, with any number of groups; a transposed one is another thing."""
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def carries(module: nn.Module) -> bool:
    """Whether a layer multiplies by a matrix, or slides one, that an adapter could change."""
    if is_convolution(module):
        return layers.forward_is_of(module, _torch_class(module))
    return layers.kind_of(module) in ("linear", "conv1d")


def _torch_class(module: Convolution) -> type[Convolution]:
    return next(cls for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, cls))


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in); of a convolution (out, in / groups * places of the kernel). Read without touching the weight."""
    if not is_convolution(module):
        return layers.matrix_shape(module)
    columns = module.in_channels // module.groups
    for side in module.kernel_size:
        columns *= side
    return module.out_channels, columns


def as_matrix(module: nn.Module, weight: Tensor) -> Float[Tensor, "out in"]:
    """A tensor laid out as the layer's weight, as a matrix."""
    return weight.flatten(1) if is_convolution(module) else layout.as_matrix(module, weight)


def laid_out(module: nn.Module, W: Float[Tensor, "out in"]) -> Tensor:
    """A matrix as the weight of a layer of this kind: the inverse of `as_matrix`."""
    return W.view(len(W), -1, *module.kernel_size) if is_convolution(module) else layout.laid_out(module, W)


def described(module: nn.Module) -> str:
    """What a layer is, for errors, such as `a grouped convolution (Conv2d, groups=4)`."""
    name = type(module).__name__
    if (is_convolution(module) or isinstance(module, nn.Linear)) and not carries(module):
        return f"a {name}, whose forward pass is its own"
    if is_convolution(module):
        return f"a grouped convolution ({name}, groups={module.groups})" if module.groups > 1 else f"a convolution ({name})"  # fmt: skip # noqa: E501
    if isinstance(module, _ConvNd):
        return f"a transposed convolution ({name})"
    return f"an embedding ({name})" if isinstance(module, nn.Embedding) else f"a {name}"


def check_carries(module: nn.Module, name: str) -> None:
    """Raises `ValueError` for a layer that has no matrix for an adapter of ours to change."""
    if not carries(module):
        other = "take 'lora', which is PEFT's and sits on embeddings too, or " if isinstance(module, nn.Embedding) else ""  # fmt: skip # noqa: E501
        raise ValueError(f"{name} is {described(module)}, which no adapter of eckart's own can sit on: target linear layers, Conv1D of transformers and convolutions; {other}train it whole, modules_to_save=[{name.rpartition('.')[2]!r}]")  # fmt: skip # noqa: E501
