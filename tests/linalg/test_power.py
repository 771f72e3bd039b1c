from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from eckart.linalg.power import BlockPower, orthonormalise, power_step


def gaussian(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def decaying(m: int, n: int, factor: float = 0.8, seed: int = 0) -> Tensor:
    U = torch.linalg.qr(gaussian(m, min(m, n), seed))[0]
    V = torch.linalg.qr(gaussian(n, min(m, n), seed + 1))[0]
    return (U * factor ** torch.arange(float(min(m, n)))) @ V.mT


def largest_angle(P: Tensor, Q: Tensor) -> float:
    """The sine of the largest principal angle between two subspaces of equal dimension."""
    return float(torch.linalg.matrix_norm(P - Q @ (Q.mT @ P), ord=2))


def leading(A: Tensor, rank: int, side: str) -> Tensor:
    U, _, Vh = torch.linalg.svd(A, full_matrices=False)
    return Vh[:rank].mT if side == "right" else U[:, :rank]


def steps_until(power: BlockPower, A: Tensor, target: Tensor, angle: float) -> int:
    for step in range(1, 101):
        if largest_angle(power.update(A), target) < angle:
            return step
    raise AssertionError("no convergence in 100 steps")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (30, 30)])
def test_converges_to_the_singular_subspace(shape: tuple[int, int], side: str) -> None:
    A = decaying(*shape)
    power = BlockPower(5, side=side)
    Q = power.update(A, steps=60)
    target = leading(A, 5, side)
    assert largest_angle(Q, target) < 1e-4
    torch.testing.assert_close((Q.mT @ target).abs(), torch.eye(5), rtol=0, atol=2e-3)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(5), rtol=0, atol=1e-5)


def test_every_step_helps_at_the_rate_of_the_spectral_gap() -> None:
    A = decaying(50, 40, factor=0.7)
    power, target = BlockPower(4, seed=1), leading(A, 4, "right")
    power.update(A, steps=6)
    before = largest_angle(power.update(A), target)
    after = largest_angle(power.update(A, steps=2), target)
    assert after == pytest.approx(before * 0.7**4, rel=0.2)


def test_warm_start_needs_fewer_steps_than_cold_on_a_slowly_changing_matrix() -> None:
    A = decaying(80, 60, factor=0.85)
    power = BlockPower(6)
    power.update(A, steps=60)
    for change in range(3):
        A = A + 1e-3 * gaussian(80, 60, seed=100 + change) / math.sqrt(60)
        target = leading(A, 6, "right")
        warm = steps_until(power, A, target, 1e-3)
        cold = steps_until(BlockPower(6), A, target, 1e-3)
        assert warm <= cold / 3


def test_columns_keep_their_place_and_sign_between_updates() -> None:
    A = decaying(50, 30)
    power = BlockPower(4)
    before = power.update(A, steps=60)
    after = power.update(A + 1e-3 * decaying(50, 30, seed=7))
    assert ((before * after).sum(0) > 0.99).all()


def test_residual_is_the_share_of_the_matrix_outside_the_subspace() -> None:
    A = decaying(40, 30)
    S = torch.linalg.svdvals(A)
    expected = float(S[5:].norm() / S.norm())
    for side in ("left", "right"):
        power = BlockPower(5, side=side)
        cold = power.update(A), power.residual(A)
        power.update(A, steps=60)
        assert power.residual(A) == pytest.approx(expected, rel=1e-4)
        assert expected < cold[1] < 1
    assert power.residual(torch.zeros(40, 30)) == 0.0


def test_same_seed_same_bits() -> None:
    A = gaussian(20, 15)
    assert torch.equal(BlockPower(3, seed=4).update(A), BlockPower(3, seed=4).update(A))
    assert not torch.equal(BlockPower(3, seed=4).update(A), BlockPower(3, seed=5).update(A))


def test_state_round_trip_continues_bit_for_bit() -> None:
    A, B = gaussian(20, 15), gaussian(20, 15, seed=1)
    power = BlockPower(3)
    assert power.state_dict() == {}
    power.update(A, steps=2)
    state = {name: tensor.clone() for name, tensor in power.state_dict().items()}
    resumed = BlockPower(3, seed=99)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.update(B), power.update(B))
    resumed.load_state_dict({})
    assert resumed.basis is None


def test_loaded_basis_is_a_copy() -> None:
    state = {"basis": torch.eye(5)[:, :2]}
    power = BlockPower(2)
    power.load_state_dict(state)
    state["basis"].zero_()
    assert power.basis is not None
    assert float(power.basis.norm()) == pytest.approx(math.sqrt(2))


def test_zero_matrix_leaves_the_basis_as_it_is() -> None:
    power = BlockPower(2)
    before = power.update(decaying(8, 6)).clone()
    assert torch.equal(power.update(torch.zeros(8, 6)), before)
    start = BlockPower(2).update(torch.zeros(8, 6))
    torch.testing.assert_close(start.mT @ start, torch.eye(2))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales_do_not_change_the_basis(scale: float) -> None:
    A = decaying(20, 12)
    torch.testing.assert_close(BlockPower(3).update(A * scale), BlockPower(3).update(A), rtol=0, atol=1e-4)


def test_rank_deficient_matrix_keeps_an_orthonormal_basis() -> None:
    A = torch.outer(torch.arange(1.0, 9.0), torch.arange(1.0, 7.0))
    Q = BlockPower(3).update(A, steps=3)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(3), rtol=0, atol=1e-5)
    assert largest_angle(leading(A, 1, "right"), Q) < 1e-5


@pytest.mark.parametrize(("given", "basis"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_solves_in_float32_or_float64(given: torch.dtype, basis: torch.dtype) -> None:
    assert BlockPower(2).update(gaussian(9, 7).to(given)).dtype == basis


def test_power_step_gives_ritz_values_below_the_true_ones() -> None:
    A = decaying(30, 20)
    _, V, R = power_step(A, gaussian(20, 4))
    truth = torch.linalg.svdvals(A)[:4]
    assert (torch.linalg.svdvals(R) <= truth * (1 + 1e-5)).all()
    for _ in range(60):
        U, V, R = power_step(A, V)
    torch.testing.assert_close(torch.linalg.svdvals(R), truth, rtol=1e-4, atol=0)
    torch.testing.assert_close(A.mT @ U, V @ R, rtol=0, atol=1e-5)


def test_orthonormalise_is_a_qr_with_a_positive_diagonal() -> None:
    X = gaussian(12, 5)
    Q, R = orthonormalise(X)
    torch.testing.assert_close(Q @ R, X)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(5))
    assert (R.diagonal() > 0).all()
    assert torch.equal(R, R.triu())


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="rank of at least 1, not 0"):
        BlockPower(0)
    with pytest.raises(ValueError, match="'left' or 'right', not 'top'"):
        BlockPower(1, side="top")
    power = BlockPower(4)
    with pytest.raises(RuntimeError, match="call update first"):
        power.residual(torch.ones(5, 5))
    with pytest.raises(ValueError, match="too large for a matrix of sides \\(9, 3\\)"):
        power.update(torch.ones(9, 3))
    with pytest.raises(ValueError, match="at least 1 step, not 0"):
        power.update(torch.ones(9, 9), steps=0)
    with pytest.raises(ValueError, match=r"torch\.int64"):
        power.update(torch.ones(9, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match="NaN or infinite"):
        power.update(torch.full((9, 9), math.nan))
    assert power.basis is None
    power.update(gaussian(9, 8))
    with pytest.raises(ValueError, match="basis of R\\^8 for the right side, but was given a matrix with 7 there"):
        power.update(gaussian(9, 7))
    with pytest.raises(ValueError, match="finite basis of shape \\(n, 4\\), not one of shape \\(8, 3\\)"):
        power.load_state_dict({"basis": torch.ones(8, 3)})
    with pytest.raises(ValueError, match="holds only 'basis'"):
        power.load_state_dict({"basis": torch.ones(8, 4), "seed": torch.tensor(0)})
