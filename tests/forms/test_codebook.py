"""Vector quantisation: codes and tables as stored, wide codes, weights, tables by columns, bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from eckart.forms import Codebook, Quantized
from eckart.forms.codebook import CodebookMatrix
from eckart.linalg.weighting import PLAIN, Weighting
from eckart.linalg.whitening import DiagonalRoot
from eckart.testing import error_ratio, gaussian

W = gaussian(64, 48)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def naive(module: CodebookMatrix) -> Tensor:
    """Piece by piece."""
    (out, in_), dim = module.shape, module.form.dim
    codes, table = module.codes(), module.table.detach()
    pieces = codes.shape[1]
    per_table = -(-pieces // len(table))
    rows = []
    for i in range(out):
        rows.append(torch.cat([table[j // per_table, codes[i, j]] for j in range(pieces)])[:in_])
    assert table.shape[2] == dim
    return torch.stack(rows)


@pytest.mark.parametrize("form", [Codebook(3), Codebook(5, dim=3, tables=4), Codebook(9, dim=2), Codebook(1, dim=7)])
@pytest.mark.parametrize("shape", [(64, 48), (9, 31)])
def test_dense_is_looked_up(form: Codebook, shape: tuple[int, int]) -> None:
    module = form.fit(gaussian(*shape))
    assert torch.equal(module.dense(), naive(module))


def test_codes_above_eight_bits_survive_storage() -> None:
    """As many entries as pieces: the matrix itself."""
    module = Codebook(11, dim=2).fit(W)
    assert module.table.shape == (1, 1536, 2)
    assert int(module.codes().max()) > 256
    assert error_ratio(module.dense(), W) < 1e-6


@pytest.mark.parametrize("bits", [2, 5, 8, 10])
def test_bytes_are_the_formula(bits: int) -> None:
    module = Codebook(bits, dim=2).fit(W, dtype=torch.float16)
    pieces = 48 // 2
    codes = 64 * (-(-pieces * min(bits, 8) // 8) + -(-pieces * max(bits - 8, 0) // 8))
    assert module.nbytes == codes + 2 * 2 * min(2**bits, 64 * pieces)


def test_planted_entries_are_found() -> None:
    table = 5 * gaussian(16, 4, seed=1)
    codes = torch.randint(16, (64, 12), generator=torch.Generator().manual_seed(0))
    planted = table[codes].flatten(1)
    assert error_ratio(Codebook(4).fit(planted + 1e-3 * W).dense(), planted) < 1e-3


def test_pieces_of_weights_that_belong_together_beat_single_weights() -> None:
    """At fewer bytes, where neighbouring weights are equal."""
    M = gaussian(64, 12, seed=2).repeat_interleave(4, dim=1)
    codebook, single = Codebook(4), Quantized(2, group=None)
    assert codebook.nbytes((64, 48), torch.float16) < single.nbytes((64, 48), torch.float16)
    errors = [float((M - f.fit(M, dtype=torch.float16).dense()).square().sum()) for f in (codebook, single)]
    assert errors[0] < 0.3 * errors[1]


def test_codes_are_the_best_for_the_table_as_stored() -> None:
    module = Codebook(4).fit(1000 * W, dtype=torch.bfloat16)
    table = module.table[0].detach().float()
    pieces = (1000 * W).unflatten(1, (12, 4))
    assert torch.equal(torch.cdist(pieces.flatten(0, 1), table).argmin(1).view(64, 12), module.codes())


def test_weights_count_and_the_cut_off_end_does_not() -> None:
    weighting = Weighting(right=DiagonalRoot(2 * gaussian(48, seed=3).exp()))
    weighted, plain = (weighting.norm2(W - Codebook(4).fit(W, w).dense()) for w in (weighting, PLAIN))
    assert weighted < 0.9 * plain
    each = Weighting(each=gaussian(64, 48, seed=4).mul(2).exp())
    weighted, plain = (each.norm2(W - Codebook(4).fit(W, w).dense()) for w in (each, PLAIN))
    assert weighted < 0.9 * plain
    odd = gaussian(64, 5)  # the second piece of each row is one column, and three that nobody sees
    module = Codebook(6, tables=2).fit(odd)
    assert error_ratio(module.dense()[:, 4], odd[:, 4]) < 1e-6  # 64 entries for 64 numbers


def test_tables_of_their_own_fit_columns_of_their_own() -> None:
    M = torch.cat([W, W + 1000], dim=1)
    shared, own = (float((M - Codebook(2, tables=t).fit(M).dense()).square().sum()) for t in (1, 2))
    assert own < 0.9 * shared


def test_error_falls_along_the_ladder() -> None:
    curve = Codebook(dim=2).curve(W, PLAIN, torch.float16)
    assert [f.bits for f in curve.forms] == [2, 4, 6, 8, 10]  # a table of 4096 entries is larger than the matrix
    assert all(b < a for a, b in itertools.pairwise(curve.errors))
    assert curve.nbytes == sorted(curve.nbytes)


@pytest.mark.parametrize("settings", [{"bits": 17}, {"bits": 0}, {"dim": 0}, {"tables": 0}, {"seed": "x"}])
def test_nonsense_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="codebook"):
        Codebook(**settings)  # type: ignore[arg-type]
