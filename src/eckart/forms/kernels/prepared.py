"""What is kept beside matrices of codes, and what kernels know of a quantised one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor, nn

from eckart.forms.dense import DenseMatrix
from eckart.forms.grids import Uniform
from eckart.forms.packing import unpack

if TYPE_CHECKING:
    from eckart.forms.quantized import QuantizedMatrix

T = TypeVar("T")
Stamp = tuple[tuple[int, int, torch.dtype], ...]


class Kept:
    """What was made of a module's tensors, as long as these are as they were."""

    def __init__(self) -> None:
        self.made: dict[str, tuple[Stamp, list[Tensor], Any]] = {}

    def keep(self, name: str, sources: Sequence[Tensor], make: Callable[[], T]) -> T:
        """What `make` returned when the sources were as they are now."""
        stamp = tuple((t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype) for t in sources)
        found = self.made.get(name)
        if found is None or found[0] != stamp:
            with torch.inference_mode(False), torch.no_grad():  # what inference made serves learning, too
                found = (stamp, [t.detach() for t in sources], make())  # sources held: no other gets their address
            self.made[name] = found
        value: T = found[2]
        return value


class Prepared(Kept):
    """A matrix on a uniform grid as weight = scale * (code - middle) + shift, and the layouts made of it.

    Attributes:
        out, width: the matrix's shape.
        bits: of a code.
        group: columns that share a scale; `count` of them in a row.
        middle: the code, not always whole, that stands for zero before the shift; None where the grid is not uniform.
    """

    def __init__(self, matrix: QuantizedMatrix):
        super().__init__()
        form = matrix.form
        assert form.bits is not None
        self.out, self.width = matrix.shape
        self.bits = form.bits
        self.group = max(1, min(form.group or self.width, self.width))
        self.count = -(-self.width // self.group)
        self.grid = form.grid
        self.middle = (0.5 if self.bits == 1 else 2.0 ** (self.bits - 1)) if type(form.grid) is Uniform else None

    def scale_and_shift(
        self, matrix: QuantizedMatrix
    ) -> tuple[Float[Tensor, "groups out"], Float[Tensor, "groups out"] | None]:
        """In float32; the shift is None where the grid is symmetric."""
        assert isinstance(self.grid, Uniform)
        assert self.middle is not None
        scale = self._float(matrix, "scale")
        if self.grid.symmetric:
            return scale, None
        if self.grid.zero == "real":
            return scale, self._float(matrix, "zero") + self.middle * scale
        zero = unpack(matrix.get_buffer("zero"), self.bits, self.count).T
        return scale, (self.middle - zero.float()) * scale

    def parameters(self, matrix: QuantizedMatrix) -> list[Tensor]:
        """The tensors that scale and shift are made of."""
        own: list[Tensor] = [b for name, b in matrix._buffers.items() if name != "codes" and b is not None]
        for stored in matrix.floats.values():
            own += [stored.weight] if isinstance(stored, DenseMatrix) else stored.state_dict(keep_vars=True).values()
        return own

    def codes(self, matrix: QuantizedMatrix, rows: slice) -> UInt8[Tensor, "rows in"]:
        return unpack(matrix.codes[rows], self.bits, self.width)

    def signed(self, matrix: QuantizedMatrix) -> Int8[Tensor, "out in"]:
        """Codes of a grid with a whole middle, as numbers around zero."""
        assert self.middle is not None
        made = torch.empty(self.out, self.width, dtype=torch.int8)
        for start in range(0, self.out, ROWS):
            codes = self.codes(matrix, slice(start, start + ROWS))
            made[start : start + ROWS] = (codes.to(torch.int16) - int(self.middle)).to(torch.int8)
        return made

    def _float(self, matrix: QuantizedMatrix, name: str) -> Float[Tensor, "groups out"]:
        stored: Any = matrix.floats[name]
        dense: Tensor = stored.dense()
        return dense.detach().to(torch.float32)


ROWS = 256
"""Rows that are unpacked at a time."""

_KEPT: WeakKeyDictionary[nn.Module, Kept] = WeakKeyDictionary()


def kept(matrix: nn.Module) -> Kept:
    """Of any matrix; `prepared` of a quantised one."""
    return _KEPT.setdefault(matrix, Kept())


def prepared(matrix: QuantizedMatrix) -> Prepared:
    found = _KEPT.get(matrix)
    if not isinstance(found, Prepared):
        found = _KEPT[matrix] = Prepared(matrix)
    return found


def forget(model: nn.Module) -> None:
    """Drop what is kept for the matrices of codes in a model; it is made again when next used.

    Only needed to free memory, or after writing to codes or scales through `.data`, which torch does not count.
    """
    for module in model.modules():
        _KEPT.pop(module, None)


def cached_bytes(model: nn.Module) -> int:
    """Bytes that are held beside the matrices of codes in a model: layouts and their scales, not what is stored."""
    return sum(t.numel() * t.element_size() for t in _held(model))


def _held(model: nn.Module) -> list[Tensor]:
    kept = (_KEPT[module] for module in model.modules() if module in _KEPT)
    return [t for at in kept for _, _, value in at.made.values() for t in _tensors(value)]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, nn.Module):
        return [*value.state_dict().values(), *_held(value)]
    return [t for v in value for t in _tensors(v)] if isinstance(value, tuple) else []
