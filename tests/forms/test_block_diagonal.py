"""Blocks along the diagonal: placement, the optimum under weights with couplings, edges, ladders."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from eckart.forms import BlockDiagonal
from eckart.linalg.weighting import PLAIN, Weighting
from eckart.linalg.whitening import DiagonalRoot, psd_root
from eckart.testing import error_ratio, gaussian

W = gaussian(12, 18, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def mask(out: int, in_: int, blocks: int) -> Tensor:
    a, b = -(-out // blocks), -(-in_ // blocks)
    return (torch.arange(out)[:, None] // a) == (torch.arange(in_) // b)


def covariance(n: int, seed: int) -> Tensor:
    X = gaussian(n, 3 * n, seed=seed, dtype=torch.float64)
    X = X + 2 * gaussian(3 * n, seed=seed + 1, dtype=torch.float64)  # all inputs share something
    return X @ X.T


@pytest.mark.parametrize(("shape", "blocks"), [((12, 18), 3), ((12, 18), 6), ((7, 5), 2), ((7, 5), 5), ((4, 9), 1)])
def test_entries_within_the_blocks_are_kept(shape: tuple[int, int], blocks: int) -> None:
    M = gaussian(*shape, dtype=torch.float64)
    for weighting in (PLAIN, Weighting(right=DiagonalRoot(gaussian(shape[1], seed=1).exp()))):
        assert torch.equal(BlockDiagonal(blocks).fit(M, weighting).dense(), M * mask(*shape, blocks))


def test_couplings_are_met_by_least_squares() -> None:
    """Against the normal equations of all entries within the blocks, solved as one system."""
    weighting = Weighting(psd_root(covariance(12, 1), 0.0), psd_root(covariance(18, 3), 0.0))
    inside = mask(12, 18, 3)
    at = inside.nonzero()
    G, C = weighting.left.gram(12), weighting.right.gram(18)
    system = G[at[:, 0]][:, at[:, 0]] * C[at[:, 1]][:, at[:, 1]]
    wanted = torch.zeros_like(W)
    wanted[inside] = torch.linalg.solve(system, (G @ W @ C)[inside])
    found = BlockDiagonal(3).fit(W, weighting).dense()
    optimum, plain = weighting.norm2(W - wanted), weighting.norm2(W - W * inside)
    assert optimum < 0.9 * plain
    assert weighting.norm2(W - found) == pytest.approx(optimum, rel=0.02)
    assert error_ratio(found * ~inside, torch.zeros_like(W)) == 0


def test_ladder_is_of_common_divisors() -> None:
    assert [str(f) for f in BlockDiagonal().ladder((12, 18))] == [f"block_diagonal(blocks={n})" for n in (6, 3, 2)]
    assert [f.nbytes((12, 18), torch.float16) for f in BlockDiagonal().ladder((12, 18))] == [72, 144, 216]
    assert [str(f) for f in BlockDiagonal().ladder((7, 5))] == [f"block_diagonal(blocks={n})" for n in (4, 2)]
    curve = BlockDiagonal().curve(W, PLAIN, torch.float64)
    assert list(curve.errors) == pytest.approx([float((W * ~mask(12, 18, n)).square().sum()) for n in (6, 3, 2)])


def test_more_blocks_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 12"):
        BlockDiagonal(13).fit(W)
