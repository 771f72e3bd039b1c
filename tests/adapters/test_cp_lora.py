"""CP-LoRA: sums of rank-one tensors as four small convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lone import fitted, gaussian, lone, update_of
from test_flora import CONVOLUTIONS
from test_hydra import stirred
from torch import nn

from eckart.linalg.canonical import cp_dense
from eckart.testing.adapters import near


def count(layer: Any) -> int:
    return sum(p.numel() for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_it_is_the_sum_of_rank_one_kernels_in_the_layers_place(kind: str) -> None:
    layer, x = stirred(lone("cp_lora", nn.Conv2d(6, 8, **CONVOLUTIONS[kind]), rank=3, alpha=2.0)), gaussian(2, 6, 9, 9)
    update, conv = update_of(layer), layer.base_layer
    dense = 2 / 3 * cp_dense([s.detach() for s in update.sides]).reshape(conv.weight.shape)
    assert near(update.delta(layer.host), dense.flatten(1))
    before = layer(x)
    assert near(before - conv(x), conv._conv_forward(x, dense, None))
    layer.merge()
    assert near(layer(x), before)


def test_it_is_four_convolutions() -> None:
    layer, x = stirred(lone("cp_lora", nn.Conv2d(6, 8, 3, stride=2, dilation=2, padding=2), rank=4)), gaussian(2, 6, 9, 9)  # fmt: skip # noqa: E501
    a, b, c, d = update_of(layer).sides
    h = F.conv2d(x, b.T[:, :, None, None])
    h = F.conv2d(h, c.T[:, None, :, None], None, (2, 1), (2, 0), (2, 1), 4)
    h = F.conv2d(h, d.T[:, None, None, :], None, (1, 2), (0, 2), (1, 2), 4)
    assert near(layer(x) - layer.base_layer(x), 16 / 4 * F.conv2d(h, a[:, :, None, None]))


def test_it_trains_as_many_numbers_as_the_formula_says() -> None:
    assert count(lone("cp_lora", nn.Conv2d(6, 8, 3), rank=5)) == 5 * (6 + 8 + 2 * 3)
    assert count(lone("cp_lora", nn.Conv2d(6, 8, (1, 3)), rank=5)) == 5 * (6 + 8 + 3)
    for base in (nn.Conv2d(6, 8, 1), nn.Linear(6, 8)):
        assert count(lone("cp_lora", base, rank=5)) == 5 * (6 + 8)


def test_it_starts_exactly_and_only_the_first_factor_learns_then() -> None:
    layer, x = lone("cp_lora", nn.Conv2d(6, 8, 3), rank=30), gaussian(2, 6, 9, 9)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer(x).square().sum().backward()
    assert [bool(s.grad.any()) for s in update_of(layer).sides] == [True, False, False, False]


def test_a_change_of_three_such_terms_is_found_where_lora_of_its_size_finds_little() -> None:
    base = nn.Conv2d(8, 8, 3)
    terms = [torch.linalg.qr(gaussian(n, 3, seed=n + k)).Q for k, n in enumerate((8, 8, 3, 3))]
    target = base.weight.detach().flatten(1) + cp_dense(terms).flatten(1)
    layer = lone("cp_lora", base, rank=3, alpha=3.0)
    assert count(layer) == 66 < count(lone("lora_c", base, rank=1)) == 80
    values = torch.linalg.svdvals(target - layer.host.weight()).square()
    assert fitted(layer, target, steps=300, lr=0.1) < 1e-6 < 0.5 < values[1:].sum() / values.sum()


def test_what_has_no_such_form_is_refused() -> None:
    for base, word in ((nn.ConvTranspose2d(6, 6, 3), "transposed"), (nn.Bilinear(6, 6, 3), "Bilinear")):
        with pytest.raises(ValueError, match=f"0 is a .*{word}"):
            lone("cp_lora", base)
    with pytest.raises(ValueError, match="0: rank 7 is more"):
        lone("cp_lora", nn.Conv2d(6, 8, 1), rank=7)
    for setting in ("rank", "alpha"):
        with pytest.raises(ValueError, match=f"{setting}=0"):
            lone("cp_lora", nn.Conv2d(6, 8, 3), **{setting: 0})
