"""FLoRA: a core with one factor a side is the Tucker product, on convolutions of every kind and on matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lone import fitted, gaussian, lone, update_of
from test_hydra import stirred
from torch import Tensor, nn

from eckart.testing.adapters import near

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilation": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "rectangular": {"kernel_size": (2, 5), "stride": (1, 2), "padding": (1, 0)},
    "row": {"kernel_size": (1, 3), "padding": "same"},
    "point": {"kernel_size": 1, "stride": 2},
    "reflected": {"kernel_size": 4, "padding": 2, "padding_mode": "reflect"},
}


def tucker(update: Any) -> Tensor:
    """scale * G x_1 U_1 x_2 ..., by one einsum."""
    order = update.core.dim()
    sides, ranks = "oiyx"[:order], "abcd"[:order]
    words = ",".join(s + r for s, r in zip(sides, ranks, strict=True))
    return update.scale * torch.einsum(f"{ranks},{words}->{sides}", update.core, *update.U)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_on_a_convolution_it_is_the_tucker_product_in_the_layers_place(kind: str) -> None:
    layer, x = stirred(lone("flora", nn.Conv2d(6, 8, **CONVOLUTIONS[kind]), rank=3)), gaussian(2, 6, 9, 9)
    update, conv = update_of(layer), layer.base_layer
    dense = tucker(update).detach().reshape(conv.weight.shape)
    assert near(update.delta(layer.host), dense.flatten(1))
    assert near(layer(x) - conv(x), conv._conv_forward(x, dense, None))
    before = layer(x)
    layer.merge()
    assert near(layer(x), before)


def test_with_ranks_of_its_own_for_each_side_the_change_has_no_more_than_these() -> None:
    ranks = [4, 3, 2, 1]
    layer = stirred(lone("flora", nn.Conv2d(6, 8, (2, 5)), ranks=ranks))
    T = update_of(layer).delta(layer.host).detach().view(8, 6, 2, 5)
    assert near(T, tucker(update_of(layer)))
    assert [int(torch.linalg.matrix_rank(T.movedim(k, 0).flatten(1))) for k in range(4)] == ranks
    flat = stirred(lone("flora", gaussian(8, 6), ranks=[4, 3]))
    out, in_, core = *update_of(flat).U, update_of(flat).core
    assert near(update_of(flat).delta(flat.host), 0.4 * out @ core @ in_.T)


def test_it_trains_as_many_numbers_as_the_formula_says_and_starts_exactly() -> None:
    layer, x = lone("flora", nn.Conv2d(6, 8, 3), rank=4), gaussian(2, 6, 9, 9)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 4 * (6 + 8) + 2 * (3 + 3) + 4 * 4 * 2 * 2
    assert torch.equal(layer(x), layer.base_layer(x))
    layer(x).square().sum().backward()
    update = update_of(layer)
    assert update.core.grad.any()
    assert not any(U.grad.any() for U in update.U)
    assert (update.scale, update_of(lone("flora", gaussian(8, 8))).scale) == (4.0, 0.4)


def test_a_change_with_such_a_core_is_found_where_lora_of_its_size_finds_nothing() -> None:
    base = nn.Conv2d(12, 12, 3)
    teacher = stirred(lone("flora", base, rank=3, seed=5))
    target = (teacher.host.weight() + update_of(teacher).delta(teacher.host)).detach()
    layer = lone("flora", base, rank=3)
    count = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    assert count == 12 + 9 * 12  # LoRA of rank 1
    values = torch.linalg.svdvals(target - layer.host.weight()).square()
    assert fitted(layer, target, steps=300, lr=0.03) < 1e-3 < 0.15 < values[1:].sum() / values.sum()


def test_ranks_that_no_side_can_have_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0: rank 9 is more than a side of 6"):
        lone("flora", nn.Conv2d(6, 12, 3), rank=9)
    with pytest.raises(ValueError, match=r"0: rank 4 is more than a side of 3"):
        lone("flora", nn.Conv2d(6, 8, 3), rank=2, kernel_rank=4)
    with pytest.raises(ValueError, match=r"0: ranks=\[2, 2\] are 2.*\[8, 6, 3, 3\]"):
        lone("flora", nn.Conv2d(6, 8, 3), ranks=[2, 2])
    with pytest.raises(ValueError, match=r"ranks\[1\]=0"):
        lone("flora", gaussian(8, 8), ranks=[2, 0])
    with pytest.raises(ValueError, match="conv_scale=0"):
        lone("flora", gaussian(8, 8), conv_scale=0)
    with pytest.raises(ValueError, match=r"0: rank 2 is more than a side of 1.*\[6, 1, 3, 3\]; lower it, give one"):
        lone("flora", nn.Conv2d(6, 6, 3, groups=6), rank=2)
