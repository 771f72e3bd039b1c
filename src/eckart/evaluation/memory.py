"""Memory: what a model's weights hold, and the peak of a piece of code."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from types import TracebackType
from typing import ClassVar

from torch import nn

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def model_bytes(model: nn.Module) -> int:
    """Bytes that a model's parameters and buffers hold, storage shared between them (tied weights) counted once."""
    return sum(storages(model).values())


def storages(module: nn.Module, recurse: bool = True) -> dict[int, int]:
    """Address and bytes of every storage behind a module's parameters and buffers."""
    tensors = (*module.parameters(recurse), *module.buffers(recurse))
    held = (tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta")
    return {storage.data_ptr(): storage.nbytes() for storage in held}


class PeakMemory:
    """Peak resident memory of this process within a `with` block, in bytes, of all threads.

    On Linux the kernel's high-water mark is reset on entry, so the peak is exact and belongs to the block; regions may
    nest. Elsewhere, or where the mark cannot be reset, the peak is that of the process so far, and `exact` is False.

    Attributes:
        start: resident when the block was entered.
        peak: most that was resident within the block; set when it ends.
    """

    _open: ClassVar[list[PeakMemory]] = []

    def __init__(self) -> None:
        self.start = self.peak = 0
        self.exact = False

    @property
    def added(self) -> int:
        """How much the block needed beyond what was resident before it."""
        return max(0, self.peak - self.start)

    def __enter__(self) -> PeakMemory:
        before = peak_so_far()
        for region in self._open:
            region.peak = max(region.peak, before)
        self.exact = _reset()
        self.start = resident()
        self._open.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._open.remove(self)
        self.peak = max(self.peak, peak_so_far())


def resident() -> int:
    """Bytes of this process that are in memory now (the peak so far where that is not told)."""
    return _status("VmRSS") or peak_so_far()


def peak_so_far() -> int:
    """The kernel's high-water mark of resident bytes since the process began or the mark was reset."""
    mark = _status("VmHWM")
    if mark is not None:
        return mark
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def _status(field: str) -> int | None:
    if not STATUS.exists():
        return None
    line = next((line for line in STATUS.read_text().splitlines() if line.startswith(field + ":")), None)
    return None if line is None else int(line.split()[1]) * 1024


def _reset() -> bool:
    """Set the high-water mark to what is resident now; whether that could be done."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True
