"""Stacks of one-bit blocks: energies of the paper's kind, bits as stored, prefixes, diagonal scales."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from eckart.forms import LowRank, SignStack
from eckart.forms.packing import unpack
from eckart.linalg.weighting import PLAIN, Weighting
from eckart.linalg.whitening import DiagonalRoot, IdentityRoot
from eckart.testing import error_ratio, gaussian

W = gaussian(128, 192, seed=1)


def left(form: SignStack, matrix: torch.Tensor = W, weighting: Weighting = PLAIN) -> list[float]:
    """Remaining energy after every number of blocks, each fitted by itself."""
    assert form.blocks is not None
    whole = weighting.norm2(matrix)
    fitted = (form.at(n).fit(matrix, weighting).dense().detach() for n in range(1, form.blocks + 1))
    return [weighting.norm2(matrix - module) / whole for module in fitted]


def test_magnitudes_of_a_random_matrix_are_nearly_of_rank_one() -> None:
    """|x| of a normal x has mean sqrt(2/π): one block of rank 1 leaves 1 - 2/π of the energy, on a large matrix; two
    and three leave the card's 0.130 and 0.058."""
    found = left(SignStack(3, rank=1), gaussian(512, 688, seed=2))
    assert found == pytest.approx([0.363, 0.130, 0.058], rel=0.02)


def test_energy_falls_with_every_block_and_with_rank() -> None:
    thin, thick = left(SignStack(6, rank=1)), left(SignStack(6, rank=8))
    assert all(later < earlier for earlier, later in pairwise(thin))
    assert all(b < a for a, b in zip(thin, thick, strict=True))


def test_signs_are_worth_more_than_singular_triplets_of_the_same_bytes() -> None:
    form = SignStack(2, rank=4)
    rank = form.nbytes((128, 192), torch.float16) // (2 * (128 + 192))
    low_rank = PLAIN.norm2(W - LowRank(rank).fit(W).dense().detach()) / PLAIN.norm2(W)
    assert left(form)[1] < 0.3 * low_rank


def test_residuals_are_those_of_the_factors_as_stored() -> None:
    """Each block's signs are those of what the stored blocks before it leave, zero as +1."""
    M = W.clone()
    M[3] = 0
    module = SignStack(5, rank=4).fit(M, dtype=torch.float16)
    R = M
    for signs, u, v in zip(module.signs, module.left.detach(), module.right.detach(), strict=True):
        positive = unpack(signs, 1, 192).bool()
        assert torch.equal(positive, R >= 0)
        magnitudes = u.float() @ v.float()
        R = R - torch.where(positive, magnitudes, -magnitudes)
    assert error_ratio(module.dense().detach().float(), M - R) < 2e-3


@pytest.mark.parametrize("shape", [(8, 16), (5, 13), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_bytes_are_the_formula(shape: tuple[int, int], dtype: torch.dtype) -> None:
    out, in_ = shape
    k = min(2, *shape)
    module = SignStack(3, rank=2).fit(gaussian(*shape), dtype=dtype)
    assert module.nbytes == 3 * (out * -(-in_ // 8) + dtype.itemsize * k * (out + in_))


def test_the_first_blocks_are_the_stack_of_fewer() -> None:
    whole = SignStack(4, rank=4).fit(W, dtype=torch.float16)
    for blocks in (1, 3, 4):
        first, fitted = whole.first(blocks), SignStack(blocks, rank=4).fit(W, dtype=torch.float16)
        assert first.form == fitted.form
        for name, value in fitted.state_dict().items():
            assert torch.equal(first.state_dict()[name], value)
        assert first.signs.untyped_storage().nbytes() == first.signs.nbytes  # no view that keeps the rest alive
    for blocks in (0, 5):
        with pytest.raises(ValueError, match="no first"):
            whole.first(blocks)


@pytest.mark.parametrize("sides", ["rows", "columns", "both"])
def test_curve_tells_the_errors_of_the_fits(sides: str) -> None:
    rows, columns = DiagonalRoot(gaussian(128, seed=3).exp()), DiagonalRoot(gaussian(192, seed=4).exp())
    weighting = Weighting(
        rows if sides != "columns" else IdentityRoot(), columns if sides != "rows" else IdentityRoot()
    )
    form = SignStack(rank=4)
    curve = form.curve(W, weighting, torch.float16)
    assert max(curve.nbytes) < 2 * 128 * 192 <= max(curve.nbytes) + curve.nbytes[0]
    assert all(b < a for a, b in pairwise(curve.errors))
    for rung, nbytes, error in list(zip(curve.forms, curve.nbytes, curve.errors, strict=True))[:3]:
        module = rung.fit(W, weighting, dtype=torch.float16)
        formed = (module.left.float(), module.right.float())
        assert nbytes == module.nbytes
        exact = sum(torch.where(unpack(s, 1, 192).bool(), m, -m) for s, m in zip(module.signs, torch.bmm(*formed), strict=True))  # fmt: skip # noqa: E501
        assert error == pytest.approx(weighting.norm2(W - exact.detach()), rel=1e-4)


def test_scales_with_heavy_tails_are_worth_having() -> None:
    """The output error under inputs of very different sizes falls for every number of blocks (the card's point 4)."""
    d = gaussian(192, seed=5).mul(1.2).exp()
    weighting = Weighting(right=DiagonalRoot(d))
    M = W / d.sqrt()  # what training leaves where inputs are large is small
    scaled = left(SignStack(3), M, weighting)
    plain = [weighting.norm2(M - SignStack(n).fit(M).dense().detach()) / weighting.norm2(M) for n in (1, 2, 3)]
    assert all(a < 0.9 * b for a, b in zip(scaled, plain, strict=True))


def test_scaling_is_undone_exactly() -> None:
    """A fit under scales is the fit of the scaled matrix, its columns divided by them."""
    d = 2.0 ** torch.randint(-4, 5, (192,), generator=torch.Generator().manual_seed(0))
    weighted = SignStack(1, rank=4).fit(W, Weighting(right=DiagonalRoot(d))).dense().detach()
    assert error_ratio(weighted * d, SignStack(1, rank=4).fit(W * d).dense().detach()) < 1e-5


@pytest.mark.parametrize("settings", [{"rank": 0}, {"rank": "many"}, {"blocks": 65}, {"blocks": 2.0}])
def test_nonsense_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="sign_stack"):
        SignStack(**settings)  # type: ignore[arg-type]


def test_a_rank_above_the_shorter_side_is_that_side() -> None:
    assert SignStack(1, rank=16).fit(gaussian(4, 9)).left.shape == (1, 4, 4)
