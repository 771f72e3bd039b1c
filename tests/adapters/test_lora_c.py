"""LoRA-C and ConvLoRA: what PEFT and loralib make of a kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lone import gaussian, lone, update_of
from peft import LoraConfig, get_peft_model
from test_flora import CONVOLUTIONS
from test_hydra import stirred
from torch import nn

from eckart.testing.adapters import near


def count(layer: Any) -> int:
    return sum(p.numel() for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("unfolding", ["channels", "kernel"])
def test_it_starts_exactly_and_merges(kind: str, unfolding: str) -> None:
    base = nn.Conv2d(6, 8, **CONVOLUTIONS[kind])
    layer, x = lone("lora_c", base, rank=3, unfolding=unfolding), gaussian(2, 6, 9, 9)
    assert torch.equal(layer(x), base(x))
    before = stirred(layer)(x)
    layer.merge()
    assert near(layer(x), before)


def test_it_is_two_convolutions_and_what_peft_does() -> None:
    base = nn.Conv2d(6, 8, 3, stride=2, padding=2)
    layer, x = stirred(lone("lora_c", base, rank=3, alpha=2.0)), gaussian(2, 6, 9, 9)
    B, A = update_of(layer).B, update_of(layer).A
    h = F.conv2d(x, A.view(3, 6, 3, 3), None, 2, 2)
    assert near(layer(x) - base(x), 2 / 3 * F.conv2d(h, B[:, :, None, None]))
    model = get_peft_model(nn.Sequential(base), LoraConfig(r=3, lora_alpha=2, target_modules=["0"]))
    peft = model.base_model.model[0]
    peft.lora_A["default"].weight.data = A.data.view(3, 6, 3, 3)
    peft.lora_B["default"].weight.data = B.data[:, :, None, None]
    assert near(layer(x), model(x))


def test_the_other_unfolding_is_the_view_that_loralib_takes() -> None:
    layer = stirred(lone("lora_c", nn.Conv2d(6, 8, 3), rank=2, unfolding="kernel", alpha=2.0))
    update = update_of(layer)
    assert (update.B.shape, update.A.shape) == ((8 * 3, 2 * 3), (2 * 3, 6 * 3))
    kernel, flat = update.delta(layer.host).view(8, 6, 3, 3), (update.B @ update.A).flatten()
    for o, i, y, x in ((0, 0, 0, 1), (3, 4, 2, 1), (7, 5, 2, 2)):
        assert kernel[o, i, y, x] == flat[((o * 6 + i) * 3 + y) * 3 + x]


def test_they_train_as_many_numbers_as_the_formulas_say() -> None:
    base = nn.Conv2d(6, 8, 3)
    assert count(lone("lora_c", base, rank=4)) == 4 * (6 * 9 + 8)
    assert count(lone("lora_c", base, rank=4, unfolding="kernel")) == 4 * 9 * (6 + 8)
    assert count(lone("lora_c", nn.Linear(6, 8), rank=4, unfolding="kernel")) == 4 * (6 + 8)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unfolding='rows'.*'channels' or 'kernel'"):
        lone("lora_c", nn.Conv2d(6, 8, 3), unfolding="rows")
    with pytest.raises(ValueError, match="0: rank 9 is more"):
        lone("lora_c", nn.Conv2d(6, 8, 3), rank=9)
    with pytest.raises(ValueError, match="0 is a transposed convolution"):
        lone("lora_c", nn.ConvTranspose2d(6, 6, 3))
