"""Groups of weights as a length and a direction, which is a point of the pyramid lattice: no table is stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from eckart.forms import kernels
from eckart.forms.algebra import thin
from eckart.forms.base import FORMS, DecodedMatrix, Factored, Form, Shape, check_shape, empty, stored
from eckart.forms.gptq import GPTQ
from eckart.forms.grids import Uniform
from eckart.forms.packing import pack, pack_wide, packed_width, unpack, unpack_wide
from eckart.forms.quantized import Groups, Quantized, QuantizedMatrix
from eckart.linalg.constants import constant
from eckart.linalg.kmeans1d import kmeans1d
from eckart.linalg.pyramid import MOST_BITS, MOST_PULSES, index_bits, index_of, nearest_point, point_of
from eckart.linalg.weighting import PLAIN, Weighting
from eckart.linalg.whitening import IdentityRoot

RUNGS = 12
ROWS = 256
"""That are decoded at a time."""
CHUNK = 2**22
"""Weights that are fitted at a time."""


class PyramidMatrix(DecodedMatrix):
    """The number of every group's lattice point, a code for its length, and a scale for every row.

    Attributes:
        points: (out, bytes) packed numbers of `bits` bits.
        gains: (out, bytes) packed codes.
        norms: (out,).
    """

    points: Tensor
    gains: Tensor
    form: Pyramid

    def __init__(
        self, points: UInt8[Tensor, "out a"], gains: UInt8[Tensor, "out b"], norms: nn.Parameter, shape: Shape,
        form: Pyramid,
    ):  # fmt: skip
        super().__init__()
        self.register_buffer("points", points)
        self.register_buffer("gains", gains)
        self.norms, self.shape, self.form = norms, shape, form

    def forward(
        self, x: Float[Tensor, "*batch in"], bias: Float[Tensor, " out"] | None = None
    ) -> Float[Tensor, "*batch out"]:
        learns = torch.is_grad_enabled() and self.norms.requires_grad
        codes = self.codes() if kernels.eager(x) and not learns else None
        return super().forward(x, bias) if codes is None else codes.forward(x, bias)

    def portable(self) -> Factored:
        return self.codes() or self

    def codes(self) -> QuantizedMatrix | None:
        """The same matrix with its points as codes of 4 to 8 bits, made at first use and held beside the module.

        Numbers of points take a walk to decode, too long for every product. None where an integer needs more than 8
        bits.
        """
        sources = [self.points, self.gains, self.norms]
        return kernels.kept(self).keep("codes", sources, self._codes)

    def _codes(self) -> QuantizedMatrix | None:
        at, out = self.form.layout(self.shape), self.shape[0]
        y = torch.empty(out, at.groups, at.group, dtype=torch.int16, device=self.points.device)
        for rows in (slice(i, i + ROWS) for i in range(0, out, ROWS)):
            y[rows] = point_of(unpack_wide(self.points[rows], at.bits, at.groups), at.group, at.pulses)
        most = int(y.abs().max()) if y.numel() else 0
        bits = max(4, most.bit_length() + 1)
        if bits > 8:
            return None
        form = Quantized(bits, at.group, Uniform(symmetric=True))
        groups = Groups(form, at.width, self.norms.dtype)
        gains = at.levels.to(self.norms)[unpack(self.gains, self.form.gain_bits, at.groups).long()]
        lengths = y.float().square().sum(-1).sqrt().clamp_min(1.0).to(gains)
        scale = (gains * self.norms[:, None] / lengths)[..., None]
        codes = (y + 2 ** (bits - 1)).to(torch.uint8).flatten(1)[:, : at.width]
        return form.assembled(codes, groups.stored({"scale": scale}), groups).requires_grad_(False)

    def decoded(self, rows: slice | Tensor) -> Float[Tensor, "rows in"]:
        at = self.form.layout(self.shape)
        y = point_of(unpack_wide(self.points[rows], at.bits, at.groups), at.group, at.pulses)
        return at.joined(y, unpack(self.gains[rows], at.gain_bits, at.groups), self.norms[rows])


@dataclass(frozen=True)
class Layout:
    """What a closed form is on one shape: columns of a group, groups of a row, pulses, bits of a point's number."""

    width: int
    group: int
    groups: int
    pulses: int
    bits: int
    gain_bits: int

    @property
    def levels(self) -> Float[Tensor, " levels"]:
        """Lengths of groups, in norms of their row."""
        return gain_levels(self.gain_bits, self.group, self.width)

    def split(self, x: Float[Tensor, "out in"]) -> Float[Tensor, "out groups g"]:
        """Columns by groups, the last one filled up with zeros."""
        return F.pad(x, (0, self.groups * self.group - self.width)).unflatten(1, (self.groups, self.group))

    def joined(
        self, y: Int[Tensor, "out groups g"], codes: UInt8[Tensor, "out groups"], norms: Float[Tensor, " out"]
    ) -> Float[Tensor, "out in"]:
        """The matrix of points, codes of lengths, and norms, in the dtype of these."""
        lengths = self.levels.to(norms)[codes.long()] * norms[:, None]
        return (unit(y).to(norms.dtype) * lengths[..., None]).flatten(1)[:, : self.width]


@FORMS.word("pyramid")
@dataclass(frozen=True)
class Pyramid(Form):
    """Groups of weights by shape and gain (pyramid vector quantisation, arXiv 2410.16926).

    A group's direction is the nearest of all integer points whose absolute values add up to `pulses`, kept as its
    number among them; its length is one of 2^gain_bits shares of the row's norm, placed by the law that they follow
    where the row's direction is uniform (a square root of a Beta variable), zero among them. A weight on inputs is
    met by error feedback from group to group, and by the length that is best under it.

    Args:
        pulses: None is decided by the budget.
        group: consecutive columns, the last group filled up with zeros. All points of a group must be numbered in 62
            bits: up to 3.9 bits a weight in groups of 16, more in smaller ones.
        gain_bits: of a group's length.
        damping: added to the diagonal of the weight on inputs, relative to its mean.
    """

    pulses: int | None = None
    group: int = 16
    gain_bits: int = 4
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.pulses is not None and (not isinstance(self.pulses, int) or not 1 <= self.pulses <= MOST_PULSES):
            raise ValueError(f"pyramid(pulses={self.pulses!r}): a point has 1 to {MOST_PULSES} pulses")
        if not isinstance(self.group, int) or not 1 <= self.group <= 64:
            raise ValueError(f"pyramid(group={self.group!r}): a group has 1 to 64 columns")
        if not isinstance(self.gain_bits, int) or not 1 <= self.gain_bits <= 8:
            raise ValueError(f"pyramid(gain_bits={self.gain_bits!r}): a length has 1 to 8 bits")
        GPTQ(damping=self.damping)  # which refuses what is no damping

    @property
    def open(self) -> bool:
        return self.pulses is None

    def layout(self, shape: Shape) -> Layout:
        """Raises `ValueError` where points cannot be numbered."""
        if self.pulses is None:
            raise ValueError(f"{self} has no pulses yet: give them, or a budget that decides them")
        group = min(self.group, max(1, shape[1]))
        bits = index_bits(group, self.pulses)
        if bits > MOST_BITS:
            raise ValueError(f"{self}: points in groups of {group} need {bits} bits, the most is {MOST_BITS}: take fewer pulses or smaller groups")  # fmt: skip # noqa: E501
        return Layout(shape[1], group, -(-shape[1] // group), self.pulses, bits, self.gain_bits)

    def ladder(self, shape: Shape) -> list[Form]:
        if not self.open:
            return [self]
        group = min(self.group, max(1, shape[1]))
        pulses = {bits: k for k in range(1, MOST_PULSES + 1) if (bits := index_bits(group, k)) <= MOST_BITS}
        return thin([replace(self, pulses=k) for _, k in sorted(pulses.items())], RUNGS)

    def build(self, shape: Shape, *, dtype: torch.dtype | None = None, device: str | None = None) -> PyramidMatrix:
        check_shape(shape, self)
        at, out = self.layout(shape), shape[0]
        points = torch.empty(out, packed_width(at.groups, at.bits), dtype=torch.uint8, device=device)
        gains = torch.empty(out, packed_width(at.groups, self.gain_bits), dtype=torch.uint8, device=device)
        return PyramidMatrix(points, gains, empty(out, dtype=dtype, device=device), shape, self)

    def fit(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting = PLAIN, *, dtype: torch.dtype | None = None
    ) -> PyramidMatrix:
        shape = (matrix.shape[0], matrix.shape[1])
        at, parts = self.layout(shape), self._parts(matrix, weighting, dtype or matrix.dtype)
        packed = [(pack_wide(index_of(y, at.pulses), at.bits), pack(codes, at.gain_bits), n) for y, codes, n in parts]
        points, gains, norms = (torch.cat(part) for part in zip(*packed, strict=True))
        return PyramidMatrix(points, gains, stored(norms, dtype or matrix.dtype), shape, self)

    def approximation(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting, dtype: torch.dtype
    ) -> Float[Tensor, "out in"]:
        at = self.layout((matrix.shape[0], matrix.shape[1]))
        parts = self._parts(matrix, weighting, dtype)
        return torch.cat([at.joined(y, codes, norms.to(dtype)) for y, codes, norms in parts]).to(matrix.dtype)

    def _parts(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting, dtype: torch.dtype
    ) -> Iterator[tuple[Int[Tensor, "rows groups g"], UInt8[Tensor, "rows groups"], Float[Tensor, " rows"]]]:
        """Points, codes of lengths, and norms of some rows at a time, none of which asks for another."""
        W = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
        at = self.layout((W.shape[0], W.shape[1]))
        fed = not isinstance(weighting.right, IdentityRoot) and W.numel() > 0
        U = GPTQ("given", self.damping).feedback(weighting, at.width).U.to(W) if fed else None
        for rows in W.split(max(1, CHUNK // max(1, at.width))):
            y = nearest_point(at.split(rows), at.pulses)
            codes, norms = self._gains(rows, y, at, dtype)
            if U is not None:
                y, codes = self._swept(rows, norms, U, at)
            yield y, codes, norms

    def _gains(self, W: Tensor, y: Tensor, at: Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The best lengths for directions, and the best norms for these."""
        wanted = (at.split(W) * unit(y).to(W)).sum(-1)
        levels, norms = at.levels.to(W), W.square().sum(1).sqrt()
        for _ in range(2):
            held = norms.to(dtype).to(W)
            codes = nearest_level(wanted, held, levels)
            gains = levels[codes.long()]
            energy = gains.square().sum(1)
            norms = torch.where(energy > 0, (gains * wanted).sum(1) / torch.where(energy > 0, energy, 1.0), 0.0)
        return codes, held

    def _swept(self, W: Tensor, norms: Tensor, U: Tensor, at: Layout) -> tuple[Tensor, Tensor]:
        """Points and lengths, group after group, each one's error moved into the groups not yet done."""
        rest, levels = W.clone(), at.levels.to(W)
        points = torch.zeros(W.shape[0], at.groups, at.group, dtype=torch.int64, device=W.device)
        codes = torch.zeros(W.shape[0], at.groups, dtype=torch.uint8, device=W.device)
        for j in range(at.groups):
            start, end = j * at.group, min((j + 1) * at.group, at.width)
            v, own = rest[:, start:end], U[start:end, start:end]
            points[:, j] = nearest_point(F.pad(v, (0, at.group - v.shape[1])), at.pulses)
            direction = unit(points[:, j]).to(W)[:, : v.shape[1]]
            seen, aim = (torch.linalg.solve_triangular(own, t, upper=True, left=False) for t in (direction, v))
            energy = seen.square().sum(1)
            wanted = (seen * aim).sum(1) / torch.where(energy > 0, energy, 1.0)
            codes[:, j] = nearest_level(wanted[:, None], norms, levels)[:, 0]
            lengths = levels[codes[:, j].long()] * norms
            error = aim - seen * lengths[:, None]
            rest[:, end:] -= error @ U[start:end, end:]
        return points, codes


def unit(y: Int[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """Points on the unit sphere, in float32 or wider."""
    x = y.to(torch.get_default_dtype())
    return x / x.square().sum(-1, keepdim=True).sqrt().clamp_min(1.0)


def nearest_level(
    wanted: Float[Tensor, "out groups"], norms: Float[Tensor, " out"], levels: Float[Tensor, " levels"]
) -> UInt8[Tensor, "out groups"]:
    """Codes of lengths."""
    shares = wanted / torch.where(norms > 0, norms, torch.inf)[:, None]
    return torch.bucketize(shares.contiguous(), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


@constant
def gain_levels(bits: int, group: int, width: int) -> Float[Tensor, " levels"]:
    """Zero, and 2^bits - 1 lengths of groups of a random vector of norm 1, least in mean squared error (Lloyd-Max).

    The square of such a length follows Beta(group / 2, (width - group) / 2).
    """
    at = (torch.arange(2048, dtype=torch.float64) + 0.5) / 2048
    law = (group - 1) * at.log() + (max(1, width - group) / 2 - 1) * (1 - at.square()).log()
    levels = kmeans1d(at, 2**bits - 1, (law - law.max()).exp())
    return torch.cat([levels.new_zeros(1), levels])
