"""Matrix product operators: against loops over digits, against spectra of unfoldings, under weights, in any shape."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from eckart.forms import LowRank, TensorTrain
from eckart.forms.base import Shape
from eckart.forms.tensor_train import Route, TensorTrainMatrix
from eckart.linalg.trains import Split, balanced
from eckart.linalg.weighting import PLAIN, Weighting
from eckart.linalg.whitening import DiagonalRoot, psd_root
from eckart.testing import error_ratio, gaussian

SHAPES: list[Shape] = [(24, 30), (7, 13), (1, 9), (17, 4), (64, 8)]


def naive(module: TensorTrainMatrix) -> Tensor:
    """W[o, i] = G_1[o_1, i_1] ... G_n[o_n, i_n], entry by entry."""
    cores, split = [c.detach() for c in module.cores], module.split
    W = torch.zeros(math.prod(split.out), math.prod(split.in_), dtype=cores[0].dtype)
    rows, columns = (list(itertools.product(*map(range, side))) for side in (split.out, split.in_))
    for (o, row), (i, column) in itertools.product(enumerate(rows), enumerate(columns)):
        value = torch.ones(1, 1, dtype=W.dtype)
        for core, a, b in zip(cores, row, column, strict=True):
            value = value @ core[:, a, b]
        W[o, i] = value[0, 0]
    return W[: module.shape[0], : module.shape[1]]


def widest(form: TensorTrain, shape: Shape) -> TensorTrain:
    return form.at(max(form.split(shape).bonds(10**9)))


def unfoldings(M: Tensor, split: Split) -> list[Tensor]:
    """The matrices whose ranks the bonds limit, entry by entry."""
    n, found = len(split.out), []
    for k in range(1, n):
        sizes = split.sizes
        U = torch.zeros(math.prod(sizes[:k]), math.prod(sizes[k:]), dtype=M.dtype)
        for o, i in itertools.product(range(M.shape[0]), range(M.shape[1])):
            digits, ro, ri = [], o, i
            for a, b in zip(reversed(split.out), reversed(split.in_), strict=True):
                digits.append((ro % a) * b + ri % b)
                ro, ri = ro // a, ri // b
            digits.reverse()
            at = [0, 0]
            for j, (digit, size) in enumerate(zip(digits, sizes, strict=True)):
                at[j >= k] = at[j >= k] * size + digit
            U[at[0], at[1]] = M[o, i]
        found.append(U)
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cores", [2, 3])
def test_dense_is_the_product_of_small_matrices(shape: Shape, cores: int) -> None:
    module = TensorTrain(1, cores).fit(gaussian(*shape, dtype=torch.float64))
    assert error_ratio(module.dense(), naive(module)) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cores", [2, 3, 4])
def test_full_bonds_are_the_matrix(shape: Shape, cores: int) -> None:
    W = gaussian(*shape, dtype=torch.float64)
    assert error_ratio(widest(TensorTrain(None, cores), shape).fit(W).dense(), W) < 1e-10


@pytest.mark.parametrize("bond", [1, 3, 8])
def test_two_cores_leave_the_tail_of_the_rearranged_spectrum(bond: int) -> None:
    W = gaussian(24, 30, dtype=torch.float64)
    module = TensorTrain(bond).fit(W)
    values = torch.linalg.svdvals(unfoldings(W, module.split)[0])
    error = float((W - module.dense().detach()).norm())
    assert error == pytest.approx(float(values[bond:].square().sum().sqrt()), rel=1e-6)
    assert torch.linalg.matrix_rank(module.dense()) >= 20 > 2 * bond  # no low rank


@pytest.mark.parametrize("cores", [3, 4])
def test_more_cores_stay_within_the_bound_and_gain_with_the_bond(cores: int) -> None:
    W, before = gaussian(36, 24, dtype=torch.float64), float("inf")
    for bond in (1, 2, 4, 6):
        module = TensorTrain(bond, cores).fit(W)
        error = float((W - module.dense().detach()).square().sum())
        spectra = [torch.linalg.svdvals(U) for U in unfoldings(W, module.split)]
        tails = [float(s[bond:].square().sum()) for s in spectra]
        assert max(tails) * (1 - 1e-9) <= error <= sum(tails) * (1 + 1e-9) <= (cores - 1) * max(tails) * (1 + 1e-9)
        assert error <= before
        before = error


def test_planted_structure_is_found_where_low_rank_fails() -> None:
    form = TensorTrain(1)
    (a, b), (c, d) = form.split((24, 30)).out, form.split((24, 30)).in_
    noise = 1e-3 * gaussian(24, 30, seed=3)
    W = torch.kron(gaussian(a, c, seed=1), gaussian(b, d, seed=2))
    found = form.fit(W + noise)
    assert float((found.dense().detach() - W).norm()) < float(noise.norm())
    rank = found.nbytes // (4 * (24 + 30)) + 1
    assert error_ratio(LowRank(rank).fit(W).dense(), W) > 0.5
    thin = torch.outer(gaussian(24, seed=4), gaussian(30, seed=5))  # and the other way round
    assert error_ratio(form.fit(thin).dense(), thin) > 0.5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cores", [2, 3])
@pytest.mark.parametrize("route", ["left", "right"])
def test_contracting_is_multiplying(shape: Shape, cores: int, route: Route) -> None:
    """Values and gradients of all cores; and as many flops as are told."""
    module = TensorTrain(1, cores).fit(gaussian(*shape, dtype=torch.float64))
    x, weight = gaussian(5, shape[1], seed=1, dtype=torch.float64), gaussian(5, shape[0], seed=2, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        y = module.contracted(x, route)
    wanted = x @ module.dense().T
    assert error_ratio(y, wanted) < 1e-12
    pairs = zip(*(torch.autograd.grad((z * weight).sum(), list(module.parameters())) for z in (y, wanted)), strict=True)
    assert all(error_ratio(found, true) < 1e-10 for found, true in pairs)
    assert counter.get_total_flops() <= module.costs(5)[route]


def test_flops_are_those_of_the_cheapest_route() -> None:
    module = TensorTrain(1).fit(gaussian(64, 64))
    for tokens in (1, 10, 1000):
        costs = module.costs(tokens)
        assert module.flops(tokens) == costs[module.route(tokens)] == min(costs.values())
    assert module.route(1) != "dense"
    full = widest(TensorTrain(), (64, 64)).fit(gaussian(64, 64))
    assert full.route(1000) == "dense"
    x = gaussian(1000, 64, seed=1)
    with FlopCounterMode(display=False) as counter:
        full(x)
    assert counter.get_total_flops() == full.flops(1000)


@pytest.mark.parametrize("cores", [2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_the_formula(shape: Shape, cores: int) -> None:
    module = TensorTrain(1, cores).fit(gaussian(*shape))
    split = module.split
    assert module.nbytes == 4 * sum(o * i for o, i in zip(split.out, split.in_, strict=True))
    wide = widest(TensorTrain(None, cores), shape).fit(gaussian(*shape))
    assert wide.nbytes == 4 * sum(math.prod(core.shape) for core in wide.cores)
    for left, right in itertools.pairwise(wide.cores):
        assert left.shape[-1] == right.shape[0]


def covariance(n: int, seed: int) -> Tensor:
    X = torch.logspace(0, -2, n, dtype=torch.float64)[:, None] * gaussian(n, 3 * n, seed=seed, dtype=torch.float64)
    return X @ X.T


WEIGHTINGS = {
    "inputs": Weighting(right=psd_root(covariance(30, 1), 0.0)),
    "both": Weighting(psd_root(covariance(24, 2), 0.0), psd_root(covariance(30, 1), 0.0)),
    "diagonal": Weighting(right=DiagonalRoot(torch.logspace(0, -2, 30, dtype=torch.float64))),
    "each": Weighting(each=gaussian(24, 30, seed=6, dtype=torch.float64).exp()),
    "singular": Weighting(right=psd_root(covariance(30, 1)[:, :5] @ covariance(30, 1)[:5], 0.0, "eigen")),
}


@pytest.mark.parametrize("cores", [2, 3])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_are_worth_having_and_never_harm(name: str, cores: int) -> None:
    W, weighting = gaussian(24, 30, dtype=torch.float64), WEIGHTINGS[name]
    for bond in (1, 4, 8):
        form = TensorTrain(bond, cores)
        weighted, plain = (weighting.norm2(W - form.fit(W, w).dense()) for w in (weighting, PLAIN))
        assert weighted <= plain * (1 + 1e-9)
        assert weighted < 0.9 * plain or name == "each"


def test_weights_that_separate_are_met_to_their_optimum() -> None:
    """Where the scales are themselves a Kronecker product, the weighted optimum is known: the SVD of the scaled."""
    W, form = gaussian(24, 30, dtype=torch.float64), TensorTrain(4)
    split = form.split((24, 30))
    d = torch.kron(*(gaussian(n, seed=n, dtype=torch.float64).exp() for n in split.in_))
    weighting = Weighting(right=DiagonalRoot(d))
    optimum = float((W * d - form.fit(W * d).dense().detach()).square().sum())
    assert optimum * (1 - 1e-9) <= weighting.norm2(W - form.fit(W, weighting).dense()) <= 1.02 * optimum


@pytest.mark.parametrize("shape", [(24, 30), (23, 30)])
def test_curve_tells_the_errors_of_the_fits(shape: Shape) -> None:
    W = gaussian(*shape, dtype=torch.float64)
    curve = TensorTrain().curve(W, PLAIN, torch.float32)
    assert len(curve) > 3
    assert all(b < a for a, b in itertools.pairwise(curve.errors))
    assert max(curve.nbytes) < 4 * math.prod(shape)
    for form, nbytes, error in zip(curve.forms, curve.nbytes, curve.errors, strict=True):
        module = form.fit(W, dtype=torch.float32)
        assert error == pytest.approx(float((W - module.dense().detach()).square().sum()), rel=1e-4)
        assert nbytes == module.nbytes


def test_both_sides_of_a_bond_are_equally_large() -> None:
    module = TensorTrain(4, 2).fit(1e4 * gaussian(24, 30))
    left, right = (c.detach().flatten(0, 2) if k == 0 else c.detach().flatten(1).T for k, c in enumerate(module.cores))
    assert torch.allclose(left.norm(dim=0), right.norm(dim=0), rtol=1e-4)
    assert bool(torch.isfinite(TensorTrain(4, 3).fit(1e4 * gaussian(24, 30), dtype=torch.float16).dense()).all())


@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_side_has_balanced_factors(count: int) -> None:
    for n in range(1, 600):
        factors = balanced(n, count)
        assert len(factors) == count
        assert n <= math.prod(factors) <= math.ceil(n ** (1 / count) - 1e-9) ** count
        assert factors[-1] <= 3 * factors[0]
    assert balanced(576, 2) == (24, 24)
    assert math.prod(balanced(4099, 2)) < 1.01 * 4099


@pytest.mark.parametrize("settings", [{"bond": 0}, {"bond": 2.0}, {"cores": 1}, {"cores": 9}, {"cores": "two"}])
def test_nonsense_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="tensor_train"):
        TensorTrain(**settings)  # type: ignore[arg-type]


def test_a_bond_wider_than_any_is_refused() -> None:
    form = widest(TensorTrain(), (24, 30))
    form.fit(gaussian(24, 30))
    with pytest.raises(ValueError, match="no bond is ever wider"):
        form.at((form.bond or 0) + 1).fit(gaussian(24, 30))
