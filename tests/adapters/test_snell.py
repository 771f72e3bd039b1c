"""SNELL: the rank and the sparsity of what its factors make, what it keeps in memory, and what it is good for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eckart import adapters
from eckart.adapters.kernelised import distances, entries_kept, thinned
from eckart.runs.counting import SavedBytes, state_bytes
from eckart.testing.adapters import layers, near

OUT, IN = 64, 96


def on_a_layer(module: nn.Module | None = None, **settings: Any) -> Any:
    """The only layer of a model, with SNELL on it."""
    module = nn.Linear(IN, OUT) if module is None else module
    return layers(adapters.adapt(nn.Sequential(module), "snell", target_modules=["0"], **settings))[0]


def test_the_merged_matrix_has_full_rank() -> None:
    layer = on_a_layer(rank=8)
    merged = layer.updates["default"].merged(*layer.updates["default"].parameters())
    assert merged.shape == (OUT, IN)
    assert torch.linalg.matrix_rank(merged) == OUT


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_distances_are_those_of_their_definition(p: float) -> None:
    torch.manual_seed(0)
    P, Q = torch.randn(4, 30, 3), torch.randn(4, 40, 3)
    plain = torch.zeros(40, 30)
    for h in range(4):
        for j in range(40):
            plain[j] += (-1) ** h * (Q[h, j] - P[h]).abs().pow(p).sum(-1).pow(1 / p)
    assert near(distances(P, Q, p), plain, 1e-5)
    assert distances(P.bfloat16(), Q.bfloat16(), p).dtype == torch.float32


@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.7, 0.9])
def test_exactly_the_share_of_entries_is_applied(sparsity: float) -> None:
    layer = on_a_layer(rank=8, sparsity=sparsity)
    update = layer.updates["default"]
    merged, delta = update.merged(*update.parameters()), update.delta(layer.host)
    count = entries_kept(sparsity, OUT * IN)
    assert int((delta != 0).sum()) == count
    kept = delta != 0
    assert sparsity == 0 or merged.abs()[kept].min() > merged.abs()[~kept].max()
    assert torch.equal(delta, merged * merged.abs() * kept if sparsity else merged)
    x = torch.randn(5, IN)
    assert near(layer(x), F.linear(x, layer.base_layer.weight + delta, layer.base_layer.bias), 1e-6)


def test_counts_are_whole_where_shares_are_not() -> None:
    assert [entries_kept(s, 1000) for s in (0.7, 0.9, 0.0, 0.9999)] == [300, 100, 1000, 1]
    assert entries_kept(0.29, 100) == 71
    assert entries_kept(0.9, 6144) == 615


def test_survivors_are_weighed_by_their_magnitude_or_left_as_they_are() -> None:
    M = torch.tensor([[3.0, -1.0], [0.5, -2.0]], requires_grad=True)
    assert thinned(M, 2).tolist() == [[9.0, 0.0], [0.0, -4.0]]
    (gradient,) = torch.autograd.grad(thinned(M, 2).sum(), M)
    assert gradient.tolist() == [[3.0, 0.0], [0.0, 2.0]]
    assert thinned(M, 3, "plain").tolist() == [[3.0, -1.0], [0.0, -2.0]]
    assert thinned(M, 4) is M
    assert not thinned(M, 0).any()


@pytest.mark.parametrize(
    ("module", "size"),
    [(nn.Linear(IN, OUT), (2, 3, IN)), (Conv1D(OUT, IN), (5, IN)),
     (nn.Conv2d(6, 8, (3, 2), stride=2, padding=1, padding_mode="circular"), (2, 6, 9, 8))],
)  # fmt: skip
def test_the_second_making_gives_the_gradients_of_the_first(module: nn.Module, size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = on_a_layer(module, rank=4, scale=1.0)
    update = layer.updates["default"]
    x = torch.randn(size, requires_grad=True)
    plain = module(x) + layer.host.apply(x, update.delta(layer.host))
    found = layer(x)
    assert near(found, plain)
    upstream = torch.randn_like(plain)
    wanted = torch.autograd.grad(plain, [x, *update.parameters()], upstream)
    for a, b in zip(torch.autograd.grad(found, [x, *update.parameters()], upstream), wanted, strict=True):
        assert near(a, b)
    update.P.requires_grad_(False)
    layer(x.detach()).backward(upstream)
    assert near(update.Q.grad, wanted[2])
    assert update.P.grad is None


def test_nothing_of_the_size_of_the_matrix_is_kept_and_the_state_is_that_of_lora() -> None:
    layer, r = on_a_layer(rank=8), 8
    x = torch.randn(4, IN, requires_grad=True)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        layer(x)
    assert sorted(sizes) == sorted([OUT * IN, x.numel(), r * IN, r * OUT])  # of (out, in), the frozen weight alone
    with SavedBytes(layer) as saved:
        y = layer(x)
    assert saved.total == x.nbytes
    optimizer = torch.optim.Adam(layer.updates["default"].parameters())
    y.sum().backward()
    optimizer.step()
    assert state_bytes(optimizer) == 4 * (2 * r * (IN + OUT) + 2)  # and two counts of steps


def test_coinciding_rows_have_a_finite_gradient() -> None:
    layer = on_a_layer(rank=4, sparsity=0.0)
    update = layer.updates["default"]
    update.Q.data[:, :3] = update.P.data[:, :3]
    layer(torch.randn(5, IN)).square().sum().backward()
    for p in (update.P, update.Q):
        assert p.grad.isfinite().all()
        assert p.grad.abs().max() > 0


def test_under_autocast_and_on_a_planted_dtype_gradients_arrive() -> None:
    layer = on_a_layer(rank=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(5, IN, requires_grad=True))
    y.float().square().sum().backward()
    assert layer.updates["default"].P.grad.isfinite().all()


def test_on_planted_sparse_changes_it_beats_lora_of_as_many_numbers() -> None:
    out, in_, r = 32, 48, 4

    def error(forward: Any, parameters: list[nn.Parameter], change: Tensor, lr: float, steps: int = 400) -> float:
        optimizer, x = torch.optim.Adam(parameters, lr), torch.randn(256, in_)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / steps)
            optimizer.zero_grad()
            F.mse_loss(forward(x), x @ change.T).backward()
            optimizer.step()
        fresh = torch.randn(256, in_)
        with torch.no_grad():
            return float(F.mse_loss(forward(fresh), fresh @ change.T))

    errors = []
    for seed in range(2):
        torch.manual_seed(seed)
        change, places = torch.zeros(out * in_), torch.randperm(out * in_)[: out * in_ // 20]
        change[places] = torch.randn(len(places)).sign() * (0.5 + torch.rand(len(places)))
        change = change.view(out, in_)
        module = nn.Linear(in_, out, bias=False)
        nn.init.zeros_(module.weight)
        layer = on_a_layer(module, rank=r, sparsity=0.9, scale=2.0, seed=seed)
        P, Q = layer.updates["default"].parameters()
        assert P.numel() + Q.numel() == r * (in_ + out)
        A, B = nn.Parameter(torch.randn(r, in_) * in_**-0.5), nn.Parameter(torch.zeros(out, r))
        lora = error(lambda x, A=A, B=B: F.linear(F.linear(x, A), B), [A, B], change, 2e-2)
        errors.append((error(layer, [P, Q], change, 0.1), lora))
    ours, theirs = (sum(column) for column in zip(*errors, strict=True))
    assert ours < 0.93 * theirs


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"sparsity": 1.0}, "sparsity=1.0"), ({"sparsity": -0.1}, "sparsity"), ({"rank": 7}, "multiple of 2"),
     ({"rank": 4, "heads": 8}, "multiple of 8"), ({"heads": 3, "rank": 6}, "even"), ({"rank": 0}, "rank=0"),
     ({"p": 0.5}, "p=0.5"), ({"survivors": "all"}, "magnitude, plain"), ({"scale": 0.0}, "scale"),
     ({"rank_pattern": {"0": 5}}, "^0: rank 5")],
)  # fmt: skip
def test_settings_that_do_not_do(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        on_a_layer(**settings)


def test_the_start_is_small_and_as_wide_as_the_authors_draw_it() -> None:
    update = on_a_layer(rank=8).updates["default"]
    for factor, n in ((update.P, IN), (update.Q, OUT)):
        bound = (n * 4) ** -0.5
        largest: Tensor = factor.detach().abs().max()
        assert 0.9 * bound < float(largest) <= bound
