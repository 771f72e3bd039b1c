"""Stand-ins for a transformer whose residual stream is narrower than its config says, in a basis that changes.

The model's own blocks go on computing `stream + writer(...)`. Where the basis of the stream changes at that sum, the
writer adds `stream @ S - stream` to what it writes, so that the sum is `stream @ S + ...`; it gets the stream from the
norm at the start of its sub-layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eckart.forms.base import Shape
from eckart.forms.layers import kind_of, matrix_shape
from eckart.forms.stand_ins import StandIn, stand_in


class Connected(StandIn, ABC):
    """A stand-in that works with another module of the model."""

    @abstractmethod
    def connect(self, model: nn.Module, name: str) -> None:
        """Find the other module, once all are in place; `name` is this one's. Raises `ValueError` if it is missing."""


class Tap:
    """Hands the stream from a norm to the writer of its sub-layer: one forward pass at a time, no threads."""

    def __init__(self) -> None:
        self.stream: Tensor | None = None

    def take(self) -> Tensor | None:
        """The stream, which is let go of."""
        stream, self.stream = self.stream, None
        return stream


@stand_in
class StreamNorm(StandIn):
    """x / sqrt(|x|^2 / divisor + eps): a norm without gain that any rotation of x commutes with.

    Args:
        width: of x.
        divisor: the stream's width before it was sliced, which the mean is still taken over.
        eps: as in the norm it replaces.
    """

    kind = "stream_norm"

    def __init__(self, width: int, divisor: int, eps: float):
        super().__init__()
        self.width, self.divisor, self.eps = width, divisor, eps
        self.tap: Tap | None = None

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "width": self.width, "divisor": self.divisor, "eps": self.eps}

    @classmethod
    def from_spec(cls, model: nn.Module, name: str, spec: dict[str, Any], dtype: torch.dtype) -> nn.Module:
        width: Any = spec.get("width")
        divisor: Any = spec.get("divisor")
        eps: Any = spec.get("eps")
        if any(True for _ in model.get_submodule(name).children()):
            raise ValueError(f"{name}: the checkpoint says {cls.kind}, the model has {_class(model, name)}")
        if not _positive(width) or not _positive(divisor) or width > divisor:
            raise ValueError(f"{name}: {width!r} and {divisor!r} are not a width and the width before")
        if not isinstance(eps, float) or not 0 <= eps < 1:
            raise ValueError(f"{name}: {eps!r} is not the eps of a norm")
        return cls(width, divisor, eps)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        if self.tap is not None:
            self.tap.stream = x
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / self.divisor + self.eps)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.width}, divisor={self.divisor}, eps={self.eps}"


@stand_in
class Narrow(StandIn):
    """An ordinary linear layer, Conv1D or embedding of another shape than the model's code gives it.

    `narrow` makes it a subclass of the very class it replaces, so its forward pass is that class's own, its weight can
    be written to, and adapters merge into it.
    """

    kind = "narrow"
    _is_hf_initialized = False  # transformers must fill buffers that no checkpoint holds, such as Gemma's scale

    def spec(self) -> dict[str, Any]:
        bias = getattr(self, "bias", None) is not None
        return {"kind": self.kind, "shape": list(matrix_shape(self)), "bias": bias}

    @classmethod
    def from_spec(cls, model: nn.Module, name: str, spec: dict[str, Any], dtype: torch.dtype) -> nn.Module:
        shape = _shape(model, name, spec, cls.kind)
        return narrow(model.get_submodule(name), shape, bool(spec.get("bias")), dtype)


@cache
def _narrow_class(cls: Any) -> type[nn.Module]:
    return type(f"Narrow{cls.__name__}", (Narrow, cls), {"__module__": __name__})


def narrow(module: nn.Module, shape: Shape, bias: bool, dtype: torch.dtype) -> nn.Module:
    """A `Narrow` that is like `module` but holds a matrix of another shape (out, in), without values."""
    own_class: Any = type(module)
    cls = _narrow_class(own_class)
    new = cls.__new__(cls)
    nn.Module.__init__(new)
    own = set(vars(new)) | {"forward", "_hf_hook", "_old_forward"}  # the last three are accelerate's
    new.__dict__.update({k: v for k, v in vars(module).items() if k not in own})
    new._buffers.update(module._buffers)
    new._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
    new.training = module.training
    return _resize(new, shape, bias, dtype)


def _resize(module: nn.Module, shape: Shape, bias: bool, dtype: torch.dtype) -> nn.Module:
    out, in_ = shape
    if isinstance(module, Conv1D):
        module.nf, module.nx = shape
        shape = (in_, out)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = shape
    else:
        module.out_features, module.in_features = shape  # type: ignore[assignment]
    module.register_parameter("weight", nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")))
    if not isinstance(module, nn.Embedding):
        empty = nn.Parameter(torch.empty(out, dtype=dtype, device="meta")) if bias else None
        module.register_parameter("bias", empty)
    return module


@stand_in
class ResidualWriter(Connected):
    """W x + b + (s S - s), where s is the stream that the sum after this layer adds to.

    What comes between a writer and the sum, such as GPT-2's dropout in training, acts on the shortcut's part too.

    Args:
        linear: W and b; W is (k, in).
        norm: name of the `StreamNorm` that saw s.
        dtype: of the shortcut S (k, k), which has no values yet.
    """

    kind = "residual_writer"

    def __init__(self, linear: nn.Module, norm: str, dtype: torch.dtype):
        super().__init__()
        self.linear, self.norm = linear, norm
        self.out_features, self.in_features = matrix_shape(linear)
        size = (self.out_features, self.out_features)
        self.shortcut = nn.Parameter(torch.empty(size, dtype=dtype, device="meta"))
        self.tap: Tap | None = None

    def spec(self) -> dict[str, Any]:
        shape, bias = [self.out_features, self.in_features], getattr(self.linear, "bias", None) is not None
        return {"kind": self.kind, "shape": shape, "bias": bias, "norm": self.norm}

    @classmethod
    def from_spec(cls, model: nn.Module, name: str, spec: dict[str, Any], dtype: torch.dtype) -> nn.Module:
        shape, norm = _shape(model, name, spec, cls.kind), spec.get("norm")
        if not isinstance(norm, str):
            raise ValueError(f"{name}: {norm!r} is not the name of a norm")
        with torch.device("meta"):
            plain = Conv1D(1, 1) if kind_of(model.get_submodule(name)) == "conv1d" else nn.Linear(1, 1)
        return cls(_resize(plain, shape, bool(spec.get("bias")), dtype), norm, dtype)

    @property
    def weight(self) -> Tensor:
        """Of the linear layer: GPT-2's initialisation asks for it by this name."""
        return self.linear.weight  # type: ignore[return-value]

    def connect(self, model: nn.Module, name: str) -> None:
        try:
            norm = model.get_submodule(self.norm)
        except AttributeError:
            norm = None
        if not isinstance(norm, StreamNorm) or norm.width != self.out_features:
            raise ValueError(f"{name} needs a norm of width {self.out_features} that keeps the stream at {self.norm!r}")
        self.tap = norm.tap = Tap()

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch k"]:
        stream = None if self.tap is None else self.tap.take()
        if stream is None:
            raise RuntimeError(f"a writer was run without the norm {self.norm!r} before it, which gives it the stream")
        return self.linear(x) + (stream @ self.shortcut - stream)


def _shape(model: nn.Module, name: str, spec: dict[str, Any], kind: str) -> Shape:
    """The shape in a spec, if a module of that shape can stand at `name`."""
    module = model.get_submodule(name)
    kinds = ("linear", "conv1d", "embedding") if kind == Narrow.kind else ("linear", "conv1d")
    if kind_of(module) not in kinds:
        raise ValueError(f"{name}: the checkpoint says {kind}, the model has {type(module).__name__}")
    own, shape = matrix_shape(module), spec.get("shape")
    if not (isinstance(shape, list) and len(shape) == 2 and all(_positive(n) for n in shape)):
        raise ValueError(f"{name}: {shape!r} is not the shape of a matrix")
    if shape[0] > own[0] or shape[1] > own[1]:
        raise ValueError(f"{name}: the checkpoint's shape {tuple(shape)} is larger than the model's {own}")
    return shape[0], shape[1]


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _class(model: nn.Module, name: str) -> str:
    return type(model.get_submodule(name)).__name__
