"""Weight compander against its card: the functions, parametrisation, induced steps, starts, spread of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import tiny
from eckart.testing import gaussian
from eckart.training import structure
from eckart.training.parametrised import original
from eckart.training.weight_compander import FUNCTIONS, Compander, WeightCompander


def compander(model: nn.Module, name: str = "0") -> Compander:
    module: Any = model.get_submodule(name)
    return module.parametrizations.weight[0]


@pytest.mark.parametrize("function", list(FUNCTIONS))
def test_functions_are_odd_increasing_bounded_and_inverted(function: str) -> None:
    f = Compander(function, 0.7, 0.4, False, torch.zeros((), dtype=torch.float64))
    v = torch.linspace(-2, 2, 401, dtype=torch.float64)
    v[200] = 0
    w = f(v)
    assert float(w[200]) == 0
    torch.testing.assert_close(w, -w.flip(0))
    assert bool((w.diff() > 0).all())
    slopes = w.diff()
    assert float(slopes[200]) > float(slopes[-1])
    torch.testing.assert_close(f.right_inverse(w), v, rtol=1e-6, atol=1e-6)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        narrow = Compander(function, 0.7, 0.4, False, torch.zeros((), dtype=dtype))
        far = narrow(torch.tensor([1e4 if dtype == torch.float16 else 1e6, 0.3], dtype=dtype))
        assert far.dtype == dtype
        assert bool(torch.isfinite(far).all())
        assert float(far[0]) <= float(narrow.bound)


@pytest.mark.parametrize("function", list(FUNCTIONS))
def test_gradients_and_steps_follow_the_slope(function: Any) -> None:
    model = toys.mlp(6, 5, dtype=torch.float64)
    structure(model, "weight_compander", function=function)
    v, f = original(model[0]), compander(model)
    x, lr = gaussian(7, 6, dtype=torch.float64), 1e-9
    w = model[0].weight.detach().requires_grad_()
    F.linear(x, w, model[0].bias).square().sum().backward()
    assert w.grad is not None
    at = v.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(f(at).sum(), at)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    model(x).square().sum().backward()
    assert v.grad is not None
    torch.testing.assert_close(v.grad, slope * w.grad, rtol=1e-10, atol=1e-10)
    optimizer.step()
    moved = model[0].weight.detach() - w.detach()
    torch.testing.assert_close(moved / lr, -slope.square() * w.grad, rtol=1e-3, atol=1e-3)


def test_arctans_slope_is_the_cards() -> None:
    f = Compander("arctan", 0.7, 0.4, False, torch.zeros((), dtype=torch.float64))
    v = torch.linspace(-1, 1, 9, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(f(v).sum(), v)
    torch.testing.assert_close(slope, (0.7 / 0.4 / (1 + (v / 0.4) ** 2)).detach())


def test_it_is_an_ordinary_parametrisation() -> None:
    model = toys.mlp(6, 5)
    keys = set(model.state_dict())
    structure(model, "weight_compander")
    state = model.state_dict()
    assert "0.parametrizations.weight.original" in state
    other = toys.mlp(6, 5, seed=3)
    structure(other, "weight_compander")
    other.load_state_dict(state)
    assert torch.equal(other[0].weight, model[0].weight)
    W = gaussian(5, 6, seed=4) * 0.05
    model[0].weight = W
    torch.testing.assert_close(model[0].weight, W, rtol=1e-5, atol=1e-7)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert set(model.state_dict()) == keys


@pytest.mark.parametrize("function", ["arctan", "erf"])
def test_a_wide_function_is_the_identity(function: Any) -> None:
    data, found = toys.regression(10, 4), []
    for wide in (False, True):
        model = toys.mlp(10, 12, 4, dtype=torch.float64)
        if wide:
            unit = 1.0 if function == "arctan" else 2 / torch.pi**0.5  # the slope at zero
            structure(model, "weight_compander", function=function, a=1e4, b=1e4 * unit, start="draw")
        toys.train(model, None, (data[0].double(), data[1].double()), 10, make=torch.optim.SGD, lr=0.1)
        found.append(model(data[0].double()).detach())
    assert float((found[0] - found[1]).abs().max()) < 1e-4


@pytest.mark.parametrize("learned", [False, True])
def test_a_matched_start_keeps_logits_and_export_is_bit_for_bit(learned: bool, tmp_path: Path) -> None:
    model, batch = tiny.build("llama", num_hidden_layers=1), tiny.batches((2,))[0]
    wanted = model(**batch).logits.detach()
    schedule = structure(model, "weight_compander", learned=learned)
    torch.testing.assert_close(model(**batch).logits, wanted, rtol=1e-5, atol=1e-5)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule.begin(optimizer)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    schedule.step()
    trained = model(**batch).logits.detach()
    assert not torch.equal(trained, wanted)
    schedule.finish()
    assert torch.equal(model(**batch).logits, trained)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, trained)
    assert getattr(again.config, "quantization_config", None) is None
    assert all(p.requires_grad for p in model.parameters())


def test_learned_shapes_stay_positive_and_are_two_numbers_a_layer() -> None:
    model, data = toys.mlp(10, 12, 4), toys.regression(10, 4)
    before = sum(p.numel() for p in model.parameters())
    schedule = structure(model, "weight_compander", learned=True, layers="0|2")
    assert sum(p.numel() for p in model.parameters()) == before + 4
    F.mse_loss(model(data[0]), data[1]).backward()
    for name in ("0", "2"):
        f = compander(model, name)
        assert all(isinstance(p, nn.Parameter) and p.grad is not None and float(p.grad) != 0 for p in (f.log_a, f.log_b))  # fmt: skip # noqa: E501
    toys.train(model, schedule, data, 40, lr=0.3)
    assert float(compander(model).bound.detach()) > 0


def kurtosis(w: Tensor) -> float:
    return float(w.pow(4).mean() / w.square().mean().square()) - 3


def test_weights_are_bounded_and_more_evenly_spread() -> None:
    """An over-parameterised net on noisy targets, five seeds, against plain training."""
    more, fewer = [], []
    for seed in range(5):
        x, y = toys.regression(10, 2, rows=64, seed=seed + 1)
        data = (x, y + 0.5 * gaussian(64, 2, seed=seed))
        found = {}
        for name in ("plain", "compander"):
            model = toys.mlp(10, 64, 2, seed=seed)
            if name == "compander":
                structure(model, "weight_compander", a=2.0, b=2.0, layers="0")
            toys.train(model, None, data, 150, lr=1e-2)
            found[name] = model[0].weight.detach()
        assert float(found["compander"].abs().max()) < float(compander(model).bound)
        more.append(kurtosis(found["plain"]) - kurtosis(found["compander"]))
        near = {n: float((w.abs() < 0.1 * w.std()).float().mean()) for n, w in found.items()}
        fewer.append(near["plain"] - near["compander"])
    assert sum(more) > 0
    assert sum(fewer) > 0


def test_refusals() -> None:
    for settings, message in (
        ({"function": "relu"}, "it is one of arctan"),
        ({"a": 0.0}, "a=0.0.*positive"),
        ({"b": -1.0}, "b=-1.0.*positive"),
        ({"start": "cold"}, "'match' or 'draw'"),
    ):
        with pytest.raises(ValueError, match=message):
            WeightCompander(**settings)
    f = Compander("arctan", 0.1, 0.1, False, torch.zeros(()))
    with pytest.raises(ValueError, match=r"2 of 3 weights are not below the bound 0\.157"):
        f.right_inverse(torch.tensor([0.1, 0.2, -0.3]))
    with pytest.raises(ValueError, match="a > 0 and b > 0"):
        Compander("arctan", 0.0, 1.0, False, torch.zeros(()))
    tied = tiny.build("llama-tied", num_hidden_layers=1)
    with pytest.raises(ValueError, match="shares its weight"):
        structure(tied, "weight_compander", layers="lm_head")
