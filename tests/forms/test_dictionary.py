"""Dictionaries with sparse codes: the whitened norm, exact supports, bytes, and the order against truncated SVD."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from eckart.forms import LowRank, parse
from eckart.forms.block_dictionary import BlockDictionary
from eckart.forms.dictionary import Dictionary
from eckart.linalg.sparse_coding import learn_dictionary
from eckart.linalg.weighting import PLAIN, Weighting
from eckart.linalg.whitening import DiagonalRoot, psd_root
from eckart.testing import error_ratio, gaussian


def decaying(out: int, in_: int, seed: int = 0) -> Tensor:
    U, _, Vh = torch.linalg.svd(gaussian(out, in_, seed=seed), full_matrices=False)
    return U * torch.logspace(0, -1.5, len(Vh)) @ Vh


def correlated(n: int, seed: int = 0) -> Tensor:
    X = torch.logspace(0, -2, n, dtype=torch.float64)[:, None] * gaussian(n, 4 * n, seed=seed, dtype=torch.float64)
    return X @ X.T


def lost(W: Tensor, form: Dictionary | BlockDictionary | LowRank, weighting: Weighting = PLAIN) -> float:
    return weighting.norm2(W - form.fit(W, weighting).dense().detach()) / weighting.norm2(W)


def test_the_error_is_that_of_learning_in_the_whitened_space() -> None:
    W = gaussian(40, 12, dtype=torch.float64)
    weighting = Weighting(right=psd_root(correlated(12), 0.0))
    *_, errors = learn_dictionary(weighting.right.times(W), 14, 7, iterations=10)
    found = weighting.norm2(W - Dictionary(14, iterations=10).fit(W, weighting).dense().detach())
    assert 0.9 * errors[-1] <= found <= errors[-1] * (1 + 1e-5)  # the last least squares only helps


@pytest.mark.parametrize(("atoms", "ratio"), [(8, 2.0), (5, 3.0), (1, 2.0), (20, 4)])
def test_every_row_has_its_entries_and_every_byte_is_counted(atoms: int, ratio: float) -> None:
    form = Dictionary(atoms, ratio, iterations=3)
    module = form.fit(gaussian(30, 12), dtype=torch.float16)
    s = max(1, int(atoms / ratio))
    assert module.left.values.shape == (30 * s,)
    assert torch.equal((module.left.dense() != 0).sum(1), torch.full((30,), s))
    places = min(30 * s, 30 * math.ceil(atoms / 8))
    assert module.nbytes == form.nbytes((30, 12), torch.float16) == 2 * (30 * s + atoms * 12) + places


@pytest.mark.parametrize("spectrum", ["flat", "decaying"])
@pytest.mark.parametrize("removed", [0.2, 0.4])
def test_loses_far_less_than_truncation_at_the_same_size(spectrum: str, removed: float) -> None:
    """The paper's count leaves the places out; ours takes them in: the order is the same by both."""
    out, in_ = 192, 48
    W = gaussian(out, in_) if spectrum == "flat" else decaying(out, in_)
    form = Dictionary(int((1 - removed) * out * in_ / (in_ + out / 2)), iterations=15)
    found = lost(W, form)
    by_paper = lost(W, LowRank(int((1 - removed) * out * in_ / (out + in_))))
    by_bytes = lost(W, LowRank(form.nbytes((out, in_), torch.bfloat16) // (2 * (out + in_))))
    assert found < 0.5 * by_paper
    assert found < 0.7 * by_bytes


def test_codes_that_use_every_atom_are_the_truncated_svd() -> None:
    W, weighting = gaussian(30, 12, dtype=torch.float64), Weighting(right=psd_root(correlated(12), 0.0))
    assert lost(W, Dictionary(5, ratio=1), weighting) == pytest.approx(lost(W, LowRank(5), weighting), rel=1e-4)


def test_calibration_pays() -> None:
    W, weighting = gaussian(60, 16, dtype=torch.float64), Weighting(right=psd_root(correlated(16), 0.0))
    blind = Dictionary(12, iterations=15).fit(W).dense().detach()
    assert lost(W, Dictionary(12, iterations=15), weighting) < 0.3 * weighting.norm2(W - blind) / weighting.norm2(W)


@pytest.mark.parametrize("kind", ["singular", "row weights"])
def test_singular_and_left_weights(kind: str) -> None:
    W = gaussian(24, 10, dtype=torch.float64)
    singular = Weighting(right=psd_root(correlated(10)[:, :4] @ correlated(10)[:4], 0.0, "eigen"))
    rows = Weighting(DiagonalRoot(torch.logspace(0, -2, 24)))
    weighting = singular if kind == "singular" else rows
    dense = Dictionary(6).fit(W, weighting).dense().detach()
    assert bool(torch.isfinite(dense).all())
    assert weighting.norm2(W - dense) <= weighting.norm2(W - LowRank(3).fit(W, weighting).dense().detach())


def test_rows_of_one_subspace_each() -> None:
    """A union of subspaces, of which low rank sees only the sum."""
    first, second = gaussian(2, 16, seed=1), gaussian(2, 16, seed=2)
    W = torch.cat([gaussian(20, 2, seed=3) @ first, gaussian(20, 2, seed=4) @ second])
    assert lost(W, Dictionary(4, ratio=2)) < 0.02
    assert lost(W, LowRank(3)) > 0.05


def test_curve_and_ladder() -> None:
    W = decaying(48, 24)
    curve = Dictionary(iterations=6).curve(W, PLAIN, torch.float16)
    assert curve.nbytes == sorted(curve.nbytes)
    assert all(a >= b * 0.98 for a, b in zip(curve.errors, curve.errors[1:], strict=False))
    for i in (0, len(curve) // 2, len(curve) - 1):
        assert curve.errors[i] == pytest.approx(lost(W, curve.forms[i]) * curve.energy, rel=0.5)  # type: ignore[arg-type]
        assert curve.nbytes[i] == curve.forms[i].nbytes((48, 24), torch.float16)


@pytest.mark.parametrize("shape", [(40, 32), (40, 50), (40, 5), (9, 32)])
def test_blocks_and_their_bytes(shape: tuple[int, int]) -> None:
    form = BlockDictionary(nonzeros=3, atoms=12, block=16, iterations=3)
    out, in_ = shape
    k, blocks = min(12, out), math.ceil(in_ / 16)
    block = math.ceil(in_ / blocks)
    module = form.fit(gaussian(*shape), dtype=torch.float16)
    kept = torch.bincount(module.left.flat() // k, minlength=out * blocks)
    assert torch.equal(kept, torch.full((out * blocks,), 3))
    bits = out * math.ceil(blocks * math.ceil(math.log2(math.comb(k, 3))) / 8)
    values = blocks * k * block + out * blocks * 3
    assert module.nbytes == form.nbytes(shape, torch.float16) == 2 * values + bits


def test_blocks_suit_what_is_locally_of_low_rank_only() -> None:
    form = BlockDictionary(nonzeros=20, atoms=64, block=64, iterations=8)
    rank = form.nbytes((256, 128), torch.float32) // (4 * 384)
    assert 256 * 128 * 4 / form.nbytes((256, 128), torch.float32) > 1.6
    for W in (gaussian(256, 128), decaying(256, 128)):
        assert lost(W, form) < 0.7 * lost(W, LowRank(rank))
    globally_low = gaussian(256, 30, seed=1) @ gaussian(30, 128, seed=2) + 0.1 * gaussian(256, 128, seed=3)
    assert lost(globally_low, LowRank(rank)) < lost(globally_low, form)


def test_blocks_whose_codes_use_every_atom_are_block_by_block_svds() -> None:
    W = gaussian(20, 24, dtype=torch.float64)
    dense = BlockDictionary(nonzeros=4, atoms=4, block=8).fit(W).dense().detach()
    wanted = torch.cat([LowRank(4).fit(part).dense() for part in W.split(8, dim=1)], dim=1)
    assert error_ratio(dense, wanted) <= 1e-4


def test_blocks_use_their_part_of_the_covariance() -> None:
    W, C = gaussian(30, 16, dtype=torch.float64), correlated(16)
    weighting, form = Weighting(right=psd_root(C, 0.0)), BlockDictionary(nonzeros=2, atoms=8, block=8)
    blind = form.fit(W).dense().detach()
    assert lost(W, form, weighting) < 0.5 * weighting.norm2(W - blind) / weighting.norm2(W)


@pytest.mark.parametrize(
    ("text", "shape", "message"),
    [
        ("dictionary(atoms=4, ratio=0.5)", (9, 9), "no more entries than there are atoms"),
        ("dictionary(atoms=10)", (9, 9), "at most 9 atoms"),
        ("dictionary(atoms=9, ratio=1)", (9, 4), "9 entries in a code are more than 4 columns"),
        ("dictionary()", (9, 9), "no number of atoms yet"),
        ("dictionary(atoms=0)", (9, 9), "positive integer"),
        ("dictionary(atoms=2, iterations=0)", (9, 9), "iterations=0"),
        ("block_dictionary(nonzeros=5, atoms=4)", (9, 9), "a code has at most 4 entries"),
        ("block_dictionary(atoms=65)", (9, 9), "at most 64 atoms"),
        ("block_dictionary()", (9, 9), "no number of entries yet"),
        ("block_dictionary(nonzeros=2, block=0)", (9, 9), "block=0"),
    ],
)
def test_refusals(text: str, shape: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text).fit(gaussian(*shape))
