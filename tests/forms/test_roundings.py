"""Roundings against slow textbook ones, and what each promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eckart.forms import Quantized
from eckart.forms.alternate import Alternate, refit
from eckart.forms.gptq import GPTQ
from eckart.forms.grids import Uniform
from eckart.forms.levels import Learned
from eckart.forms.quantized import Groups
from eckart.forms.roundings import ROUNDINGS, Stochastic
from eckart.linalg.feedback import feedback
from eckart.linalg.weighting import PLAIN, Weighting
from eckart.linalg.whitening import Damped, psd_root
from eckart.testing import error_ratio, gaussian

OUT, IN = 12, 24


def covariance(n: int = IN, rows: int = 400) -> Tensor:
    x = gaussian(rows, n, seed=5, dtype=torch.float64) @ gaussian(n, n, seed=6, dtype=torch.float64)
    return x.T @ x / rows


def weighting(n: int = IN) -> Weighting:
    return Weighting(right=psd_root(covariance(n), 1e-9))


def lost(W: Tensor, form: Quantized, norm: Weighting | None = None) -> float:
    norm = norm or weighting(W.shape[1])
    return norm.norm2(W - form.fit(W, norm).dense().detach().to(W))


def textbook(W: Tensor, C: Tensor, form: Quantized, order: list[int], damping: float) -> Tensor:
    """Optimal brain quantisation in a given order: every column's error goes into all that are left by the inverse of
    the weight among these, which is inverted anew each time. Parameters are those of the matrix before."""
    at = Groups(form, W.shape[1], W.dtype)
    p = at.parameters(W, C.diagonal()[None])
    H = C + damping * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
    W, found = W.clone(), torch.zeros_like(W)
    for step, j in enumerate(order):
        left = order[step:]
        inverse = torch.linalg.inv(H[left][:, left])
        found[:, j] = at.column(W[:, j], j, p)[1]
        error = (W[:, j] - found[:, j]) / inverse[0, 0]
        W[:, left] -= error[:, None] * inverse[0]
    return found


@pytest.mark.parametrize("order", ["given", "activation"])
@pytest.mark.parametrize("grid", [Uniform(), Uniform(zero="real", search=5), Learned()], ids=str)
def test_gptq_is_the_textbook_one(order: str, grid: Uniform | Learned) -> None:
    W, C = gaussian(OUT, IN, dtype=torch.float64), covariance()
    form = Quantized(3, 8, grid, GPTQ(order, damping=0.01))
    places = list(range(IN)) if order == "given" else C.diagonal().sort(descending=True).indices.tolist()
    found = form.fit(W, Weighting(right=psd_root(C, 0.0))).dense().detach()
    assert error_ratio(found, textbook(W, C, form, places, 0.01)) <= 1e-10


@pytest.mark.parametrize("block", [1, 5, 8, 24, 1000])
def test_the_block_does_not_matter(block: int) -> None:
    W = gaussian(OUT, IN, dtype=torch.float64)
    found, wanted = (Quantized(2, 8, Uniform(), GPTQ(block=b)).fit(W, weighting()).dense() for b in (block, 128))
    assert error_ratio(found, wanted) <= 1e-10


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [None, 8])
def test_gptq_is_below_nearest(bits: int, group: int | None) -> None:
    W = gaussian(64, IN, seed=1)
    assert lost(W, Quantized(bits, group, Uniform(), GPTQ())) < 0.9 * lost(W, Quantized(bits, group))


def test_without_couplings_gptq_is_nearest() -> None:
    W = gaussian(OUT, IN)
    assert torch.equal(Quantized(3, 8, Uniform(), GPTQ()).fit(W).dense(), Quantized(3, 8).fit(W).dense())


def test_dead_inputs_take_no_errors_and_give_none() -> None:
    W, C, dead = gaussian(OUT, IN, dtype=torch.float64), covariance(), [3, 17]
    W[:, dead] *= 0.1
    C[dead], C[:, dead] = 0, 0
    form = Quantized(3, None, Uniform(), GPTQ(damping=1e-9))
    norm = Weighting(right=psd_root(C, 0.0, "eigen"))
    found = form.fit(W, norm).dense().detach()
    at = Groups(form, IN, torch.float64)
    p = at.parameters(W, norm.importance((OUT, IN)))
    for j in dead:
        assert torch.allclose(found[:, j], at.column(W[:, j], j, p)[1])
    alive = [j for j in range(IN) if j not in dead]
    alone = form.fit(W[:, alive], Weighting(right=psd_root(C[alive][:, alive], 0.0))).dense().detach()
    assert error_ratio(found[:, alive], alone) <= 1e-9


def test_no_data_is_no_couplings() -> None:
    W = gaussian(OUT, IN)
    nothing = Weighting(right=psd_root(torch.zeros(IN, IN)))
    assert torch.equal(Quantized(3, 8, Uniform(), GPTQ()).fit(W, nothing).dense(), Quantized(3, 8).fit(W).dense())


def test_a_singular_weight_is_damped_and_said() -> None:
    x = gaussian(5, IN, seed=3, dtype=torch.float64)
    norm = Weighting(right=psd_root(x.T @ x, 0.0, "eigen"))
    form = Quantized(3, 8, Uniform(), GPTQ(damping=0.0))
    with pytest.warns(Damped, match="is singular"):
        found = form.fit(gaussian(OUT, IN), norm)
    assert bool(torch.isfinite(found.dense()).all())


@pytest.mark.parametrize("order", ["given", "activation"])
def test_feedback_is_a_factor_of_the_inverse(order: str) -> None:
    C = covariance()
    columns, U = feedback(C, order, 0.05)
    H = (C + 0.05 * C.diagonal().mean() * torch.eye(IN, dtype=C.dtype))[columns][:, columns]
    assert torch.equal(U, U.triu())
    assert error_ratio(U.T @ U @ H, torch.eye(IN, dtype=C.dtype)) <= 1e-9
    assert order == "given" or bool((C.diagonal()[columns].diff() <= 0).all())


def test_stochastic_is_right_on_average_and_never_far() -> None:
    W, grid = gaussian(6, 20, dtype=torch.float64), Uniform(zero="real")
    draws = torch.stack([Quantized(3, 10, grid, Stochastic(s)).fit(W).dense().detach() for s in range(400)])
    nearest = Quantized(3, 10, grid).fit(W)
    step = nearest.floats["scale"].dense().detach().T.repeat_interleave(10, 1)
    assert float(((draws.mean(0) - W).abs() / step).max()) < 0.12
    assert float(((draws - W).abs() / step).max()) <= 1 + 1e-9
    assert not torch.equal(draws[0], draws[1])
    assert error_ratio(nearest.dense(), W) < error_ratio(draws[0], W)


def test_weights_on_the_grid_do_not_move() -> None:
    W = Quantized(3, 10).fit(gaussian(6, 20)).dense().detach()
    for rounding in (Stochastic(1), GPTQ(), Alternate()):
        assert error_ratio(Quantized(3, 10, Uniform(), rounding).fit(W, weighting(20)).dense(), W) <= 1e-6


GRIDS = [Uniform(zero="real"), Uniform(), Uniform(symmetric=True), Learned()]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("group", [None, 7])
def test_refitted_parameters_leave_no_gradient(grid: Uniform | Learned, group: int | None) -> None:
    W, C = gaussian(OUT, IN, dtype=torch.float64), covariance()
    at = Groups(Quantized(2, group, grid), IN, torch.float64)
    p = at.parameters(W)
    codes = at.encode(W, p)
    better = at.stored(refit(W, C, codes, p, at))
    rest = (at.decode(codes, better) - W) @ C
    filled = torch.nn.functional.pad(rest, (0, at.count * at.group - IN)).unflatten(1, (at.count, at.group))
    for design in at.design(codes, better).values():
        gradient = (design * filled[..., None]).sum(2)
        assert float(gradient.abs().max()) <= 1e-8 * float(C.norm())
    norm = Weighting(right=psd_root(C, 0.0))
    best = norm.norm2(W - at.decode(codes, better))
    assert best <= norm.norm2(W - at.decode(codes, p))
    for seed in range(5):
        moved = {k: v + 1e-3 * gaussian(*v.shape, seed=seed, dtype=v.dtype) for k, v in better.values.items()}
        if at.slots.get("zero") is not None and at.slots["zero"].bits is not None:
            moved["zero"] = better.values["zero"]
        assert norm.norm2(W - at.decoded(codes, moved)) >= best


@pytest.mark.parametrize("text", ["gptq(order='random')", "gptq(damping=-1)", "gptq(block=0)", "stochastic(seed=0.5)",
                                  "alternate(steps=-1)", "alternate(codes=nearest())"])  # fmt: skip
def test_refusals(text: str) -> None:
    with pytest.raises(ValueError, match=text.split("(")[0]):
        ROUNDINGS.parse(text)


def test_plain_needs_no_data() -> None:
    assert lost(gaussian(4, 8), Quantized(4, 4, Uniform(), Alternate()), PLAIN) < 0.1
