"""SVFit: singular values in a frozen frame."""

from __future__ import annotations

import pytest
import torch
from lone import fitted, gaussian, learning, lone, update_of
from torch import nn

SHAPES = [(12, 8), (8, 12), (9, 9)]


@pytest.mark.parametrize("shape", SHAPES)
def test_start_is_exact_at_every_rank(shape: tuple[int, int]) -> None:
    W, x = gaussian(*shape), gaussian(5, shape[1], seed=1)
    for rank in range(1, min(shape) + 1):
        layer = lone("svfit", W, rank=rank)
        assert torch.equal(layer(x), x @ W.T)
        frame = update_of(layer)
        residual = W - frame.left * frame.core.detach() @ frame.right
        values = torch.linalg.svdvals(W.double())[rank:]
        assert float(residual.norm()) == pytest.approx(float(values.norm()), abs=1e-5)


def test_gradient_is_that_of_the_matrix_between_the_vectors() -> None:
    W, x, g = gaussian(12, 8), gaussian(20, 8, seed=1), gaussian(20, 12, seed=2)
    layer = lone("svfit", W, rank=5)
    (layer(x) * g).sum().backward()
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    expected = torch.einsum("oi,oj,ji->i", U[:, :5], g.T @ x, Vh[:5].T)
    torch.testing.assert_close(update_of(layer).core.grad, expected, rtol=1e-4, atol=1e-4)


def test_only_the_values_learn() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 6))
    for base, rank in ((model[0], 5), (model[1], 6)):
        layer = lone("svfit", base, rank=rank)
        assert {n: p.numel() for n, p in learning(layer).items()} == {"core": rank}
        optimizer = torch.optim.AdamW(learning(layer).values(), 1e-2)
        layer(gaussian(3, base.in_features)).sum().backward()
        optimizer.step()
        moments = [t for s in optimizer.state.values() for t in s.values() if t.dim() > 0]
        assert sum(t.numel() for t in moments) == 2 * rank


def test_rescaled_values_are_recovered_and_rotated_vectors_are_not() -> None:
    W = gaussian(12, 8)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    assert fitted(lone("svfit", W, rank=8), U * (S * torch.linspace(0.5, 2, 8)) @ Vh) < 1e-6
    rotation = torch.linalg.matrix_exp(0.3 * (gaussian(8, 8, seed=3) - gaussian(8, 8, seed=3).T))
    target = U * S @ rotation @ Vh
    off = U.T @ (target - W) @ Vh.T
    floor = float((off - off.diagonal().diag()).square().sum() / (target - W).square().sum())
    assert fitted(lone("svfit", W, rank=8), target) == pytest.approx(floor, rel=1e-4)
    assert floor > 0.1


def test_the_change_stays_in_the_leading_subspaces_when_merged() -> None:
    W, x = gaussian(12, 8), gaussian(5, 8, seed=1)
    layer = lone("svfit", W, rank=3)
    update_of(layer).core.data *= 1.7
    before = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    change = layer.base_layer.weight - W
    torch.testing.assert_close(change, U[:, :3] @ U[:, :3].T @ change @ Vh[:3].T @ Vh[:3], atol=1e-5, rtol=0)
    assert int((torch.linalg.svdvals(change) > 1e-4).sum()) == 3


def test_energy_takes_the_fewest_values_that_hold_it() -> None:
    U, _, Vh = torch.linalg.svd(gaussian(12, 8), full_matrices=False)
    W = U * torch.tensor([3.0, 2, 1, 0.5, 0.1, 0.1, 0.1, 0.1]) @ Vh  # squares 9, 4, 1, 0.25, 0.04 in all
    assert [len(update_of(lone("svfit", W, energy=e)).core) for e in (0.62, 0.9, 0.95, 1.0)] == [1, 2, 3, 8]


def test_bad_settings_are_named() -> None:
    for settings in ({"rank": 0}, {"energy": 1.2}, {"energy": -0.1}):
        with pytest.raises(ValueError, match=rf"svfit\({next(iter(settings))}="):
            lone("svfit", gaussian(6, 6), **settings)
    with pytest.raises(ValueError, match="0: rank 7 is more than a matrix of shape"):
        lone("svfit", gaussian(6, 9), rank=7)
    with pytest.raises(ValueError, match="the weight of 0 holds NaN"):
        lone("svfit", torch.full((6, 6), torch.nan), rank=2)
