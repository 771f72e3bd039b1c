"""Numbers as people read them: three significant digits, MB of 10^6 bytes, minutes and seconds."""

from __future__ import annotations

import math

MISSING = "not measured"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def finite(value: object) -> float | None:
    """The value as a float, or None where it is no number to write or draw: missing, text, NaN, 1e100 or beyond.

    Below 1e-100 it is 0: files may hold anything, and axes need room above and below.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e100:
        return None
    return float(value) if abs(value) > 1e-100 else 0.0


def significant(value: object, digits: int = 3) -> str:
    """Three significant digits: 0.0123, 14.1, 1,230, 37.2M, 1.2bn; powers of ten beyond; MISSING for no number."""
    number = finite(value)
    if number is None:
        return "∞" if value == math.inf else MISSING
    if number == 0:
        return "0"
    rounded = float(f"{number:.{digits - 1}e}")
    size = abs(rounded)
    if size < 1e-3 or size >= 1e12:
        mantissa, exponent = f"{rounded:.{digits - 1}e}".split("e")
        return f"{mantissa}×10{str(int(exponent)).translate(_SUPERSCRIPT)}".replace("-", "−")
    for factor, suffix in ((1e9, "bn"), (1e6, "M")):
        if size >= factor:
            return significant(rounded / factor, digits) + suffix
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    return f"{rounded:,.{decimals}f}".replace("-", "−")


def count(value: object) -> str:
    """A whole number: exact with thousands separators below a million, 135M and 7.24bn above."""
    number = finite(value)
    if number is None or abs(number) >= 1e6:
        return significant(value)
    return f"{round(number):,}".replace("-", "−")


def size(value: object) -> str:
    """Bytes in decimal units: 12 B, 45.6 kB, 269 MB, 1.23 GB."""
    number = finite(value)
    if number is None:
        return MISSING
    factor, unit = byte_unit(number)
    return f"{significant(number / factor) if factor > 1 else count(number)} {unit}"


def byte_unit(largest: float) -> tuple[float, str]:
    """The decimal unit that suits a number of bytes, as (factor, name)."""
    rounded = float(f"{abs(largest):.2e}")
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if rounded >= factor:
            return factor, unit
    return 1.0, "B"


def duration(value: object) -> str:
    """Seconds as 0.42 s, 12.3 s, 2 min 5 s, 1 h 4 min."""
    number = finite(value)
    if number is None:
        return MISSING
    if abs(number) < 99.95:
        return f"{significant(number)} s"
    minutes, seconds = divmod(round(number), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    hours, minutes = divmod(round(number / 60), 60)
    return f"{hours:,} h {minutes} min"


def percent(value: object) -> str:
    """A fraction as a percentage: 0.614 is 61.4%."""
    number = finite(value)
    return MISSING if number is None else f"{significant(100 * number)}%"


def ratio(new: object, old: object) -> float | None:
    """new / old, or None where either is missing or the divisor is zero."""
    top, bottom = finite(new), finite(old)
    return None if top is None or not bottom else top / bottom


def times(value: object) -> str:
    """A factor: 0.8 is ×0.800."""
    number = finite(value)
    return MISSING if number is None else f"×{significant(number)}"


def tick(value: float) -> str:
    """The shortest label of a round number on an axis: 0.5, 20, 10k, 5M, 10⁻⁴."""
    magnitude = abs(value)
    if magnitude and (magnitude < 1e-3 or magnitude >= 1e12):
        mantissa, exponent = f"{value:.0e}".split("e")
        power = "10" + str(int(exponent)).translate(_SUPERSCRIPT)
        return power if mantissa == "1" else f"{mantissa}×{power}".replace("-", "−")
    for factor, suffix in ((1e9, "bn"), (1e6, "M"), (1e3, "k")):
        if magnitude >= factor * (10 if suffix == "k" else 1):
            return f"{value / factor:g}{suffix}".replace("-", "−")
    return f"{value:g}".replace("-", "−")
