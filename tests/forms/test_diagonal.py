"""The diagonal of least error in a two-sided norm, against least squares on the written-out design matrix."""

from __future__ import annotations

import pytest
import torch

from eckart.forms import Diagonal
from eckart.linalg.weighting import PLAIN, Weighting
from eckart.linalg.whitening import psd_root
from eckart.testing import error_ratio, gaussian


def weighting(out: int, in_: int, kind: str) -> Weighting:
    if kind == "plain":
        return PLAIN
    G, C = gaussian(out, 2 * out, seed=2, dtype=torch.float64), gaussian(in_, 2 * in_, seed=3, dtype=torch.float64)
    left, right = psd_root(G @ G.T, 0.0), psd_root(C @ C.T, 0.0)
    return Weighting(right=right) if kind == "right" else Weighting(left, right)


@pytest.mark.parametrize("shape", [(6, 6), (5, 8), (8, 5), (1, 4)])
@pytest.mark.parametrize("kind", ["plain", "right", "both"])
def test_is_the_least_squares_solution(shape: tuple[int, int], kind: str) -> None:
    out, in_ = shape
    W, w = gaussian(*shape, seed=1, dtype=torch.float64), weighting(out, in_, kind)
    units = []
    for i in range(min(shape)):
        unit = torch.zeros(shape, dtype=torch.float64)
        unit[i, i] = 1
        units.append(w.apply(unit).flatten())
    wanted = torch.linalg.lstsq(torch.stack(units, 1), w.apply(W).flatten()[:, None]).solution[:, 0]
    fitted = Diagonal().fit(W, w)
    assert error_ratio(fitted.diagonal, wanted) <= 1e-9
    if kind == "plain":
        torch.testing.assert_close(fitted.diagonal.detach(), W.diagonal())


def test_an_unseen_entry_stays_finite() -> None:
    C = torch.diag(torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))
    W = gaussian(3, 3, seed=1, dtype=torch.float64)
    d = Diagonal().fit(W, Weighting(right=psd_root(C, 0.0, "eigen"))).diagonal.detach()
    assert torch.isfinite(d).all()
    torch.testing.assert_close(d[[0, 2]], W.diagonal()[[0, 2]])
