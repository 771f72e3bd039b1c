"""A convolution as a chain of cheaper ones, whose kernels multiply to one of its own size that is never formed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.forms.layers import DropIn, kind_of
from eckart.forms.read_only import ReadOnly
from eckart.forms.stand_ins import StandIn, stand_in
from eckart.jobs.recipe import Recipe

CONVOLUTIONS: tuple[type[Any], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SCHEMES = ("encoder_decoder", "cp", "separable", "depth_separable")


class WithConvolutions(Recipe):
    """Knows convolutions of all dimensions and groups, beside the layers that hold a matrix."""

    def kind(self, module: nn.Module) -> str | None:
        return kind_of(module) or ("convolution" if is_convolution(module) else None)


class OnlyKernels(Recipe):
    """Knows convolutions alone, of kernels of more than one tap."""

    def kind(self, module: nn.Module) -> str | None:
        return "convolution" if is_convolution(module) and math.prod(module.kernel_size) > 1 else None  # type: ignore[arg-type] # fmt: skip


def is_convolution(module: nn.Module) -> bool:
    """Whether it is an ordinary convolution, of one, two or three dimensions."""
    return isinstance(module, CONVOLUTIONS) and not isinstance(module, DropIn)


@dataclass(frozen=True)
class Step:
    """One convolution of a chain: its channels, the axes along which it has the kernel's taps, and its groups."""

    in_: int
    out: int
    axes: tuple[int, ...]
    groups: int


def steps(conv: Any, scheme: str, rank: int) -> list[Step]:
    """The convolutions of a scheme. Raises `ValueError` where the scheme is not known or the rank does not fit.

    `encoder_decoder` is the whole kernel to `rank` channels and one tap; `cp` one tap, a depthwise convolution along
    every axis in turn and one tap; `separable` one convolution along every axis; `depth_separable` a depthwise one
    along every axis and one tap, with as many channels as come in. Groups are kept throughout.
    """
    axes, g = tuple(range(len(conv.kernel_size))), conv.groups
    if scheme not in SCHEMES:
        raise ValueError(f"{scheme!r} is no scheme of a chain of convolutions: it is one of {', '.join(SCHEMES)}")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1 or rank % g:
        raise ValueError(f"{rank!r} channels within a chain of {g} groups: give a positive multiple of the groups")
    if scheme == "depth_separable" and rank != conv.in_channels:
        raise ValueError(f"a depth-separable chain has its {conv.in_channels} incoming channels within, not {rank}")
    i, o = conv.in_channels, conv.out_channels
    if scheme == "encoder_decoder":
        return [Step(i, rank, axes, g), Step(rank, o, (), g)]
    along = [Step(rank, rank, (axis,), rank) for axis in axes]
    if scheme == "cp":
        return [Step(i, rank, (), g), *along, Step(rank, o, (), g)]
    if scheme == "depth_separable":
        return [*along, Step(rank, o, (), g)]
    if len(axes) == 1:
        raise ValueError("a kernel of one dimension has no axes to separate: choose another scheme, or leave the layer out with layers=...")  # fmt: skip # noqa: E501
    ends = [i, *[rank] * (len(axes) - 1), o]
    return [Step(ends[axis], ends[axis + 1], (axis,), g) for axis in axes]


@stand_in
class ConvChain(StandIn):
    """Convolutions one after the other, with strides, padding and dilation where the taps are, and one bias.

    Args:
        like: the convolution that it stands in for.
        scheme: see `steps`.
        rank: channels within.
    """

    kind = "conv_chain"

    def __init__(self, like: Any, scheme: str, rank: int, *, bias: bool, dtype: torch.dtype):
        super().__init__()
        self.scheme, self.rank = scheme, rank
        self.shape, self.groups = list(like.weight.shape), like.groups
        self.parts = nn.Sequential()
        plan = steps(like, scheme, rank)
        for n, step in enumerate(plan):
            self.parts.append(_part(like, step, bias and n + 1 == len(plan), dtype))

    @property
    def convolutions(self) -> list[Any]:
        """In order."""
        return list(self.parts)

    @property
    def bias(self) -> nn.Parameter | None:
        found: nn.Parameter | None = self.convolutions[-1].bias
        return found

    def forward(self, x: Float[Tensor, "*batch in *pixels"]) -> Float[Tensor, "*batch out *pixels2"]:
        y: Tensor = self.parts(x)
        return y

    def kernel(self) -> Float[Tensor, "out in_of_group *taps"]:
        """The one kernel that all of them make together, differentiable."""
        first, *rest = (spread(conv.weight, conv.groups) for conv in self.convolutions)
        for following in rest:
            first = torch.einsum("or...,ri...->oi...", following, first)
        out, in_ = self.shape[0] // self.groups, self.shape[1]
        return torch.cat([first[j * out : (j + 1) * out, j * in_ : (j + 1) * in_] for j in range(self.groups)])

    @property
    def weight(self) -> Float[Tensor, "out in_of_group *taps"]:
        return self.kernel().detach().as_subclass(ReadOnly)

    def dense(self) -> Any:
        """An ordinary convolution with that kernel, for export."""
        ends, K = self.convolutions, self.kernel().detach()
        axis_of = [next(c for c in ends if axis in c.taps) for axis in range(K.dim() - 2)]
        geometry = {n: tuple(getattr(c, n)[a] for a, c in enumerate(axis_of)) for n in ("stride", "dilation")}
        padding: Any = ends[0].padding
        if not isinstance(padding, str):
            padding = tuple(c.padding[a] for a, c in enumerate(axis_of))
        with torch.device("meta"):
            conv = CONVOLUTIONS[K.dim() - 3](
                K.shape[1] * self.groups, K.shape[0], tuple(K.shape[2:]), groups=self.groups, padding=padding,
                bias=self.bias is not None, padding_mode=ends[0].padding_mode, dtype=K.dtype, **geometry,
            )  # fmt: skip
        conv.weight = nn.Parameter(K)
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.detach().clone())
        return conv

    def flops(self, pixels: Sequence[int]) -> int:
        """Multiply-adds, counted twice, where each convolution puts out so many pixels."""
        return sum(2 * n * c.weight.numel() for n, c in zip(pixels, self.convolutions, strict=True))

    def fill(self, kernels: Sequence[Tensor], bias: Tensor | None) -> ConvChain:
        """Put these kernels in, on their device."""
        self.to_empty(device=kernels[0].device)
        for conv, kernel in zip(self.convolutions, kernels, strict=True):
            conv.weight.data.copy_(kernel.reshape(conv.weight.shape))
        if bias is not None and self.bias is not None:
            self.bias.data.copy_(bias.detach())
        return self

    def spec(self) -> dict[str, Any]:
        bias = self.bias is not None
        return {"kind": self.kind, "shape": self.shape, "scheme": self.scheme, "rank": self.rank, "bias": bias}

    @classmethod
    def from_spec(cls, model: nn.Module, name: str, spec: dict[str, Any], dtype: torch.dtype) -> nn.Module:
        module: Any = model.get_submodule(name)
        if not is_convolution(module):
            raise ValueError(f"{name}: the checkpoint says {cls.kind}, the model has {type(module).__name__}")
        shape, rank = list(module.weight.shape), spec.get("rank")
        if spec.get("shape") != shape or not isinstance(rank, int) or rank > 4 * math.prod(shape):
            raise ValueError(f"{name}: a chain of {rank!r} channels for a kernel of {spec.get('shape')} does not fit one of {shape}")  # fmt: skip # noqa: E501
        try:
            chain = cls(module, str(spec.get("scheme")), rank, bias=bool(spec.get("bias")), dtype=dtype)
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None
        if sum(c.weight.numel() for c in chain.convolutions) > 4 * math.prod(shape):
            raise ValueError(f"{name}: a chain of {rank} channels would take more than any compressed layer")
        return chain

    def extra_repr(self) -> str:
        return f"{self.scheme}, kernel={tuple(self.shape)}, rank={self.rank}"


def _part(conv: Any, step: Step, bias: bool, dtype: torch.dtype) -> nn.Module:
    """One convolution, without values. Where it has no taps it neither strides nor pads."""

    def here(values: Any, otherwise: int) -> Any:
        return values if isinstance(values, str) else tuple(v if a in step.axes else otherwise for a, v in enumerate(values))  # fmt: skip # noqa: E501

    made = CONVOLUTIONS[len(conv.kernel_size) - 1](
        step.in_, step.out, here(conv.kernel_size, 1), here(conv.stride, 1), here(conv.padding, 0),
        here(conv.dilation, 1), step.groups, bias, conv.padding_mode, dtype=dtype, device="meta",
    )  # fmt: skip
    made.taps = step.axes
    return made


def spread(weight: Float[Tensor, "out in_of_group *taps"], groups: int) -> Float[Tensor, "out in *taps"]:
    """The kernel of a grouped convolution as one without groups: zeros between them."""
    if groups == 1:
        return weight
    parts = weight.unflatten(0, (groups, -1))
    eye = torch.eye(groups, dtype=weight.dtype, device=weight.device)
    return torch.einsum("gh,goi...->gohi...", eye, parts).flatten(2, 3).flatten(0, 1)


def drawn(shapes: Sequence[tuple[Sequence[int], int]], variance: float, generator: torch.Generator) -> list[Tensor]:
    """Uniform kernels of a chain whose product has entries of this variance, each with the same gain.

    The variances of the kernels are v_i = (v f)^(1/n) / f_i, f_i the numbers that one output of the i-th is made of and
    f those for the product: f_1 ... f_n is f times the number of paths that an entry of the product sums up.

    Args:
        shapes: of each kernel, and f_i.
        variance: v f.
    """
    gain = variance ** (1 / len(shapes))
    return [torch.empty(*s).uniform_(-1, 1, generator=generator) * math.sqrt(3 * gain / f) for s, f in shapes]


def gain_of(W: Float[Tensor, "out in"]) -> float:
    """The variance of outputs on inputs of variance one. Raises `ValueError` on zeros, which tell none."""
    gain = float(W.double().square().mean()) * W.shape[1]
    if not gain > 0:
        raise ValueError("its weight is zero, which says nothing of how large to draw factors: initialise it first")
    return gain
