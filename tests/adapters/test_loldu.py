"""LoLDU: pivots between frozen triangles."""

from __future__ import annotations

import pytest
import torch
from lone import fitted, gaussian, learning, lone, update_of

from eckart.adapters.loldu import STARTS, ldu

SHAPES = [(12, 8), (8, 12), (9, 9)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_factors_multiply_to_the_matrix(shape: tuple[int, int]) -> None:
    W = gaussian(*shape)
    L, D, U = ldu(W)
    assert (L * D @ U - W).norm() <= 1e-6 * W.norm()
    m = min(shape)
    assert (L.shape, D.shape, U.shape) == ((shape[0], m), (m,), (m, shape[1]))
    torch.testing.assert_close(U[:, :m].diagonal(), torch.ones(m))
    assert torch.equal(U[:, :m].tril(-1), torch.zeros(m, m))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("start", STARTS)
def test_start_is_exact_however_the_pivots_begin(shape: tuple[int, int], start: str) -> None:
    W, x = gaussian(*shape), gaussian(5, shape[1], seed=1)
    layer = lone("loldu", W, rank=4, start=start, alpha=3)
    assert torch.equal(layer(x), x @ W.T)
    _, D, _ = ldu(W)
    z = update_of(layer).core.detach()
    expected = {"pivots": D[:4], "zeros": torch.zeros(4), "ones": torch.ones(4), "constant": D[:4].mean().expand(4)}
    if start in expected:
        assert torch.equal(z, expected[start])
    else:
        assert len(set(z.tolist())) == 4
        assert start == "normal" or float(z.abs().max()) <= float(D[:4].mean().abs()) / 2


def test_trained_numbers_and_their_gradient() -> None:
    W, x, g = gaussian(12, 8), gaussian(20, 8, seed=1), gaussian(20, 12, seed=2)
    layer = lone("loldu", W, rank=5, alpha=2)
    (layer(x) * g).sum().backward()
    assert {n: p.numel() for n, p in learning(layer).items()} == {"core": 5}
    P, L, U = torch.linalg.lu(W)
    U = U / U.diagonal()[:, None]
    expected = 2 / 5 * torch.einsum("oi,oj,ij->i", (P @ L)[:, :5], g.T @ x, U[:5])
    torch.testing.assert_close(update_of(layer).core.grad, expected, rtol=1e-5, atol=1e-4)


def test_planted_pivots_are_recovered_where_they_are_trained() -> None:
    W = gaussian(9, 9)
    L, D, U = ldu(W)
    change = torch.zeros(9)
    change[:5] = torch.linspace(-1, 1, 5)
    target = L * (D + change) @ U
    full = lone("loldu", W, rank=9)
    assert fitted(full, target) < 1e-5
    torch.testing.assert_close(update_of(full).core.detach(), D + change, rtol=0, atol=1e-2)
    assert fitted(lone("loldu", W, rank=5), target) < 1e-5
    last = torch.zeros(9)
    last[6:] = 1.0
    assert fitted(lone("loldu", W, rank=5), L * (D + last) @ U) > 0.5


def test_matrices_without_full_rank_are_damped_as_the_docstring_says() -> None:
    low = gaussian(9, 3) @ gaussian(3, 7, seed=1)
    pruned = gaussian(7, 7) * (torch.arange(7) % 2 == 0)
    for W in (low, pruned, torch.zeros(5, 6)):
        L, D, U = ldu(W)
        assert (L * D @ U - W).abs().max() <= 1e-5
        assert float(U.abs().max()) <= 1001
        layer, x = lone("loldu", W, rank=4), gaussian(3, W.shape[1], seed=2)
        layer(x).square().sum().backward()
        assert torch.equal(layer(x), x @ W.T)
        assert all(bool(p.grad is not None and p.grad.isfinite().all()) for p in learning(layer).values())


def test_bad_settings_are_named() -> None:
    for settings in ({"rank": 0}, {"alpha": 0.0}, {"start": "lu"}):
        with pytest.raises(ValueError, match=rf"loldu\({next(iter(settings))}="):
            lone("loldu", gaussian(6, 6), **settings)
    with pytest.raises(ValueError, match="0: rank 7 is more than a matrix of shape"):
        lone("loldu", gaussian(6, 9), rank=7)
