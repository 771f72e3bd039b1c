"""What the user pays: bytes on disk, as a ratio, a size, or bits per weight."""

from __future__ import annotations

import re
from dataclasses import dataclass

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Budget:
    """Bytes that all weight files of the output may take together.

    Attributes:
        value: the number asked for.
        unit: `ratio` of the input checkpoint's bytes; `bytes`; `bpw`, bits for each of the input's weights; or
            `linears` and `bpw linears`, the same of the targeted layers alone, as papers count it, all else kept.
    """

    value: float
    unit: str

    @classmethod
    def parse(cls, text: str | float | Budget) -> Budget:
        """From `0.8`, `80MB`, `3.0bpw`, `0.8 linears` or `3bpw linears`. Raises `ValueError` on anything else."""
        if isinstance(text, Budget):
            return text
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*(?:\s+[Ll]inears)?)\s*", str(text))
        if match:
            value, unit = float(match[1]), " ".join(match[2].upper().split())
            if unit in ("", "LINEARS") and 0 < value <= 1:
                return cls(value, "linears" if unit else "ratio")
            if unit in ("BPW", "BPW LINEARS") and 0 < value <= 64:
                return cls(value, unit.lower())
            if unit in UNITS and 1 <= value * UNITS[unit] < 1e18:
                return cls(round(value * UNITS[unit]), "bytes")
        raise ValueError(f"cannot read the budget {text!r}: give a ratio (0.8), a size (80MB), bits per weight (3.0bpw), or either of the linear layers alone ('0.8 linears', '3bpw linears')")  # fmt: skip # noqa: E501

    def __str__(self) -> str:
        number = str(self.value / 1e6 if self.unit == "bytes" else self.value).removesuffix(".0")
        return (
            number
            + {"bytes": "MB", "ratio": "", "bpw": "bpw", "linears": " linears", "bpw linears": "bpw linears"}[self.unit]
        )

    def total(self, *, input_bytes: int, weights: int, target_bytes: int) -> int:
        """Bytes for the whole output.

        Args:
            input_bytes: of the input's weight files, at the input's own dtype.
            weights: number of the input's weights, tied ones once.
            target_bytes: of the layers that may be compressed, within `input_bytes`.
        """
        if self.unit == "ratio":
            return int(self.value * input_bytes)
        if self.unit == "bpw":
            return int(self.value * weights / 8)
        if self.unit == "bpw linears":
            return int(
                input_bytes - target_bytes + self.value / 8 * target_bytes / max(1, round(input_bytes / weights))
            )
        if self.unit == "linears":
            return int(input_bytes - (1 - self.value) * target_bytes)
        return int(self.value)
