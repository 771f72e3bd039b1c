"""LIFT: which entries are trained, what their optimiser holds, and what becomes of both when they are chosen anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, ShiraConfig, get_peft_model
from torch import Tensor, nn

from eckart import adapters
from eckart.adapters.lift import Entries, principal
from eckart.runs.counting import SavedBytes, state_bytes
from eckart.testing.adapters import answers, layers, near, small_model, trained


def decaying(out: int, in_: int, noise: float = 0.0) -> Tensor:
    """A matrix with a decaying spectrum, plus noise."""
    g = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, min(out, in_), generator=g)).Q for n in (out, in_))
    W = left * torch.arange(1, min(out, in_) + 1) ** -1.5 @ right.T
    return W + noise * torch.randn(out, in_, generator=g)


def on_a_layer(W: Tensor, **settings: Any) -> Any:
    module = nn.Linear(W.shape[1], W.shape[0], bias=False)
    module.weight.data.copy_(W)
    model = adapters.adapt(nn.Sequential(module), "lift", target_modules=["0"], **settings)
    return model, layers(model)[0], layers(model)[0].updates["default"]


def steps(model: Any, layer: Any, count: int, optimizer: torch.optim.Optimizer, seed: int = 1, schedule: Any = None) -> None:  # fmt: skip # noqa: E501
    torch.manual_seed(seed)
    for _ in range(count):
        x, y = torch.randn(9, layer.in_features), torch.randn(9, layer.out_features)
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()


def test_the_largest_entries_of_the_low_rank_approximation_are_selected() -> None:
    W, rank, f = decaying(20, 30), 3, 4
    _, _, update = on_a_layer(W, rank=rank, filter_rank=f)
    U, S, Vh = np.linalg.svd(W.double().numpy(), full_matrices=False)
    low = np.abs((U[:, :f] * S[:f]) @ Vh[:f]).ravel()
    count = rank * (20 + 30)
    assert update.values.shape == (count,)
    assert set(update.indices.tolist()) == set(np.argsort(low)[-count:].tolist())
    assert low[update.indices.numpy()].min() >= np.delete(low, update.indices.numpy()).max()  # the largest indeed


def test_at_full_rank_it_is_magnitude_and_below_it_is_not() -> None:
    W = decaying(20, 30, noise=0.05)
    largest = set(W.abs().flatten().topk(100).indices.tolist())
    assert set(principal(W, 20, 100).tolist()) == largest
    assert set(principal(W, 25, 100).tolist()) == largest
    assert len(set(principal(W, 2, 100).tolist()) & largest) < 80


def test_only_selected_entries_move_and_only_they_have_state_and_nothing_dense_is_kept() -> None:
    W = decaying(20, 30)
    model, layer, update = on_a_layer(W, rank=2, filter_rank=4)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    steps(model, layer, 1, optimizer)
    moved = update.delta(layer.host).flatten().nonzero().flatten()
    assert moved.tolist() == update.indices.tolist()
    count = 2 * (20 + 30)
    assert state_bytes(optimizer) == 2 * 4 * count + 4  # and the count of steps
    x = torch.randn(9, 30, requires_grad=True)
    with SavedBytes(model) as saved:
        model(x)
    assert saved.total == x.nbytes


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_a_static_mask_is_shira() -> None:
    W, rank = decaying(20, 30), 2
    model, layer, update = on_a_layer(W, rank=rank, filter_rank=4, interval=0)
    config = ShiraConfig(r=rank, target_modules=["0"])
    mask = torch.zeros(600).index_fill(0, update.indices.long(), 1.0).view(20, 30)
    config.mask_fn = lambda base_layer, r, **_: mask
    module = nn.Linear(30, 20, bias=False)
    module.weight.data.copy_(W)
    theirs = get_peft_model(nn.Sequential(module), config)
    for each in (model, theirs):
        parameters = [p for p in each.parameters() if p.requires_grad]
        steps(each, layer, 10, torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0), schedule=None)
    x = torch.randn(5, 30)
    assert near(model(x), theirs(x))
    assert not near(model(x), F.linear(x, W), 1e-3)


def test_a_new_selection_keeps_the_matrix_and_the_state_of_survivors() -> None:
    W = decaying(20, 30)
    model, layer, update = on_a_layer(W, rank=1, filter_rank=4)
    optimizer = torch.optim.Adam([update.values], lr=1e-2)
    steps(model, layer, 3, optimizer)
    before, matrix = update.indices.long(), update.delta(layer.host).clone()
    state = {k: v.clone() for k, v in optimizer.state[update.values].items()}
    coming = torch.cat([before[:20], torch.tensor([i for i in range(600) if i not in set(before.tolist())][:30])])
    coming = coming.sort().values
    update.select(coming, optimizer)
    assert torch.equal(update.delta(layer.host), matrix)
    assert update.indices.tolist() == coming.tolist()
    assert update.left.tolist() == before[20:].tolist()
    now = optimizer.state[update.values]
    old = {int(i): k for k, i in enumerate(before)}
    for name in ("exp_avg", "exp_avg_sq"):
        for k, i in enumerate(coming.tolist()):
            assert now[name][k] == (state[name][old[i]] if i in old else 0.0)
    assert now["step"] == 3
    steps(model, layer, 1, optimizer)
    assert torch.equal(
        update.delta(layer.host).flatten()[before[20:]], matrix.flatten()[before[20:]]
    )  # they are frozen
    update.select(before, optimizer)  # what comes back goes on from where it was
    assert not set(update.left.tolist()) & set(before.tolist())
    assert torch.equal(update.values.detach()[20:], matrix.flatten()[before[20:]])


def test_the_schedule_selects_by_the_weights_of_then_on_its_clock() -> None:
    W = decaying(20, 30)
    model, layer, update = on_a_layer(W, rank=1, filter_rank=3, interval=2)
    optimizer, schedule = torch.optim.Adam([update.values], lr=0.3), adapters.schedule(model)
    schedule.begin(optimizer)
    first = update.indices.clone()
    steps(model, layer, 1, optimizer, schedule=schedule)
    assert torch.equal(update.indices, first)
    steps(model, layer, 1, optimizer, schedule=schedule)
    now = W + update.delta(layer.host).detach()
    assert set(update.indices.tolist()) == set(principal(now, 3, 50).tolist()) != set(first.tolist())


def test_a_run_that_is_cut_goes_on_as_if_it_were_not(tmp_path: Path) -> None:
    W = decaying(20, 30)

    def run(model: Any, layer: Any, update: Entries, first: int, count: int, state: Any = None) -> Any:
        optimizer, schedule = torch.optim.Adam([update.values], lr=0.1), adapters.schedule(model)
        if state is not None:
            optimizer.load_state_dict(state)
            schedule.load_state_dict({"steps": first})
        schedule.begin(optimizer)
        for step in range(first, first + count):
            steps(model, layer, 1, optimizer, seed=step, schedule=schedule)
        return optimizer.state_dict()

    settings = {"rank": 1, "filter_rank": 3, "interval": 2}
    whole, cut = on_a_layer(W, **settings), on_a_layer(W, **settings)
    run(*whole, 0, 7)
    state = run(*cut, 0, 5)
    assert len(cut[2].left)
    cut[0].save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(on_a_layer(W, **settings)[0].unload(), tmp_path, is_trainable=True)
    (layer,) = layers(again)
    run(again, layer, layer.updates["default"], 5, 2, state)
    assert torch.equal(layer.updates["default"].delta(layer.host), whole[2].delta(whole[1].host))


def test_what_left_is_loaded_into_a_model_in_training_and_by_transformers(tmp_path: Path) -> None:
    model = trained(adapters.adapt(small_model(), "lift", rank=2, filter_rank=3, interval=2), steps=5, lr=0.2)
    assert any(len(layer.updates["default"].left) for layer in layers(model))
    model.save_pretrained(tmp_path)
    other = adapters.adapt(small_model(), "lift", rank=2, filter_rank=3, interval=2)
    other.load_adapter(tmp_path, "default", is_trainable=True)  # as Trainer resumes
    assert torch.equal(answers(other), answers(model))
    plain = small_model()
    plain.load_adapter(str(tmp_path))
    assert torch.equal(answers(plain.eval()), answers(model))


def test_on_a_planted_change_of_the_principal_subspace_it_beats_other_masks() -> None:
    torch.manual_seed(0)
    W = decaying(24, 32, noise=0.02)
    U, S, Vh = torch.linalg.svd(W)
    change = 0.5 * (U[:, :2] * S[:2]) @ Vh[:2]
    x = torch.randn(512, 32)
    y = F.linear(x, W + change)

    def left(indices: Tensor | None) -> float:
        model, layer, update = on_a_layer(W, rank=2, filter_rank=2, interval=0)
        if indices is not None:
            update.select(indices.sort().values, None)
        optimizer = torch.optim.Adam([update.values], lr=2e-2)
        for _ in range(120):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
        return float((change - update.delta(layer.host)).square().mean().detach())

    count = 2 * (24 + 32)
    ours = left(None)
    assert ours < 0.9 * left(W.abs().flatten().topk(count).indices)
    assert ours < 0.7 * left(torch.randperm(24 * 32)[:count])


def test_training_all_entries_is_said() -> None:
    with pytest.warns(UserWarning, match=r"0: lift\(rank=12\) trains all 600 entries"):
        _, _, update = on_a_layer(decaying(20, 30), rank=12)
    assert update.indices.tolist() == list(range(600))


@pytest.mark.parametrize("settings", [{"rank": 0}, {"filter_rank": 0}, {"interval": -1}, {"interval": 2.5}])
def test_settings_that_do_not_do(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        on_a_layer(decaying(20, 30), **settings)


def test_weights_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="the weight of 0"):
        on_a_layer(decaying(20, 30).fill_(float("nan")), rank=1)
