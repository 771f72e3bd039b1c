"""Schedules: points, ramps and events; one call for every optimiser step in both kinds of loop; resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import tiny
from eckart.schedules import Every, Ramp, Schedule, ScheduleCallback, Together, at_step
from eckart.schedules.base import add_gradient, forget


class Recorder(Schedule):
    """Notes its calls, and the first parameter's gradient when it is complete."""

    def __init__(self, weight: Tensor | None = None):
        super().__init__()
        self.weight, self.calls = weight, []
        self.seen: list[float] = []

    def at(self, step: int) -> None:
        self.calls.append(("at", step))

    def after(self, step: int) -> None:
        self.calls.append(("after", step))

    def gradients(self, step: int) -> None:
        self.calls.append(("gradients", step))
        if self.weight is not None and self.weight.grad is not None:
            self.seen.append(float(self.weight.grad.norm()))


def test_points_of_a_run() -> None:
    assert at_step(7, None, "begin") == 7
    assert at_step(0.25, 100, "begin") == 25
    assert at_step(1.0, 100, "begin") == 100
    for bad in (-1, 1.5, True):
        with pytest.raises(ValueError, match=r"begin=.*: give a step .* or a share"):
            at_step(bad, 100, "begin")
    with pytest.raises(ValueError, match="length is not known"):
        at_step(0.5, None, "begin")


def test_ramps() -> None:
    ramp = Ramp(10, 30, 0.0, 0.8, exponent=3)
    assert [ramp(t) for t in (0, 9, 10)] == [0.0, 0.0, 0.0]
    assert [ramp(t) for t in (30, 31, 1000)] == [0.8, 0.8, 0.8]
    assert ramp(20) == pytest.approx(0.8 - 0.8 / 8, abs=1e-15)
    values = [ramp(t) for t in range(10, 31)]
    assert values == sorted(values)
    assert Ramp(0, 4, 1.0, 0.0)(1) == 0.75
    assert Ramp(5, 5, 1.0, 2.0)(4) == 1.0
    assert Ramp(5, 5, 1.0, 2.0)(5) == 2.0
    with pytest.raises(ValueError, match="a ramp from step 3 to step 2"):
        Ramp(3, 2, 0.0, 1.0)


def test_events_end_exactly_at_the_end() -> None:
    assert [t for t in range(40) if Every(10, 5, 28)(t)] == [5, 15, 25, 28]
    assert [t for t in range(10) if Every(4)(t)] == [0, 4, 8]
    with pytest.raises(ValueError, match="every 0 steps"):
        Every(0)


def test_a_bare_loop_with_accumulated_gradients() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = Recorder(model.weight)
    schedule.begin(optimizer, 2)
    for step in range(2):
        for _ in range(3):
            model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        assert schedule.steps == step + 1
    assert schedule.calls == [
        ("at", 0), ("after", 0), ("gradients", 0), ("after", 1), ("at", 1), ("gradients", 1), ("after", 2), ("at", 2)
    ]  # fmt: skip
    assert schedule.seen == pytest.approx([3 * 3**0.5] * 2)


def test_calls_that_are_missing_or_too_many_are_named() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = Recorder()
    with pytest.raises(RuntimeError, match=r"Recorder.step\(\) was called before begin"):
        schedule.step()
    with pytest.raises(ValueError, match="Recorder works on the optimiser's gradients"):
        schedule.begin(total=3)
    schedule.begin(optimizer)
    with pytest.raises(RuntimeError, match="without an optimiser step before it"):
        schedule.step()
    optimizer.step()
    with pytest.raises(RuntimeError, match="second step since Recorder"):
        optimizer.step()
    schedule.step()
    with pytest.raises(RuntimeError, match=r"before begin\(\)"):
        schedule.load_state_dict({"steps": 3})
    with pytest.raises(ValueError, match="is not the state of a schedule"):
        Recorder().load_state_dict({})
    schedule.release()
    optimizer.step()
    optimizer.step()

    class Long(Schedule):
        needs_total = True

    with pytest.raises(ValueError, match="Long is laid out over the whole run"):
        Long().begin()


def test_a_resumed_schedule_acts_on_no_weight_again() -> None:
    optimizer = torch.optim.SGD(nn.Linear(3, 1).parameters(), lr=0.1)
    schedule = Recorder()
    schedule.load_state_dict({"steps": 5})
    schedule.begin(optimizer, 10)
    assert schedule.calls == [("at", 5)]
    optimizer.step()
    schedule.step()
    assert schedule.calls[1:] == [("gradients", 5), ("after", 6), ("at", 6)]
    assert schedule.state_dict() == {"steps": 6}


def test_several_as_one() -> None:
    optimizer = torch.optim.SGD(nn.Linear(3, 1).parameters(), lr=0.1)
    one, two = Recorder(), Recorder()
    both = Together([one, two])
    both.begin(optimizer, 4)
    optimizer.step()
    both.step()
    assert one.calls == two.calls == [("at", 0), ("after", 0), ("gradients", 0), ("after", 1), ("at", 1)]
    assert one.total == 4
    assert one.optimizer is optimizer
    assert both.state_dict() == {"steps": 1}


def test_optimiser_state_is_forgotten_and_gradients_are_added() -> None:
    weight = nn.Parameter(torch.ones(2))
    add_gradient(weight, torch.ones(2, dtype=torch.float64))
    add_gradient(weight, torch.ones(2))
    assert weight.grad is not None
    assert weight.grad.tolist() == [2.0, 2.0]
    optimizer = torch.optim.Adam([weight])
    optimizer.step()
    assert weight in optimizer.state
    forget(optimizer, [weight])
    assert weight not in optimizer.state
    forget(None, [weight])


def test_an_accelerate_loop_calls_it_where_gradients_are_synchronised() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    try:
        model = nn.Linear(3, 1)
        wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        schedule = Recorder(model.weight)
        schedule.begin(optimizer, 2)
        assert isinstance(schedule.optimizer, torch.optim.SGD)
        for _ in range(4):
            with accelerator.accumulate(wrapped):
                accelerator.backward(wrapped(torch.ones(1, 3)).sum())
                optimizer.step()
                assert schedule.pending is accelerator.sync_gradients
                if accelerator.sync_gradients:
                    schedule.step()
                optimizer.zero_grad()
        assert schedule.steps == 2
        assert [c for c in schedule.calls if c[0] == "gradients"] == [("gradients", 0), ("gradients", 1)]
        assert schedule.seen == pytest.approx([3**0.5] * 2)
    finally:
        for state in (AcceleratorState, GradientState):
            state._reset_state()


def run(model: Any, schedule: Schedule, folder: Path, resume: bool = False, steps: int = 4, save: int = 2) -> None:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-3, save_steps=save, report_to=[], disable_tqdm=True, seed=0, dataloader_pin_memory=False,
        logging_strategy="no", use_cpu=True,
    )  # fmt: skip
    rows = [{"input_ids": ids, "labels": ids} for ids in tiny.batches((32,), length=8)[0]["input_ids"]]
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[ScheduleCallback(schedule)])
    trainer.train(resume_from_checkpoint=resume)


@pytest.mark.filterwarnings("ignore")
def test_trainer_calls_once_for_every_optimiser_step_and_resumes(tmp_path: Path) -> None:
    model = tiny.build("llama", num_hidden_layers=1)
    schedule = Recorder(model.model.layers[0].mlp.up_proj.weight)
    run(model, schedule, tmp_path)
    steps = [("gradients", t) for t in range(4)]
    assert [c for c in schedule.calls if c[0] == "gradients"] == steps
    assert [c for c in schedule.calls if c[0] == "after"] == [("after", t) for t in range(5)]
    assert schedule.steps == schedule.total == 4
    assert len(schedule.seen) == 4
    (tmp_path / "checkpoint-4").rename(tmp_path / "old")
    again = Recorder()
    run(tiny.build("llama", num_hidden_layers=1), again, tmp_path, resume=True)
    assert again.calls[:3] == [("at", 2), ("gradients", 2), ("after", 3)]
    assert again.steps == 4
