"""Which entries are kept: against brute force, Wanda's equation, and optimal brain surgeon as the textbook does it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from eckart.forms import ColumnSparse, Form, GroupSparse, RowSparse, SemiSparse, Sparse, parse
from eckart.forms.patterns import Anywhere, EveryColumn, OfEvery, Pattern
from eckart.forms.selections import OBS, OMP, SELECTIONS, Fisher, Magnitude, Selection, Wanda
from eckart.linalg.weighting import PLAIN, Weighting
from eckart.linalg.whitening import DiagonalRoot, psd_root
from eckart.testing import error_ratio, gaussian

OUT, IN = 6, 16
W = gaussian(OUT, IN, seed=1, dtype=torch.float64)


def covariance(n: int = IN, seed: int = 0) -> Tensor:
    """Of correlated inputs of different sizes."""
    X = torch.logspace(0, -1, n, dtype=torch.float64)[:, None] * gaussian(n, 3 * n, seed=seed, dtype=torch.float64)
    return (X + 0.5 * X.roll(1, 0)) @ (X + 0.5 * X.roll(1, 0)).T


C = covariance()
INPUTS = Weighting(right=psd_root(C, 0.0))


def forms(selection: Selection) -> list[Form]:
    return [
        Sparse(0.5, selection),
        SemiSparse(2, 4, selection),
        GroupSparse(0.5, 4, selection),
        ColumnSparse(3, selection),
        RowSparse(5, selection),
    ]


ALL = [Magnitude(), Magnitude(per_row=True), Wanda(), Wanda(per_row=False), Fisher(), OBS(), OBS(per_row=True), OMP()]


@pytest.mark.parametrize("selection", ALL, ids=str)
@pytest.mark.parametrize("weighting", ["plain", "inputs", "each"])
def test_every_selection_goes_with_every_pattern(selection: Selection, weighting: str) -> None:
    norm = {"plain": PLAIN, "inputs": INPUTS, "each": Weighting(each=gaussian(OUT, IN).square() + 0.1)}[weighting]
    for form in forms(selection):
        assert parse(str(form)) == form
        if selection == OMP() and weighting == "inputs" and not isinstance(form, RowSparse | ColumnSparse):
            with pytest.raises(ValueError, match="fixed number of entries"):
                form.fit(W, norm)
            continue
        module = form.fit(W, norm)
        places = form.pattern((OUT, IN)).places  # type: ignore[attr-defined]
        assert module.values.shape[0] == places.count == len(places.decode(module.state_dict()))
        assert 0 < norm.norm2(W - module.dense().detach()) < norm.norm2(W)


def patterns() -> list[Pattern]:
    return [
        Anywhere((5, 14), count=33),
        Anywhere((5, 14), 4, count=9),
        Anywhere((5, 14), count=30, even=True),
        OfEvery((5, 14), n=2, m=4),
        EveryColumn((5, 14), nonzeros=2),
    ]


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("block", [1, 4, 5, 8, 100])
def test_blocks_of_columns_add_up_to_the_pattern(per_row: bool, block: int) -> None:
    scores = gaussian(5, 14).square()
    for pattern in patterns():
        step = pattern.step(block)
        parts = [pattern.keep(scores[:, i : i + step], i, per_row) for i in range(0, 14, step)]
        keep = torch.cat(parts, dim=1)
        mask = pattern.spread(keep).any(-1)
        assert int(mask.sum()) == pattern.places.count
        assert torch.equal(pattern.join(pattern.spread(scores)), scores)
        if per_row and isinstance(pattern, Anywhere):
            kept = mask.sum(1)
            assert int(kept.max() - kept.min()) <= 1


def test_the_best_set_of_a_pattern_is_found() -> None:
    scores = gaussian(2, 5).square()
    for pattern in (Anywhere((2, 5), count=4), Anywhere((2, 5), 2, count=3), OfEvery((2, 5), n=1, m=3)):
        found = float(scores[pattern.keep(scores)].sum())
        lines, width = pattern.places.lines, pattern.places.width
        if isinstance(pattern, OfEvery):
            best = sum(float(scores[i, j : j + 3].max()) for i in range(2) for j in (0, 3))
        else:
            totals = pattern.spread(scores).sum(-1).flatten().tolist()
            sets = itertools.combinations(range(lines * width), pattern.places.count)
            best = max(sum(totals[i] for i in chosen) for chosen in sets)
        assert found == pytest.approx(best, rel=1e-6)


def test_wanda_is_its_equation() -> None:
    X = gaussian(200, IN, seed=5, dtype=torch.float64) * torch.logspace(0, -2, IN, dtype=torch.float64)
    weighting = Weighting(right=psd_root(X.T @ X / 200, 0.0))
    metric = W.abs() * X.norm(dim=0)
    dense = Sparse(0.5, Wanda()).fit(W, weighting).dense().detach()
    for row, score, w in zip(dense, metric, W, strict=True):
        kept = score.sort(descending=True).indices[: IN // 2]
        wanted = torch.zeros_like(w).index_copy(0, kept, w[kept])
        assert torch.equal(row, wanted)
    # comparing over the whole matrix is another thing
    assert not torch.equal(dense, Sparse(0.5, Wanda(per_row=False)).fit(W, weighting).dense())
    by_magnitude = Sparse(0.5, Magnitude()).fit(W).dense().detach()
    assert weighting.norm2(W - dense) < weighting.norm2(W - by_magnitude)


def test_selections_use_the_weights_they_name() -> None:
    left, right = DiagonalRoot(torch.logspace(-3, 3, OUT)), DiagonalRoot(torch.logspace(-3, 3, IN))
    both = Weighting(left, right)
    rows = {s: (Sparse(1 / 3, s).fit(W, both).dense() != 0).any(1).sum() for s in (Fisher(), Wanda(per_row=False))}
    assert rows[Fisher()] < OUT  # heavy rows win
    assert rows[Wanda(per_row=False)] == OUT
    assert torch.equal(Sparse(0.3, Fisher()).fit(W).dense(), Sparse(0.3, Magnitude()).fit(W).dense())
    assert torch.equal(Sparse(0.3, Magnitude()).fit(W, both).dense(), Sparse(0.3, Magnitude()).fit(W).dense())


def surgeon(W: Tensor, H: Tensor, pattern: Pattern, block: int) -> Tensor:
    """Drop columns one after the other, inverting what is left of H before every one."""
    rest, keep = W.clone(), torch.zeros_like(W, dtype=torch.bool)
    for j in range(W.shape[1]):
        if j % block == 0:
            end = min(j + block, W.shape[1])
            # [H^-1]_kk with all columns before k gone
            schur = [torch.linalg.inv(H[k:, k:])[0, 0] for k in range(j, end)]
            keep[:, j:end] = pattern.keep(rest[:, j:end].square() / torch.stack(schur), j)
        inverse = torch.linalg.inv(H[j:, j:])
        dropped = torch.where(keep[:, j], 0.0, rest[:, j])
        rest[:, j:] -= dropped[:, None] * inverse[0] / inverse[0, 0]
    return torch.where(keep, rest, 0.0)


@pytest.mark.parametrize("block", [1, 3, 8, 16, 128])
def test_sparsegpt_is_the_textbook_surgeon(block: int) -> None:
    H = C + 0.01 * C.diagonal().mean() * torch.eye(IN, dtype=torch.float64)
    for density in (0.3, 0.5, 0.8):
        found = Sparse(density, OBS(block=block)).fit(W, INPUTS)
        wanted = surgeon(W, H, found.pattern, min(block, IN))
        assert error_ratio(found.dense(), wanted) <= 1e-9
    for form, step in ((SemiSparse(2, 4, OBS(block=block)), 4), (ColumnSparse(2, OBS(block=block)), 1)):
        found = form.fit(W, INPUTS)
        assert error_ratio(found.dense(), surgeon(W, H, found.pattern, step)) <= 1e-9


def test_dropping_the_first_column_is_exact() -> None:
    """All other columns are later, so that the surgeon's answer is the least-squares one."""
    w = torch.cat([1e-3 * torch.ones(1, dtype=torch.float64), torch.ones(IN - 1, dtype=torch.float64)])[None]
    found = Sparse((IN - 1) / IN, OBS(damping=0.0)).fit(w, INPUTS).dense().detach()
    assert found[0, 0] == 0
    best = torch.linalg.solve(C[1:, 1:], C[1:] @ w[0])
    assert error_ratio(found[0, 1:], best) <= 1e-9


def test_scores_are_those_of_the_schur_complement() -> None:
    """For the first column w^2 / [H^-1]_11 exactly; a matrix of one block is scored as it is."""
    inverse = torch.linalg.inv(C)
    U = torch.linalg.cholesky(inverse, upper=True)
    assert float(U[0, 0] ** 2) == pytest.approx(float(inverse[0, 0]), rel=1e-9)
    for j in range(IN):
        assert float(U[j, j] ** 2) == pytest.approx(float(torch.linalg.inv(C[j:, j:])[0, 0]), rel=1e-9)
    scores = (W / U.diagonal()).square()
    keep = Sparse(0.48, OBS(damping=0.0)).fit(W, INPUTS).dense() != 0
    assert float(scores[~keep].max()) <= float(scores[keep].min())


def test_the_surgeon_beats_what_does_not_repair() -> None:
    for form in (Sparse(0.5), SemiSparse()):
        errors = {}
        for selection in (OBS(), Wanda(), Magnitude()):
            closed = type(form)(**{**form.__dict__, "selection": selection})
            errors[selection] = INPUTS.norm2(W - closed.fit(W, INPUTS).dense().detach())
        assert errors[OBS()] < 0.8 * errors[Wanda()] <= errors[Wanda()] < errors[Magnitude()]


def test_inputs_that_are_never_active_lose_their_weights_first() -> None:
    dead = C.clone()
    dead[3], dead[:, 3] = 0, 0
    weighting = Weighting(right=psd_root(dead, 0.0, "eigen"))
    dense = Sparse(0.9, OBS()).fit(W, weighting).dense().detach()
    assert not dense[:, 3].any()
    assert bool(torch.isfinite(dense).all())


def test_without_couplings_the_surgeon_only_drops() -> None:
    diagonal = Weighting(right=DiagonalRoot(torch.logspace(0, -1, IN, dtype=torch.float64)))
    for form, plain in ((Sparse(0.5, OBS(damping=0.0)), Sparse(0.5, Fisher())), (SemiSparse(2, 4, OBS(damping=0.0)), SemiSparse())):  # fmt: skip # noqa: E501
        torch.testing.assert_close(form.fit(W, diagonal).dense(), plain.fit(W, diagonal).dense())


def test_a_singular_covariance_without_damping_is_refused() -> None:
    x = gaussian(IN, 1, dtype=torch.float64)
    weighting = Weighting(right=psd_root(x @ x.T, 0.0, "eigen"))
    with pytest.raises(ValueError, match=r"obs\(damping=0.0\): the covariance of the inputs is singular"):
        Sparse(0.5, OBS(damping=0.0)).fit(W, weighting)
    Sparse(0.5, OBS()).fit(W, weighting)


def test_residuals_of_a_sum_are_repaired_too() -> None:
    form = parse("low_rank(rank=2) + sparse(density=0.3, selection=obs())")
    alone = Sparse(0.3, OBS()).fit(W, INPUTS).dense().detach()
    both = form.fit(W, INPUTS).dense().detach()
    assert INPUTS.norm2(W - both) < 0.8 * INPUTS.norm2(W - alone)


@pytest.mark.parametrize(
    "text", ["obs(block=0)", "obs(damping=-1)", "obs(damping='much')", "wanda(per_row=3)", "magnitude(rows=True)"]
)
def test_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"obs|wanda|magnitude"):
        SELECTIONS.parse(text)
