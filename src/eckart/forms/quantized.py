"""Weights as codes of a few bits on a grid that every group of columns chooses for itself."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from eckart.forms import kernels
from eckart.forms.base import FORMS, DecodedMatrix, Factored, Form, Shape, check_shape
from eckart.forms.dense import Dense
from eckart.forms.grids import Grid, Uniform
from eckart.forms.packing import pack, packed_width, unpack
from eckart.forms.roundings import GroupParameters, Nearest, Rounding, Stored
from eckart.linalg.weighting import PLAIN, Weighting

LADDER = (2, 3, 4, 5, 6, 8)


class QuantizedMatrix(DecodedMatrix):
    """Packed codes, and for every group of columns the parameters of its grid.

    Attributes:
        codes: (out, bytes) uint8, rows packed one after the other.
        floats: name -> the parameters that are floating point, as a matrix (groups * width, out) of the form
            `form.scales`.
        integers: name -> (out, bytes) packed codes of the parameters that are whole numbers.
    """

    codes: Tensor
    form: Quantized

    def __init__(
        self, codes: UInt8[Tensor, "out bytes"], floats: dict[str, Factored], integers: dict[str, Tensor], shape: Shape,
        form: Quantized,
    ):  # fmt: skip
        super().__init__()
        self.register_buffer("codes", codes)
        self.floats = nn.ModuleDict(floats)
        for name, packed in integers.items():
            self.register_buffer(name, packed)
        self.shape, self.form = shape, form

    def forward(
        self, x: Float[Tensor, "*batch in"], bias: Float[Tensor, " out"] | None = None
    ) -> Float[Tensor, "*batch out"]:
        return kernels.linear(self, x, bias)

    def decoded(self, rows: slice | Tensor) -> Float[Tensor, "rows in"]:
        """Some rows of the matrix."""
        at = Groups(self.form, self.shape[1])
        p: dict[str, Tensor] = {}
        for name, slot in at.slots.items():
            if slot.bits is None:
                matrix = self.floats[name]
                assert isinstance(matrix, Factored)
                p[name] = matrix.dense().T[rows].unflatten(1, (at.count, slot.width))
        like = next(iter(p.values()))
        for name, slot in at.slots.items():
            if slot.bits is not None:
                codes = unpack(getattr(self, name)[rows], slot.bits, at.count * slot.width)
                p[name] = codes.to(like.dtype).unflatten(1, (at.count, slot.width))
        return at.decoded(unpack(self.codes[rows], at.bits, at.width), p)


@FORMS.word("quantized")
@dataclass(frozen=True)
class Quantized(Form):
    """Each weight a code of `bits` bits on the grid of its group, packed without gaps.

    Args:
        bits: of every code, 1 to 8; None is decided by the budget.
        group: consecutive columns of one row that share the grid's parameters, the last group what is left of the
            row; None takes the whole row.
        grid: which numbers codes stand for.
        rounding: how codes are chosen.
        scales: the form of the matrix of scales (and of other floating point parameters), as (groups, out), so that
            `quantized(bits=3, group=16, scales=quantized(bits=3, group=16))` quantises those of 16 consecutive rows
            together. `dense()` keeps them in the storage dtype.
    """

    bits: int | None = None
    group: int | None = 64
    grid: Grid = field(default_factory=Uniform)
    rounding: Rounding = field(default_factory=Nearest)
    scales: Form = field(default_factory=Dense)

    def __post_init__(self) -> None:
        if self.bits is not None and (not isinstance(self.bits, int) or not 1 <= self.bits <= 8):
            raise ValueError(f"quantized(bits={self.bits!r}): a code has 1 to 8 bits")
        if self.group is not None and (not isinstance(self.group, int) or self.group < 1):
            raise ValueError(f"quantized(group={self.group!r}): the group is a positive number of columns, or None for all")  # fmt: skip # noqa: E501
        kinds = ((self.grid, Grid, "grid"), (self.rounding, Rounding, "rounding"), (self.scales, Form, "scales"))
        for value, kind, name in kinds:
            if not isinstance(value, kind):
                raise ValueError(f"quantized({name}={value}): that is no {kind.__name__.lower()}")

    @property
    def open(self) -> bool:
        return self.bits is None or self.scales.open

    def ladder(self, shape: Shape) -> list[Form]:
        return [self] if self.bits is not None else [replace(self, bits=bits) for bits in LADDER]

    def build(self, shape: Shape, *, dtype: torch.dtype | None = None, device: str | None = None) -> QuantizedMatrix:
        check_shape(shape, self)
        out, at = shape[0], Groups(self, shape[1])
        floats: dict[str, Factored] = {}
        integers: dict[str, Tensor] = {}
        for name, slot in self.grid.slots(at.bits).items():
            size = at.count * slot.width
            if slot.bits is None:
                floats[name] = self.scales.build((size, out), dtype=dtype, device=device)
            else:
                integers[name] = torch.empty(out, packed_width(size, slot.bits), dtype=torch.uint8, device=device)
        codes = torch.empty(out, packed_width(shape[1], at.bits), dtype=torch.uint8, device=device)
        return QuantizedMatrix(codes, floats, integers, shape, self)

    def fit(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting = PLAIN, *, dtype: torch.dtype | None = None
    ) -> QuantizedMatrix:
        W = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
        at = Groups(self, W.shape[1], dtype or matrix.dtype)
        return self.assembled(*self.rounding.round(W, weighting, at), at)

    def assembled(self, codes: UInt8[Tensor, "out in"], p: Stored, at: Groups) -> QuantizedMatrix:
        """The module of codes and parameters that were chosen for it."""
        shape = (codes.shape[0], codes.shape[1])
        return QuantizedMatrix(pack(codes, at.bits), dict(p.floats), at.packed(p), shape, self)


class Groups:
    """The columns of a matrix in groups, and its grid applied to them.

    Args:
        form: closed.
        width: columns of the matrix.
        dtype: of stored parameters.
    """

    def __init__(self, form: Quantized, width: int, dtype: torch.dtype | None = None):
        if form.bits is None:
            raise ValueError(f"{form} has no bits yet: give them, or a budget that decides them")
        self.form, self.grid, self.bits, self.width, self.dtype = form, form.grid, form.bits, width, dtype
        self.group = min(form.group or max(1, width), max(1, width))
        self.count = -(-width // self.group)
        self.slots = self.grid.slots(self.bits)

    @property
    def rowwise(self) -> bool:
        return isinstance(self.form.scales, Dense)

    def split(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows groups g"]:
        """Columns by groups; the last one is filled up with its last column, which moves neither end of its range."""
        filled = self.count * self.group - self.width
        if filled:
            x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], filled)], dim=-1)
        return x.unflatten(-1, (self.count, self.group))

    def joined(self, x: Tensor) -> Tensor:
        """The inverse of `split`."""
        return x.flatten(-2)[..., : self.width]

    def inside(self, like: Tensor) -> Float[Tensor, "groups g"]:
        """1 for the columns of the matrix, 0 for those that fill the last group."""
        columns = torch.arange(self.count * self.group, device=like.device) < self.width
        return columns.to(like.dtype).view(self.count, self.group)

    def parameters(
        self, W: Float[Tensor, "out in"], weight: Float[Tensor, "#out in"] | None = None, *, searched: bool = True
    ) -> Stored:
        """The grid's parameters for a matrix, as they will be after storage; without its search if so told."""
        if weight is not None:
            weight = self.split(weight) * self.inside(weight)
        grid = self.grid if searched else self.grid.unsearched
        return self.stored(grid.fit(self.split(W), self.bits, weight))

    def stored(self, values: GroupParameters) -> Stored:
        """Parameters rounded as storage rounds them, and the modules that hold those in floating point."""
        floats: dict[str, Factored] = {}
        found = dict(values)
        for name, value in values.items():
            if self.slots[name].bits is None:
                floats[name] = self.form.scales.fit(value.flatten(1).T.contiguous(), dtype=self.dtype)
                found[name] = floats[name].dense().detach().T.unflatten(1, tuple(value.shape[1:])).to(value.dtype)
        return Stored(found, floats)

    def packed(self, p: Stored) -> dict[str, Tensor]:
        """The parameters that are whole numbers, packed."""
        return {
            name: pack(p.values[name].flatten(1).to(torch.uint8), slot.bits)
            for name, slot in self.slots.items()
            if slot.bits is not None
        }

    def encode(self, W: Float[Tensor, "out in"], p: Stored) -> UInt8[Tensor, "out in"]:
        return self.joined(self.grid.encode(self.split(W), p.values, self.bits))

    def decode(self, codes: UInt8[Tensor, "out in"], p: Stored) -> Float[Tensor, "out in"]:
        return self.decoded(codes, p.values)

    def decoded(self, codes: UInt8[Tensor, "out in"], values: GroupParameters) -> Float[Tensor, "out in"]:
        """The matrix that codes stand for."""
        return self.joined(self.grid.decode(self.split(codes), values, self.bits))

    def column(
        self, w: Float[Tensor, " out"], j: int, p: Stored
    ) -> tuple[UInt8[Tensor, " out"], Float[Tensor, " out"]]:
        own = {name: value[:, j // self.group] for name, value in p.values.items()}
        codes = self.grid.encode(w[:, None], own, self.bits)
        return codes[:, 0], self.grid.decode(codes, own, self.bits)[:, 0]

    def design(self, codes: UInt8[Tensor, "out in"], p: Stored) -> dict[str, Float[Tensor, "out groups g k"]]:
        found = self.grid.design(self.split(codes), p.values, self.bits)
        return {name: d * self.inside(d)[..., None] for name, d in found.items()}
