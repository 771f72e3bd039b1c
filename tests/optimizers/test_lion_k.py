"""Lion and its family: the update, bounds from inside and outside, constrained optima, conjugates, and the energy."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from drive import drive, gradients, parameter
from torch import Tensor, nn

from eckart.optimizers import LionK
from eckart.optimizers.convex import (
    L1,
    Convex,
    DeadZone,
    Huber,
    Nuclear,
    PNorm,
    Quadratic,
    Relativistic,
    Rows,
    TopK,
)

CATALOGUE = [
    L1(), PNorm(2.0), PNorm(1.5), PNorm(3.0), DeadZone(0.3), TopK(3), Huber(0.5), Relativistic(), Rows(), Quadratic(),
    Nuclear(),
]  # fmt: skip


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_it_is_lion(decay: float) -> None:
    p, grads = parameter(7, 5), gradients((7, 5), 100)
    optimizer = LionK([p], lr=0.01, weight_decay=decay)
    x, m = p.detach().double().clone(), torch.zeros(7, 5, dtype=torch.float64)
    for G, found in zip(grads, drive(optimizer, p, grads), strict=True):
        G = G.double()
        x = (1 - 0.01 * decay) * x - 0.01 * (0.9 * m + 0.1 * G).sign()
        m = 0.99 * m + 0.01 * G
        torch.testing.assert_close(found.double(), x, atol=1e-5, rtol=0)
    assert optimizer.state_bytes() == 4 * 35


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_it_is_the_published_package(decay: float) -> None:
    released = pytest.importorskip("lion_pytorch")
    p, q, grads = parameter(7, 5), parameter(7, 5), gradients((7, 5), 100)
    theirs = released.Lion([q], lr=0.01, weight_decay=decay)
    ours = LionK([p], lr=0.01, weight_decay=decay)
    torch.testing.assert_close(drive(ours, p, grads), drive(theirs, q, grads), atol=1e-7, rtol=0)


def test_bounds_are_reached_exponentially_from_outside_and_kept_from_inside() -> None:
    lr, decay = 0.05, 0.5
    p = nn.Parameter(parameter(6, 6).detach().sign() * 10 / decay)
    inside = nn.Parameter(parameter(6, 6, seed=1).detach().clamp(-1, 1) / decay)
    optimizer = LionK([p, inside], lr=lr, weight_decay=decay)
    start = float((decay * p).detach().abs().max())
    generator = torch.Generator().manual_seed(2)
    for t in range(1, 200):
        # gradients that push outwards as hard as they can
        p.grad = -p.detach().sign() * 100 * torch.rand(6, 6, generator=generator)
        inside.grad = -inside.detach().sign() * 100 * torch.rand(6, 6, generator=generator)
        optimizer.step()
        excess = float((decay * p).detach().abs().max()) - 1
        assert excess <= (1 - lr * decay) ** t * (start - 1) + 1e-5
        assert float((decay * inside).detach().abs().max()) <= 1 + 1e-6
    # decay within the gradient, which the sign hides, keeps no bound
    coupled = nn.Parameter(inside.detach().clone())
    optimizer = LionK([coupled], lr=lr)
    for _ in range(200):
        coupled.grad = -coupled.detach().sign() * 100 + decay * coupled.detach()
        optimizer.step()
    assert float((decay * coupled).detach().abs().max()) > 2


def solved(kernel: Convex, a: Tensor, decay: float, steps: int = 1500, lr: float = 0.05) -> Tensor:
    """The end of minimising ||x - a||^2 / 2 with a learning rate that falls to zero."""
    p = nn.Parameter(torch.zeros_like(a))
    optimizer = LionK([p], lr=lr, weight_decay=decay, kernel=kernel)
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - t / steps) ** 3
        p.grad = p.detach() - a
        optimizer.step()
    return p.detach()


def test_constrained_optima_are_found() -> None:
    a = torch.tensor([0.3, -0.7, 2.5, -4.0, 0.05, 1.1], dtype=torch.float64)
    decay = 1.0
    torch.testing.assert_close(solved(L1(), a, decay), a.clamp(-1, 1), atol=1e-5, rtol=0)
    p = nn.Parameter(torch.zeros_like(a))
    optimizer = LionK([p], lr=0.02, weight_decay=decay)
    for _ in range(600):
        p.grad = p.detach() - a
        optimizer.step()
    assert float((p.detach() - a.clamp(-1, 1)).abs().max()) < 0.04
    ball = solved(PNorm(2.0), a, decay)
    torch.testing.assert_close(ball, a / a.norm(), atol=1e-4, rtol=0)


def test_a_dead_zone_shrinks_and_clips() -> None:
    a = torch.tensor([0.3, -0.7, 2.5, -4.0, 0.05, 1.1], dtype=torch.float64)
    # minimises f(x) + K*(lambda x) / lambda, whose penalty is e ||x||_1
    wanted = (a.sign() * (a.abs() - 0.2).clamp(min=0)).clamp(-1, 1)
    torch.testing.assert_close(solved(DeadZone(0.2), a, 1.0), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kernel", CATALOGUE, ids=str)
def test_subgradients_attain_the_conjugate(kernel: Convex) -> None:
    for seed in range(3):
        x = parameter(4, 5, seed=seed, dtype=torch.float64).detach()
        y = kernel.subgradient(x)
        torch.testing.assert_close(kernel.value(x) + kernel.conjugate(y), (x * y).sum(), atol=1e-6, rtol=1e-6)
        leaf = x.clone().requires_grad_()
        kernel.value(leaf).backward()
        torch.testing.assert_close(y, leaf.grad, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(kernel.subgradient(-x), -y)
    assert not kernel.subgradient(torch.zeros(4, 5)).any()


@pytest.mark.parametrize("kernel", [k for k in CATALOGUE if k != Quadratic()], ids=str)
def test_conjugates_are_infinite_outside(kernel: Convex) -> None:
    assert math.isinf(kernel.conjugate(10 * torch.ones(4, 5)))
    assert float(kernel.conjugate(torch.zeros(4, 5))) == 0


def test_the_energy_never_rises_once_inside() -> None:
    kernel, decay, lr = Relativistic(), 0.5, 2e-3
    b1, b2 = 1 - 0.1, 1 - lr  # eps gamma = 0.1 and h gamma = lr with gamma = 1
    gamma, eps = 1.0, 0.1
    a = torch.tensor([0.5, -3.0, 1.0], dtype=torch.float64)
    curvature = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    p = nn.Parameter(torch.tensor([-1.0, 1.5, -0.5], dtype=torch.float64))
    optimizer = LionK([p], lr=lr, betas=(b1, b2), weight_decay=decay, kernel=kernel)
    energies = []
    for _ in range(1500):
        p.grad = curvature * (p.detach() - a)
        optimizer.step()
        # the paper's momentum has the opposite sign
        x, m = p.detach(), -optimizer.state[p]["exp_avg"]
        loss = (curvature * (x - a).square()).sum() / 2
        constraint = kernel.conjugate(decay * x)
        mixed = constraint + kernel.value(m) - decay * (m * x).sum()
        energies.append(float(loss + gamma / decay * constraint + (1 - eps * gamma) / (1 + eps * decay) * mixed))
    rises = [after - before for before, after in itertools.pairwise(energies)]
    assert max(rises) < lr**2 * 10
    assert energies[-1] < energies[0] - 0.5


@pytest.mark.parametrize("kernel", CATALOGUE, ids=str)
def test_zero_gradients_and_no_decay_move_nothing(kernel: Convex) -> None:
    p = parameter(4, 5)
    before = p.detach().clone()
    (after,) = drive(LionK([p], lr=0.1, kernel=kernel), p, [torch.zeros(4, 5)])
    assert torch.equal(after, before)


def test_norm_gains_may_go_without_decay() -> None:
    gain = nn.Parameter(torch.full((3,), 10.0))
    optimizer = LionK([{"params": [gain], "weight_decay": 0.0}], lr=0.1, weight_decay=1.0)
    drive(optimizer, gain, [torch.zeros(3)])
    assert torch.equal(gain.detach(), torch.full((3,), 10.0))


def test_it_can_be_the_rule_within_a_subspace() -> None:
    p = nn.Parameter(torch.zeros(8, 6))
    optimizer = LionK([{"params": [p], "rank": 2}], lr=0.1)
    values = torch.linalg.svdvals(drive(optimizer, p, gradients((8, 6), 1))[0])
    assert values[1] > 1e-3 * values[0] > 1e3 * values[2]
    assert optimizer.state_bytes() == 4 * (2 * 6 + 2 * 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LionK([parameter(3)], betas=(0.9, 1.0)), "betas"),
        (lambda: LionK([parameter(3)], lr=-1), "lr of group 0"),
        (lambda: LionK([parameter(3)], weight_decay=-1), "weight_decay of group 0"),
        (lambda: PNorm(0.5), "above 1"),
        (lambda: PNorm(1.0), "use L1"),
        (lambda: DeadZone(-1), "not negative"),
        (lambda: TopK(0), "at least 1"),
        (lambda: TopK(4).subgradient(torch.ones(3)), "only 3 entries"),
        (lambda: Huber(0), "above 0"),
    ],
)
def test_impossible_settings_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
