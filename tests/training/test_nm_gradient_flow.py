"""N:M gradient flow against its card: masks, fades, gradients by hand, stages, and packed storage."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import tiny
from eckart.forms.layers import FactoredConv2d, FactoredLinear
from eckart.testing import gaussian
from eckart.training import structure
from eckart.training.nm_gradient_flow import Faded, Fading, NMGradientFlow


def faded(model: nn.Module, name: str = "0") -> tuple[Tensor, Faded]:
    """The trained tensor and what fades it."""
    module: Any = model.get_submodule(name)
    return module.parametrizations.weight.original, module.parametrizations.weight[0]


def placed(model: nn.Module, step: int, total: int = 1000, **settings: Any) -> Fading:
    """The schedule at a step of a run."""
    schedule = structure(model, "nm_gradient_flow", **settings)
    assert isinstance(schedule, Fading)
    schedule.load_state_dict({"steps": step})
    schedule.begin(total=total)
    return schedule


@pytest.mark.parametrize("runs", ["rows", "columns"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8), (4, 4)])
def test_every_group_keeps_exactly_n(runs: Any, n: int, m: int) -> None:
    for W in (gaussian(16, 24, seed=1), torch.ones(16, 24)):
        model = nn.Sequential(nn.Linear(24, 16))
        model[0].weight.data.copy_(W)
        placed(model, 1000, n=n, m=m, runs=runs)
        kept = model[0].weight != 0
        lines = kept if runs == "rows" else kept.t()
        assert bool((lines.unflatten(1, (-1, m)).sum(-1) == n).all())
    model = nn.Sequential(nn.Conv2d(8, 16, 3))
    placed(model, 1000, n=n, m=m, runs=runs)
    kept = (model[0].weight != 0).permute(0, 2, 3, 1).flatten(1)
    lines = kept if runs == "rows" else kept.t()
    assert bool((lines.unflatten(1, (-1, m)).sum(-1) == n).all())


def test_the_largest_are_kept() -> None:
    model = nn.Sequential(nn.Linear(8, 3))
    W = model[0].weight.detach().clone()
    placed(model, 1000, n=2, m=4)
    order = W.abs().unflatten(1, (2, 4)).topk(2, dim=-1).indices
    wanted = torch.zeros(3, 2, 4, dtype=torch.bool).scatter(-1, order, True).flatten(1)
    assert torch.equal(model[0].weight, W * wanted)


def test_fades() -> None:
    beta = 0.01
    exponential = placed(toys.mlp(8, 4), 0, beta=beta, dense=100, fine=0.1)
    assert [exponential.fade(t) for t in (0, 99, 100, 900, 1000)] == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert exponential.fade(100 + 69) == pytest.approx(math.exp(-0.69))
    half = placed(toys.mlp(8, 4), 0, beta=math.log(2) / 50, dense=100)
    assert half.fade(150) == pytest.approx(0.5, abs=1e-15)
    linear = placed(toys.mlp(8, 4), 0, beta=beta, dense=100, recipe="mdgf-linear")
    assert [linear.fade(t) for t in (100, 125, 200, 300)] == pytest.approx([1.0, 0.75, 0.0, 0.0])


@pytest.mark.parametrize("dense", [0, 100, 800])
def test_without_a_rate_they_fade_over_whatever_phase_there_is(dense: int) -> None:
    exponential = placed(toys.mlp(8, 4), 0, dense=dense, fine=0.1)
    linear = placed(toys.mlp(8, 4), 0, dense=dense, fine=0.1, recipe="mdgf-linear")
    middle = (dense + 900) // 2
    assert [exponential.fade(t) for t in (dense, middle)] == pytest.approx([1.0, math.exp(-5)])
    assert [linear.fade(t) for t in (dense, middle)] == pytest.approx([1.0, 0.5])
    assert exponential.fade(899) < 2e-4
    assert linear.fade(899) <= 0.01 + 1e-9


def test_undecayed_it_is_the_dense_layer_bit_for_bit_and_faded_out_the_hard_mask() -> None:
    plain, model, x = toys.mlp(8, 4), toys.mlp(8, 4), gaussian(5, 8)
    placed(model, 0)
    for module in (plain, model):
        module(x).square().sum().backward()
    assert torch.equal(model(x), plain(x))
    W, _ = faded(model)
    assert torch.equal(W.grad, plain[0].weight.grad)
    placed(plain, 1000)
    kept = plain[0].weight.detach()
    torch.testing.assert_close(plain(x), x @ kept.T + plain[0].bias)
    assert int((kept != 0).sum()) == 16
    assert plain[0].bias.any()


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.001},
        {"beta": 0.001, "flow": "ste"},
        {"recipe": "sr-ste", "pull": 0.3},
        {"recipe": "sdgf-stepwise"},
    ],
)
def test_gradients_are_those_worked_out_by_hand(settings: dict[str, Any]) -> None:
    model, x = toys.mlp(8, 4, dtype=torch.float64), gaussian(5, 8, seed=1, dtype=torch.float64)
    schedule = placed(model, 500, dense=100, **settings)
    W, fade = faded(model)
    M = fade.choose(W.detach())
    weight = model[0].weight.detach().requires_grad_()
    nn.functional.linear(x, weight, model[0].bias).square().sum().backward()
    g = weight.grad
    assert g is not None
    b = schedule.fade(500)
    model(x).square().sum().backward()
    wanted = {
        "decayed": g * torch.where(M, 1.0, b),
        "ste": g,
        "sr-ste": g + 0.3 * ~M * W.detach(),
        "sdgf-stepwise": g,
    }[settings.get("recipe") or settings.get("flow", "decayed")]
    torch.testing.assert_close(W.grad, wanted, rtol=1e-9, atol=1e-12)
    pruned = torch.zeros_like(W) if b == 0 or settings.get("flow") == "ste" else b * W
    torch.testing.assert_close(weight.detach(), torch.where(M, W, pruned).detach())


def test_stages_and_when_they_change() -> None:
    assert [n for n, _ in NMGradientFlow(1, 16, "sdgf-stepwise").stages()] == [15, 8, 4, 2, 1]
    assert NMGradientFlow(1, 8, "sdgf-geometric").stages() == [(8, 64), (4, 32), (2, 16), (1, 8)]
    assert NMGradientFlow(2, 4, "sdgf-stepwise").stages() == [(3, 4), (2, 4)]
    schedule = placed(toys.mlp(16, 4), 0, n=1, m=16, recipe="sdgf-stepwise", dense=100, fine=150, total=900)
    changes = [t for t in range(1, 900) if schedule.pattern(t) != schedule.pattern(t - 1)]
    assert changes == [230, 360, 490, 620]
    assert (schedule.pattern(0), schedule.pattern(899)) == ((15, 16), (1, 16))
    resumed = toys.mlp(16, 4)
    placed(resumed, 400, n=1, m=16, recipe="sdgf-stepwise", dense=100, fine=150, total=900)
    assert int((resumed[0].weight != 0).sum()) == 4 * 4  # in the middle of a stage, from the step alone


def test_the_mask_is_refreshed_by_the_step_and_not_by_forward() -> None:
    model = toys.mlp(8, 4)
    schedule = placed(model, 999, refresh=2)
    W, fade = faded(model)
    first = (model[0].weight != 0).clone()
    W.data.copy_(gaussian(4, 8, seed=9))
    assert torch.equal(model[0].weight != 0, first)
    schedule.step()
    now = model[0].weight != 0
    assert torch.equal(now, fade.choose(W.detach()))
    assert not torch.equal(now, first)


def test_decayed_flow_has_quieter_gradients_than_sr_ste() -> None:
    """Variance over steps of the gradient's norm in the last third, on 1:16, mean of five seeds."""
    variances: dict[str, list[float]] = {"mdgf-exponential": [], "sr-ste": []}
    for seed in range(5):
        data = toys.regression(16, 4, seed=seed + 1)
        for recipe, found in variances.items():
            model, norms = toys.mlp(16, 64, 4, seed=seed), []
            schedule = structure(model, "nm_gradient_flow", n=1, m=16, recipe=recipe, beta=0.05, layers="0|2")
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            schedule.begin(optimizer, 90)
            for step in range(90):
                rows = torch.randint(256, (32,), generator=torch.Generator().manual_seed(step))
                nn.functional.mse_loss(model(data[0][rows]), data[1][rows]).backward()
                norms.append(float(faded(model)[0].grad.norm()))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            found.append(float(torch.tensor(norms[60:]).var()))
    assert sum(variances["mdgf-exponential"]) < sum(variances["sr-ste"])


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8), (1, 32)])
def test_finish_packs_the_choices(n: int, m: int) -> None:
    model, x = toys.mlp(64, 48), gaussian(3, 64)
    schedule = placed(model, 1000, n=n, m=m)
    wanted = model(x).detach()
    schedule.finish()
    assert isinstance(model[0], FactoredLinear)
    torch.testing.assert_close(model(x), wanted, rtol=1e-3, atol=1e-5)
    bits = 64 // m * math.ceil(math.log2(math.comb(m, n)))  # of a row, which begins at a byte
    assert model[0].matrix.nbytes == 48 * (64 // m * n * 4 + -(-bits // 8))


def test_finish_stores_kernels_and_columns_by_place() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3))
    x = gaussian(1, 8, 5, 5)
    schedule = placed(model, 1000, n=1, m=8)
    wanted = model(x).detach()
    schedule.finish()
    assert isinstance(model[0], FactoredConv2d)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-6)
    columns = toys.mlp(24, 16)
    schedule = placed(columns, 1000, n=1, m=8, runs="columns")
    wanted = columns(gaussian(2, 24)).detach()
    schedule.finish()
    torch.testing.assert_close(columns(gaussian(2, 24)), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_is_saved_and_loaded_by_plain_transformers(name: str, tmp_path: Path) -> None:
    model = tiny.build(name, **({"n_layer": 1} if name == "gpt2" else {"num_hidden_layers": 1}))
    schedule = placed(model, 1000, layers=r".*mlp.*")
    schedule.finish()
    batch = tiny.batches((2,))[0]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, rtol=1e-6, atol=1e-6)
    modules = again.config.quantization_config.modules
    assert modules
    assert all(spec["form"] == "semi_sparse()" and "mlp" in where for where, spec in modules.items())


def test_refusals() -> None:
    for settings, message in (
        ({"n": 5, "m": 4}, "n=5, m=4.*1 to m of every m"),
        ({"n": 0}, "1 to m of every m"),
        ({"n": 3, "m": 16, "recipe": "sdgf-stepwise"}, "a power of two"),
        ({"beta": -1.0}, "beta=-1.0.*not negative"),
        ({"recipe": "densify"}, "it is one of"),
        ({"refresh": 0}, "a positive number of steps"),
        ({"dense": 2.0}, "dense=2.0: give a step"),
    ):
        with pytest.raises(ValueError, match=message):
            NMGradientFlow(**settings)
    with pytest.raises(ValueError, match="0: groups of 4 do not divide its rows of 10 weights"):
        structure(toys.mlp(10, 4), "nm_gradient_flow")
    with pytest.raises(ValueError, match="0: groups of 64 do not divide its rows of 24"):
        structure(toys.mlp(24, 4), "nm_gradient_flow", n=1, m=8, recipe="sdgf-geometric")
    with pytest.raises(ValueError, match="how many optimiser steps it has"):
        structure(toys.mlp(8, 4), "nm_gradient_flow").begin()
