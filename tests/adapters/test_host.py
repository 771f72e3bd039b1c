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


LAYERS = {
    "linear": (nn.Linear(6, 8), (2, 6)),
    "conv1d": (nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 9)),
    "strings": (nn.Conv1d(6, 8, 4, padding="same", padding_mode="replicate", groups=2), (2, 6, 9)),
    "conv2d": (nn.Conv2d(6, 8, (3, 2), dilation=(1, 2), padding="same"), (2, 6, 7, 6)),
    "grouped": (nn.Conv2d(6, 8, 3, groups=2, padding=(1, 2), padding_mode="circular"), (2, 6, 7, 6)),
    "depthwise": (nn.Conv2d(6, 12, 3, groups=6, stride=(2, 1)), (2, 6, 7, 6)),
    "conv3d": (nn.Conv3d(6, 8, (2, 1, 3), groups=2, padding=(1, 0, 1)), (2, 6, 4, 5, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_product_of_matrices_acts_as_they_do_one_after_the_other(kind: str) -> None:
    layer, shape = LAYERS[kind]
    host, x = Host(layer, "layer"), gaussian(*shape)
    B, M, A = gaussian(host.out, 3), gaussian(3, 4), gaussian(4, host.width)
    whole = host.apply(x, B @ M @ A)
    assert near(host.apply(x, host.weight()), host.frozen(x))
    assert near(host.up(host.mix(host.down(x, A), M), B), whole)
    assert near(host.up(host.down(x, M @ A), B), whole)
    shifted = host.shift(whole, host.bias())
    assert torch.equal(shifted.movedim(host.channels, -1), whole.movedim(host.channels, -1) + host.bias())
    if host.conv is not None:
        assert near(host.up(host.down(x[0], M @ A), B), whole[0])  # one image alone


@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_pulled_back_is_the_gradient(kind: str) -> None:
    layer, shape = LAYERS[kind]
    host, x = Host(layer, "layer"), gaussian(*shape).requires_grad_(True)
    M = gaussian(*host.shape).requires_grad_(True)
    y = host.apply(x, M)
    g = gaussian(*y.shape, seed=1)
    expected = torch.autograd.grad(y, (x, M), g)
    found = host.pulled_back(x.detach(), M.detach(), g, to_x=True, to_M=True)
    assert all(f is not None and near(f, e) for f, e in zip(found, expected, strict=True))
    assert host.pulled_back(x.detach(), M.detach(), g, to_x=False, to_M=True)[0] is None


def test_a_thin_matrix_in_the_place_of_a_grouped_convolutions_own_is_refused() -> None:
    layer, shape = LAYERS["grouped"]
    host = Host(layer, "layer")
    with pytest.raises(ValueError, match=r"layer is a grouped convolution, where a matrix of 4 rows .*`down`"):
        host.apply(gaussian(*shape), gaussian(4, host.width))


def test_the_projection_that_attention_reads_and_never_calls_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer belongs to an nn.MultiheadAttention.*exclude_modules"):
        Host(nn.MultiheadAttention(8, 2).out_proj, "layer")
