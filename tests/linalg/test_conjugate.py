"""Conjugate gradients: exact after as many steps as unknowns, monotone before, calm on singular systems."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from eckart.linalg.conjugate import conjugate_gradient, is_plain, normal_map
from eckart.linalg.weighting import PLAIN, Weighting
from eckart.linalg.whitening import DiagonalRoot, psd_root
from eckart.testing import error_ratio, gaussian

A = gaussian(9, 20, dtype=torch.float64) @ gaussian(9, 20, dtype=torch.float64).T
B, START = gaussian(9, seed=1, dtype=torch.float64), gaussian(9, seed=2, dtype=torch.float64)


def objective(x: Tensor, matrix: Tensor = A, rhs: Tensor = B) -> float:
    return float(x @ matrix @ x / 2 - x @ rhs)


def test_solves_in_as_many_steps_as_unknowns() -> None:
    found = conjugate_gradient(lambda x: A @ x, B, START, 12)
    assert error_ratio(found, torch.linalg.solve(A, B)) < 1e-9


def test_every_step_gains() -> None:
    values = [objective(conjugate_gradient(lambda x: A @ x, B, START, n)) for n in range(8)]
    assert all(b < a for a, b in pairwise(values))


def test_a_singular_system_is_solved_where_it_can_be() -> None:
    thin = gaussian(9, 4, seed=3, dtype=torch.float64)
    S = thin @ thin.T
    found = conjugate_gradient(lambda x: S @ x, S @ B, START, 50)
    assert error_ratio(S @ found, S @ B) < 1e-9
    assert torch.equal(conjugate_gradient(lambda x: 0 * x, 0 * B, START, 5), START)


def test_the_normal_map_is_half_the_gradient_of_the_norm() -> None:
    M = gaussian(5, 7, seed=4, dtype=torch.float64)
    root = gaussian(7, 9, dtype=torch.float64)
    made = [
        PLAIN,
        Weighting(DiagonalRoot(gaussian(5, seed=5).abs() + 0.1), psd_root(root @ root.T, 0.0)),
        Weighting(each=gaussian(5, 7, seed=6).square()),
    ]
    for weighting in made:
        step = 1e-5 * gaussian(5, 7, seed=7, dtype=torch.float64)
        change = (weighting.norm2(M + step) - weighting.norm2(M - step)) / 4
        assert abs(change - float((normal_map(weighting, 5, 7)(M) * step).sum())) < 1e-6 * abs(change)
    assert [is_plain(weighting) for weighting in made] == [True, False, False]
