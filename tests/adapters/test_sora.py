"""SoRA: gates that close to exact zeros, and what is left when the closed ones are cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from planted import Rows, change, fit, inputs, loss, teach
from torch import nn

from eckart import adapters
from eckart.adapters.cutting import Cuttable
from eckart.adapters.host import Host
from eckart.adapters.proximal import Proximal, soft
from eckart.adapters.sora import groups, sparsify
from eckart.testing.adapters import adapted, answers, layers, near, small_model, trained

RANKS = [1, 4, 0, 2]


def rows(key: str = "sora", **settings: Any) -> Any:
    return adapters.adapt(Rows(4), key, target_modules=r"layers\.\d", **{"rank": 6, "alpha": 6.0, **settings})


def updates(model: Any) -> list[Any]:
    return [layer.updates["default"] for layer in layers(model)]


def test_the_proximal_step_is_the_closed_form_with_exact_zeros() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    found = soft(x, 0.5)
    assert torch.equal(found, torch.where(x > 0.5, x - 0.5, torch.where(x < -0.5, x + 0.5, torch.zeros(()))))
    assert set(found[x.abs() < 0.5].tolist()) == {0.0}


def test_a_closed_gate_opens_where_one_step_moves_it_by_more_than_the_threshold() -> None:
    gate = nn.Parameter(torch.tensor([0.0, 0.0]))
    optimizer = torch.optim.SGD([gate], 1.0)
    schedule = Proximal(lambda: [gate], 0.5)
    schedule.begin(optimizer, 2)
    gate.grad = torch.tensor([-0.75, -0.25])
    optimizer.step()
    schedule.step()
    assert gate.tolist() == [0.25, 0.0]


def test_without_threshold_it_is_a_lora_with_a_trained_gate() -> None:
    model = rows(xi=0.0)
    teacher = teach([change(r, seed=r) for r in RANKS])
    plain = [u.gate.detach().clone() for u in updates(model)]
    B, A, g = (nn.Parameter(t.detach().clone()) for t in (updates(model)[1].B, updates(model)[1].A, plain[1]))
    frozen, by_hand = Rows(4).layers[1], torch.optim.AdamW([B, A, g], 1e-2, weight_decay=0.0)
    optimizer = torch.optim.AdamW(groups(model, 1e-2, weight_decay=0.0))
    fit(model, teacher, 5, adapters.schedule(model), optimizer, 4)
    for x in inputs(5, 4):
        y = frozen(x[:, 1]) + ((x[:, 1] @ A.T) * g) @ B.T
        ((y - teacher(x)[:, 1]).square().mean() / 4).backward()
        by_hand.step()
        by_hand.zero_grad()
    assert near(updates(model)[1].gate, g, 1e-5)
    assert near(updates(model)[1].B, B, 1e-5)
    assert not torch.equal(updates(model)[1].gate, plain[1])


def test_with_a_huge_threshold_nothing_is_left_of_it(tmp_path: Path) -> None:
    plain = answers(small_model())
    model = trained(adapted("sora", xi=1e6))
    assert set(model.peft_config["default"].rank_pattern.values()) == {0}
    assert torch.equal(answers(model), plain)
    assert not [n for n, p in model.named_parameters() if p.requires_grad]
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(small_model(), tmp_path, is_trainable=True)
    assert torch.equal(answers(other), plain)
    assert not [n for n, p in other.named_parameters() if p.requires_grad]
    assert torch.equal(answers(other.merge_and_unload()), plain)


def test_planted_ranks_are_found_with_fewer_parameters_and_no_worse_loss(tmp_path: Path) -> None:
    teacher = teach([change(r, seed=r) for r in RANKS])
    model, steps = rows(xi=1.5e-2), 300
    optimizer = torch.optim.AdamW(groups(model, 2e-2, weight_decay=0.0))
    schedule = adapters.schedule(model)
    fit(model, teacher, steps, schedule, optimizer, 4)
    open_ = [int(u.gate.count_nonzero()) for u in updates(model)]
    assert all(n <= found <= n + 1 for found, n in zip(open_, RANKS, strict=True))
    assert open_[2] == 0
    before = [u.delta(layer.host).detach() for u, layer in zip(updates(model), layers(model), strict=True)]
    schedule.finish()
    after = [u.delta(layer.host) for u, layer in zip(updates(model), layers(model), strict=True)]
    assert all(near(a, b, 1e-6) for a, b in zip(after, before, strict=True))
    assert [u.rank for u in updates(model)] == open_
    assert sum(f.numel() for layer in layers(model) for f in layer.get_factors("default")) == sum(open_) * 16
    assert list(model.peft_config["default"].rank_pattern.values()) == open_
    model.save_pretrained(tmp_path)
    assert loss(PeftModel.from_pretrained(Rows(4), tmp_path), teacher, 4) == loss(model, teacher, 4)

    lora = rows(xi=0.0)
    fit(lora, teacher, steps, adapters.schedule(lora), torch.optim.AdamW(groups(lora, 2e-2, weight_decay=0.0)), 4)
    assert loss(model, teacher, 4) <= loss(lora, teacher, 4) + 1e-4


def test_the_sweep_returns_the_curve_and_closes_ever_more_gates() -> None:
    teacher, model = teach([change(r, seed=r) for r in RANKS]), rows()

    def train(schedule: Any) -> None:
        optimizer = torch.optim.AdamW(groups(model, 2e-2, weight_decay=0.0))
        fit(model, teacher, 60, schedule, optimizer, 4)

    curve = sparsify(model, [0.0, 2e-3, 8e-3, 1.0], train, lambda: loss(model, teacher, 4))
    assert [s.xi for s in curve] == [0.0, 2e-3, 8e-3, 1.0]
    counts = [s.gates for s in curve]
    assert counts[0] == 24
    assert counts[-1] == 0
    assert counts == sorted(counts, reverse=True)
    assert [s.parameters for s in curve] == [16 * n for n in counts]
    assert curve[-1].metric > curve[0].metric


def test_the_threshold_warms_up_and_may_follow_the_learning_rate() -> None:
    def shrunk(**settings: Any) -> list[float]:
        model = rows(xi=0.01, **settings)
        optimizer = torch.optim.SGD(groups(model, 0.5, weight_decay=0.0))
        schedule = adapters.schedule(model)
        schedule.begin(optimizer, 4)
        gate, sizes = updates(model)[0].gate, []
        for _ in range(4):
            before = gate.detach().abs().max()
            optimizer.step()
            schedule.step()
            sizes.append(round(float(before - gate.detach().abs().max()), 5))
        return sizes

    assert shrunk() == [0.01] * 4
    assert shrunk(times_rate=True) == [0.005] * 4
    assert shrunk(warmup=4) == shrunk(warmup=1.0) == [0.0025, 0.005, 0.0075, 0.01]


def test_the_penalty_in_the_loss_is_of_the_mean_over_all_gates() -> None:
    model = rows(l1=3.0, xi=0.0)
    optimizer = torch.optim.SGD(groups(model, 1.0, weight_decay=0.0))
    before = [u.gate.detach().clone() for u in updates(model)]
    schedule = adapters.schedule(model)
    schedule.begin(optimizer, 1)
    optimizer.step()
    schedule.step()
    for update, gate in zip(updates(model), before, strict=True):
        assert near(update.gate, gate - 3.0 / 24 * gate.sign())


def test_on_a_convolution_it_can_be_cut_to_nothing() -> None:
    host = Host(nn.Conv2d(3, 5, 3, padding=1), "conv")
    update = Cuttable(torch.ones(5, 2), torch.ones(2, 27))
    x, y0 = torch.randn(1, 3, 6, 6), torch.zeros(1, 5, 6, 6)
    update.keep(torch.tensor([1]))
    assert update(x, y0, host).abs().max() > 0
    update.keep(torch.tensor([], dtype=torch.long))
    assert torch.equal(update(x, y0, host), y0)
    assert torch.equal(update.delta(host), torch.zeros(5, 27))


def test_an_optimiser_without_the_gates_or_that_decays_them_is_refused() -> None:
    model = rows()
    factors, gates = groups(model)
    with pytest.raises(ValueError, match="gates that the optimiser does not train"):
        adapters.schedule(model).begin(torch.optim.AdamW([factors]), 1)
    everything = [*factors["params"], *gates["params"]]
    with pytest.raises(ValueError, match=r"would decay by 0.1.*sora\.groups"):
        adapters.schedule(model).begin(torch.optim.AdamW(everything, weight_decay=0.1), 1)


@pytest.mark.parametrize("settings", [{"xi": -1e-3}, {"l1": -1.0}, {"rank": 0}, {"warmup": 1.5}])
def test_bad_settings_are_named(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=rf"sora\({name}"):
        rows(**settings)


@pytest.mark.parametrize("thresholds", [[], [-1.0], [0.1, 0.1], [0.2, 0.1]])
def test_thresholds_that_do_not_rise_are_refused(thresholds: list[float]) -> None:
    with pytest.raises(ValueError, match="each is larger than the one before"):
        sparsify(rows(), thresholds, lambda s: None, lambda: 0.0)
