from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eckart.report.numbers import MISSING, count, duration, finite, percent, ratio, significant, size, tick, times


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (14.12, "14.1"),
        (0.01234, "0.0123"),
        (1234, "1,230"),
        (0.99996, "1.00"),
        (999_600, "1.00M"),
        (37_200_000, "37.2M"),
        (1.5e9, "1.50bn"),
        (4.2e15, "4.20×10¹⁵"),
        (1.234e-5, "1.23×10⁻⁵"),
        (-2.5, "−2.50"),
        (math.inf, "∞"),
        (math.nan, MISSING),
        (None, MISSING),
        ("12", MISSING),
    ],
)
def test_three_significant_digits(value: object, text: str) -> None:
    assert significant(value) == text


@given(st.floats(1e-3, 1e12, exclude_max=True))
def test_written_numbers_are_within_half_a_percent(value: float) -> None:
    text = significant(value).replace(",", "").replace("×10¹²", "e12").replace("bn", "e9").replace("M", "e6")
    assert float(text) == pytest.approx(value, rel=0.005001)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12, "12 B"),
        (999, "999 B"),
        (45_600, "45.6 kB"),
        (269_060_552, "269 MB"),
        (999_999_999, "1.00 GB"),
        (None, MISSING),
    ],
)
def test_sizes_are_decimal(value: object, text: str) -> None:
    assert size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.42, "0.420 s"),
        (12.34, "12.3 s"),
        (125, "2 min 5 s"),
        (3599.7, "1 h 0 min"),
        (3840, "1 h 4 min"),
        (None, MISSING),
    ],
)
def test_durations(value: object, text: str) -> None:
    assert duration(value) == text


def test_small_formats() -> None:
    assert percent(0.614) == "61.4%"
    assert count(134_515_008) == "135M"
    assert count(4096) == "4,096"
    assert times(0.8) == "×0.800"
    assert [tick(value) for value in (0.5, 20.0, 1000.0, 10_000.0, 5e6, 1e-4)] == [
        "0.5",
        "20",
        "1000",
        "10k",
        "5M",
        "10⁻⁴",
    ]


def test_what_cannot_be_drawn_is_no_number() -> None:
    assert [finite(value) for value in (True, "1", None, math.nan, math.inf, 1e308, 10**400)] == [None] * 7
    assert finite(1e-300) == 0.0
    assert ratio(1, 0) is None
    assert ratio(None, 2) is None
    assert ratio(1, 4) == 0.25
