"""Sums of Kronecker products: against torch.kron, against the rearranged spectrum, in any shape."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from eckart.forms import Kronecker, LowRank, TensorTrain
from eckart.linalg.weighting import PLAIN, Weighting
from eckart.linalg.whitening import DiagonalRoot
from eckart.testing import error_ratio, gaussian

W = gaussian(24, 30, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def rearranged(left: tuple[int, int]) -> torch.Tensor:
    """Row: place in A; column: place in B."""
    (a, b), (c, d) = left, (24 // left[0], 30 // left[1])
    R = torch.zeros(a * b, c * d, dtype=W.dtype)
    for i, j, k, m in itertools.product(range(a), range(b), range(c), range(d)):
        R[i * b + j, k * d + m] = W[i * c + k, j * d + m]
    return R


@pytest.mark.parametrize("left", [(4, 6), (2, 15), (24, 1), (3, 2)])
@pytest.mark.parametrize("terms", [1, 3])
def test_is_the_sum_of_products_nearest_to_the_matrix(left: tuple[int, int], terms: int) -> None:
    """Error the discarded tail of the rearranged spectrum; cores the factors of torch.kron."""
    module = Kronecker(terms, left).fit(W)
    A, B = (core.detach() for core in module.cores)
    formed = torch.stack([torch.kron(A[0, :, :, t], B[t, :, :, 0]) for t in range(terms)]).sum(0)
    assert error_ratio(module.dense(), formed) < 1e-12
    tail = torch.linalg.svdvals(rearranged(left))[terms:].square().sum()
    assert float((W - formed).square().sum()) == pytest.approx(float(tail), rel=1e-6)
    assert module.nbytes == 8 * terms * (left[0] * left[1] + 720 // (left[0] * left[1]))


def test_planted_sums_are_recovered_under_noise() -> None:
    planted = sum(torch.kron(gaussian(4, 6, seed=t), gaussian(6, 5, seed=t + 9)) for t in range(2))
    noise = 1e-3 * gaussian(24, 30, seed=5)
    form = Kronecker(2, (4, 6))
    found = form.fit(planted + noise)
    assert float((found.dense().detach() - planted).norm()) < float(noise.norm())
    assert error_ratio(LowRank(found.nbytes // (4 * 54) + 1).fit(planted).dense(), planted) > 0.5


def test_a_chosen_shape_is_the_chain_of_two_cores() -> None:
    for shape in ((24, 30), (7, 13), (1, 5)):
        M = gaussian(*shape, dtype=torch.float64)
        assert torch.equal(Kronecker(1).fit(M).dense(), TensorTrain(1).fit(M).dense())


def test_weights_never_harm() -> None:
    weighting = Weighting(right=DiagonalRoot(gaussian(30, seed=3, dtype=torch.float64).exp()))
    for terms in (1, 4):
        form = Kronecker(terms, (3, 2))
        weighted, plain = (weighting.norm2(W - form.fit(W, w).dense()) for w in (weighting, PLAIN))
        assert weighted < 0.95 * plain


def test_the_ladder_costs_less_than_the_matrix() -> None:
    curve = Kronecker(None, (4, 6)).curve(W, PLAIN, torch.float32)
    widths = [f.width for f in curve.forms if isinstance(f, Kronecker)]
    assert widths == sorted(set(widths))
    assert (widths[0], widths[-1]) == (1, 13)  # 720 numbers, 54 of each term
    assert max(curve.nbytes) < 4 * 720
    assert all(b < a for a, b in itertools.pairwise(curve.errors))


@pytest.mark.parametrize("settings", [{"terms": 0}, {"left_shape": (2,)}, {"left_shape": (0, 2)}, {"left_shape": 4}])
def test_nonsense_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="kronecker"):
        Kronecker(**settings)  # type: ignore[arg-type]


def test_shapes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="5 x 6 does not divide"):
        Kronecker(1, (5, 6)).fit(W)
    with pytest.raises(ValueError, match="no bond is ever wider than 24"):
        Kronecker(25, (4, 6)).fit(W)
