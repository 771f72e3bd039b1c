"""Fira: the scaled rest by hand, the limiter, full-rank updates, and its order beside GaLore."""

from __future__ import annotations

import math

import pytest
import torch
from drive import SHAPES, drive, gradients, groups, parameter, trained
from torch import Tensor, nn

from eckart.optimizers import Columns, Fira, GaLore, NormScaled, Projected, Random
from eckart.optimizers.residual import Split
from eckart.optimizers.rules import Adam, Direction
from eckart.testing import error_ratio

T, RANK = 4, 3


def fira(p: nn.Parameter, rank: int = RANK, **settings: object) -> Fira:
    return Fira([{"params": [p], "rank": rank}], interval=T, **settings)


def naive_fira(W: Tensor, grads: list[Tensor], *, rank: int, lr: float, alpha: float, gamma: float) -> list[Tensor]:
    """The algorithm of the paper, with projections as whole matrices and its limiter as a branch."""
    W, path, last = W.clone(), [], None
    b1, b2, eps = 0.9, 0.999, 0.05
    tall = W.shape[0] >= W.shape[1]
    basis = None
    for t, G in enumerate(grads):
        if t % T == 0:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            new = Vh[:rank].T if tall else U[:, :rank]
            if basis is not None:
                new = new * (new * basis).sum(0).sign()
            basis = new
            if t == 0:
                M = V = torch.zeros_like(G @ basis if tall else basis.T @ G)
        R = G @ basis if tall else basis.T @ G
        M, V = b1 * M + (1 - b1) * R, b2 * V + (1 - b2) * R**2
        N = M / (V.sqrt() + eps)
        back = (lambda X, Q=basis: X @ Q.T) if tall else (lambda X, Q=basis: Q @ X)
        S = G - alpha * back(R)
        if tall:
            for i in range(W.shape[0]):
                S[i] *= N[i].norm() / (R[i].norm() + 1e-8)
        else:
            for j in range(W.shape[1]):
                S[:, j] *= N[:, j].norm() / (R[:, j].norm() + 1e-8)
        if last is not None and S.norm() > gamma * last:
            S = S * gamma * last / S.norm()
        last = S.norm()
        W = W - lr * math.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1)) * (alpha * back(N) + S)
        path.append(W)
    return path


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_trajectories_are_the_papers(shape: tuple[int, int]) -> None:
    p, grads = parameter(*shape), gradients(shape, 2 * T + 5)
    wanted = naive_fira(p.detach(), grads, rank=RANK, lr=0.01, alpha=0.25, gamma=1.01)
    for a, b in zip(drive(fira(p, eps=0.05), p, grads), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_trajectories_are_those_of_the_released_package(shape: tuple[int, int]) -> None:
    released = pytest.importorskip("fira")
    p, q, grads = parameter(*shape), parameter(*shape), gradients(shape, T)
    group = {"rank": RANK, "update_proj_gap": T, "alpha": 0.25, "proj_type": "std"}
    theirs = released.FiraAdamW([{"params": [q], **group}], lr=0.01)
    for a, b in zip(drive(fira(p), p, grads), drive(theirs, q, grads), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_at_full_rank_nothing_is_left_over_unless_alpha_keeps_some(shape: tuple[int, int]) -> None:
    grads, rank = gradients(shape, 5), min(shape)
    p, q = parameter(*shape), parameter(*shape)
    galore = GaLore([{"params": [q], "rank": rank}], interval=T, scale=1.0)
    for a, b in zip(drive(fira(p, rank, scale=1.0), p, grads), drive(galore, q, grads), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    G = grads[0]
    factors = {1: torch.linalg.qr(torch.randn(shape[1], shape[1], generator=torch.Generator().manual_seed(0)))[0]}
    split = Split(G, G @ factors[1], factors, Direction(G @ factors[1], 1.0), 0.25)
    for overlap, wanted in ((True, 0.75 * G), (False, 0 * G)):
        found = NormScaled(growth=None, overlap=overlap).rest({}, split)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", [0, 1])
def test_every_column_of_the_rest_is_scaled_by_its_own_ratio(mode: int) -> None:
    G, r = gradients((9, 9), 1)[0], 4
    Q = torch.linalg.qr(parameter(9, 9).detach())[0][:, :r]
    R = Q.T @ G if mode == 0 else G @ Q
    N = parameter(*R.shape, seed=3).detach()
    split = Split(G, R, {mode: Q}, Direction(N, 0.5), 1.0)
    S = G - (Q @ R if mode == 0 else R @ Q.T)
    found = NormScaled(growth=None).rest({}, split)
    for i in range(9):
        n, before, s, f = (x.select(1 - mode, i) for x in (N, R, S, found))
        torch.testing.assert_close(f.norm(), 0.5 * n.norm() / before.norm() * s.norm())
    whole = NormScaled(growth=None, factors="matrix").rest({}, split)
    torch.testing.assert_close(whole, 0.5 * N.norm() / R.norm() * S)


def test_the_limiter_lets_norms_grow_by_one_percent_at_most() -> None:
    rule, state, generator = NormScaled(), {}, torch.Generator().manual_seed(0)
    last, limited = None, 0
    for _ in range(200):
        S = torch.randn(6, 5, generator=generator) * 100 ** float(torch.randint(2, (), generator=generator))
        found = S * rule.limit(state, S.norm())
        if last is not None:
            assert float(found.norm()) <= (1.01 + 1e-6) * last
            if float(S.norm()) < 1.01 * last:
                torch.testing.assert_close(found, S)
            else:
                limited += 1
        last = float(found.norm())
        torch.testing.assert_close(float(state["residual_norm"]), last, rtol=1e-5, atol=0)
    assert 20 < limited < 199


def test_a_rest_of_zero_does_not_freeze_it() -> None:
    rule, state = NormScaled(), {}
    rule.limit(state, torch.tensor(0.0))
    assert float(rule.limit(state, torch.tensor(3.0))) == 1
    assert float(rule.limit(state, torch.tensor(6.0))) == pytest.approx(1.01 / 2)


def test_updates_are_of_full_rank_and_state_is_one_number_more() -> None:
    p = nn.Parameter(torch.zeros(12, 9))
    optimizer = fira(p)
    values = torch.linalg.svdvals(drive(optimizer, p, gradients((12, 9), 1))[0])
    assert values[-1] > 1e-3 * values[0]
    assert optimizer.state_bytes() == 4 * (RANK * (9 + 2 * 12) + 1) == optimizer.expected_state_bytes()


def test_columns_of_zeros_stay_finite() -> None:
    p, G = parameter(6, 8), gradients((6, 8), 1)[0]
    G[:, 2] = 0
    before = p.detach().clone()
    (after,) = drive(fira(p), p, [G])
    assert after.isfinite().all()
    torch.testing.assert_close(after[:, 2], before[:, 2])
    (after,) = drive(fira(p), p, [torch.zeros(6, 8)])
    assert after.isfinite().all()


@pytest.mark.parametrize("projector", [Random(), Columns()], ids=["random", "columns"])
def test_any_projector_will_do(projector: object) -> None:
    p = nn.Parameter(torch.zeros(12, 9))
    values = torch.linalg.svdvals(drive(fira(p, projector=projector), p, gradients((12, 9), 1))[0])
    assert values[-1] > 1e-3 * values[0]


def test_the_limiters_state_is_part_of_a_checkpoint() -> None:
    grads = gradients((9, 7), 6)
    p, q = parameter(9, 7), parameter(9, 7)
    a, b = fira(p), fira(q)
    drive(a, p, grads[:3])
    state = a.state_dict()
    q.data.copy_(p)
    b.load_state_dict(state)
    burst = [100 * grads[3]]
    assert torch.equal(drive(a, p, burst)[0], drive(b, q, burst)[0])
    del b.state[q]["residual_norm"]
    assert not torch.equal(drive(a, p, burst)[0], drive(b, q, burst)[0])


def test_it_learns_better_than_galore_at_the_same_state() -> None:
    galore = trained(lambda model, lr: GaLore(groups(model, rank=2), lr=lr, scale=1.0, interval=20))
    fira = trained(lambda model, lr: Fira(groups(model, rank=2), lr=lr, scale=1.0, interval=20))
    assert fira < galore - 0.05


def test_impossible_settings_are_refused() -> None:
    p = parameter(4, 4)
    with pytest.raises(ValueError, match="at least 1"):
        fira(p, growth=0.9)
    with pytest.raises(ValueError, match="'column' or 'matrix'"):
        fira(p, factors="row")
    with pytest.raises(ValueError, match="side"):
        fira(p, side="middle")
    with pytest.raises(ValueError, match="rank of group 0"):
        fira(p, 0)
    assert error_ratio(p.detach(), parameter(4, 4).detach()) == 0
    assert Projected([p], projector=Random(), inner=Adam(), residual=NormScaled(), lr=0.1).expected_state_bytes() == 128
