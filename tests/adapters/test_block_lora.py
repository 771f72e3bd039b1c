"""Block-LoRA: what it is beside LoRA of rank / blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from eckart import adapters
from eckart.adapters.frames import Factors
from eckart.testing.adapters import adapted, answers, layers, near, small_model, trained


class One(nn.Module):
    """A single layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def one(**settings: Any) -> tuple[Any, Any, Any]:
    """(model, its only update, its host) with `block_lora` on it."""
    model = adapters.adapt(One(), "block_lora", target_modules=["layer"], **settings)
    (layer,) = layers(model)
    return model, layer.updates["default"], layer.host


def test_forward_is_that_of_a_lora_with_the_sum_of_blocks() -> None:
    model, update, _ = one(rank=6, blocks=3)
    update.B.data.normal_()
    x = torch.randn(5, 12)
    expected = model.base_model.model.layer.base_layer(x) + 2**-0.5 * (x @ update.A.T @ update.B.sum(0).T)
    assert near(model(x), expected, 1e-6)
    merged = model(x)
    assert near(model.merge_and_unload()(x), merged, 1e-6)


def test_it_trains_all_of_b_and_a_share_of_a() -> None:
    model, _, _ = one(rank=6, blocks=3)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 6 * 10 + 2 * 12


def test_written_as_a_lora_it_answers_the_same_to_the_bit_in_peft() -> None:
    model = trained(adapted("block_lora", rank=4, blocks=2))
    plain = get_peft_model(small_model(), LoraConfig(r=2, lora_alpha=2, target_modules="all-linear")).eval()
    modules = dict(plain.base_model.model.named_modules())
    for layer in layers(model):
        B, A = layer.get_factors("default")
        lora = modules[layer.host.name]
        lora.lora_B["default"].weight.data.copy_(B)
        lora.lora_A["default"].weight.data.copy_(A)
    assert torch.equal(answers(plain), answers(model))


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_from_zero_it_is_a_lora_whose_b_learns_n_times_as_fast(kind: str) -> None:
    model, update, host = one(rank=6, blocks=3, scale=1.5)
    lora = Factors(torch.zeros(10, 2), update.A.detach().clone(), 1.5)
    frozen = copy.deepcopy(host.module)
    make: Any = torch.optim.SGD if kind == "sgd" else torch.optim.Adam
    ours = make([p for p in model.parameters() if p.requires_grad], 1e-2)
    theirs = make([{"params": [lora.A], "lr": 1e-2}, {"params": [lora.B], "lr": 3e-2}])
    for step in range(6):
        torch.manual_seed(step)
        x, y = torch.randn(8, 12), torch.randn(8, 10)
        ((model(x) - y) ** 2).mean().backward()
        ((frozen(x) + lora(x, y, host) - y) ** 2).mean().backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(update.B[0], update.B[1])
    assert torch.equal(update.B[0], update.B[2])
    assert float(lora.B.detach().abs().max()) > 1e-3
    assert near(update.B.sum(0), lora.B, 1e-6)
    assert near(update.A, lora.A, 1e-6)


@pytest.mark.parametrize("blocks", [2, 3])
def test_balanced_blocks_start_at_the_model_and_part(blocks: int) -> None:
    plain = answers(small_model())
    model = adapted("block_lora", rank=blocks * 2, blocks=blocks, start="balanced")
    assert torch.equal(answers(model), plain)
    update = layers(trained(model))[0].updates["default"]
    assert not near(update.B[0], update.B[1])


def test_a_dropout_of_their_own_parts_blocks_that_start_at_zero() -> None:
    model = trained(adapted("block_lora", rank=4, blocks=2, block_dropout=0.5))
    update = layers(model)[0].updates["default"]
    assert not torch.equal(update.B[0], update.B[1])
    assert torch.equal(answers(model), answers(model))


def test_the_down_projection_costs_n_times_less() -> None:
    def flops(update: nn.Module, host: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            update(torch.ones(7, 12), torch.ones(7, 10), host)
        return int(counter.get_total_flops())

    _, update, host = one(rank=6, blocks=3)
    lora = Factors(torch.zeros(10, 6), torch.zeros(6, 12))
    assert flops(lora, host) == 2 * 7 * 6 * (12 + 10)
    assert flops(update, host) == 2 * 7 * (6 // 3) * (12 + 10)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 5, "blocks": 2}, "cannot cut rank 5 into 2"),
        ({"blocks": 0}, r"block_lora\(blocks=0"),
        ({"rank": 12}, "layer: rank 12 is more than"),
        ({"start": "one"}, "'zero' or 'balanced'"),
        ({"start": "balanced", "blocks": 1}, "one block alone"),
        ({"block_dropout": 1.0}, "block_dropout=1.0"),
        ({"scale": -1.0}, "scale=-1.0"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        one(**settings)
