"""Checks of settings, worded once."""

from __future__ import annotations

from collections.abc import Sequence


def check_betas(betas: Sequence[float]) -> None:
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas are two numbers from 0 to below 1, not {betas}")


def check_not_negative(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name} is a number that is not negative; it was given as {value!r}")


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
