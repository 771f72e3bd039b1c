"""SNELLA: the mixed kernel, and layers that compete for one budget of entries."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from eckart import adapters
from eckart.adapters.kernelised import distances, entries_kept, thinned
from eckart.adapters.snella import shared_out
from eckart.runs.counting import SavedBytes
from eckart.testing.adapters import layers, near

SIZES = [(24, 16), (16, 24), (12, 16)]


def stack(**settings: Any) -> Any:
    """Three layers with SNELLA on them."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(i, o) for o, i in SIZES))
    return adapters.adapt(model, "snella", target_modules=["0", "1", "2"], **{"rank": 4, **settings})


def train(model: Any, schedule: Any, steps: int, optimizer: Any = None, first: int = 0, total: int | None = None) -> Any:  # fmt: skip # noqa: E501
    optimizer = optimizer or torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule.begin(optimizer, total or steps)
    for step in range(first, first + steps):
        g = torch.Generator().manual_seed(step)
        F.mse_loss(model(torch.randn(8, 16, generator=g)), torch.randn(8, 12, generator=g)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return optimizer


def kept(model: Any) -> list[int]:
    return [int(u.kept) for u in adapters.updates(model).values()]


@given(
    st.lists(st.tuples(st.one_of(st.just(0.0), st.floats(1e-12, 1e6)), st.integers(0, 5000)), min_size=1, max_size=8),
    st.floats(0, 1),
)
def test_the_budget_is_spent_and_no_capacity_exceeded(matrices: list[tuple[float, int]], share: float) -> None:
    scores, room = [s for s, _ in matrices], [c for _, c in matrices]
    budget = int(share * sum(room))
    found = shared_out(budget, scores, room)
    assert sum(found) == budget
    assert all(0 <= v <= c for v, c in zip(found, room, strict=True))
    free = [(v, s) for v, s, c in zip(found, scores, room, strict=True) if v < c]
    levels = [(v / s, 1 / s) for v, s in free if s > 0]
    for level, one in levels:  # those with room have shares in proportion to their scores, to one entry
        assert all(level - other <= one + other_one + 1e-6 * level for other, other_one in levels)
        assert all((v - 1) / s <= level + one + 1e-6 * level for v, s in zip(found, scores, strict=True) if s > 0)
    if levels:
        assert not any(v for v, s in zip(found, scores, strict=True) if s == 0)


def test_shares_by_hand() -> None:
    assert shared_out(12, [1.0, 3.0], [100, 100]) == [3, 9]
    assert shared_out(10, [1.0, 1e9], [100, 4]) == [6, 4]
    assert shared_out(9, [0.0, 0.0, 0.0], [100, 100, 1]) == [4, 4, 1]
    assert shared_out(50, [1.0, 0.0, 0.0], [10, 100, 5]) == [10, 35, 5]
    assert shared_out(500, [1.0, 2.0], [10, 20]) == [10, 20]


def test_the_kernel_is_that_of_its_definition() -> None:
    update = next(iter(adapters.updates(stack(initial_sparsity=0.0)).values()))
    P, Q, alpha, beta, log_gamma = update.parameters()
    alpha.data.fill_(1.3), beta.data.fill_(-0.2), log_gamma.data.fill_(math.log(0.5))
    D = 0.1 * (torch.cdist(P[0], Q[0]) - torch.cdist(P[1], Q[1]))  # (in, out), as in the paper
    assert near(update.merged(*update.parameters()), (D + 1.3 * torch.softmax(D / 0.5, dim=1) - 0.2).T)


def test_without_mixture_it_is_snell() -> None:
    update = next(iter(adapters.updates(stack(initial_sparsity=0.4)).values()))
    P, Q, alpha, beta, log_gamma = update.parameters()
    alpha.data.zero_()
    expected = thinned(0.1 * distances(P, Q), entries_kept(0.4, update.count))
    assert torch.equal(update.made(P, Q, alpha, beta, log_gamma), expected)


def test_no_dense_tensor_is_kept() -> None:
    model = stack()
    layer = layers(model)[0]
    x = torch.randn(4, 16, requires_grad=True)
    with SavedBytes(layer) as saved:
        layer(x)
    assert saved.total == x.nbytes


def test_the_schedule_follows_the_cubic_and_spends_all_of_it() -> None:
    model = stack(initial_sparsity=0.1, sparsity=0.6, begin=4, end=14, interval=2)
    schedule, sizes = adapters.schedule(model), [o * i for o, i in SIZES]
    first, last = (sum(entries_kept(s, n) for n in sizes) for s in (0.1, 0.6))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    totals = []
    for step in range(20):
        if step == 0:
            train(model, schedule, 1, optimizer, total=20)
        else:
            F.mse_loss(model(torch.randn(8, 16)), torch.randn(8, 12)).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        totals.append(sum(kept(model)))
    assert totals[:4] == [first] * 4
    for step in range(6, 15, 2):
        assert totals[step - 1] == round(last + (first - last) * (1 - (step - 4) / 10) ** 3)
    assert totals[13:] == [last] * 7
    assert totals == sorted(totals, reverse=True)
    assert all(v <= n for v, n in zip(kept(model), sizes, strict=True))
    for layer in layers(model):
        update = layer.updates["default"]
        assert int((update.delta(layer.host) != 0).sum()) == int(update.kept)


def test_equal_scores_and_one_ratio_give_every_layer_that_ratio() -> None:
    assert shared_out(60, [2.0] * 3, [40] * 3) == [20] * 3
    model = stack(initial_sparsity=0.5, sparsity=0.5, begin=0, end=2)
    train(model, adapters.schedule(model), 3)
    assert sum(kept(model)) == sum(entries_kept(0.5, o * i) for o, i in SIZES)


def test_importance_is_of_the_new_numbers_and_the_gradient_that_moved_them() -> None:
    model = stack(beta1=0.8, beta2=0.6)
    schedule, update = adapters.schedule(model), adapters.updates(model)["0"]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule.begin(optimizer, 20)
    smoothed, deviation = torch.zeros_like(update.P), torch.zeros_like(update.P)
    for step in range(3):
        F.mse_loss(model(torch.randn(8, 16)), torch.randn(8, 12)).backward()
        optimizer.step()
        if step == 1:
            update.P.grad[0, 0, 0] = float("nan")
        now = (update.P * update.P.grad).detach().abs().nan_to_num()
        smoothed = 0.8 * smoothed + 0.2 * now
        deviation = 0.6 * deviation + 0.4 * (now - smoothed).abs()
        schedule.step()
        optimizer.zero_grad()
    state = optimizer.state[update.P]
    assert near(state["importance"] / smoothed.max(), smoothed / smoothed.max())
    assert near(state["uncertainty"] / deviation.max(), deviation / deviation.max())


def test_a_layer_that_is_not_run_has_no_importance_and_its_entries_go_to_the_others() -> None:
    model = stack(initial_sparsity=0.5, sparsity=0.5, begin=0, end=4, interval=2)
    schedule, (*_, last) = adapters.schedule(model), adapters.updates(model).values()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule.begin(optimizer, 6)
    before = sum(kept(model))
    for step in range(6):
        F.mse_loss(model(torch.randn(8, 16)), torch.randn(8, 12)).backward()
        if step < 5:
            last.P.grad = last.Q.grad = None
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step == 4:
            assert last.P not in optimizer.state
            assert sum(kept(model)) == before
            assert kept(model)[-1] == 0
    assert {"step", "importance"} <= {*optimizer.state[last.P]}  # as soon as it is run, it is treated as the others


def test_a_run_that_is_cut_goes_on_as_if_it_were_not() -> None:
    settings = {"sparsity": 0.7, "interval": 2, "end": 8}
    whole, cut, again = stack(**settings), stack(**settings), stack(**settings)
    train(whole, adapters.schedule(whole), 9)
    schedule = adapters.schedule(cut)
    optimizer = train(cut, schedule, 5, total=9)
    again.load_state_dict(cut.state_dict())
    resumed = torch.optim.Adam([p for p in again.parameters() if p.requires_grad], lr=1e-2)
    resumed.load_state_dict(optimizer.state_dict())
    follow = adapters.schedule(again)
    follow.load_state_dict(schedule.state_dict())
    train(again, follow, 4, resumed, first=5, total=9)
    assert kept(again) == kept(whole) != kept(stack(**settings))
    for a, b in zip(adapters.updates(again).values(), adapters.updates(whole).values(), strict=True):
        assert torch.equal(a.P, b.P)


def test_the_layer_that_must_change_gets_the_entries_and_the_error_is_below_snells() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
    teacher = deepcopy(base).requires_grad_(False)
    teacher[2].weight.view(-1)[torch.randperm(256)[:100]] += torch.randn(100)
    x, fresh = torch.randn(256, 16), torch.randn(256, 16)
    y, expected = teacher(x), teacher(fresh)

    def error(key: str, lr: float = 3e-2, steps: int = 160, **settings: Any) -> tuple[float, list[int]]:
        model = adapters.adapt(deepcopy(base), key, target_modules=["0", "2", "4"], rank=8, sparsity=0.85, scale=1.0, **settings)  # fmt: skip # noqa: E501
        schedule = adapters.schedule(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, weight_decay=0.0)
        schedule.begin(optimizer, steps)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / steps)
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        with torch.no_grad():
            return float(F.mse_loss(model(fresh), expected)), kept(model)

    ours, counts = error("snella", interval=10, initial_sparsity=0.5, end=0.5)
    snell, even = error("snell")
    assert sum(counts) == sum(even) == 3 * entries_kept(0.85, 256)
    assert counts[1] > 3 * max(counts[0], counts[2])
    assert ours < 0.9 * snell


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"sparsity": 0.2, "initial_sparsity": 0.3}, "more entries than it begins with"), ({"begin": 0.5, "end": 0.5}, "before it begins"),  # noqa: E501
     ({"begin": 9, "end": 3}, "before it begins"), ({"rank": 5}, "multiple of 2"), ({"interval": 0}, "interval"),
     ({"beta1": 1.0}, "beta1"), ({"sparsity": 1.0}, "sparsity"), ({"end": -1}, "end"), ({"target_modules": ["9"]}, "match no layer")],  # noqa: E501
)  # fmt: skip
def test_settings_that_do_not_do(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        adapters.adapt(nn.Sequential(nn.Linear(16, 12)), "snella", **{"rank": 4, "target_modules": ["0"], **settings})


def test_a_run_that_is_too_short_or_has_no_gradients_is_refused() -> None:
    model = stack(begin=5, end=0.5)
    with pytest.raises(ValueError, match="over 8 steps it ends at 4"):
        train(model, adapters.schedule(model), 8)
    model = stack()
    schedule = adapters.schedule(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    schedule.begin(optimizer, 4)
    model(torch.randn(2, 16)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"schedule.step\(\) before optimizer.zero_grad"):
        schedule.step()
