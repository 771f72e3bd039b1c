"""What a user may write as a budget, what it comes to in bytes, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eckart.allocation import Budget

GOOD = {
    0.8: (0.8, "ratio"),
    1: (1.0, "ratio"),
    "0.8": (0.8, "ratio"),
    " .5 ": (0.5, "ratio"),
    "8e-1": (0.8, "ratio"),
    "80MB": (80_000_000, "bytes"),
    "80 mb": (80_000_000, "bytes"),
    "1.5GB": (1_500_000_000, "bytes"),
    "2.3KB": (2300, "bytes"),
    "1.001KB": (1001, "bytes"),
    "512 KiB": (512 * 1024, "bytes"),
    "1MiB": (1024**2, "bytes"),
    "1GiB": (1024**3, "bytes"),
    "7B": (7, "bytes"),
    "3.0bpw": (3.0, "bpw"),
    "4 BPW": (4.0, "bpw"),
    "0.8 linears": (0.8, "linears"),
    "1linears": (1.0, "linears"),
}
BAD = [
    "", " ", "big", "0", "0.0", "-0.5", "+0.5", "1.01", "2", "nan", "inf", "-inf", "1e999", "80XB", "80MBs", "80%",
    "MB", "0MB", "0.4B", "-3MB", "1e400MB", "1e30GB", "0bpw", "-1bpw", "65bpw", "bpw", "0 linears", "1.5 linears",
    "0.5 0.5", "0.5;0.6", "0,8", "0x10B", "٠.٥", "1_0MB", "linears 0.8", None, True, 0, -1, 2.5, float("nan"),
    float("inf"), [], {}, b"0.8",
]  # fmt: skip


@pytest.mark.parametrize("text", GOOD, ids=repr)
def test_what_may_be_written(text: str | float) -> None:
    found = Budget.parse(text)
    assert (found.value, found.unit) == GOOD[text]
    assert Budget.parse(found) is found


@pytest.mark.parametrize("text", BAD, ids=repr)
def test_what_may_not(text: str) -> None:
    with pytest.raises(ValueError, match=r"cannot read the budget .*: give a ratio \(0.8\), a size \(80MB\), bits per"):
        Budget.parse(text)


@given(
    st.builds(Budget, st.floats(1e-6, 1), st.sampled_from(["ratio", "linears"]))
    | st.builds(Budget, st.floats(0.01, 64), st.just("bpw"))
    | st.builds(Budget, st.integers(1, 10**13), st.just("bytes"))
)
def test_printing_loses_nothing(budget: Budget) -> None:
    assert Budget.parse(str(budget)) == budget


def test_printing_is_short() -> None:
    texts = ["0.8", "80MB", "3bpw", "0.8 linears", "2.5bpw linears", "83.88608MB"]
    assert [str(Budget.parse(text)) for text in texts] == texts
    assert str(Budget.parse("80MiB")) == "83.88608MB"


@pytest.mark.parametrize(
    ("text", "total"),
    [
        ("0.8", 800_000),
        ("1", 1_000_000),
        ("80KB", 80_000),
        ("3bpw", 187_500),
        ("0.5 linears", 700_000),
        ("4bpw linears", 550_000),
    ],
)
def test_total(text: str, total: int) -> None:
    """Of an input of a million bytes and half a million weights, 600 000 bytes of which may be compressed."""
    assert Budget.parse(text).total(input_bytes=1_000_000, weights=500_000, target_bytes=600_000) == total
