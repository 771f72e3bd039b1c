"""Adapters with schedules in transformers' Trainer, with accumulated gradients, resumed, and in two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

import tiny
from eckart import adapters
from eckart.schedules import ScheduleCallback
from eckart.testing.adapters import batches, small_model

STEPS = 6
METHODS: dict[str, dict[str, Any]] = {
    "s2_lora": {"rank": 4, "sparsity": 1e-5},
    "increlora": {"rank": 2, "growth": 1, "top": 7, "warmup": 1, "every": 2},
    "adalora": {"rank": 1, "initial_rank": 3, "final": 2, "warmup": 1},
}


PLACES = ["q_proj", "down_proj"]
"""Layers of the runs in two processes."""


def model_of(key: str, **settings: Any) -> Any:
    return adapters.adapt(small_model(), key, **METHODS[key], **settings)


def learned(model: Any) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def windows() -> list[dict[str, Any]]:
    """Rows of two batches for each step."""
    ids = torch.cat([batches(1, seed=s)[0]["input_ids"] for s in range(2 * STEPS)])
    return [{"input_ids": row, "labels": row} for row in ids]


class InOrder(Trainer):
    """Trainer that does not shuffle."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def train(model: Any, schedule: Any, folder: Path, resume: bool = False, save: int = 100) -> None:
    optimizer = torch.optim.SGD(learned(model), 0.3, momentum=0.5)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        max_grad_norm=0.0, save_steps=save, report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
        logging_strategy="no", use_cpu=True, remove_unused_columns=False,
    )  # fmt: skip
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    callbacks = [ScheduleCallback(schedule)]
    trainer = InOrder(model, arguments, train_dataset=windows(), callbacks=callbacks, optimizers=(optimizer, rate))
    trainer.train(resume_from_checkpoint=resume)


def bare(model: Any, schedule: Any) -> None:
    """The same run without Trainer."""
    optimizer = torch.optim.SGD(learned(model), 0.3, momentum=0.5)
    rows = windows()
    model.train()
    schedule.begin(optimizer, STEPS)
    for step in range(STEPS):
        for part in range(2):
            at = 4 * step + 2 * part
            batch = {k: torch.stack([row[k] for row in rows[at : at + 2]]) for k in ("input_ids", "labels")}
            (model(**batch).loss / 2).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", METHODS)
def test_trainer_does_what_a_bare_loop_does_once_for_every_step(key: str, tmp_path: Path) -> None:
    model, other = model_of(key), model_of(key)
    schedule, by_hand = adapters.schedule(model), adapters.schedule(other)
    called: list[tuple[str, int]] = []
    for name in ("gradients", "after"):
        own = getattr(schedule, name)

        def noted(step: int, name: str = name, own: Any = own) -> None:
            called.append((name, step))
            own(step)

        setattr(schedule, name, noted)
    train(model, schedule, tmp_path)
    bare(other, by_hand)
    assert [s for n, s in called if n == "gradients"] == list(range(STEPS))
    assert [s for n, s in called if n == "after"] == list(range(STEPS + 1))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    schedule.finish()
    by_hand.finish()
    assert structure(model) == structure(other)
    assert structure(model) != structure(model_of(key))


def structure(model: Any) -> Any:
    """What the schedule decided: ranks, or which components are zero."""
    config = model.peft_config["default"]
    if config.rank_pattern:
        return config.rank_pattern
    return {n: (p == 0).tolist() for n, p in model.named_parameters() if "coefficients" in n}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", ["increlora", "adalora"])
def test_trainer_goes_on_from_a_checkpoint(key: str, tmp_path: Path) -> None:
    whole = model_of(key)
    train(whole, adapters.schedule(whole), tmp_path, save=3)
    (tmp_path / f"checkpoint-{STEPS}").rename(tmp_path / "last")
    again = model_of(key)
    schedule = adapters.schedule(again)
    train(again, schedule, tmp_path, resume=True)
    assert schedule.steps == STEPS
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def work(rank: int, folder: Path) -> None:
    for key in METHODS:
        model = model_of(key, target_modules=PLACES)
        schedule = adapters.schedule(model)
        parallel = nn.parallel.DistributedDataParallel(model.train(), find_unused_parameters=True)
        optimizer = torch.optim.Adam(learned(model), 2e-2)
        schedule.begin(optimizer, STEPS)
        for step in range(STEPS):
            batch = batches(1, seed=2 * step + rank)[0]
            parallel(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        torch.save({n: p for n, p in model.state_dict().items() if "base_layer" not in n}, folder / f"{key}-{rank}")


def test_two_processes_with_their_own_data_end_with_the_same_adapter(tmp_path: Path) -> None:
    with tiny.two_processes(work, tmp_path):
        pass
    for key in METHODS:
        one, two = (torch.load(tmp_path / f"{key}-{rank}", weights_only=True) for rank in range(2))
        assert one.keys() == two.keys()
        assert any("updates" in n or "lora_" in n for n in one)
        for name, tensor in one.items():
            assert torch.equal(tensor, two[name]), f"{key}: {name}"
        plain = model_of(key, target_modules=PLACES).state_dict()
        assert any(not torch.equal(tensor, plain[name]) for name, tensor in one.items())
