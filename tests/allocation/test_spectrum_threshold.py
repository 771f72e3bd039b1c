"""WeLore's threshold: monotone, blind to scale, and spent where spectra decay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eckart.allocation import BudgetError, Problem, SpectrumThreshold, Uniform
from eckart.allocation.spectrum_threshold import normalise
from eckart.forms import Curve, Dense, Form, LowRank
from eckart.linalg.weighting import PLAIN
from eckart.testing import gaussian

N = 24


def rank_reduction(spectra: dict[str, torch.Tensor], ranks: dict[str, int]) -> float:
    """The share of all singular values that were dropped: the paper's effective rank reduction, in [0, 1]."""
    total = sum(len(s) for s in spectra.values())
    return sum(len(s) - min(len(s), ranks[name]) for name, s in spectra.items()) / max(1, total)


def matrix(decay: float, seed: int) -> Tensor:
    """A square matrix whose singular values fall like exp(-decay i)."""
    U, V = (torch.linalg.qr(gaussian(N, N, seed=100 * seed + s, dtype=torch.float64)).Q for s in (0, 1))
    return U @ torch.diag(torch.exp(-decay * torch.arange(N, dtype=torch.float64))) @ V.T


def problem(matrices: dict[str, Tensor], share: float = 1.0) -> Problem:
    curves = {}
    for name, M in matrices.items():
        found = LowRank().curve(M, PLAIN, torch.float32)
        forms: list[Form] = [*found.forms, Dense()]
        nbytes, errors = [*found.nbytes, 4 * M.numel()], [*found.errors, 0.0]
        curves[name] = Curve(forms, nbytes, errors, found.energy, found.spectrum)
    return Problem(curves, int(share * sum(c.nbytes[-1] for c in curves.values())))


def ranks(found: Problem, choice: dict[str, int]) -> dict[str, int]:
    """Kept ranks, N where left dense."""
    return {name: getattr(found.curves[name].forms[i], "rank", N) for name, i in choice.items()}


MODEL = {f"w{i}": matrix(0.1 * (i + 1), i) for i in range(6)}


def test_the_share_that_is_cut_grows_as_the_budget_falls() -> None:
    spectra = {name: torch.linalg.svdvals(M) for name, M in MODEL.items()}
    reductions = []
    for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3):
        found = problem(MODEL, share)
        reductions.append(rank_reduction(spectra, ranks(found, SpectrumThreshold().choose(found))))
    assert reductions[0] == 0
    assert reductions == sorted(reductions)
    assert reductions[-1] > 0.8


@pytest.mark.parametrize("share", [0.3, 0.45, 0.6])
def test_the_budget_is_met_within_one_singular_value(share: float) -> None:
    """Lowering the threshold to the next singular value of the model would not fit."""
    found = problem(MODEL, share)
    choice = SpectrumThreshold().choose(found)
    values = {name: normalise(c.spectrum) for name, c in found.curves.items() if c.spectrum is not None}
    kept = ranks(found, choice)
    missing = {name: float(values[name][kept[name]]) for name in kept if kept[name] < N}
    first = max(missing, key=missing.__getitem__)
    curve = found.curves[first]
    step = curve.nbytes[min(choice[first] + 1, len(curve) - 1)] - curve.nbytes[choice[first]]
    assert found.nbytes(choice) <= found.budget < found.nbytes(choice) + step


def test_scaling_a_weight_changes_no_rank() -> None:
    scaled = {name: 10.0 ** (3 * (i - 2)) * M for i, (name, M) in enumerate(MODEL.items())}
    for share in (0.4, 0.6, 0.8):
        plain, other = problem(MODEL, share), problem(scaled, share)
        assert SpectrumThreshold().choose(plain) == SpectrumThreshold().choose(other)


def test_decaying_spectra_are_cut_and_flat_ones_are_not() -> None:
    flat = {f"flat{i}": matrix(0.0, i) + 0.05 * matrix(0.1, 10 + i) for i in range(4)}
    decaying = {f"decaying{i}": matrix(0.5, 20 + i) for i in range(4)}
    found = problem(flat | decaying, 0.7)
    choice = SpectrumThreshold().choose(found)
    pruned = {name: N - rank for name, rank in ranks(found, choice).items()}
    assert sum(pruned[name] for name in decaying) > 0.9 * sum(pruned.values())
    # what a chain of these layers puts out, against the same bytes spread evenly
    x = gaussian(50, N, seed=9, dtype=torch.float64)

    def output_error(indices: dict[str, int]) -> float:
        total = 0.0
        for name, M in (flat | decaying).items():
            fitted = found.curves[name].forms[indices[name]].fit(M).dense().detach()
            total += float((x @ (M - fitted).T).square().sum() / (x @ M.T).square().sum())
        return total

    assert output_error(choice) < output_error(Uniform().choose(found))


def test_ranks_and_bytes_are_told_apart() -> None:
    """A share of the ranks is not that share of the bytes: r (out + in) / (out in)."""
    spectra = {name: torch.linalg.svdvals(M) for name, M in MODEL.items()}
    found = problem(MODEL, 0.5)
    choice = SpectrumThreshold().choose(found)
    kept = ranks(found, choice)
    assert rank_reduction(spectra, kept) == pytest.approx(1 - sum(kept.values()) / (6 * N))
    wanted = sum(min(1.0, rank * (N + N) / (N * N)) for rank in kept.values()) / 6
    ratio = found.nbytes(choice) / sum(c.nbytes[-1] for c in found.curves.values())
    assert ratio == pytest.approx(wanted)
    assert abs(ratio - (1 - rank_reduction(spectra, kept))) > 0.1


def test_a_constant_spectrum_is_left_dense() -> None:
    constant = {"constant": torch.eye(N, dtype=torch.float64), "other": matrix(0.3, 1)}
    assert normalise(torch.full((5,), 3.0)).tolist() == [1.0] * 5
    found = problem(constant, 0.7)
    choice = SpectrumThreshold().choose(found)
    assert found.curves["constant"].forms[choice["constant"]] == Dense()
    with pytest.raises(BudgetError, match=r"spectrum_threshold\(\) spent \d+ bytes of \d+"):
        SpectrumThreshold().choose(problem({"constant": constant["constant"]}, 0.5))


def test_a_small_reduction_is_not_worth_it() -> None:
    found = problem(MODEL, 0.6)
    for least in (0.5, 0.8):
        kept = ranks(found, SpectrumThreshold(min_reduction=least).choose(found))
        assert all(rank == N or 1 - rank / N >= least for rank in kept.values())
        assert any(rank < N for rank in kept.values())


def test_multiples_are_kept() -> None:
    curve = LowRank(multiple=4).curve(MODEL["w3"], PLAIN, torch.float32)
    dense = 4 * N * N
    curves = {"w": Curve([*curve.forms, Dense()], [*curve.nbytes, dense], [*curve.errors, 0.0], 1.0, curve.spectrum)}
    for share in (0.4, 0.7):
        found = Problem(curves, int(share * dense))
        assert ranks(found, SpectrumThreshold().choose(found))["w"] in (4, 8)


def test_a_form_without_a_spectrum_is_refused() -> None:
    bare = Problem({"mlp.up": Curve([Dense()], [10], [0.0], 1.0)}, 10)
    with pytest.raises(ValueError, match=r"mlp\.up: spectrum_threshold needs a form with a spectrum, such as low_rank"):
        SpectrumThreshold().choose(bare)
