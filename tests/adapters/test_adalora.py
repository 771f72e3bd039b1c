"""AdaLoRA: PEFT's own, whose ranks really change; budgets, resuming, Trainer, and what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from planted import Rows, change, fit, loss, teach
from safetensors.torch import load_file
from torch import Tensor

from eckart import adapters
from eckart.testing.adapters import answers, batches, small_model

SETTINGS: dict[str, Any] = {"rank": 2, "initial_rank": 4, "warmup": 2, "final": 3, "every": 2, "orthogonality": 0.5}
STEPS = 12


def model_of(seed: int = 3, **settings: Any) -> Any:
    return adapters.adapt(small_model(), "adalora", seed=seed, **(SETTINGS | settings))


def values(model: Any) -> dict[str, Tensor]:
    """The singular values of every layer."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_E" in n}


def live(model: Any) -> int:
    return sum(int((e != 0).sum()) for e in values(model).values())


def go(model: Any, schedule: Any, optimizer: Any, steps: range, total: int = STEPS) -> list[int]:
    """Train, and count live components after every step."""
    model.train()
    schedule.steps = steps.start
    schedule.begin(optimizer, total)
    counts = []
    for step in steps:
        batch = batches(1, seed=step)[0]
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        counts.append(live(model))
    return counts


def adam(model: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-2, weight_decay=0.0)


def test_it_is_peft_s_own_with_its_allocator_called() -> None:
    config = AdaLoraConfig(
        target_r=2, init_r=4, lora_alpha=16, tinit=2, tfinal=3, deltaT=2, orth_reg_weight=0.5, total_step=STEPS,
        target_modules="all-linear", task_type="CAUSAL_LM",
    )  # fmt: skip
    base = small_model()
    torch.manual_seed(3)
    theirs, ours = get_peft_model(base, config), model_of()
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
    by_hand, optimizer, schedule = adam(theirs), adam(ours), adapters.schedule(ours)
    schedule.begin(optimizer, STEPS)
    ours.train()
    theirs.train()
    for step in range(STEPS):
        batch = batches(1, seed=step)[0]
        for model in (theirs, ours):
            model(**batch, labels=batch["input_ids"]).loss.backward()
        by_hand.step()
        optimizer.step()
        theirs.base_model.update_and_allocate(step + 1)
        schedule.step()
        by_hand.zero_grad()
        optimizer.zero_grad()
        for a, b in zip(values(theirs).values(), values(ours).values(), strict=True):
            assert torch.equal(a != 0, b != 0), step
            assert torch.allclose(a, b, atol=1e-5)
    schedule.finish()
    assert ours.peft_config["default"].rank_pattern == theirs.peft_config["default"].rank_pattern
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_the_budget_is_kept_to_the_component() -> None:
    model = model_of()
    counts = go(model, adapters.schedule(model), adam(model), range(STEPS))
    first, last, begin, end = 14 * 4, 14 * 2, 2, STEPS - 3
    budget = [int(last + (first - last) * (1 - (t - begin) / (end - begin)) ** 3) for t in range(begin, end + 1)]
    assert counts[:2] == [first, first]
    assert [counts[t - 1] for t in (4, 6, 8)] == [budget[t - begin] for t in (4, 6, 8)]
    assert counts[end - 1 :] == [last] * 4


def test_without_the_schedule_no_rank_ever_changes() -> None:
    model = model_of()
    optimizer = adam(model)
    for step in range(STEPS):
        batch = batches(1, seed=step)[0]
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert live(model) == 14 * 4


def test_a_run_that_was_cut_goes_on_as_if_it_were_not(tmp_path: Path) -> None:
    for cut in (7, 10):
        whole = model_of()
        go(whole, adapters.schedule(whole), adam(whole), range(STEPS))
        first = model_of()
        optimizer = adam(first)
        go(first, adapters.schedule(first), optimizer, range(cut))
        first.save_pretrained(tmp_path)
        saved = optimizer.state_dict()
        second = PeftModel.from_pretrained(small_model(), tmp_path, is_trainable=True)
        again = adam(second)
        again.load_state_dict(saved)
        go(second, adapters.schedule(second), again, range(cut, STEPS))
        assert all(torch.equal(a, b) for a, b in zip(values(whole).values(), values(second).values(), strict=True))


@pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape", "ignore:The following rank_pattern")
def test_saved_are_live_components_alone_and_layers_may_have_none(tmp_path: Path) -> None:
    model = model_of(rank=1, initial_rank=3)
    schedule = adapters.schedule(model)
    go(model, schedule, adam(model), range(STEPS))
    schedule.finish()
    model.eval()
    model.save_pretrained(tmp_path)
    ranks = [int((e != 0).sum()) for e in values(model).values()]
    assert 0 in ranks
    assert sum(ranks) == 14
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for n, t in saved.items() if "lora_E" in n) == 14
    shapes = [m.weight.shape for m in small_model().modules() if isinstance(m, torch.nn.Linear)][:-1]
    live_numbers = sum(r * (sum(shape) + 1) for r, shape in zip(ranks, shapes, strict=True))
    assert sum(t.numel() for t in saved.values()) == live_numbers
    again = PeftModel.from_pretrained(small_model(), tmp_path).eval()
    assert (answers(again) - answers(model)).abs().max() < 1e-6
    with pytest.raises(ValueError, match="is_trainable=True"):
        adapters.schedule(again)


def test_ranks_gather_where_the_change_is() -> None:
    teacher = teach([change(r, seed=5) for r in (0, 0, 4, 0)])

    def after(model: Any, schedule: Any) -> float:
        torch.manual_seed(0)
        parameters = [p for p in model.parameters() if p.requires_grad]
        fit(model, teacher, 120, schedule, torch.optim.Adam(parameters, 2e-2), 4)
        return loss(model, teacher, 4)

    model = adapters.adapt(Rows(4), "adalora", rank=1, initial_rank=4, target_modules=r"layers\.\d", every=5)
    schedule = adapters.schedule(model)
    found = after(model, schedule)
    ranks = [int((e != 0).sum()) for e in values(model).values()]
    assert sum(ranks) == 4
    assert ranks[2] >= 3
    config = LoraConfig(r=1, lora_alpha=1, target_modules=r".*layers\.\d")
    plain = get_peft_model(Rows(4), config)
    assert found < 0.7 * after(plain, adapters.schedule(plain))


def test_factors_are_kept_orthonormal_whatever_the_loss_is() -> None:
    def farthest(strength: float) -> float:
        model = adapters.adapt(Rows(2), "adalora", rank=1, initial_rank=3, target_modules=r"layers\.\d", orthogonality=strength)  # fmt: skip # noqa: E501
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 2e-2)
        fit(model, teach([change(2), change(2)]), 120, adapters.schedule(model), optimizer, 2)
        rows = [p.detach() for n, p in model.named_parameters() if "lora_A" in n]
        return max(float((A @ A.T - torch.eye(3)).abs().max()) for A in rows)

    assert farthest(0.5) < 0.05
    assert farthest(0.0) > 0.5


def test_settings_and_calls_that_do_not_do_are_named() -> None:
    for settings, words in (
        ({"rank": 4, "initial_rank": 4}, r"initial_rank=4\): it is a whole number above the rank at the end, 4"),
        ({"beta1": 1.0}, "beta1=1.0"), ({"warmup": -1}, "warmup=-1"), ({"every": 0}, "every=0"),
        ({"orthogonality": -0.1}, "orthogonality=-0.1"), ({"dropout": 1.0}, "dropout=1.0"),
        ({"initial_rank": 30}, r"q_proj: initial_rank 30 .* \(16, 16\)"),
        ({"target_modules": ["q_prj"]}, "did you mean 'q_proj'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            model_of(**settings)
    model = model_of()
    optimizer, schedule = adam(model), adapters.schedule(model)
    with pytest.raises(ValueError, match="5 steps with 2 of warm-up and 3 of the final phase"):
        schedule.begin(optimizer, 5)
    with pytest.raises(ValueError, match="say how many optimiser steps"):
        schedule.begin(optimizer)
    schedule.begin(optimizer, STEPS)
    batch = batches(1)[0]
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"schedule.step\(\) before optimizer.zero_grad"):
        schedule.step()
