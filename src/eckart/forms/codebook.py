"""Vector quantisation: each few neighbouring weights of a row are one entry of a shared table."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from eckart.forms.base import FORMS, DecodedMatrix, Form, Shape, check_shape, empty, stored
from eckart.forms.packing import pack, packed_width, unpack
from eckart.linalg.kmeans import kmeans, nearest
from eckart.linalg.weighting import PLAIN, Weighting

LADDER = (2, 4, 6, 8, 10, 12)


class CodebookMatrix(DecodedMatrix):
    """Every row in pieces of `dim` columns, the last one cut off where the row ends; each piece a row of a table.

    Attributes:
        table: (tables, entries, dim), one table for each block of neighbouring pieces.
        low, high: (out, bytes) packed codes, their lowest eight bits and what is above.
    """

    low: Tensor
    high: Tensor
    form: Codebook

    def __init__(self, table: Tensor, low: Tensor, high: Tensor | None, shape: Shape, form: Codebook):
        super().__init__()
        self.table = nn.Parameter(table) if not isinstance(table, nn.Parameter) else table
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.shape, self.form = shape, form

    def codes(self, rows: slice | Tensor = slice(None)) -> Int[Tensor, "rows pieces"]:
        """The codes themselves."""
        at = Pieces(self.form, self.shape)
        codes = unpack(self.low[rows], min(at.bits, 8), at.count).long()
        if self.high is not None:
            codes = codes | unpack(self.high[rows], at.bits - 8, at.count).long() << 8
        return codes

    def decoded(self, rows: slice | Tensor) -> Float[Tensor, "rows in"]:
        at, codes = Pieces(self.form, self.shape), self.codes(rows)
        offset = at.table_of(codes.device) * self.table.shape[1]
        return F.embedding(codes + offset, self.table.flatten(0, 1)).flatten(1)[:, : self.shape[1]]


@FORMS.word("codebook")
@dataclass(frozen=True)
class Codebook(Form):
    """Vector quantisation by weighted k-means (Lloyd, 1982), single errors weighted by `weighting.importance`.

    Takes `bits` / `dim` bits a weight, and 2^bits * dim numbers for each table (as many entries as there are pieces,
    where those are fewer). Couplings between errors, which a covariance has off its diagonal, are left out.

    Args:
        bits: of every code, 1 to 16; None is decided by the budget.
        dim: neighbouring columns that one code stands for.
        tables: blocks of columns with a table of their own; as many as there are pieces in a row, where those are
            fewer.
        seed: of the start of k-means.
    """

    bits: int | None = None
    dim: int = 4
    tables: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bits is not None and (not isinstance(self.bits, int) or not 1 <= self.bits <= 16):
            raise ValueError(f"codebook(bits={self.bits!r}): a code has 1 to 16 bits")
        for name in ("dim", "tables"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"codebook({name}={value!r}): the number of {name} is a positive integer")
        if not isinstance(self.seed, int):
            raise ValueError(f"codebook(seed={self.seed!r}): the seed is an integer")

    @property
    def open(self) -> bool:
        return self.bits is None

    def ladder(self, shape: Shape) -> list[Form]:
        return [replace(self, bits=bits) for bits in LADDER] if self.open else [self]

    def build(self, shape: Shape, *, dtype: torch.dtype | None = None, device: str | None = None) -> CodebookMatrix:
        check_shape(shape, self)
        at, out = Pieces(self, shape), shape[0]
        low, high = (torch.empty(out, packed_width(at.count, b), dtype=torch.uint8, device=device)
                     for b in (min(at.bits, 8), max(at.bits - 8, 0)))  # fmt: skip
        table = empty(at.tables, at.entries, self.dim, dtype=dtype, device=device)
        return CodebookMatrix(table, low, high if at.bits > 8 else None, shape, self)

    def fit(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting = PLAIN, *, dtype: torch.dtype | None = None
    ) -> CodebookMatrix:
        shape = (matrix.shape[0], matrix.shape[1])
        at = Pieces(self, shape)
        W = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
        importance = weighting.importance(shape).to(W)
        mean = importance.mean() if importance.numel() else importance.sum()
        X, weights = at.split(W), at.split(importance / mean if mean > 0 else torch.ones_like(W))
        tables, codes = [], []
        for block in at.blocks():
            x, f = X[:, block].flatten(0, 1), weights[:, block].flatten(0, 1)
            entries = min(at.entries, len(x))
            centroids = kmeans(x, max(1, entries), f, seed=self.seed).centroids
            # codes are chosen for the table as it is stored
            table = F.pad(centroids, (0, 0, 0, at.entries - len(centroids))).to(dtype or matrix.dtype)
            tables.append(table)
            codes.append(nearest(x, table[: len(centroids)].to(x), f)[0].view(X[:, block].shape[:2]))
        every = torch.cat(codes, dim=1) if codes else torch.zeros(W.shape[0], 0, dtype=torch.int64, device=W.device)
        low = pack((every & 255).to(torch.uint8), min(at.bits, 8))
        high = pack((every >> 8).to(torch.uint8), at.bits - 8) if at.bits > 8 else None
        return CodebookMatrix(stored(torch.stack(tables), None), low, high, shape, self)


class Pieces:
    """The rows of a matrix of this shape in pieces of `dim` columns, and the pieces by tables."""

    def __init__(self, form: Codebook, shape: Shape):
        if form.bits is None:
            raise ValueError(f"{form} has no bits yet: give them, or a budget that decides them")
        self.bits, self.dim = form.bits, form.dim
        self.count = -(-shape[1] // form.dim)
        self.tables = max(1, min(form.tables, self.count))
        self.per_table = max(1, -(-self.count // self.tables))
        self.tables = max(1, -(-self.count // self.per_table))
        self.entries = max(1, min(2**self.bits, shape[0] * min(self.per_table, self.count)))

    def split(self, x: Float[Tensor, "out in"]) -> Float[Tensor, "out pieces dim"]:
        """Pieces, the last filled up with zeros."""
        return F.pad(x, (0, self.count * self.dim - x.shape[1])).unflatten(1, (self.count, self.dim))

    def blocks(self) -> list[slice]:
        """The pieces of every table."""
        return [slice(t * self.per_table, min((t + 1) * self.per_table, self.count)) for t in range(self.tables)]

    def table_of(self, device: torch.device) -> Int[Tensor, " pieces"]:
        """Index of the table of every piece of a row."""
        return torch.arange(self.count, device=device) // self.per_table
