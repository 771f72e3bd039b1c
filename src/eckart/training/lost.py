"""LOST: low-rank factors from the SVD of the initial weight, plus dense columns where the rest of it is large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from eckart.forms import Dense, Factored, Form, LowRank, Product, Select
from eckart.forms.algebra import ProductMatrix, SumMatrix
from eckart.forms.base import parse
from eckart.forms.layers import kind_of, matrix_shape
from eckart.forms.scaled import Scaled, ScaledMatrix
from eckart.forms.stand_ins import StandIn, stand_in
from eckart.registry import method
from eckart.training.base import Born, dtype_of, like


@stand_in
class Bottleneck(StandIn):
    """scale * up(silu(down(x))) + rest(x) + bias: two factors with a nonlinearity between them, beside a matrix.

    Args:
        low: the two factors.
        rest: the matrix beside them, or None.
        scale: of what goes through the factors.
    """

    kind = "bottleneck"

    def __init__(self, low: ProductMatrix, rest: Factored | None, scale: float, bias: Tensor | None):
        super().__init__()
        self.low, self.rest, self.scale = low, rest, scale
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.out_features, self.in_features = low.shape

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        y = self.low.left(F.silu(self.low.right(x))) * self.scale
        y = y if self.bias is None else y + self.bias
        return y if self.rest is None else y + self.rest(x)

    def spec(self) -> dict[str, Any]:
        rest = None if self.rest is None else str(self.rest.form)
        shape, bias = list(self.low.shape), self.bias is not None
        return {"kind": self.kind, "low": str(self.low.form), "rest": rest, "shape": shape, "scale": self.scale, "bias": bias}  # fmt: skip # noqa: E501

    @classmethod
    def from_spec(cls, model: nn.Module, name: str, spec: dict[str, Any], dtype: torch.dtype) -> nn.Module:
        module, scale = model.get_submodule(name), spec.get("scale")
        if kind_of(module) not in ("linear", "conv1d") or spec.get("shape") != list(matrix_shape(module)):
            raise ValueError(f"{name}: a bottleneck of shape {spec.get('shape')} cannot stand in for {type(module).__name__}")  # fmt: skip # noqa: E501
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise ValueError(f"{name}: {scale!r} is not the scale of a bottleneck")
        shape = matrix_shape(module)
        try:
            low = parse(str(spec.get("low"))).build(shape, dtype=dtype, device="meta")
            rest = None if spec.get("rest") is None else parse(str(spec["rest"])).build(shape, dtype=dtype, device="meta")  # fmt: skip # noqa: E501
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None
        held = low.nbytes + (0 if rest is None else rest.nbytes)
        if not isinstance(low, ProductMatrix) or held > 4 * max(1, shape[0] * shape[1]) * dtype.itemsize:
            raise ValueError(f"{name}: {spec.get('low')} and {spec.get('rest')} are not the parts of a bottleneck")
        bias = torch.empty(shape[0], dtype=dtype, device="meta") if spec.get("bias") else None
        return cls(low, rest, float(scale), bias)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, bias={self.bias is not None}"


@method("lost", family="sparse + low-rank", paper="LOST, Li et al., 2025, arXiv 2508.02668")
@dataclass(frozen=True)
class LOST(Born):
    """y = gamma B phi(A x) + (1 - gamma) W_s x[I]: B A the leading SVD, I the columns it leaves most of.

    The activation makes it one matrix no more, so that `densify` leaves it. With `activation="none"` the layer is a
    form, `scaled(low_rank()) + scaled(dense() @ select())`. For an i.i.d. Gaussian weight the columns differ little, so
    that the choice of I is close to random there.

    Args:
        rank: r, of A (r, in) and B (out, r), whose start is U_r S_r^(1/2), S_r^(1/2) V_rᵀ.
        density: share of the input columns in I.
        gamma: weight of the low-rank branch; 1 drops the columns, 0 the low-rank branch.
        activation: phi, `silu` or `none`.
        score: whose column norms decide I, those of the `complement` W - U_r S_r V_rᵀ or of the `weight`.
        columns: what W_s starts from, the `weight` itself or the `complement`.
    """

    rank: int = 128
    density: float = 0.01
    gamma: float = 0.7
    activation: Literal["silu", "none"] = "silu"
    score: Literal["complement", "weight"] = "complement"
    columns: Literal["weight", "complement"] = "weight"

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"lost(rank={self.rank!r}): the rank is a positive integer")
        for name in ("density", "gamma"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"lost({name}={getattr(self, name)!r}): it is a share from 0 to 1")
        for name, known in (("activation", ("silu", "none")), ("score", SIDES), ("columns", SIDES)):
            if getattr(self, name) not in known:
                raise ValueError(f"lost({name}={getattr(self, name)!r}): it is {' or '.join(map(repr, known))}")

    def stand_in(self, module: nn.Module, W: Float[Tensor, "out in"], generator: torch.Generator) -> nn.Module:
        in_ = W.shape[1]
        dtype, count = dtype_of(module), round(self.density * in_)
        low = LowRank(self.rank).fit(W)
        rest = W - low.dense().detach()
        keep = chosen(W if self.score == "weight" else rest, count)
        kept = (W if self.columns == "weight" else rest)[:, keep]
        low = LowRank(self.rank).fit(W, dtype=dtype)
        terms: list[tuple[Factored, float]] = []
        if count and self.gamma < 1:
            form = Product(Dense(), Select(count))
            beside = ProductMatrix(Dense().fit(kept, dtype=dtype), Select(count).at(keep, (count, in_), dtype), form)
            terms.append((beside, 1 - self.gamma))
        if self.activation == "silu" and kind_of(module) == "conv2d":
            raise ValueError("lost has no activation inside a convolution: set activation='none', or leave it out with layers=...")  # fmt: skip # noqa: E501
        if self.activation == "silu" and self.gamma > 0:
            bias = getattr(module, "bias", None)
            columns = scaled(*terms[0]) if terms else None
            return Bottleneck(low, columns, self.gamma, None if bias is None else bias.detach())
        if self.gamma > 0:
            terms.insert(0, (low, self.gamma))
        if not terms:
            raise ValueError("lost with gamma=0 and no columns leaves nothing: raise one of them")
        factored = [scaled(matrix, by) for matrix, by in terms]
        if len(factored) == 1:
            return like(module, factored[0])
        form_of_sum: Form = factored[0].form + factored[1].form
        return like(module, SumMatrix(factored, form_of_sum))


SIDES = ("complement", "weight")


def chosen(M: Float[Tensor, "out in"], count: int) -> Tensor:
    """The `count` columns of largest norm, ascending; of equal ones the first."""
    return M.double().square().sum(0).sort(descending=True, stable=True).indices[:count].sort().values


def scaled(matrix: Factored, by: float) -> Factored:
    """by * matrix."""
    return ScaledMatrix(matrix, by, Scaled(matrix.form, by))
