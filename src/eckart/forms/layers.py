"""Drop-ins: a factored matrix where a model expects a Linear, a Conv1D of transformers, an Embedding or a Conv2d.

Each drop-in is a subclass of what it replaces, so that code which asks `isinstance` (PEFT, Trainer) goes on working,
and its `weight` is the dense matrix, formed when asked for and read-only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eckart.forms.algebra import ProductMatrix
from eckart.forms.base import Factored, Shape, parse
from eckart.forms.dense import DenseMatrix
from eckart.forms.read_only import ReadOnly
from eckart.forms.stand_ins import StandIn, stand_in


class DropIn(StandIn):
    """What all factored layers share: the `matrix`, the `bias`, and a formed `weight`."""

    matrix: Factored
    bias: Any

    def spec(self) -> dict[str, Any]:
        bias = self.bias is not None
        return {"kind": self.kind, "form": str(self.matrix.form), "shape": list(self.matrix.shape), "bias": bias}

    @classmethod
    def from_spec(cls, model: nn.Module, name: str, spec: dict[str, Any], dtype: torch.dtype) -> nn.Module:
        module = model.get_submodule(name)
        if kind_of(module) != cls.kind:
            raise ValueError(f"{name}: the checkpoint says {cls.kind}, the model has {type(module).__name__}")
        shape = spec.get("shape")
        if not (isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, int) and n > 0 for n in shape)):
            raise ValueError(f"{name}: {shape!r} is not the shape of a matrix")
        own = matrix_shape(module)
        if shape[0] > own[0] or shape[1] > own[1]:
            raise ValueError(f"{name}: the checkpoint's shape {tuple(shape)} is larger than the model's {own}")
        try:
            matrix = parse(str(spec.get("form"))).build((shape[0], shape[1]), dtype=dtype, device="meta")
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None
        if matrix.nbytes > 4 * max(1, own[0] * own[1]) * dtype.itemsize:
            raise ValueError(f"{name}: {matrix.form} would take {matrix.nbytes} bytes, more than any compressed layer")
        columns = 1 if isinstance(module, nn.Embedding) else 0
        bias = torch.empty(shape[columns], dtype=dtype, device="meta") if spec.get("bias") else None
        return drop_in(module, matrix, bias)

    def _fill(self, matrix: Factored, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.matrix = matrix
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    def borrow(self, owner: DropIn) -> None:
        """Hold the very matrix of another layer, with which it is moved, stored and counted."""
        self._modules.pop("matrix", None)
        object.__setattr__(self, "matrix", owner.matrix)

    def reset_parameters(self) -> None:
        """Nothing to draw: the factors come from a fit or a checkpoint."""

    def _formed(self) -> Tensor:
        return self.matrix.dense().detach().as_subclass(ReadOnly)

    def extra_repr(self) -> str:
        return f"bias={self.bias is not None}"


@stand_in
class FactoredLinear(DropIn, nn.Linear):
    """x Wᵀ + b with W factored."""

    kind = "linear"

    def __init__(self, matrix: Factored, bias: Float[Tensor, " out"] | None = None):
        self._fill(matrix, bias)
        self.out_features, self.in_features = matrix.shape

    @property
    def weight(self) -> Float[Tensor, "out in"]:  # type: ignore[override]
        return self._formed()

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return self.matrix.forward(x, self.bias)


@stand_in
class FactoredConv1D(DropIn, Conv1D):
    """transformers' Conv1D, whose weight is (in, out): the factored matrix is (out, in) as everywhere."""

    kind = "conv1d"

    def __init__(self, matrix: Factored, bias: Float[Tensor, " out"] | None = None):
        self._fill(matrix, bias)
        self.nf, self.nx = matrix.shape
        self.out_features, self.in_features = matrix.shape

    @property
    def weight(self) -> Float[Tensor, "in out"]:
        return self._formed().t()

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return self.matrix.forward(x, self.bias)


@stand_in
class FactoredEmbedding(DropIn, nn.Embedding):
    """Rows of a factored table, plus one vector added to all (the mean, where a method keeps it apart)."""

    kind = "embedding"

    def __init__(
        self,
        matrix: Factored,
        bias: Float[Tensor, " dim"] | None = None,
        *,
        padding_idx: int | None = None,
        scale: float | None = None,
    ):
        self._fill(matrix, bias)
        self.num_embeddings, self.embedding_dim = matrix.shape
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, None, 2.0
        self.scale_grad_by_freq, self.sparse, self.scale = False, False, scale

    @property
    def weight(self) -> Float[Tensor, "rows dim"]:  # type: ignore[override]
        return self._formed() if self.bias is None else (self.matrix.dense() + self.bias).detach().as_subclass(ReadOnly)

    def forward(self, input: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        y = self.matrix.rows(input)
        y = y if self.bias is None else y + self.bias
        if self.padding_idx is not None and y.requires_grad:
            y = torch.where((input == self.padding_idx)[..., None], y.detach(), y)  # padding teaches nothing
        return y if self.scale is None else y * self.scale


@stand_in
class FactoredConv2d(DropIn, nn.Conv2d):
    """A convolution whose kernel, unfolded to (out, in * height * width), is factored."""

    kind = "conv2d"

    def __init__(self, matrix: Factored, bias: Float[Tensor, " out"] | None, like: nn.Conv2d):
        self._fill(matrix, bias)
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode"):
            setattr(self, name, getattr(like, name))
        self.groups, self.transposed, self.output_padding = 1, False, (0, 0)
        self._reversed_padding_repeated_twice = list(like._reversed_padding_repeated_twice)

    @property
    def weight(self) -> Float[Tensor, "out in h w"]:  # type: ignore[override]
        return self._formed().view(self.out_channels, self.in_channels, *self.kernel_size)

    def forward(self, input: Float[Tensor, "*batch in h w"]) -> Float[Tensor, "*batch out h2 w2"]:
        matrix = self.matrix
        if isinstance(matrix, ProductMatrix) and isinstance(matrix.right, DenseMatrix):
            # a convolution to `rank` channels, then a mixing of channels: no patch is ever copied
            kernel = matrix.right.weight.view(-1, self.in_channels, *self.kernel_size)
            y = matrix.left(self._conv_forward(input, kernel, None).movedim(-3, -1))
        else:
            y = matrix(patches(input, self))
        return (y if self.bias is None else y + self.bias).movedim(-1, -3)


def patches(x: Float[Tensor, "*batch in h w"], conv: nn.Conv2d) -> Float[Tensor, "*batch h2 w2 k"]:
    """The unfolded inputs of a convolution: one row of in * height * width numbers for every output pixel."""
    single, x = x.dim() == 3, x if x.dim() == 4 else x[None]
    if conv.padding_mode != "zeros":
        x, padding = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), (0, 0)
    elif isinstance(conv.padding, str):
        x, padding = F.pad(x, conv._reversed_padding_repeated_twice), (0, 0)
    else:
        padding = (int(conv.padding[0]), int(conv.padding[1]))
    kernel, dilation, stride = conv.kernel_size, conv.dilation, conv.stride
    columns = F.unfold(x, kernel, dilation, padding, stride).movedim(1, -1)
    height, width = ((x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
                     for i in (0, 1))  # fmt: skip
    rows = columns.view(x.shape[0], height, width, columns.shape[-1])
    return rows[0] if single else rows


EQUAL_FORWARDS = frozenset({"transformers.models.falcon.modeling_falcon.FalconLinear"})
"""Classes whose forward pass is their own, and computes what torch's does."""


def kind_of(module: nn.Module) -> str | None:
    """`linear`, `conv1d`, `embedding` or `conv2d`; None for what cannot be replaced.

    That are grouped convolutions, and layers that do more than their class is known for: routers, convolutions that pad
    by themselves or scale their kernel.
    """
    if isinstance(module, Conv1D):
        return "conv1d"
    if isinstance(module, nn.Linear):
        return "linear" if forward_is_of(module, nn.Linear) else None
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv2d) and module.groups == 1:
        return "conv2d" if forward_is_of(module, nn.Conv2d) else None
    return None


def forward_is_of(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a module of a subclass computes what one of the base class does; stand-ins do."""
    cls = type(module)
    own = isinstance(module, StandIn) or f"{cls.__module__}.{cls.__qualname__}" in EQUAL_FORWARDS
    return own or cls.forward is base.forward


def matrix_shape(module: nn.Module) -> Shape:
    """(out, in) of the matrix that a replaceable module holds, read without touching its weight."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    if isinstance(module, nn.Conv2d):
        return module.out_channels, module.in_channels * module.kernel_size[0] * module.kernel_size[1]
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    raise TypeError(f"{type(module).__name__} holds no matrix that eckart can factor")


def matrix_of(module: nn.Module) -> Float[Tensor, "out in"]:
    """The matrix itself: Conv1D transposed, Conv2d unfolded."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if isinstance(module, Conv1D):
        return weight.t()
    return weight.flatten(1) if isinstance(module, nn.Conv2d) else weight


def drop_in(module: nn.Module, matrix: Factored, bias: Tensor | None = None) -> nn.Module:
    """What stands in for `module`, with its weight replaced by `matrix` and its bias by `bias`."""
    if isinstance(module, Conv1D):
        return FactoredConv1D(matrix, bias)
    if isinstance(module, nn.Embedding):
        scale = getattr(module, "scalar_embed_scale", None)
        if type(module) is not nn.Embedding and not isinstance(module, FactoredEmbedding) and scale is None:
            raise TypeError(f"{type(module).__name__} adds something of its own to nn.Embedding: leave it dense")
        return FactoredEmbedding(matrix, bias, padding_idx=module.padding_idx, scale=scale)
    if isinstance(module, nn.Conv2d):
        return FactoredConv2d(matrix, bias, module)
    if isinstance(module, nn.Linear):
        return FactoredLinear(matrix, bias)
    raise TypeError(f"{type(module).__name__} has no drop-in")
