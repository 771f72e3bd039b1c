"""convDoRA and CP-DoRA: magnitude apart from direction, exactly as PEFT's DoRA where that has the same form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from lone import gaussian, lone, update_of
from peft import LoraConfig, PeftModel, get_peft_model
from test_hydra import stirred
from torch import Tensor, nn

from eckart import adapters
from eckart.testing.adapters import near

KEYS = ["conv_dora", "cp_dora"]
OF_KERNELS = ["flora", "cp_lora", "lora_c", "conv_dora", "cp_dora"]


def base() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(6, 8, 3, stride=2, padding=1)


@pytest.mark.parametrize("key", KEYS)
def test_it_starts_exactly_with_the_norms_of_the_channels(key: str) -> None:
    layer, x = lone(key, base(), rank=4), gaussian(2, 6, 9, 9)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert near(update_of(layer).magnitude, layer.base_layer.weight.flatten(1).norm(dim=1), 1e-6)
    assert not update_of(layer).delta(layer.host).any()


@pytest.mark.parametrize("key", KEYS)
def test_the_merged_kernels_channels_have_the_trained_norms_and_the_direction_of_the_sum(key: str) -> None:
    layer, x = stirred(lone(key, base(), rank=4)), gaussian(2, 6, 9, 9)
    update, W, before = update_of(layer), layer.host.weight(), layer(x)
    V = W + update.inner.delta(layer.host)
    expected = update.magnitude[:, None] * V / V.norm(dim=1, keepdim=True)
    assert near(W + update.delta(layer.host), expected)
    assert near(before, layer.base_layer._conv_forward(x, expected.view(8, 6, 3, 3), layer.base_layer.bias))
    layer.merge()
    assert near(layer.base_layer.weight.flatten(1), expected)
    assert near(layer(x), before)


def test_a_decomposition_adds_one_number_for_each_channel() -> None:
    def count(key: str, **settings: Any) -> int:
        return sum(p.numel() for p in lone(key, base(), rank=4, **settings).parameters() if p.requires_grad)

    assert count("conv_dora") == 4 * 9 * (6 + 8) + 8
    assert count("conv_dora", unfolding="channels") == 4 * (6 * 9 + 8) + 8
    assert count("cp_dora") == 4 * (6 + 8 + 3 + 3) + 8


def test_by_channels_it_is_pefts_dora_with_its_gradients() -> None:
    ours, x, g = lone("conv_dora", base(), rank=3, alpha=2.0, unfolding="channels"), gaussian(2, 6, 9, 9), gaussian(2, 8, 5, 5)  # fmt: skip # noqa: E501
    model = get_peft_model(nn.Sequential(base()), LoraConfig(r=3, lora_alpha=2, use_dora=True, target_modules=["0"]))
    update, peft = update_of(stirred(ours)), model.eval().base_model.model[0]
    peft.lora_A["default"].weight.data = update.inner.A.data.view(3, 6, 3, 3).clone()
    peft.lora_B["default"].weight.data = update.inner.B.data[:, :, None, None].clone()
    size = peft.lora_magnitude_vector["default"].weight
    size.data = update.magnitude.data.view(size.shape).clone()
    assert near(ours(x), model(x))
    (ours(x) * g).sum().backward()
    (model(x) * g).sum().backward()
    pairs = [
        (update.inner.A, peft.lora_A["default"].weight),
        (update.inner.B, peft.lora_B["default"].weight),
        (update.magnitude, size),
    ]
    assert all(near(a.grad.flatten(), b.grad.flatten(), 1e-4) for a, b in pairs)


@pytest.mark.parametrize("key", KEYS)
def test_a_channel_of_zeros_stays_finite(key: str) -> None:
    conv = base()
    conv.weight.data[3] = 0
    layer, x = lone(key, conv, rank=4), gaussian(2, 6, 9, 9)
    assert torch.equal(layer(x), conv(x))
    layer(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)


def network() -> Any:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config).eval()


@pytest.mark.parametrize("key", OF_KERNELS)
def test_a_residual_network_learns_with_it_and_loads_again(key: str, tmp_path: Any) -> None:
    images, labels = gaussian(6, 3, 16, 16), torch.tensor([0, 1, 2, 0, 1, 2])
    settings: dict[str, Any] = {"target_modules": ["convolution"], "modules_to_save": ["classifier.1"], "rank": 3}

    def logits(m: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = m(pixel_values=images).logits
        return found

    model = adapters.adapt(network(), key, **settings).eval()
    assert near(logits(model), logits(network()))
    optimizer, losses = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2), []
    for _ in range(8):
        loss = model(pixel_values=images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(network(), tmp_path).eval()), logits(model))
    assert near(logits(model.merge_and_unload()), logits(PeftModel.from_pretrained(network(), tmp_path).eval()), 1e-4)
