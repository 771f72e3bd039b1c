"""The frozen layer: what adapters ask of it beside its matrix, and what is drawn for it."""

from __future__ import annotations

import pytest
import torch
from lone import gaussian
from torch import nn
from transformers.pytorch_utils import Conv1D

from eckart.adapters.host import Host, seeded
from eckart.testing.adapters import near


def test_what_is_drawn_depends_on_the_seed_and_on_the_name() -> None:
    drawn = {tuple(torch.randn(3, generator=seeded(s, n)).tolist()) for s in (0, 1, 1 << 32) for n in ("a", "b")}
    assert len(drawn) == 6
    assert torch.equal(torch.randn(3, generator=seeded(1, "a")), torch.randn(3, generator=seeded(1, "a")))


@pytest.mark.parametrize("layer", [nn.Linear(6, 8), Conv1D(8, 6), nn.Conv2d(6, 8, 3, stride=2), nn.Linear(6, 8, False)])
def test_the_frozen_matrix_acts_without_its_bias_in_the_types_of_both(layer: nn.Module) -> None:
    x = gaussian(2, 6, 7, 7) if isinstance(layer, nn.Conv2d) else gaussian(2, 6)
    host = Host(layer, "layer")
    assert near(host.frozen(x), host.apply(x, host.weight()))
    assert near(host.unbiased(layer(x)), host.frozen(x))
    half = Host(layer.bfloat16(), "layer").frozen(x)
    assert half.dtype == torch.float32
    assert near(half, host.frozen(x), 1e-2)


def test_the_projection_that_attention_reads_and_never_calls_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer belongs to an nn.MultiheadAttention.*exclude_modules"):
        Host(nn.MultiheadAttention(8, 2).out_proj, "layer")
