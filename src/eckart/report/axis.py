"""Round ticks on linear and logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from eckart.report.numbers import finite


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic range with round ticks."""

    low: float
    high: float
    log: bool = False
    label: str = ""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"An axis needs finite low < high, but got {self.low} and {self.high}.")
        if self.log and self.low <= 0:
            raise ValueError(f"A logarithmic axis needs positive bounds, but its low end is {self.low}.")

    @classmethod
    def around(cls, values: Iterable[float], *, log: bool = False, zero: bool = False, label: str = "") -> Axis:
        """The tightest round axis that holds all finite values (where log, the positive ones); `zero` includes zero."""
        kept = [value for value in map(finite, values) if value is not None and (value > 0 or not log)]
        if log:
            low, high = (min(kept), max(kept)) if kept else (1.0, 10.0)
            return cls(_round_down(low), _round_up(max(high, 1.01 * low)), True, label)
        low, high = (min(kept), max(kept)) if kept else (0.0, 1.0)
        if zero:
            low, high = min(low, 0.0), max(high, 0.0)
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            low, high = (0.0, 1.0) if low == 0 else (low - 0.1 * abs(low), high + 0.1 * abs(high))
        step = _step(high - low, 5)
        return cls(step * math.floor(low / step + 1e-9), step * math.ceil(high / step - 1e-9), False, label)

    def at(self, value: float) -> float:
        """Where the value lies, as a fraction of the axis."""
        if self.log:
            if value <= 0:
                raise ValueError(f"{value} has no place on a logarithmic axis.")
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 6) -> list[float]:
        """At most so many round numbers inside the axis."""
        if self.log and self.high / self.low >= 6:
            low, high = math.floor(math.log10(self.low) + 1e-9), math.ceil(math.log10(self.high) - 1e-9)
            candidates = [m * 10.0**p for p in range(low, high + 1) for m in (1, 2, 5)]
            inside = [value for value in candidates if self._holds(value)]
            stride = 1
            while len(inside) > most:
                inside = [10.0**p for p in range(low, high + 1) if p % stride == 0 and self._holds(10.0**p)]
                stride += 1
            return inside
        step = _step(self.high - self.low, most - 1)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(index * step, 12) if step > 1e-9 else index * step for index in range(first, last + 1)]

    def _holds(self, value: float) -> bool:
        return self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)


def _step(span: float, pieces: int) -> float:
    rough = span / pieces
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def _round_down(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (5, 2, 1) if m * power <= value * (1 + 1e-9))


def _round_up(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= value * (1 - 1e-9))
