"""decoupleQ against its card: monotone, and ahead of GPTQ at two bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quantised import check_method, correlated, heavy, lost

from eckart.forms import parse

REAL = "grid=uniform(zero='real'"
OURS = f"quantized(bits=2, group={{group}}, {REAL}, search=40), rounding=alternate())"


def test_through_a_model(tmp_path: Path) -> None:
    check_method("decoupleq", tmp_path)


@pytest.mark.parametrize("group", [None, 32])
def test_order_at_two_bits(group: int | None) -> None:
    norm, W = correlated(), heavy()
    near, clipped, gptq, ours = (
        lost(W, text.format(group=group), norm)
        for text in (
            "quantized(bits=2, group={group})",
            "quantized(bits=2, group={group}, grid=uniform(search=40))",
            "quantized(bits=2, group={group}, rounding=gptq())",
            OURS,
        )
    )
    assert ours < gptq / 1.3
    assert gptq < near
    assert ours < clipped


def test_no_row_is_worse_than_gptq_or_nearest_and_steps_never_hurt() -> None:
    norm, W = correlated(), heavy()
    C = norm.right.gram(W.shape[1])

    def rows(text: str) -> torch.Tensor:
        D = (W - parse(text).fit(W, norm).dense().detach()).double()
        return ((D @ C) * D).sum(1)

    baselines = [rows(f"quantized(bits=2, group=16, {REAL}), rounding={r}())") for r in ("nearest", "gptq")]
    steps = [
        rows(f"quantized(bits=2, group=16, {REAL}, search=40), rounding=alternate(steps={n}))") for n in (0, 1, 2, 4)
    ]
    for fewer, more in zip([torch.minimum(*baselines), *steps], steps, strict=False):
        assert bool((more <= fewer * (1 + 1e-6)).all())
    assert float(steps[-1].sum()) < 0.95 * float(steps[0].sum())
