"""GQSA's one-shot stage against its card: aligned zeros, balanced rows, bytes to the bit, its limits, refusals."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised import check_method, correlated, heavy, lost
from torch import nn

import eckart
import tiny
from eckart.compression.gqsa import GQSA
from eckart.forms import GroupSparse, Quantized, parse
from eckart.forms.products import group_pays, group_product, task_bounds
from eckart.forms.sparse import SparseMatrix
from eckart.linalg.weighting import PLAIN
from eckart.testing import error_ratio, gaussian

W4 = "values=quantized(bits=4, group=16)"
OBS = "selection=obs(per_row=True)"


def test_through_a_model(tmp_path: Path) -> None:
    check_method("gqsa", tmp_path, "0.6")


def group_sparse_layers(model: nn.Module) -> dict[str, SparseMatrix]:
    layers: dict[str, Any] = {n: m.matrix for n, m in model.named_modules() if hasattr(m, "matrix")}
    return {n: m for n, m in layers.items() if isinstance(m, SparseMatrix)}


def test_removed_groups_are_aligned_zeros_and_rows_keep_equally_many() -> None:
    model, result = eckart.compress(tiny.build("llama"), "gqsa", budget="0.55", data=tiny.batches((2, 2)))
    layers = group_sparse_layers(model)
    assert len(layers) == sum(layer.form != "dense()" for layer in result.layers) > 0
    for matrix in layers.values():
        form, (out, width) = matrix.form, matrix.shape
        assert isinstance(form, GroupSparse)
        assert form.density is not None
        groups = matrix.dense().view(out, width // 16, 16)
        alive = groups.abs().amax(-1) > 0
        kept = torch.zeros(out * width // 16).index_fill(0, matrix.flat(), 1.0).view(out, -1)
        assert not (alive & (kept == 0)).any()
        assert int(kept.sum()) == round(form.density * kept.numel())
        assert int(kept.sum(1).max() - kept.sum(1).min()) <= 1


def test_rows_may_keep_different_numbers() -> None:
    W = gaussian(6, 64) * torch.logspace(0, 3, 6)[:, None]
    counts = (parse(f"group_sparse(density=0.5, group=16, selection=obs(), {W4})").fit(W).dense() != 0).any(-1)
    assert counts.tolist() == [False] * 3 + [True] * 3


@pytest.mark.parametrize("density", [0.5, 0.75])
def test_bytes_are_those_of_the_card(density: float) -> None:
    """(1 - p) (b + (16 + b) / G) bits, and where the groups stand: one bit each, which is less than an index here."""
    out, width = 256, 1024
    form = parse(f"group_sparse(density={density}, group=16, {W4})")
    kept = round(density * out * width / 16)
    assert 8 * form.nbytes((out, width), torch.float16) == kept * (16 * 4 + 16 + 4) + out * width // 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_sparsity_it_is_plain_group_quantisation(dtype: torch.dtype) -> None:
    W = heavy()
    ours = parse(f"group_sparse(density=1.0, group=16, {OBS}, {W4})").fit(W, dtype=dtype)
    assert torch.equal(ours.dense(), Quantized(4, 16).fit(W, dtype=dtype).dense())


def test_without_quantisation_it_is_group_pruning() -> None:
    W, norm = heavy(), correlated()
    pruned = parse(f"group_sparse(density=0.5, group=16, {OBS})").fit(W, norm).dense()
    ours = parse(f"group_sparse(density=0.5, group=16, {OBS}, values=quantized(bits=8, group=16))").fit(W, norm).dense()
    alive = [M.view(48, 4, 16).any(-1) for M in (ours, pruned)]
    assert torch.equal(*alive)
    assert error_ratio(ours, pruned) < 0.005


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
@pytest.mark.parametrize("width", [64, 70])
def test_the_product_by_groups_is_that_of_the_dense_matrix(width: int, batch: tuple[int, ...]) -> None:
    W = gaussian(9, width, dtype=torch.float64) * torch.logspace(-4, 2, 9, dtype=torch.float64)[:, None]
    matrix = parse(f"group_sparse(density=0.1, group=16, {W4})").fit(W).requires_grad_(False)
    assert isinstance(matrix, SparseMatrix)
    places = matrix.pattern.places.by_line(matrix._stored)
    assert 0 in places[0].diff()  # an empty row
    assert int(places[0].diff().max()) > 1
    x = gaussian(*batch, width, seed=1, dtype=torch.float64)
    wanted = x @ matrix.dense().T
    for tasks in (None, 1, 2, 5, 1000):
        assert error_ratio(group_product(x, *places, matrix.values, matrix.shape, tasks), wanted) < 1e-12
    assert group_pays(x, matrix.shape, matrix.kept.shape[1])
    assert error_ratio(matrix(x), wanted) < 1e-12


@pytest.mark.parametrize(("places", "tasks"), [(10, 3), (10, 10), (3, 10), (0, 4), (7, 1)])
def test_tasks_differ_by_one_group_at_most(places: int, tasks: int) -> None:
    bounds = task_bounds(places, tasks)
    sizes = [b - a for a, b in itertools.pairwise(bounds)]
    assert (bounds[0], bounds[-1], len(sizes)) == (0, places, tasks)
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("seed", range(3))
def test_taking_over_what_dropped_groups_did_pays(seed: int) -> None:
    W, norm = heavy(seed), correlated(seed)
    with_it = lost(W, f"group_sparse(density=0.5, group=16, {OBS}, {W4})", norm)
    without = lost(W, f"group_sparse(density=0.5, group=16, selection=fisher(per_row=True), {W4})", norm)
    assert with_it < 0.9 * without


def test_a_short_last_group_is_kept_in_full_and_its_filling_does_not_stretch_the_grid() -> None:
    W = gaussian(5, 20) + 10.0
    form = parse("group_sparse(density=1.0, group=16, values=quantized(bits=4, group=16, grid=uniform(zero='real')))")
    dense = form.fit(W).dense().detach()
    assert float((dense - W).abs().max()) < 0.3  # steps of a fifteenth of the range of 4 numbers, not of 0 to 13


def test_the_curve_tells_what_fits_lose() -> None:
    W, norm = heavy(), correlated()
    form = parse("group_sparse(group=16, values=quantized(group=16))")
    curve = form.curve(W, norm, torch.float16)
    assert list(curve.nbytes) == sorted(curve.nbytes)
    assert {f.values.bits for f in curve.forms if isinstance(f, GroupSparse) and isinstance(f.values, Quantized)} == {2, 3, 4, 5, 6, 8}  # fmt: skip # noqa: E501
    for i in (0, len(curve) - 1):
        error = lost(W, curve.forms[i], norm, torch.float16)
        assert curve.errors[i] == pytest.approx(error, rel=1e-3)
        assert curve.nbytes[i] == curve.forms[i].nbytes((48, 64), torch.float16)


def test_refused() -> None:
    with pytest.raises(ValueError, match="groups of 16 are kept and groups of 32 quantised"):
        GQSA(parse("group_sparse(group=16, values=quantized(bits=4, group=32))"))
    with pytest.raises(ValueError, match="its form is group_sparse"):
        GQSA(Quantized(4))
    with pytest.raises(ValueError, match="density"):
        GroupSparse(0.0)  # all groups removed
    with pytest.raises(ValueError, match="no form"):
        GroupSparse(0.5, values="quantized()")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no bits yet"):
        GroupSparse(0.5, values=Quantized()).fit(gaussian(4, 32), PLAIN)
