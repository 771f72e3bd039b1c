"""Householder Projector: reflections that are orthogonal, reach the singular vectors, and turn whole directions."""

from __future__ import annotations

import pytest
import torch
from lone import gaussian, lone, update_of
from test_hydra import stirred
from torch import Tensor, nn

from eckart.adapters.householder_projector import reflectors, turned
from eckart.testing.adapters import near


def naive(vectors: Tensor, n: int) -> Tensor:
    """H(v_1) H(v_2) ..., one at a time."""
    Q = torch.eye(len(vectors), dtype=vectors.dtype)
    for v in vectors.T:
        Q = Q @ (torch.eye(len(v), dtype=v.dtype) - 2 * v[:, None] * v / (v @ v))
    return Q[:, :n]


@pytest.mark.parametrize(("d", "k"), [(7, 7), (7, 2), (32, 32), (33, 5)])
def test_all_reflections_at_once_are_the_product_of_one_after_the_other(d: int, k: int) -> None:
    vectors = gaussian(d, k)
    for n in (1, k, d):
        assert near(turned(vectors, n), naive(vectors, n))
    double = gaussian(d, k).double().requires_grad_()
    G = gaussian(d, d, seed=1).double()
    grads = [torch.autograd.grad((f(double, d) * G).sum(), double)[0] for f in (turned, naive)]
    assert near(*grads, 1e-8)


def test_it_is_lapacks_product_for_lapacks_vectors() -> None:
    packed, tau = torch.geqrf(gaussian(9, 4))
    vectors = torch.tril(packed, -1) + torch.eye(9, 4)
    assert near(turned(vectors, 4), torch.linalg.householder_product(packed, tau))


@pytest.mark.parametrize("d", [7, 32, 512])
def test_after_a_hundred_steps_it_is_orthogonal(d: int) -> None:
    vectors = nn.Parameter(gaussian(d, min(d, 40)))
    target, optimizer = gaussian(d, 5, seed=1), torch.optim.Adam([vectors], 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        (turned(vectors, 5) - target).square().sum().backward()
        optimizer.step()
    Q = turned(vectors.detach(), d)
    assert (Q @ Q.T - torch.eye(d)).abs().max() < 1e-5


def test_a_reflector_of_zeros_reflects_nothing() -> None:
    vectors = gaussian(6, 3)
    vectors[:, 1] = 0
    vectors.requires_grad_()
    assert near(turned(vectors, 6), naive(vectors.detach()[:, [0, 2]], 6))
    turned(vectors, 6).square().sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.isfinite().all()


@pytest.mark.parametrize("count", [3, 6, 7, 9])
def test_any_orthonormal_columns_are_reached_up_to_their_signs(count: int) -> None:
    for Q in (torch.linalg.qr(gaussian(9, 3)).Q, torch.eye(9, 3), -torch.eye(9)[:, [4, 0, 8]]):
        vectors, signs = reflectors(Q, count)
        assert vectors.shape == (9, count)
        assert near(turned(vectors, 3) * signs, Q)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (9, 9)])
@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("reflections", [0, 12])
def test_with_its_own_spectrum_it_starts_at_the_best_of_its_rank(shape: tuple[int, int], rank: int, reflections: int) -> None:  # fmt: skip # noqa: E501
    W = gaussian(*shape)
    layer = lone("householder_projector", W, rank=rank, spectrum="own", reflections=reflections)
    U, S, Vh = torch.linalg.svd(W)
    best = U[:, :rank] * S[:rank] @ Vh[:rank]
    assert near(W + update_of(layer).delta(layer.host), best)
    if rank == min(shape):
        assert near(best, W)
    update = update_of(layer)
    assert (update.u.shape, update.v.shape) == tuple((d, min(d, reflections) or rank) for d in shape)


@pytest.mark.parametrize(("spectrum", "value"), [("ones", 1.0), ("mean", None)])
def test_trained_it_has_so_many_equal_singular_values_and_orthonormal_directions(spectrum: str, value: float | None) -> None:  # fmt: skip # noqa: E501
    layer = stirred(lone("householder_projector", nn.Linear(12, 9), rank=4, spectrum=spectrum))
    update, W, x = update_of(layer), layer.host.weight(), gaussian(5, 12)
    value = value or float(torch.linalg.svdvals(W)[:4].mean())
    A = W + update.delta(layer.host)
    values = torch.linalg.svdvals(A)
    assert near(values[:4], torch.tensor(value).expand(4))
    assert values[4:].max() < 1e-5
    V = update.directions()
    assert near(V @ V.T, torch.eye(4))
    beside = gaussian(12, seed=1)
    beside = beside - V.T @ (V @ beside)
    with torch.no_grad():
        still, moved = layer(x + 5 * beside) - layer(x), layer(x + 5 * V[0]) - layer(x)
    assert near(still, torch.zeros(()))
    assert near(moved.norm(dim=1), torch.tensor(5 * value).expand(5))
    before = layer(x)
    layer.merge()
    assert near(layer(x), before)
    assert near(layer.base_layer.weight, A)


def test_the_spectrum_has_the_signs_that_reflections_cannot_give() -> None:
    one = lone("householder_projector", gaussian(6, 6), rank=6)
    assert near(update_of(one).s.abs(), torch.ones(6))
    U, _, Vh = torch.linalg.svd(gaussian(6, 6))
    assert near(gaussian(6, 6) + update_of(one).delta(one.host), U @ Vh)


def test_relative_to_its_start_it_changes_nothing_at_first_and_is_a_lora() -> None:
    layer, x = lone("householder_projector", nn.Linear(12, 9), rank=3, spectrum="own", relative=True), gaussian(5, 12)
    assert near(layer(x), layer.base_layer(x), 1e-6)
    left, right = update_of(stirred(layer)).factors(layer.host)
    assert (left.shape, right.shape) == ((9, 6), (6, 12))
    assert near(left @ right, update_of(layer).delta(layer.host))
    before = layer(x)
    layer.merge()
    assert near(layer(x), before)


def test_vectors_may_be_of_any_length() -> None:
    layer, x = stirred(lone("householder_projector", nn.Linear(12, 9), rank=3)), gaussian(5, 12)
    before = layer(x)
    for p, factor in zip((update_of(layer).u, update_of(layer).v), (1e-4, 1e4), strict=True):
        p.data *= factor
    assert near(layer(x), before)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="0: rank 10 is more"):
        lone("householder_projector", gaussian(9, 12), rank=10)
    with pytest.raises(ValueError, match="0: 2 reflections cannot turn 3"):
        lone("householder_projector", gaussian(9, 12), rank=3, reflections=2)
    with pytest.raises(ValueError, match="spectrum='flat'"):
        lone("householder_projector", gaussian(9, 12), spectrum="flat")
