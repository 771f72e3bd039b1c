"""SoKA: principal Kronecker products."""

from __future__ import annotations

import pytest
import torch
from lone import gaussian, learning, lone, update_of
from peft import LoKrConfig, get_peft_model
from torch import Tensor, nn

from eckart.adapters.soka import terms_at
from eckart.linalg.trains import Split

SHAPES = [((12, 8), (3, 2)), ((12, 8), (2, 4)), ((8, 12), (4, 3)), ((6, 35), (3, 7))]


def planted(terms: int, noise: float, seed: int = 0) -> Tensor:
    """A (24, 30) sum of Kronecker products of similar norm, of (4, 5) and (6, 6), with noise beside it."""
    P = torch.linalg.qr(gaussian(20, terms, seed=seed)).Q.T.reshape(terms, 4, 5)
    Q = torch.linalg.qr(gaussian(36, terms, seed=seed + 1)).Q.T.reshape(terms, 6, 6)
    s = torch.linspace(1.2, 0.9, terms)
    W = sum((s[k] * torch.kron(P[k], Q[k]) for k in range(terms)), torch.zeros(24, 30))
    return W + noise * gaussian(24, 30, seed=seed + 2)


def test_the_rearrangement_is_a_bijection_that_makes_products_rank_one() -> None:
    split = Split((24, 30), (4, 6), (5, 6))
    W = gaussian(24, 30)
    assert torch.equal(split.matrix(split.tensor(W)), W)
    values = torch.linalg.svdvals(split.tensor(torch.kron(gaussian(4, 5), gaussian(6, 6, seed=1))))
    assert float(values[1] / values[0]) < 1e-6


def stirred(layer: object) -> None:
    for i, parameter in enumerate(learning(layer).values()):  # type: ignore[arg-type]
        parameter.data += 0.3 * gaussian(*parameter.shape, seed=i)


@pytest.mark.parametrize(("shape", "left"), SHAPES)
def test_implicit_products_equal_explicit_ones(shape: tuple[int, int], left: tuple[int, int]) -> None:
    W, x = gaussian(*shape), gaussian(2, 5, shape[1], seed=1)
    layer = lone("soka", W, rank=3, energy=0.0, left_shape=left)
    assert torch.equal(layer(x), layer.base_layer(x))
    start = update_of(layer)
    stirred(layer)
    now, before = torch.zeros(shape), torch.zeros(shape)
    for k in range(3):
        now += (start.s[k] * torch.kron(start.P[k], start.Q[k])).detach()
        before += start.s0[k] * torch.kron(start.P0[k], start.Q0[k])
    torch.testing.assert_close(start.delta(layer.host).detach(), now - before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x), x @ (W + now - before).T, rtol=1e-4, atol=1e-4)
    a, b = left
    numbers = 3 * (a * b + shape[0] * shape[1] // (a * b) + 1)
    assert sum(p.numel() for p in learning(layer).values()) == numbers


def test_the_start_is_the_nearest_sum() -> None:
    W = gaussian(24, 30)
    layer = lone("soka", W, rank=4, energy=0.0, left_shape=(4, 5))
    update = update_of(layer)
    left = W - update._matrix((update.P0, update.s0, update.Q0))
    R = Split((24, 30), (4, 6), (5, 6)).tensor(W)
    tail = float(torch.linalg.svdvals(R.double())[4:].norm())
    assert float(left.norm()) == pytest.approx(tail, rel=1e-5)
    assert update.captured == pytest.approx(1 - tail**2 / float(W.norm()) ** 2, rel=1e-4)
    for seed in range(20):  # alternating least squares on the same problem
        Q = gaussian(4, 36, seed=seed)
        for _ in range(10):
            P = torch.linalg.lstsq(Q.T, R.T).solution.T
            Q = torch.linalg.lstsq(P, R).solution
        assert float((R - P @ Q).norm()) >= tail * (1 - 1e-5)


def test_kronecker_sums_beat_low_ranks_where_they_are_planted_and_lose_where_they_are_not() -> None:
    def error(W: Tensor) -> float:
        return 1 - float(update_of(lone("soka", W, rank=3, energy=0.0, left_shape=(4, 5))).captured)

    def of_rank(W: Tensor, rank: int) -> float:
        values = torch.linalg.svdvals(W).square()
        return float(values[rank:].sum() / values.sum())

    same = round(3 * (20 + 36 + 1) / (24 + 30))
    assert error(planted(3, 1e-3)) < 0.01 * of_rank(planted(3, 1e-3), same)
    low = gaussian(24, same) @ gaussian(same, 30, seed=1)
    assert error(low) > 100 * of_rank(low, same)


def test_the_number_of_terms_is_read_from_the_spectrum() -> None:
    for terms, seed in ((3, 0), (3, 7), (1, 0)):
        layer = lone("soka", planted(terms, 1e-3, seed), left_shape=(4, 5))
        assert len(update_of(layer).s) == terms
    pure = torch.kron(gaussian(4, 5), gaussian(6, 6, seed=1))
    assert len(update_of(lone("soka", pure, left_shape=(4, 5))).s) == 1
    for most in (1, 2, 5):
        assert len(update_of(lone("soka", gaussian(24, 30), rank=most, left_shape=(4, 5))).s) <= most
    values = torch.tensor([4.0, 2, 1, 0.5, 0.25])
    whole = float(values.square().sum())
    assert terms_at(values, 0.7, whole) == 1
    assert terms_at(torch.ones(6), 0.5, 6.0) == 3
    assert terms_at(torch.tensor([1.0, 0.99, 0.98, 0.97, 0.0, 0.0]), 1.0, 4.0) == 4


def test_one_term_is_what_peft_calls_lokr() -> None:
    W, x = gaussian(12, 8), gaussian(5, 8, seed=1)
    config = LoKrConfig(r=8, alpha=8, target_modules=["0"], decompose_factor=3, init_weights=False)
    theirs = get_peft_model(nn.Sequential(nn.Linear(8, 12, bias=False)), config)
    theirs.base_model.model[0].base_layer.weight.data.copy_(W)
    first, second = (theirs.base_model.model[0].get_parameter(f"lokr_w{i}.default") for i in (1, 2))
    layer = lone("soka", W, rank=1, energy=0.0, left_shape=tuple(first.shape))
    update = update_of(layer)
    update.s0.zero_()
    update.P.data.copy_(first)
    update.Q.data.copy_(second)
    update.s.data.fill_(1.0)
    torch.testing.assert_close(layer(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_sides_without_factors_are_filled_up_and_zeros_stand() -> None:
    for shape in ((13, 17), (7, 12)):
        W, x = gaussian(*shape), gaussian(5, shape[1], seed=1)
        layer = lone("soka", W, rank=2, energy=0.0)
        assert torch.equal(layer(x), layer.base_layer(x))
        stirred(layer)
        torch.testing.assert_close(layer(x), x @ (W + update_of(layer).delta(layer.host)).T, rtol=1e-4, atol=1e-4)
    layer = lone("soka", torch.zeros(12, 8))
    layer(gaussian(3, 8)).sum().backward()
    assert all(bool(p.grad is not None and p.grad.isfinite().all()) for p in learning(layer).values())


def test_convolutions_are_matrices_of_unfolded_kernels() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, (2, 3), stride=2, padding=1)
    layer, x = lone("soka", conv, rank=3), gaussian(2, 4, 7, 6)
    assert torch.equal(layer(x), conv(x))
    stirred(layer)
    changed = conv.weight + update_of(layer).delta(layer.host).view_as(conv.weight)
    expected = nn.functional.conv2d(x, changed, conv.bias, 2, 1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_bad_settings_are_named() -> None:
    for settings in ({"rank": 0}, {"energy": 1.1}, {"left_shape": (0, 2)}, {"left_shape": (2,)}):
        with pytest.raises(ValueError, match=rf"soka\({next(iter(settings))}="):
            lone("soka", gaussian(6, 6), **settings)
    with pytest.raises(ValueError, match=r"0: kronecker.*5 x 2 does not divide it; leave the layer out"):
        lone("soka", gaussian(12, 8), left_shape=(5, 2))
