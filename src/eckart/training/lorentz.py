"""Hyperbolic space in the Lorentz model, and the linear layer of fully hyperbolic networks.

Sources: Nickel and Kiela, Learning Continuous Hierarchies in the Lorentz Model of Hyperbolic Geometry, ICML 2018 (the
model and its maps); Chen et al., Fully Hyperbolic Neural Networks, ACL 2022, arXiv 2105.14686, section 3.1 (the layer).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

SHORTEST = 1e-4  # space parts below this length are scaled, not normalised: their direction is noise


@dataclass(frozen=True)
class Lorentz:
    """The hyperboloid of all x with <x, x> = -1/K and x0 > 0, a space of the constant curvature -K.

    A point has a time coordinate x0 and then its space coordinates. A tangent vector at the origin (1/sqrt K, 0, ...)
    is given by its space coordinates alone, since its time is 0. All is computed in float32 or wider, and returned as
    it came.

    Args:
        curvature: K, above 0; lengths are in units of 1/sqrt K.
    """

    curvature: float = 1.0

    def __post_init__(self) -> None:
        K = self.curvature
        if isinstance(K, bool) or not isinstance(K, int | float) or not 0 < K < math.inf:
            raise ValueError(f"Lorentz(curvature={K!r}): it is the K of a space of curvature -K, a number above 0")

    def inner(self, x: Float[Tensor, "*#batch n"], y: Float[Tensor, "*#batch n"]) -> Float[Tensor, "*#batch"]:
        """<x, y> = -x0 y0 + x1 y1 + ... + xn yn."""
        a, b = wide(x), wide(y)
        return ((a[..., 1:] * b[..., 1:]).sum(-1) - a[..., 0] * b[..., 0]).to(torch.promote_types(x.dtype, y.dtype))

    def lift(self, space: Float[Tensor, "*batch n-1"]) -> Float[Tensor, "*batch n"]:
        """The only point with these space coordinates: its time is sqrt(|space|^2 + 1/K)."""
        s = wide(space)
        time = (s.square().sum(-1, keepdim=True) + 1 / self.curvature).sqrt()
        return torch.cat([time, s], -1).to(space.dtype)

    def project(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """The point with the same space coordinates, of anything that lies beside the hyperboloid."""
        return self.lift(x[..., 1:])

    def exp0(self, v: Float[Tensor, "*batch n-1"]) -> Float[Tensor, "*batch n"]:
        """Where a geodesic ends that leaves the origin along v and is as long as v."""
        w = wide(v)
        r = self._radius(w)
        return self.lift(r.sinh() / r * w).to(v.dtype)

    def log0(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n-1"]:
        """The tangent vector at the origin that `exp0` maps to x. Raises `ValueError` on what is no point."""
        self.check(x)
        s = wide(x)[..., 1:]
        r = self._radius(s)
        return (r.asinh() / r * s).to(x.dtype)

    def distance(self, x: Float[Tensor, "*#batch n"], y: Float[Tensor, "*#batch n"]) -> Float[Tensor, "*#batch"]:
        """Length of the geodesic between points. Raises `ValueError` on what is no point.

        arccosh(-K <x, y>) / sqrt K, as 2 arsinh(sqrt(K <x - y, x - y>) / 2) / sqrt K: that is exact for points close
        together, and where they are the same its gradient is 0.
        """
        self.check(x)
        self.check(y)
        d = wide(x) - wide(y)
        chord = (self.curvature * self.inner(d, d)).clamp_min(torch.finfo(d.dtype).tiny).sqrt()
        length = (chord / 2).asinh() * (2 / math.sqrt(self.curvature))
        return length.to(torch.promote_types(x.dtype, y.dtype))

    def check(self, x: Float[Tensor, "*batch n"], what: str = "x") -> None:
        """Refuse what is no point, to the square root of the dtype's precision; within torch.compile, only its width.

        Raises `ValueError`.
        """
        if x.dim() == 0 or x.shape[-1] < 2:
            raise ValueError(f"{what} has shape {tuple(x.shape)}: a point has a time and at least one space coordinate, so the last width is at least 2")  # fmt: skip # noqa: E501
        if torch.compiler.is_compiling() or not x.numel():
            return
        w = wide(x.detach())
        size = self.curvature * w[..., 0].square()
        gap = ((self.curvature * self.inner(w, w) + 1).abs() / size).max()
        if not gap <= math.sqrt(torch.finfo(x.dtype).eps) or not w[..., 0].min() > 0:
            raise ValueError(f"{what} does not lie on the hyperboloid <x, x> = {-1 / self.curvature:g}, x0 > 0: it misses by {float(gap):.2g} of K x0^2. Features become points by `Lorentz({self.curvature:g}).exp0` or `.lift`")  # fmt: skip # noqa: E501

    def _radius(self, v: Float[Tensor, "*batch n-1"]) -> Float[Tensor, "*batch 1"]:
        r = math.sqrt(self.curvature) * torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        return r.clamp_min(torch.finfo(v.dtype).eps)


class LorentzLinear(nn.Module):
    """A linear layer from points to points: y = lift(phi(x)), with the weights in the ordinary `linear` within.

    Of `linear(h(x))` the first number is a gate g and the others z; phi = scale sigmoid(g) z / |z|, so that boosts and
    rotations can both be learnt (Chen et al., section 3.1). With `scale=None`, phi is all of `linear(h(x))`. What works
    on linear layers works on `linear`, and whatever it does to the weights, what comes out are points.

    Args:
        in_features: width of the points that come in, with their time; at least 2.
        out_features: the same for those that go out.
        bias: whether `linear` has one.
        curvature: K of both spaces.
        scale: upper bound of |phi| at the start, trained as its logarithm; None for no gate.
        activation: h, such as `nn.ReLU()`, with dropout if it is wanted; None for none.

    Raises `ValueError` on other widths, curvatures and scales, and in `forward` on what is no point.
    """

    log_scale: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, curvature: float = 1.0,
        scale: float | None = 10.0, activation: nn.Module | None = None,
    ):  # fmt: skip
        super().__init__()
        for name, width in (("in_features", in_features), ("out_features", out_features)):
            if isinstance(width, bool) or not isinstance(width, int) or width < 2:
                raise ValueError(f"LorentzLinear({name}={width!r}): a point has a time and at least one space coordinate, so its width is at least 2")  # fmt: skip # noqa: E501
        if scale is not None and not 0 < scale < math.inf:
            raise ValueError(f"LorentzLinear(scale={scale!r}): it bounds a length, so it is above 0; None for no gate")
        self.manifold = Lorentz(curvature)
        self.in_features, self.out_features, self.activation = in_features, out_features, activation
        self.linear = nn.Linear(in_features, out_features - (scale is None), bias)
        log_scale = None if scale is None else nn.Parameter(torch.full((1,), math.log(scale)))
        self.register_parameter("log_scale", log_scale)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"LorentzLinear takes points of width {self.in_features}, not of shape {tuple(x.shape)}")
        self.manifold.check(x, "the input of LorentzLinear")
        z = wide(self.linear(x if self.activation is None else self.activation(x)))
        if self.log_scale is not None:
            length = self.log_scale.to(z.dtype).exp() * z[..., :1].sigmoid()
            z = length * F.normalize(z[..., 1:], dim=-1, eps=SHORTEST)
        return self.manifold.lift(z).to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, curvature={self.manifold.curvature:g}"  # fmt: skip # noqa: E501


def wide(t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """In float32, or as it is where that is wider."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
