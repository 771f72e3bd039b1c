"""The one interface: which kernel multiplies, what is saved for the backward pass, and who may round activations."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from eckart.forms.kernels import bag, integers, packed, tiles
from eckart.forms.kernels.prepared import forget, prepared

if TYPE_CHECKING:
    from eckart.forms.quantized import QuantizedMatrix

KINDS = ("exact", "int8")


class activations:
    """Set how quantised matrices treat what they multiply: `exact` (the default) or `int8`.

    `int8` allows each row of activations to be rounded to 8 bits where that is faster. It concerns CPUs, several rows
    at once, and matrices whose rows have one scale each (`group=None`, a uniform grid of 2 to 8 bits); the others stay
    exact. The error is about one hundredth, more where a few activations of a row are far larger than the others.
    Gradients are those of the matrix, as if nothing had been rounded. For the whole process, or within a `with` block:

        eckart.forms.kernels.activations("int8")
        with eckart.forms.kernels.activations("int8"): ...
    """

    current = "exact"

    def __init__(self, kind: str):
        if kind not in KINDS:
            raise ValueError(f"activations({kind!r}): they are kept 'exact' or rounded to 'int8'")
        self.before, activations.current = activations.current, kind

    def __enter__(self) -> activations:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        activations.current = self.before


def plain(
    matrix: QuantizedMatrix, x: Float[Tensor, "*batch in"], bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """The twin that is obviously right: x Wᵀ + bias with all of W formed."""
    return F.linear(x, matrix.dense().to(x.dtype), bias)


def linear(
    matrix: QuantizedMatrix, x: Float[Tensor, "*batch in"], bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """x Wᵀ + bias from packed codes, no dense copy of a large W ever alive.

    The backward pass decodes again: it saves the packed tensors, and x only where scales are trained. Within
    torch.compile, torch.export and transforms of torch.func the plain product is traced instead.

    Raises:
        ValueError: the last dimension of x is not the matrix's width.
    """
    if x.shape[-1:] != matrix.shape[1:]:
        raise ValueError(f"a matrix of shape {matrix.shape} multiplies rows of {matrix.shape[1]} numbers, x has shape {tuple(x.shape)}")  # fmt: skip # noqa: E501
    if not eager(x):
        return plain(matrix, x, bias)
    if x.is_floating_point() and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return _differentiable(matrix, x, bias)
    return _differentiable(matrix, x, bias)


def eager(x: Tensor) -> bool:
    """Whether numbers are computed now, and by plain torch."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    return not traced and type(x) in (Tensor, nn.Parameter) and not x.is_meta


def _differentiable(matrix: QuantizedMatrix, x: Tensor, bias: Tensor | None) -> Tensor:
    if torch.is_grad_enabled():
        parameters = list(matrix.parameters())
        if any(t is not None and t.requires_grad for t in (x, bias, *parameters)):
            y: Tensor = _Product.apply(x, bias, matrix, *parameters)
            return y
    return _product(matrix, x, bias)


def _product(
    matrix: QuantizedMatrix, x: Float[Tensor, "*batch in"], bias: Tensor | None
) -> Float[Tensor, "*batch out"]:
    rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), matrix.shape[1])
    y = _chosen(matrix, rows)
    if bias is not None:
        y = y + bias
    y = y if y.dtype == x.dtype else y.to(x.dtype)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], matrix.shape[0])


def _chosen(matrix: QuantizedMatrix, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
    """By the fastest way that is allowed and fits."""
    if x.device.type != "cpu":
        forget(matrix)
        return tiles.product(matrix, x)
    at, digits = prepared(matrix), 1 if activations.current == "int8" else integers.EXACT
    if x.shape[0] > 1 and integers.serves(at, x, digits):
        return integers.product(at, matrix, x, digits)
    if packed.serves(at, x):
        return packed.product(at, matrix, x)
    if bag.serves(at, x):
        return bag.product(at, matrix, x)
    return tiles.product(matrix, x)


class _Product(torch.autograd.Function):
    """Saves what is packed, decodes it again for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, matrix: QuantizedMatrix, *parameters: Tensor) -> Tensor:
        ctx.matrix, ctx.dtype, ctx.shape = matrix, x.dtype, x.shape
        trained = any(ctx.needs_input_grad[3:])
        ctx.save_for_backward(x if trained else None, *matrix.buffers(), *parameters)
        return _product(matrix, x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *_ = ctx.saved_tensors  # reading them also finds out whether one was changed since
        matrix, rows, needed = ctx.matrix, g.reshape(-1, g.shape[-1]), ctx.needs_input_grad
        to_x = tiles.gradient(matrix, rows).to(ctx.dtype).view(ctx.shape) if needed[0] else None
        to_bias = rows.sum(0) if needed[1] else None
        to_parameters: list[Tensor | None] = [None] * len(needed[3:])
        if x is not None:
            own = list(matrix.parameters())
            places = [i for i, wanted in enumerate(needed[3:]) if wanted]
            found = tiles.parameter_gradients(matrix, rows, x.reshape(rows.shape[0], -1), [own[i] for i in places])
            for i, gradient in zip(places, found, strict=True):
                to_parameters[i] = gradient
        return to_x, to_bias, None, *to_parameters
