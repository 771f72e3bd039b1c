"""Codes and exact outliers, chosen together."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from eckart.forms import Quantized, Sparse, WithOutliers, parse
from eckart.forms.gptq import GPTQ
from eckart.forms.grids import Uniform
from eckart.forms.quantized import Groups
from eckart.forms.with_outliers import largest, reductions, swept_at
from eckart.linalg.weighting import PLAIN, Weighting
from eckart.linalg.whitening import psd_root
from eckart.testing import FormContract, error_ratio, gaussian
from eckart.testing.forms import Case

OUT, IN = 48, 64
KINDS = [
    "with_outliers(dense=quantized(bits=3, group=4, rounding=gptq()), sparse=sparse(density=0.1))",
    "with_outliers(dense=quantized(bits=2, group=None, grid=learned()), sparse=sparse(density=0.05))",
]


class TestWithOutliers(FormContract):
    def forms(self) -> list[Case]:
        return [(parse(text), (12, 10)) for text in KINDS]


def heavy(seed: int = 0) -> Tensor:
    """Student's t with 3 degrees of freedom."""
    return gaussian(OUT, IN, seed=seed) / (gaussian(3, OUT, IN, seed=seed + 1).square().mean(0)).sqrt()


def weighting() -> Weighting:
    x = gaussian(600, IN, seed=5, dtype=torch.float64) @ gaussian(IN, IN, seed=6, dtype=torch.float64)
    return Weighting(right=psd_root(x.T @ x / 600, 1e-9))


@pytest.mark.parametrize("rounding", ["nearest()", "gptq()"])
@pytest.mark.parametrize("seed", range(3))
def test_better_than_a_plain_sum(rounding: str, seed: int) -> None:
    W, norm = heavy(seed), weighting()
    codes = f"quantized(bits=3, group=32, rounding={rounding})"
    errors = [
        norm.norm2(W - parse(text).fit(W, norm).dense().detach())
        for text in (f"with_outliers({codes}, sparse(density=0.02))", f"{codes} + sparse(density=0.02)", codes)
    ]
    assert errors[0] < 0.9 * min(errors[1:])


def test_outliers_are_exact() -> None:
    W = heavy()
    module = WithOutliers(Quantized(3, 32), Sparse(0.02)).fit(W)
    kept = module.terms[1].dense() != 0
    assert int(kept.sum()) == round(0.02 * W.numel())
    assert error_ratio(module.dense()[kept], W[kept]) <= 1e-6


@pytest.mark.parametrize("density", [0.002, 0.01, 0.05])
def test_feedback_keeps_no_more_than_allowed(density: float) -> None:
    W, norm = heavy(), weighting()
    module = WithOutliers(Quantized(3, 16, Uniform(), GPTQ()), Sparse(density)).fit(W, norm)
    used = int((module.terms[1].dense() != 0).sum())
    assert 0.8 * density * W.numel() - 1 <= used <= round(density * W.numel())


def test_an_endless_threshold_is_gptq() -> None:
    W, norm, form = heavy().double(), weighting(), Quantized(4, None, Uniform(), GPTQ())
    at = Groups(form, IN, torch.float64)
    moves = GPTQ().feedback(norm, IN)
    found, p = swept_at(W, norm, at, GPTQ(), moves, reductions(W, at, moves), math.inf)
    assert not bool(found.kept.any())
    assert torch.equal(at.decode(found.codes, p), form.fit(W, norm).dense())


def test_outliers_are_those_above_the_threshold_and_fewer_for_larger_ones() -> None:
    W, norm = heavy().double(), weighting()
    at = Groups(Quantized(3, 16), IN, torch.float64)
    moves = GPTQ().feedback(norm, IN)
    gains = reductions(W, at, moves)
    scale = torch.empty(IN, dtype=torch.float64)
    scale[moves.columns] = 1 / moves.U.diagonal().square()
    counts = []
    for threshold in (0.1, 1.0, 10.0, 100.0):
        found, p = swept_at(W, norm, at, GPTQ(), moves, gains, threshold)
        errors = (found.moved - at.decode(found.codes, p)).square() * scale
        assert torch.equal(found.kept, errors > threshold)
        counts.append(int(found.kept.sum()))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_reductions_are_those_of_leaving_one_out() -> None:
    W = heavy()[:4, :16].double()
    at = Groups(Quantized(3, 8), 16, torch.float64)
    moves = GPTQ().feedback(PLAIN, 16)
    found = reductions(W, at, moves) * float(moves.U[0, 0] ** 2)
    for r in range(4):
        for g in range(2):
            w = W[r, 8 * g : 8 * g + 8]
            grid = Uniform()

            def lost(kept: Tensor, grid: Uniform = grid) -> float:
                p = grid.fit(kept[None], 3)
                return float((kept - grid.decode(grid.encode(kept[None], p, 3), p, 3)[0]).square().sum())

            wanted = [lost(w) - lost(w[torch.arange(8) != k]) for k in range(8)]
            assert found[r, 8 * g : 8 * g + 8].tolist() == pytest.approx(wanted, abs=1e-9)


def test_turns_help_under_weights_of_single_errors() -> None:
    W = heavy()
    F = gaussian(OUT, IN, seed=9).square() ** 2
    norm = Weighting(each=F.double())
    joint = WithOutliers(Quantized(3, None), Sparse(0.02)).fit(W, norm)
    kept = largest(F * (W - W.mean(1, keepdim=True)).square(), round(0.02 * W.numel()))
    once = Quantized(3, None).fit(W, Weighting(each=F.double().masked_fill(kept, 0))).dense().detach()
    assert norm.norm2(W - joint.dense().detach()) <= norm.norm2((W - once).masked_fill(kept, 0)) * (1 + 1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("with_outliers(dense=dense())", "the dense part is quantized"),
        ("with_outliers(sparse=dense())", "the sparse part is sparse"),
        ("with_outliers(sparse=sparse(density=2.0))", "density"),
        ("with_outliers(sparse=sparse(density=0.1, selection=wanda()))", "leave the selection out"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)
