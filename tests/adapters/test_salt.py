"""SALT: scales, shifts and a low rank in the frame of singular vectors."""

from __future__ import annotations

import pytest
import torch
from lone import gaussian, layer_of, learning, lone, update_of
from torch import nn

from eckart import adapters

MODES = ["core", "diagonal"]


def stirred(layer: object, size: float = 0.3) -> None:
    for i, parameter in enumerate(learning(layer).values()):  # type: ignore[arg-type]
        parameter.data += size * gaussian(*parameter.shape, seed=i)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_start_is_exact(shape: tuple[int, int], mode: str) -> None:
    W, x = gaussian(*shape), gaussian(5, shape[1], seed=1)
    for settings in ({"scaled": 0, "rank": 3}, {"scaled": 8, "rank": 0}, {"scaled": 0.25, "rank": 6}):
        layer = lone("salt", W, rectified=mode, **settings)
        assert torch.equal(layer(x), x @ W.T)
        assert float(update_of(layer).penalty().detach()) == 0


@pytest.mark.parametrize("mode", MODES)
def test_blocks_of_the_core_do_not_mix(mode: str) -> None:
    W = gaussian(12, 8)
    layer = lone("salt", W, rank=2, scaled=3, rectified=mode)
    stirred(layer)
    change = update_of(layer).delta(layer.host).detach()
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    assert change.norm() > 0.5
    for block in (U[:, 3:].T @ change @ Vh[:3].T, U[:, :3].T @ change @ Vh[3:].T):
        assert float(block.abs().max()) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_effective_weight_is_the_formula(mode: str) -> None:
    W, x = gaussian(12, 8), gaussian(5, 8, seed=1)
    layer = lone("salt", W, rank=4, scaled=3, rectified=mode)
    stirred(layer, 1.0)
    update = update_of(layer)
    core = torch.zeros(8, 8)
    for i in range(3):
        core[i, i] = update.a[i] * update.S[i] + update.c[i]
    core[3:, 3:] = update.S[3:].diag() + update.X @ update.Y
    core = core.relu() if mode == "core" else torch.where(torch.eye(8) > 0, core.relu(), core)
    expected = update.U @ core @ update.Vh
    torch.testing.assert_close(W + update.delta(layer.host), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x), x @ expected.T, rtol=1e-4, atol=1e-4)


def test_without_a_low_rank_it_scales_singular_values() -> None:
    W, x, g = gaussian(12, 8), gaussian(5, 8, seed=1), gaussian(5, 12, seed=2)
    layer = lone("salt", W, rank=0, scaled=8)
    update = update_of(layer)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    a, c = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)
    for _ in range(2):  # at the start, and elsewhere
        expected = x @ (U * (a * S + c).relu() @ Vh).T
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        wanted = torch.autograd.grad((expected * g).sum(), (a, c))
        found = torch.autograd.grad((layer(x) * g).sum(), (update.a, update.c))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        for mine, theirs in ((update.a, a), (update.c, c)):
            theirs.data += gaussian(8, seed=5)
            mine.data.copy_(theirs.data)


def test_trained_numbers() -> None:
    for k, q in ((0, 3), (3, 2), (8, 0)):
        layer = lone("salt", gaussian(12, 8), scaled=k, rank=q)
        assert sum(p.numel() for p in learning(layer).values()) == 2 * k + 2 * q * (8 - k)
    assert len(update_of(lone("salt", gaussian(40, 20), rank=1)).a) == 2


def test_relu_on_the_whole_core_blocks_gradients_that_relu_on_its_diagonal_lets_through() -> None:
    W, x, g = gaussian(12, 8), gaussian(5, 8, seed=1), gaussian(5, 12, seed=2)
    ranks = {}
    for mode in MODES:
        layer = lone("salt", W, scaled=0, rank=2, rectified=mode, seed=1)
        (layer(x) * g).sum().backward()
        core = update_of(layer)
        G = core.U.T @ g.T @ x @ core.Vh.T
        G = G.diagonal().diag() if mode == "core" else G
        torch.testing.assert_close(core.Y.grad, core.X.T @ G, rtol=1e-4, atol=1e-4)
        stirred(layer)
        ranks[mode] = int((torch.linalg.svdvals(core.moved()) > 1e-4).sum())
    assert ranks == {"core": 8, "diagonal": 2}


def test_the_regulariser_reaches_a_plain_training_loop() -> None:
    model = adapters.adapt(nn.Sequential(layer_of(gaussian(12, 8))), "salt", rank=2, scaled=3, regularisation=10.0)
    update = next(iter(adapters.updates(model).values()))
    optimizer, schedule = torch.optim.SGD(learning(model).values(), 0.01), adapters.schedule(model)
    schedule.begin(optimizer)

    def step() -> None:
        y = model(gaussian(4, 8))
        assert isinstance(y, torch.Tensor)
        (0.0 * y).sum().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    step()
    assert all(bool(p.isfinite().all()) for p in learning(model).values())
    assert float(update.penalty().detach()) == 0
    stirred(model)
    core = update.a.detach().clone().requires_grad_(True)
    shift = (core * update.S[:3] + update.c - update.S[:3]).norm()
    before = float(update.penalty().detach())
    a, expected = update.a.detach().clone(), torch.autograd.grad(10 * shift, core)[0]
    step()
    torch.testing.assert_close(update.a.detach(), a - 0.01 * expected, rtol=1e-4, atol=1e-5)
    for _ in range(5):
        step()
    assert float(update.penalty().detach()) < 0.7 * before


def test_a_frame_that_is_not_saved_is_made_again() -> None:
    W = gaussian(12, 8)
    layer = lone("salt", W, rank=2, save_frame=False)
    stirred(layer)
    saved = {n: t for n, t in layer.state_dict().items() if ".updates." in f".{n}"}
    assert {n.rpartition(".")[2] for n in saved} == {"a", "c", "X", "Y"}
    other = lone("salt", W, rank=2, save_frame=False)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(gaussian(3, 8)), layer(gaussian(3, 8)))


@pytest.mark.parametrize("mode", MODES)
def test_convolutions_are_matrices_of_unfolded_kernels(mode: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, (2, 3), stride=2, padding=1)
    layer, x = lone("salt", conv, rank=2, scaled=3, rectified=mode), gaussian(2, 3, 7, 6)
    assert torch.equal(layer(x), conv(x))
    stirred(layer)
    changed = conv.weight + update_of(layer).delta(layer.host).view_as(conv.weight)
    expected = torch.nn.functional.conv2d(x, changed, conv.bias, 2, 1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_bad_settings_are_named() -> None:
    W = gaussian(12, 8)
    for settings in ({"rank": -1}, {"scaled": 1.5}, {"rectified": "no"}, {"regularisation": -1.0}):
        with pytest.raises(ValueError, match=rf"salt\({next(iter(settings))}="):
            lone("salt", W, **settings)
    with pytest.raises(ValueError, match="0: scaled=9, but a matrix of shape"):
        lone("salt", W, scaled=9)
    with pytest.raises(ValueError, match="0: rank 6 is more than the 5 singular values that are not scaled"):
        lone("salt", W, scaled=3, rank=6)
    with pytest.raises(ValueError, match="the weight of 0 holds NaN"):
        lone("salt", torch.full((6, 6), torch.nan), rank=2)
