"""A formed weight cannot be written to: directly, through a view, or by an adapter that wants to merge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from eckart.forms import LowRank, densify, drop_in
from eckart.forms.layers import matrix_of
from eckart.forms.read_only import ReadOnly
from eckart.testing import error_ratio, gaussian

MESSAGE = r"this weight is factored: it cannot be written to.*`eckart\.densify\(model\)`"


def factored(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    module = nn.Linear(8, 8)
    return drop_in(module, LowRank(2).fit(matrix_of(module).detach()), module.bias.detach())


def assign(layer: Any) -> None:
    layer.weight.data = torch.zeros(8, 8)


def add_to_data(layer: Any) -> None:
    layer.weight.data += 1


def set_item(layer: Any) -> None:
    layer.weight[0] = 1


def multiply_item(layer: Any) -> None:
    layer.weight[0] *= 2


@pytest.mark.parametrize(
    "write",
    [
        assign,
        add_to_data,
        set_item,
        multiply_item,
        lambda layer: layer.weight.add_(1),
        lambda layer: layer.weight.copy_(torch.zeros(8, 8)),
        lambda layer: layer.weight.data.zero_(),
        lambda layer: layer.weight.detach().mul_(2),
        lambda layer: layer.weight[0].fill_(1),
        lambda layer: layer.weight.T.zero_(),
        lambda layer: layer.weight.view(-1).zero_(),
        lambda layer: layer.weight.chunk(2)[0].zero_(),
        lambda layer: layer.weight.to(torch.float32).zero_(),
        lambda layer: torch.add(torch.zeros(8, 8), 1, out=layer.weight),
        lambda layer: torch._foreach_add_([layer.weight], 1),
        lambda layer: nn.init.zeros_(layer.weight),
        lambda layer: nn.init.kaiming_uniform_(layer.weight),
    ],
)
def test_writes_are_refused(write: Callable[[Any], object]) -> None:
    layer, x = factored(), gaussian(3, 8)
    before = layer(x).detach()
    with pytest.raises(TypeError, match=MESSAGE):
        write(layer)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize(
    "read",
    [
        lambda w: w + 1,
        lambda w: w.clone(),
        lambda w: w.to(torch.float64),
        lambda w: gaussian(3, 8) @ w.T,
        lambda w: nn.functional.linear(gaussian(3, 8), w),
        lambda w: torch.linalg.svd(w).U,
        lambda w: w.norm(dim=1),
    ],
)
def test_what_is_computed_from_a_weight_is_an_ordinary_tensor(read: Callable[[Tensor], Tensor]) -> None:
    layer = factored()
    found = read(layer.weight)
    assert type(found) is Tensor
    found.mul_(2)
    assert error_ratio(read(layer.weight), found / 2) <= 1e-6


def test_reading_and_flags_are_allowed() -> None:
    weight = factored().weight
    assert type(weight) is ReadOnly
    assert (weight.shape, weight.dtype, weight.device.type) == ((8, 8), torch.float32, "cpu")
    assert not weight.requires_grad_(False).requires_grad
    weight.grad = None


def with_lora() -> Any:
    """A model of two layers, the first of them factored and with an adapter on it."""
    model = nn.Sequential(factored(), nn.Linear(8, 4))
    model.requires_grad_(False)
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))  # type: ignore[arg-type]


def test_lora_trains_on_a_factored_layer() -> None:
    adapted = with_lora()
    x, target = gaussian(16, 8), gaussian(16, 4, seed=1)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 2 * (8 + 8)
    optimiser = torch.optim.SGD(trained, lr=0.1)
    losses = []
    for _ in range(5):
        loss = nn.functional.mse_loss(adapted(x), target)
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    with adapted.disable_adapter():
        assert adapted(x).shape == (16, 4)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_lora_does_not_merge_into_a_factored_layer(safe_merge: bool) -> None:
    adapted = with_lora()
    with pytest.raises(TypeError, match=MESSAGE):
        adapted.merge_and_unload(safe_merge=safe_merge)


def test_lora_merges_once_the_layer_is_dense() -> None:
    adapted = with_lora()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = gaussian(*parameter.shape, seed=3)
    x = gaussian(16, 8)
    wanted = adapted(x).detach()
    densify(adapted)
    assert error_ratio(adapted(x), wanted) <= 1e-5
    assert error_ratio(adapted.merge_and_unload()(x), wanted) <= 1e-5
