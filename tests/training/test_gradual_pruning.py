"""Gradual pruning against its card: the ramp, exact counts, gradients, both kinds of mask, and storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM

import tiny
from eckart.forms import parse
from eckart.forms.layers import FactoredConv2d, FactoredLinear
from eckart.testing import gaussian
from eckart.training import NoSaving, structure
from eckart.training.gradual_pruning import GradualPruning, Pruning, largest


def trained(model: nn.Module, name: str = "0") -> Tensor:
    module: Any = model.get_submodule(name)
    return module.parametrizations.weight.original


def mask(model: nn.Module, name: str = "0") -> Tensor:
    module: Any = model.get_submodule(name)
    return module.parametrizations.weight[0].mask


def steps(model: nn.Module, schedule: Any, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor]) -> Any:
    """One training step after another."""
    while True:
        F.mse_loss(model(data[0]), data[1]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield schedule.steps


def test_the_ramp() -> None:
    schedule = structure(toys.mlp(6, 5), "gradual_pruning", sparsity=0.8, initial=0.2, begin=10, end=30)
    assert isinstance(schedule, Pruning)
    schedule.begin()
    ramp = schedule.ramp
    assert (ramp(0), ramp(10), ramp(30), ramp(99)) == (0.2, 0.2, 0.8, 0.8)
    assert ramp(20) == pytest.approx(0.8 - 0.6 / 8, abs=1e-15)
    shares = structure(toys.mlp(6, 5), "gradual_pruning")
    with pytest.raises(ValueError, match="how many optimiser steps it has"):
        shares.begin()
    shares.begin(total=200)
    assert isinstance(shares, Pruning)
    assert (shares.ramp.begin, shares.ramp.end) == (20, 140)


@pytest.mark.parametrize("hard", [True, False])
def test_counts_are_exact_after_every_event_and_the_last_is_at_the_end(hard: bool) -> None:
    model, data = toys.mlp(10, 9, 4), toys.regression(10, 4)
    schedule = structure(model, "gradual_pruning", sparsity=0.7, begin=2, end=9, every=3, hard=hard)
    assert isinstance(schedule, Pruning)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule.begin(optimizer)
    expected, zeros = 90, torch.zeros(9, 10, dtype=torch.bool)
    for step in steps(model, schedule, optimizer, data):
        if step in (2, 5, 8, 9):
            expected = max(round(90 * (1 - schedule.ramp(step))), 1)
        assert int(mask(model).sum()) == expected
        assert int((model[0].weight != 0).sum()) == expected
        if hard:
            now = trained(model).detach() == 0
            assert bool((now | ~zeros).all())
            zeros = now
        if step == 12:
            break
    assert expected == 27
    assert (int((trained(model) == 0).sum()) == 63) is hard


def test_gradients_are_zero_where_pruned_and_autograds_elsewhere() -> None:
    model = toys.mlp(6, 5, dtype=torch.float64)
    structure(model, "gradual_pruning", sparsity=0.5, initial=0.5, begin=0, end=0).begin()
    x = gaussian(7, 6, dtype=torch.float64)
    dense = model[0].weight.detach().clone().requires_grad_()
    model(x).square().sum().backward()
    F.linear(x, dense, model[0].bias).square().sum().backward()
    kept = mask(model)
    assert int(kept.sum()) == 15
    gradient = trained(model).grad
    assert gradient is not None
    assert not gradient[~kept].any()
    assert dense.grad is not None
    torch.testing.assert_close(gradient[kept], dense.grad[kept], rtol=1e-12, atol=1e-12)


def test_a_soft_mask_keeps_values_bit_for_bit_and_lets_them_return() -> None:
    model, data = toys.mlp(10, 9, 4), toys.regression(10, 4)
    schedule = structure(model, "gradual_pruning", sparsity=0.6, initial=0.6, begin=3, end=20, every=6, hard=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    schedule.begin(optimizer)
    before, kept, returned = None, None, 0
    for step in steps(model, schedule, optimizer, data):
        if kept is not None and step not in (9, 15, 20):
            assert before is not None
            assert torch.equal(trained(model).detach()[~kept], before[~kept])
        elif kept is not None:
            returned += int((mask(model) & ~kept).sum())
        before, kept = trained(model).detach().clone(), mask(model).clone() if step >= 3 else None
        if step == 21:
            break
    assert returned > 0


@pytest.mark.parametrize("amount", [0.3, 0.85])
def test_masks_agree_with_torch(amount: float) -> None:
    layer = nn.Linear(12, 11)
    wanted = largest(layer.weight.detach(), amount)
    prune.l1_unstructured(layer, "weight", amount=amount)
    assert torch.equal(wanted, layer.weight_mask.bool())
    assert int(largest(torch.ones(4, 5), 0.5).sum()) == 10  # ties are broken, not kept
    assert int(largest(torch.ones(2, 2), 0.99).sum()) == 1


def task(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Rows to learn from and unseen ones: four functions, not linear, of 7 of 40 inputs."""
    x = gaussian(512, 40, seed=seed)
    y = torch.stack([x[:, 0] * x[:, 1], torch.sin(2 * x[:, 2]) + x[:, 3], x[:, 4].abs(), x[:, 5] * x[:, 6]], 1)
    return (x[:256], y[:256]), (x[256:], y[256:])


def test_gradual_beats_one_shot_and_wide_and_sparse_beats_narrow_and_dense() -> None:
    """Mean test loss over three seeds, at 95% and equal steps; the narrow net has as many weights as the wide one."""
    found: dict[str, list[float]] = {"gradual": [], "once": [], "narrow": []}
    ramps = {"gradual": (0.1, 0.6), "once": (0.6, 0.6)}
    for seed in range(3):
        data, unseen = task(seed)
        for name in found:
            model = toys.mlp(40, 6 if name == "narrow" else 120, 4, seed=seed)
            schedule = None
            if name in ramps:
                begin, end = ramps[name]
                schedule = structure(model, "gradual_pruning", sparsity=0.95, begin=begin, end=end, every=10, layers="0|2")  # fmt: skip # noqa: E501
            toys.train(model, schedule, data, 300, lr=1e-2)
            found[name].append(toys.loss(model, unseen))
    mean = {name: sum(values) / 3 for name, values in found.items()}
    assert mean["gradual"] < mean["once"]
    assert mean["gradual"] < mean["narrow"]


def test_finish_stores_entries_and_places() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(1), nn.Linear(32, 10)).double()
    schedule = structure(model, "gradual_pruning", layers="0|2", sparsity=0.9, begin=0, end=0)
    schedule.begin()
    x = gaussian(2, 3, 4, 4, seed=1, dtype=torch.float64)
    wanted = model(x).detach()
    assert [int((model[i].weight == 0).sum()) for i in (0, 2)] == [194, 288]
    schedule.finish()
    assert isinstance(model[0], FactoredConv2d)
    assert isinstance(model[2], FactoredLinear)
    torch.testing.assert_close(model(x), wanted)
    assert sum(p.numel() for p in model[2].parameters()) == 32 + 10


def test_finish_tells_of_what_is_no_smaller() -> None:
    model = toys.mlp(6, 5)
    schedule = structure(model, "gradual_pruning", sparsity=0.0, begin=0, end=0)
    schedule.begin()
    with pytest.warns(NoSaving, match="0 stays dense, with zeros"):
        schedule.finish()
    assert type(model[0]) is nn.Linear
    assert isinstance(model[0].weight, nn.Parameter)


def test_resumes_bit_for_bit() -> None:
    data, settings = toys.regression(10, 4), {"sparsity": 0.8, "begin": 2, "end": 9, "every": 3}
    whole = toys.mlp(10, 9, 4)
    toys.train(whole, structure(whole, "gradual_pruning", **settings), data, 12)
    cut, again = toys.mlp(10, 9, 4), toys.mlp(10, 9, 4, seed=5)
    first, second = (structure(m, "gradual_pruning", **settings) for m in (cut, again))
    optimizer = toys.train(cut, first, data, 6, total=12)
    again.load_state_dict(cut.state_dict())
    second.load_state_dict(first.state_dict())
    other = torch.optim.Adam(again.parameters(), lr=3e-3)
    other.load_state_dict(optimizer.state_dict())
    toys.train(again, second, data, 12, optimizer=other, start=6)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_is_saved_and_loaded_by_plain_transformers(name: str, tmp_path: Path) -> None:
    model = tiny.build(name, **({"n_layer": 1} if name == "gpt2" else {"num_hidden_layers": 1}))
    schedule = structure(model, "gradual_pruning", sparsity=0.8, initial=0.8, begin=0, end=0)
    schedule.begin()
    schedule.finish()
    batch = tiny.batches((2,))[0]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, rtol=1e-6, atol=1e-6)
    forms = {spec["form"] for spec in again.config.quantization_config.modules.values()}
    assert all(parse(f).density == pytest.approx(0.2, abs=1e-3) for f in forms)


def test_refusals() -> None:
    for settings, message in (
        ({"sparsity": 1.0}, "sparsity=1.0.*a share from 0, below 1"),
        ({"initial": -0.1}, "initial=-0.1.*a share from 0, below 1"),
        ({"begin": 5, "end": 4}, "ends before it begins"),
        ({"begin": 0.9}, "ends before it begins"),
        ({"every": 0}, "a positive number of steps"),
        ({"exponent": 0.0}, "it is positive"),
        ({"end": 1.5}, "gradual_pruning: end=1.5: give a step"),
    ):
        with pytest.raises(ValueError, match=message):
            GradualPruning(**settings)
    model = toys.mlp(6, 5)
    schedule = structure(model, "gradual_pruning", begin=0, end=4, every=1)
    trained(model).data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the weight of 0 is no longer finite"):
        schedule.begin()
    with pytest.raises(ValueError, match=r"lm_head shares its weight with model\.embed_tokens\.weight"):
        structure(tiny.build("llama-tied"), "gradual_pruning", layers="lm_head")
    with pytest.raises(ValueError, match="is an embedding"):
        structure(tiny.build("llama"), "gradual_pruning", layers="model.embed_tokens")
