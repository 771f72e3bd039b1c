"""The verb of the wing: which layers it takes, what it refuses, and the same run in both loops, whole and cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import eckart
import tiny
from eckart.forms.layers import FactoredLinear
from eckart.registry import entries, find
from eckart.schedules import ScheduleCallback
from eckart.training import structure

METHODS: dict[str, dict[str, Any]] = {
    "sltrain": {"rank": 3, "density": 0.05},
    "lost": {"rank": 3, "density": 0.1},
    "trp": {"period": 2, "energy": 0.9},
    "maestro": {"shrink_every": 2, "lasso": 1e-3, "threshold": 1.0},
    "sst": {"rank": 4, "every": 2, "warmup": 2},
    "gradual_pruning": {"begin": 0, "end": 5, "every": 2, "sparsity": 0.8},
    "nm_gradient_flow": {"beta": 0.5},
    "weight_compander": {"learned": True},
    "pela": {"ratio": 2.0},
    "dsformer_stf": {"nonzeros": 2, "atoms": 8, "block": 16, "refresh": 2, "iterations": 2},
    "greenformers": {"rank": 0.5},
}
OF_CONVOLUTIONS = {"apriori_conv"}
quiet = pytest.mark.filterwarnings("ignore")


def train(model: Any, schedule: Any, folder: Path, steps: int, resume: bool = False) -> None:
    """Six steps of Trainer's schedule, of which the first `steps` are done."""
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, seed=0,
        learning_rate=1e-2, save_steps=steps, report_to=[], disable_tqdm=True, use_cpu=True, logging_strategy="no",
        save_only_model=False,
    )  # fmt: skip
    rows = [{"input_ids": ids, "labels": ids} for ids in tiny.batches((32,), length=8)[0]["input_ids"]]
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[ScheduleCallback(schedule)])
    trainer.train(resume_from_checkpoint=resume)


@quiet
@pytest.mark.parametrize("key", list(METHODS))
def test_a_run_in_trainer_cut_and_resumed_is_the_whole_run_and_its_result_loads(key: str, tmp_path: Path) -> None:
    models = [tiny.build("llama", num_hidden_layers=1) for _ in range(2)]
    schedules = [structure(model, key, **METHODS[key]) for model in models]
    train(models[0], schedules[0], tmp_path, steps=3)
    for newer in tmp_path.glob("checkpoint-6"):
        newer.rename(tmp_path / "whole")
    for parameter in models[1].parameters():
        parameter.data.fill_(0.5)  # all comes from the checkpoint
    train(models[1], schedules[1], tmp_path, steps=3, resume=True)
    assert schedules[0].steps == schedules[1].steps == 6
    wanted, found = (m.state_dict() for m in models)
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    schedules[0].finish()
    batch = tiny.batches((2,))[0]
    models[0].eval().save_pretrained(tmp_path / "done")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "done")
    torch.testing.assert_close(again(**batch).logits, models[0](**batch).logits, rtol=1e-5, atol=1e-6)


@quiet
@pytest.mark.parametrize("key", list(METHODS))
def test_bare_loops_under_gradient_checkpointing_in_half_precision(key: str) -> None:
    model = tiny.build("llama", num_hidden_layers=1, dtype=torch.bfloat16).train()
    model.gradient_checkpointing_enable()
    schedule = structure(model, key, **METHODS[key])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule.begin(optimizer, 3)
    batch, losses = tiny.batches((4,))[0], []
    for _ in range(3):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    schedule.finish()
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert bool(torch.isfinite(model(**batch).logits).all())


def test_every_method_of_the_wing_is_in_these_tests_and_in_the_catalogue() -> None:
    assert {e.key for e in entries("training")} == set(METHODS) | OF_CONVOLUTIONS
    for entry in entries("training"):
        assert entry.cls() == entry.cls()
        assert entry.paper
        assert entry.summary.endswith(".")


def test_the_layers_within_the_blocks_are_taken_or_those_that_are_asked_for() -> None:
    model = tiny.build("llama", num_hidden_layers=2)
    structure(model, form="low_rank(rank=4)", layers=r".*\.1\.mlp\..*")
    taken = [name for name, module in model.named_modules() if isinstance(module, FactoredLinear)]
    assert taken == [f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")]
    model = tiny.build("llama", num_hidden_layers=2)
    structure(model, form="low_rank(rank=4)")
    assert sum(isinstance(m, FactoredLinear) for m in model.modules()) == 14
    assert not isinstance(model.lm_head, FactoredLinear)


def test_any_form_is_trained_from_its_fit() -> None:
    model = nn.Sequential(nn.Linear(12, 10))
    W = model[0].weight.detach().clone()
    structure(model, form="low_rank(rank=2) + sparse(density=0.1)")
    assert torch.equal(model[0].weight, eckart.fit("low_rank(rank=2) + sparse(density=0.1)", W).dense())
    assert all(p.requires_grad for p in model.parameters())
    assert model.training


def test_refusals() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 10))

    for words, message in (
        ({}, "a method of the wing 'training'"),
        ({"method": "sltrain", "form": "dense()"}, "a method of the wing 'training'"),
        ({"method": "sltrian"}, "unknown method 'sltrian'; did you mean 'sltrain'"),
        ({"method": "svd"}, "'svd'"),
        ({"method": "sltrain", "rnak": 3}, "sltrain has no setting 'rnak'; did you mean 'rank'"),
        ({"method": "sltrain", "rank": "3"}, "rank is a whole number, not '3'"),
        ({"method": "sltrain", "layers": "nothing"}, "no layer of Sequential is targeted by 'nothing'"),
        ({"form": "low_rank()"}, "0: low_rank.. has an open dial"),
    ):
        with pytest.raises(ValueError, match=message):
            structure(model(), **words)
    with pytest.raises(ValueError, match=r"unknown method|is one of eckart"):
        find("sltrain", "compression")
    factored = tiny.build("llama", num_hidden_layers=1)
    eckart.compress(factored, "svd", budget=0.9)
    with pytest.raises(ValueError, match=r"is factored already: make it dense first with `eckart.densify"):
        structure(factored, "trp")
