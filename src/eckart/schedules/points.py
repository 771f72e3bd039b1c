"""Functions of the step: points in a run, ramps between them, and regular events."""

from __future__ import annotations

from dataclasses import dataclass


def at_step(point: int | float, total: int | None, what: str) -> int:
    """A whole number is a step; a number with a fraction, from 0.0 to 1.0, is a share of the run.

    Raises `ValueError` that names `what` where it is neither, or where the total is not known.
    """
    if isinstance(point, bool) or not isinstance(point, int | float) or point < 0 or (isinstance(point, float) and point > 1):  # fmt: skip # noqa: E501
        raise ValueError(f"{what}={point!r}: give a step (0, 100, ...) or a share of the run (0.0 to 1.0)")
    if isinstance(point, int):
        return point
    if total is None:
        raise ValueError(f"{what}={point!r} is a share of the run, whose length is not known: give the total")
    return round(point * total)


@dataclass(frozen=True)
class Ramp:
    """From one value to another: v_end + (v_begin - v_end) (1 - (t - begin) / (end - begin))^exponent, flat outside.

    Exponent 1 is linear, 3 the cubic of gradual pruning (Zhu and Gupta, 2017, arXiv 1710.01878, section 3).
    """

    begin: int
    end: int
    first: float
    last: float
    exponent: float = 1.0

    def __post_init__(self) -> None:
        if self.begin < 0 or self.end < self.begin:
            raise ValueError(f"a ramp from step {self.begin} to step {self.end}: it must begin at 0 or later and end no earlier than it begins")  # fmt: skip # noqa: E501

    def __call__(self, step: int) -> float:
        if step >= self.end:
            return self.last
        if step <= self.begin:
            return self.first
        done = (step - self.begin) / (self.end - self.begin)
        return self.last + (self.first - self.last) * (1 - done) ** self.exponent


@dataclass(frozen=True)
class Every:
    """Events at begin, begin + spacing, ... and, where there is an end, last of all exactly there."""

    spacing: int
    begin: int = 0
    end: int | None = None

    def __post_init__(self) -> None:
        if self.spacing < 1:
            raise ValueError(f"events every {self.spacing} steps: the spacing is at least 1")

    def __call__(self, step: int) -> bool:
        """Whether there is one at this step."""
        if step < self.begin or (self.end is not None and step > self.end):
            return False
        return step == self.end or (step - self.begin) % self.spacing == 0
