"""FWSVD, as its paper's identities and orderings say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eckart.forms import LowRank
from eckart.linalg.weighting import Weighting
from eckart.metrics import FisherRows, Statistics
from eckart.testing import error_ratio, gaussian

OUT, IN, RANK = 20, 12, 4
W = gaussian(OUT, IN, seed=1, dtype=torch.float64)
F = gaussian(IN, seed=2, dtype=torch.float64).square() + 0.01


def weighting(f: Tensor) -> Weighting:
    statistics = Statistics({"fisher_in": 7 * f, "examples": torch.tensor(7.0, dtype=torch.float64)})
    return FisherRows().weighting(statistics)


def fit(f: Tensor, rank: int = RANK) -> Tensor:
    return LowRank(rank).fit(W, weighting(f)).dense().detach()


def plain(rank: int = RANK) -> Tensor:
    return LowRank(rank).fit(W).dense().detach()


@pytest.mark.parametrize("rank", [1, 4, 11])
def test_error_is_the_tail_of_the_weighted_spectrum(rank: int) -> None:
    # the paper's D M A B, with M = Wᵀ
    D = torch.diag(F.sqrt())
    tail = torch.linalg.svdvals(D @ W.T)[rank:].square().sum().sqrt()
    assert float((D @ (W - fit(F, rank)).T).norm()) == pytest.approx(float(tail), rel=1e-6)


def test_weighted_error_falls_and_plain_error_rises() -> None:
    w, difference, difference_plain = weighting(F), W - fit(F), W - plain()
    assert w.norm2(difference) < w.norm2(difference_plain)
    assert float(difference.norm()) > float(difference_plain.norm())


def test_constant_information_is_plain_svd() -> None:
    assert error_ratio(fit(torch.full((IN,), 3.7, dtype=torch.float64)), plain()) <= 1e-6


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e9])
def test_scaling_the_information_changes_nothing(scale: float) -> None:
    assert error_ratio(fit(scale * F), fit(F)) <= 1e-6


def test_weights_stand_on_the_inputs() -> None:
    x, g = gaussian(3, 5, IN, seed=3), gaussian(3, 5, OUT, seed=4)
    statistics, swapped = Statistics(), Statistics()
    for inputs, gradients in zip(x, g, strict=True):
        statistics.add_gradients(inputs, gradients, FisherRows.needs)
        swapped.add_gradients(gradients, inputs, FisherRows.needs)
    assert statistics.sums["fisher_in"].shape == (IN,)
    assert LowRank(RANK).fit(W, FisherRows().weighting(statistics)).shape == (OUT, IN)
    with pytest.raises(RuntimeError, match="size"):
        LowRank(RANK).fit(W, FisherRows().weighting(swapped))


def test_a_dead_input_gets_a_small_weight() -> None:
    f = F.clone()
    f[3] = 0
    d = weighting(f).right.gram(IN).diagonal()
    assert float(d[3]) == pytest.approx(1e-5 * float(f.mean()))
    assert torch.isfinite(fit(f)).all()
