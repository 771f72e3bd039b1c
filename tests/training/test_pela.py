"""PELA against its card: ranks, the three terms, the frozen teacher, recovery, both loops, and saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import tiny
from eckart.forms.layers import FactoredLinear
from eckart.schedules import ScheduleCallback
from eckart.testing import gaussian
from eckart.training import structure
from eckart.training.pela import PELA, Distillation, _share, farthest

pytestmark = pytest.mark.filterwarnings("ignore::eckart.training.NoSaving")


def distilled(model: Any, **settings: Any) -> Distillation:
    schedule = structure(model, "pela", **settings)
    assert isinstance(schedule, Distillation)
    return schedule


@pytest.mark.parametrize("ratio", [1.5, 2.0, 3.0])
def test_the_rank_is_the_largest_that_shrinks_by_the_ratio(ratio: float) -> None:
    model = tiny.build("llama", num_hidden_layers=1)
    sizes = {n: m.weight.shape for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    schedule = distilled(model, ratio=ratio)
    for name in schedule.names:
        out, in_ = sizes[name]
        held = sum(p.numel() for p in model.get_submodule(name).parameters())
        assert out * in_ / ratio - (out + in_) < held <= out * in_ / ratio


def test_at_full_rank_nothing_is_lost_and_all_terms_vanish() -> None:
    model, batch = tiny.build("llama", num_hidden_layers=2), tiny.batches((2,))[0]
    wanted = model(**batch).logits.detach()
    schedule = distilled(model, ratio=1e-3, eps=0.0, beta=1.0)
    torch.testing.assert_close(model(**batch).logits, wanted, rtol=1e-4, atol=1e-4)
    model.train()
    model(**batch)
    assert schedule.extra is not None
    assert float(schedule.extra.detach()) < 1e-8


def test_the_perturbation_is_the_largest_entry_and_its_gradient_goes_through_it() -> None:
    B, A = (gaussian(*s, seed=s[0], dtype=torch.float64).requires_grad_() for s in ((7, 2), (2, 5)))
    W = gaussian(7, 5, seed=9, dtype=torch.float64)
    deviation = (B @ A - W).detach()
    entry = farthest(B, A, W)
    assert float(entry.detach().abs()) == pytest.approx(float(deviation.abs().max()))
    entry.backward()
    i, j = divmod(int(deviation.abs().argmax()), 5)
    assert B.grad is not None
    assert A.grad is not None
    assert B.grad.abs().sum(1).nonzero().flatten().tolist() == [i]
    assert A.grad.abs().sum(0).nonzero().flatten().tolist() == [j]


@pytest.mark.parametrize(("eps", "sign"), [(1e-3, 1.0), (1e3, -1.0)])
def test_the_perturbation_is_drawn_to_eps_from_both_sides(eps: float, sign: float) -> None:
    model = tiny.build("llama", num_hidden_layers=1)
    schedule = distilled(model, eps=eps)
    largest = []
    for name in schedule.names:
        W = schedule.teacher.get_submodule(name).weight
        largest.append((model.get_submodule(name).matrix.dense() - W).abs().max())
    wanted = (torch.stack(largest) - eps).square().mean()
    torch.testing.assert_close(schedule.perturbation(), wanted)
    name = schedule.names[0]
    factors = list(model.get_submodule(name).parameters())
    found = torch.autograd.grad(schedule.perturbation(), factors)
    outward = torch.autograd.grad(farthest(*factors, schedule.teacher.get_submodule(name).weight).abs(), factors)
    assert sum(float((a * b).sum()) for a, b in zip(found, outward, strict=True)) * sign > 0
    some = distilled(tiny.build("llama", num_hidden_layers=1), sampled=2)
    assert float(some.perturbation().detach()) > 0


def test_the_loss_is_the_sum_of_its_terms_and_the_teacher_stays_as_it_is() -> None:
    model, batch = tiny.build("llama", num_hidden_layers=2), tiny.batches((2,))[0]
    original = tiny.build("llama", num_hidden_layers=2)
    schedule = distilled(model, alpha=0.3, beta=0.2, gamma=0.7)
    student, teacher = (_features(m, batch) for m in (model, original))
    terms = 0.3 * torch.stack([F.mse_loss(a, b) for a, b in zip(student[1], teacher[1], strict=True)]).mean()
    terms = terms + 0.2 * F.mse_loss(student[0], teacher[0]) + 0.7 * schedule.perturbation()
    plain = model(**batch, labels=batch["input_ids"]).loss  # in evaluation mode
    model.train()
    output = model(**batch, labels=batch["input_ids"])
    torch.testing.assert_close(output.loss, plain + terms, rtol=1e-5, atol=1e-6)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule.begin(optimizer)
    output.loss.backward()
    optimizer.step()
    schedule.step()
    state = schedule.teacher.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in original.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in schedule.teacher.parameters())
    assert not any(k.startswith("teacher") for k in model.state_dict())
    schedule.finish()
    model(**batch)
    assert not schedule.hooks


def _features(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Logits and the outputs of the blocks."""
    kept: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda m, a, y: kept.append(y[0] if isinstance(y, tuple) else y)) for b in model.model.layers]  # fmt: skip # noqa: E501
    with torch.no_grad():
        logits = model(**batch).logits
    for hook in hooks:
        hook.remove()
    return logits, kept


def test_the_teacher_helps_to_recover() -> None:
    """Agreement with the original's next token on unseen data, mean of three seeds: the task is that very token."""
    unseen = tiny.batches((16,), seed=50)[0]
    found: dict[str, list[float]] = {"none": [], "task": [], "both": []}
    for seed in range(3):
        wanted = tiny.build("llama", seed=seed, num_hidden_layers=2)(**unseen).logits.argmax(-1)
        for name, agreement in found.items():
            model = tiny.build("llama", seed=seed, num_hidden_layers=2)
            schedule = distilled(model, ratio=3.0, **({} if name == "both" else {"alpha": 0.0, "gamma": 0.0}))
            optimizer = torch.optim.Adam(model.train().parameters(), lr=3e-3)
            for step in range(0 if name == "none" else 30):
                batch = tiny.batches((8,), seed=step + 100)[0]
                labels = schedule.teacher(**batch).logits.argmax(-1)
                loss = F.cross_entropy(model(**batch).logits.flatten(0, 1), labels.flatten())
                assert schedule.extra is not None
                (loss + schedule.extra).backward()
                optimizer.step()
                optimizer.zero_grad()
            schedule.finish()
            agreement.append(float((model.eval()(**unseen).logits.argmax(-1) == wanted).float().mean()))
    none, task, both = (sum(found[name]) / 3 for name in ("none", "task", "both"))
    assert both > task > 1.5 * none


@pytest.mark.filterwarnings("ignore")
def test_in_trainer_the_terms_are_in_the_loss_once_and_the_result_loads(tmp_path: Path) -> None:
    rows = [{"input_ids": ids, "labels": ids} for ids in tiny.batches((16,), length=8)[0]["input_ids"]]
    logged = []
    for accumulate in (1, 2):
        model = tiny.build("llama", num_hidden_layers=1)
        schedule = distilled(model, alpha=0.0, gamma=100.0, eps=0.0)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(accumulate)), max_steps=1, per_device_train_batch_size=8 // accumulate,
            gradient_accumulation_steps=accumulate, learning_rate=0.0, report_to=[], disable_tqdm=True, use_cpu=True,
            logging_steps=1, seed=0, save_strategy="no",
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[ScheduleCallback(schedule)])
        trainer.train()
        logged.append(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))
        assert schedule.steps == 1
        schedule.finish()
    assert logged[0] == pytest.approx(logged[1], rel=1e-3)
    trainer.save_model(tmp_path / "done")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "done")
    batch = tiny.batches((2,))[0]
    torch.testing.assert_close(again(**batch).logits, model.eval()(**batch).logits, rtol=1e-6, atol=1e-6)
    assert isinstance(again.model.layers[0].mlp.up_proj, FactoredLinear)
    assert again.config.quantization_config.history[-1]["training"] == "pela"


def test_a_batch_has_its_share_of_the_labels_that_a_loss_is_divided_by() -> None:
    model = tiny.build("llama", num_hidden_layers=1)
    labels = torch.tensor([[5, 6, 7, -100], [5, -100, -100, -100]])
    assert float(_share(model, {"labels": labels, "num_items_in_batch": 8})) == 2 / 8
    assert float(_share(nn.Linear(1, 1), {"labels": labels, "num_items_in_batch": 8})) == 4 / 8
    assert _share(model, {"labels": labels}) == 1.0


def test_refusals() -> None:
    for settings, message in (
        ({"ratio": 0.0}, "ratio=0.0.*positive"),
        ({"alpha": -1.0}, "alpha=-1.0.*not negative"),
        ({"eps": -1.0}, "eps=-1.0.*not negative"),
    ):
        with pytest.raises(ValueError, match=message):
            PELA(**settings)
    with pytest.raises(ValueError, match=r"leaves no rank of a matrix of shape \(32, 32\)"):
        distilled(tiny.build("llama"), ratio=1000.0)
    with pytest.raises(ValueError, match="Sequential has none that are known: set alpha=0"):
        distilled(nn.Sequential(nn.Linear(20, 30)))
    model = tiny.build("llama", num_hidden_layers=1)
    distilled(model)
    model.model.layers[0].mlp.up_proj.bias = nn.Parameter(torch.full((48,), torch.nan))
    model.train()
    with pytest.raises(RuntimeError, match="the distillation loss is nan"):
        model(**tiny.batches((2,))[0])
