"""CP-DoRA: what it is beside CP-LoRA; what all decompositions share is tested in test_conv_dora."""

from __future__ import annotations

import torch
from lone import fitted, gaussian, lone, update_of
from test_hydra import stirred
from torch import nn

from eckart.linalg.canonical import cp_dense
from eckart.testing.adapters import near


def test_with_a_constant_gain_it_is_cp_lora() -> None:
    base, x = nn.Conv2d(6, 8, 3, dilation=2), gaussian(2, 6, 9, 9)
    plain, layer = stirred(lone("cp_lora", base, rank=3)), lone("cp_dora", base, rank=3)
    update = update_of(layer)
    update.inner.load_state_dict(update_of(plain).state_dict())
    update.magnitude.data = (layer.host.weight() + update_of(plain).delta(plain.host)).detach().norm(dim=1)
    assert near(layer(x), plain(x))


def test_the_norm_is_a_constant_for_the_gradient() -> None:
    layer = stirred(lone("cp_dora", nn.Conv2d(6, 8, 3), rank=3))
    update, g = update_of(layer), gaussian(8, 54)
    (update.delta(layer.host) * g).sum().backward()
    found = [s.grad.clone() for s in update.inner.sides]
    gain = update.gain(layer.host).detach()
    update.zero_grad()
    (gain[:, None] * update.inner.delta(layer.host) * g).sum().backward()
    assert all(near(s.grad, f) for s, f in zip(update.inner.sides, found, strict=True))


def drawn_conv(out: int, into: int, side: int) -> nn.Conv2d:
    """A convolution of drawn weights, the same in every run."""
    conv = nn.Conv2d(into, out, side)
    for p in conv.parameters():
        p.data.copy_(0.1 * gaussian(*p.shape, seed=5))
    return conv


def test_new_lengths_and_a_new_direction_are_found_together() -> None:
    base = drawn_conv(8, 8, 3)
    terms = [torch.linalg.qr(gaussian(n, 2, seed=n + k)).Q for k, n in enumerate((8, 8, 3, 3))]
    lengths = 1 + 0.5 * gaussian(8, 1).abs()
    target = lengths * (base.weight.detach().flatten(1) + cp_dense(terms).flatten(1))

    def best(key: str) -> float:  # sums of rank-one terms have local optima: of three starts
        return min(fitted(lone(key, base, rank=2, alpha=2.0, seed=s), target, steps=300, lr=0.05) for s in range(3))

    assert best("cp_dora") < 1e-3 < 0.1 < best("cp_lora")
