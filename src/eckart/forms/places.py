"""Where the entries of a sparse matrix stand, stored as small as is cheap to read, and read back with distrust."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from eckart.forms.packing import pack, packed_width, unpack

Stored = dict[str, Tensor]
Compressed = tuple[Int[Tensor, " lines_and_1"], Int[Tensor, " count"]]


@dataclass(frozen=True)
class Places(ABC):
    """`count` places in a table of `lines` lines, each `width` places wide."""

    lines: int
    width: int
    count: int

    @abstractmethod
    def empty(self, device: str | torch.device | None = None) -> Stored:
        """The stored tensors, without values."""

    @abstractmethod
    def encode(self, mask: Bool[Tensor, "lines width"]) -> Stored:
        """The stored tensors of a mask in which exactly `count` places are true."""

    @abstractmethod
    def by_line(self, stored: Stored) -> Compressed:
        """Where each line begins among the places (and at last their number), and the place of each in its line.

        Lines are in order and places ascend within each; raises `ValueError` on anything else.
        """

    def decode(self, stored: Stored) -> Int[Tensor, " count"]:
        """line * width + place of every place, ascending. Raises `ValueError` as `by_line` does."""
        starts, index = self.by_line(stored)
        lines = torch.arange(self.lines, device=index.device)
        return lines.repeat_interleave(starts.diff(), output_size=self.count) * self.width + index

    @property
    def nbytes(self) -> int:
        """Bytes that it stores."""
        return sum(t.numel() * t.element_size() for t in self.empty("meta").values())


@dataclass(frozen=True)
class Listed(Places):
    """`index`: the places of one line after the other, as the narrowest integers. `starts`: where each line begins.

    Args:
        even: every line has equally many, and `starts` is not stored.
    """

    even: bool = False

    def empty(self, device: str | torch.device | None = None) -> Stored:
        narrowest = torch.uint8 if self.width <= 2**8 else torch.int16 if self.width <= 2**15 else torch.int32
        index = torch.empty(self.count, dtype=narrowest, device=device)
        if self.even:
            return {"index": index}
        wide = torch.int32 if self.count < 2**31 else torch.int64
        return {"index": index, "starts": torch.empty(self.lines + 1, dtype=wide, device=device)}

    def encode(self, mask: Bool[Tensor, "lines width"]) -> Stored:
        starts, index = of_mask(mask)
        return {name: (index if name == "index" else starts).to(t.dtype) for name, t in self.empty("meta").items()}

    def by_line(self, stored: Stored) -> Compressed:
        index = stored["index"].long()
        starts = torch.arange(self.lines + 1, device=index.device) * (self.count // max(1, self.lines))
        if not self.even:
            starts = stored["starts"].long()
            whole = int(starts[0]) == 0 and int(starts[-1]) == self.count
            if not whole or bool((starts.diff() < 0).any()):
                raise ValueError(f"a sparse matrix says that its lines do not begin in order between 0 and {self.count}: the file is damaged")  # fmt: skip # noqa: E501
        if self.count and not 0 <= int(index.min()) <= int(index.max()) < self.width:
            raise ValueError(f"a sparse matrix has entries outside its {self.width} places a line: the file is damaged")
        falls = index[1:] <= index[:-1]
        falls[starts[(starts > 0) & (starts < self.count)] - 1] = False  # another line begins there
        if bool(falls.any()):
            raise ValueError("the places of a sparse matrix do not ascend within a line: the file is damaged")
        return starts, index


@dataclass(frozen=True)
class Bitmap(Places):
    """`bits`: one bit a place, every line beginning at a byte.

    Args:
        even: every line has equally many.
    """

    even: bool = False

    def empty(self, device: str | torch.device | None = None) -> Stored:
        return {"bits": torch.empty(self.lines, packed_width(self.width, 1), dtype=torch.uint8, device=device)}

    def encode(self, mask: Bool[Tensor, "lines width"]) -> Stored:
        return {"bits": pack(mask.to(torch.uint8), 1)}

    def by_line(self, stored: Stored) -> Compressed:
        starts, index = of_mask(unpack(stored["bits"], 1, self.width).bool())
        uneven = self.even and bool((starts.diff() != self.count // max(1, self.lines)).any())
        if len(index) != self.count or uneven:
            raise ValueError(f"the bitmap of a sparse matrix marks {len(index)} places for {self.count} entries{' that are spread evenly' if uneven else ''}: the file is damaged")  # fmt: skip # noqa: E501
        return starts, index


def cheapest(lines: int, width: int, count: int, even: bool = False) -> Places:
    """A list or a bitmap, whichever is smaller: by the numbers alone, so that an empty module knows it."""
    listed, bitmap = Listed(lines, width, count, even), Bitmap(lines, width, count, even)
    return listed if listed.nbytes < bitmap.nbytes else bitmap


@dataclass(frozen=True)
class Choices(Places):
    """`n` places in every group of `m` along a line, stored as the number of that choice among all C(m, n).

    The choice p_1 < ... < p_n has number C(p_1, 1) + ... + C(p_n, n), in ceil(log2 C(m, n)) bits; the codes of a line
    follow one another without gaps, and a line begins at a byte. A group that is cut short by the end of its line
    keeps n of what there is, all of it where that is less.
    """

    n: int = 2
    m: int = 4

    @classmethod
    def of(cls, lines: int, width: int, n: int, m: int) -> Choices:
        return cls(lines, width, lines * (width // m * n + min(n, width % m)), n, m)

    @property
    def _runs(self) -> list[tuple[int, int, int]]:
        """(groups, places in each, how many of them are kept) of whole groups, and of the one cut short."""
        short = self.width % self.m
        runs = [(self.width // self.m, self.m, self.n), (1, short, min(self.n, short))]
        return [run for run in runs if run[0] * run[1]]

    def empty(self, device: str | torch.device | None = None) -> Stored:
        bits = sum(groups * code_bits(kept, size) for groups, size, kept in self._runs)
        return {"codes": torch.empty(self.lines, packed_width(bits, 1), dtype=torch.uint8, device=device)}

    def encode(self, mask: Bool[Tensor, "lines width"]) -> Stored:
        bits, start = [mask.new_zeros(self.lines, 0, dtype=torch.uint8)], 0
        for groups, size, kept in self._runs:
            part = mask[:, start : start + groups * size].unflatten(1, (groups, size))
            shifts = torch.arange(code_bits(kept, size), device=mask.device)
            bits.append(((number_of(part)[..., None] >> shifts) & 1).flatten(1).to(torch.uint8))
            start += groups * size
        return {"codes": pack(torch.cat(bits, dim=1), 1)}

    def by_line(self, stored: Stored) -> Compressed:
        packed = stored["codes"]
        masks, at = [packed.new_zeros(self.lines, 0, dtype=torch.bool)], 0
        for groups, size, kept in self._runs:
            width = code_bits(kept, size)
            masks.append(choice_of(_codes(packed, at, groups, width), kept, size).flatten(1))
            at += groups * width
        return of_mask(torch.cat(masks, dim=1))


def _codes(packed: UInt8[Tensor, "lines bytes"], at: int, groups: int, width: int) -> Int[Tensor, "lines groups"]:
    """Codes of `width` bits each, from bit `at` of every line on."""
    if at == 0 and 0 < width <= 8:
        return unpack(packed, width, groups).long()
    bits = unpack(packed, 1, packed.shape[1] * 8)[:, at : at + groups * width].unflatten(1, (groups, width))
    return (bits.long() << torch.arange(width, device=packed.device)).sum(-1)


def of_mask(mask: Bool[Tensor, "lines width"]) -> Compressed:
    """Starts and places of a mask."""
    counts = mask.sum(1, dtype=torch.int64)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]), mask.nonzero()[:, 1]


def code_bits(n: int, m: int) -> int:
    """Bits of the number of a choice of n out of m."""
    return (math.comb(m, n) - 1).bit_length()


def number_of(mask: Bool[Tensor, "*batch m"]) -> Int[Tensor, "*batch"]:
    """The number of the choice of the true places, in the combinatorial number system."""
    m = mask.shape[-1]
    table = torch.tensor([[math.comb(p, i) for i in range(m + 1)] for p in range(m)], device=mask.device)
    order = mask.long().cumsum(-1)
    return (table[torch.arange(m, device=mask.device), order] * mask).sum(-1)


def choice_of(codes: Int[Tensor, "*batch"], n: int, m: int) -> Bool[Tensor, "*batch m"]:
    """The inverse of `number_of`. Raises `ValueError` where a number is too large."""
    ways = math.comb(m, n)
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < ways:
        raise ValueError(f"a sparse matrix chooses {n} of {m} places in a way that does not exist: the file is damaged")
    if ways < codes.numel():
        return _unranked(torch.arange(ways, device=codes.device), n, m)[codes]
    return _unranked(codes, n, m)


def _unranked(codes: Int[Tensor, "*batch"], n: int, m: int) -> Bool[Tensor, "*batch m"]:
    """The choices of these numbers, place by place from the last."""
    mask = codes.new_zeros(*codes.shape, m, dtype=torch.bool)
    left, wanted = codes.clone(), torch.full_like(codes, n)
    for p in reversed(range(m)):
        below = torch.tensor([math.comb(p, i) for i in range(n + 1)], device=codes.device)[wanted]
        taken = (wanted > 0) & (left >= below)
        mask[..., p] = taken
        left -= torch.where(taken, below, 0)
        wanted -= taken.long()
    return mask
