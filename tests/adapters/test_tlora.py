"""TLoRA: rings that are the matrices their formula says, an exact start that is not a trap, and what it is good at."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from lone import fitted, gaussian, lone, update_of
from test_hydra import stirred
from torch import Tensor, nn

from eckart.adapters.tlora import contracted, formed, turned
from eckart.testing.adapters import near


def ring(cores: list[Tensor]) -> Tensor:
    """T, entry by entry: trace(A_1[i_1, j_1] ... A_D[i_D, j_D])."""
    sizes = [len(c) for c in cores]
    found = []
    for i in product(*(range(n) for n in sizes)):
        for j in product(*(range(n) for n in sizes)):
            whole = torch.eye(cores[0].shape[2])
            for core, a, b in zip(cores, i, j, strict=True):
                whole = whole @ core[a, b]
            found.append(whole.trace())
    width = torch.Size(sizes).numel()
    return torch.stack(found).view(width, width)


def count(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize(("factors", "q"), [(1, 2), (2, 1), (2, 3), (3, 2)])
def test_it_starts_at_the_identity_to_the_bit_and_then_has_full_rank(factors: int, q: int) -> None:
    layer, x = lone("tlora", gaussian(12, 12), factors=factors, transform_rank=q), gaussian(5, 12, seed=1)
    update = update_of(layer)
    assert torch.equal(update.T(), torch.eye(12))
    assert torch.equal(ring(list(update.transform)), torch.eye(12))
    assert torch.equal(layer(x), layer.base_layer(x))
    assert torch.linalg.matrix_rank(update_of(stirred(layer)).T().detach()) == 12


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_both_rings_are_the_traces_of_their_cores(factors: int) -> None:
    layer = stirred(lone("tlora", gaussian(8, 12), factors=factors, rank=2, scale=0.5))
    update, x = update_of(layer), gaussian(5, 12, seed=1)
    cores = [c.detach() for c in update.transform]
    T = ring(cores)
    assert near(contracted(x, cores), x @ T.T)
    assert near(formed(cores), T)
    many = gaussian(60, 12, seed=2)
    assert near(turned(many, cores), many @ T.T)
    left, right = update.residual()
    entries = []
    for o in product(*(range(c.shape[1]) for c in update.left)):
        for i in product(*(range(c.shape[1]) for c in update.right)):
            whole = torch.eye(2)
            for core, k in zip([*update.left, *update.right], [*o, *i], strict=True):
                whole = whole @ core[:, k]
            entries.append(0.5 * whole.trace())
    R = torch.stack(entries).view(8, 12)
    assert near(left @ right, R)
    W = layer.host.weight()
    assert near(update.delta(layer.host), W @ (T - torch.eye(12)) + R)
    assert near(layer(x), x @ (W @ T + R).T)


def test_a_ring_of_rank_one_is_a_kronecker_product() -> None:
    update = update_of(stirred(lone("tlora", gaussian(8, 12), factors=2, transform_rank=1)))
    first, second = (c[:, :, 0, 0] for c in update.transform)
    assert near(update.T(), torch.kron(first, second))


def test_on_a_convolution_it_mixes_channels() -> None:
    layer = stirred(lone("tlora", nn.Conv2d(6, 8, 3, padding=1, stride=2)))
    x, update, conv = gaussian(2, 6, 7, 7), update_of(layer), layer.base_layer
    mixed = torch.einsum("ij,njyx->niyx", update.T(), x)
    left, right = update.residual()
    R = (left @ right).view(8, 6, 3, 3)
    assert near(layer(x), conv(mixed) + nn.functional.conv2d(x, R, None, 2, 1))


def test_the_ring_does_not_stay_a_kronecker_product() -> None:
    W, T = gaussian(12, 12), torch.eye(12) + 0.3 * gaussian(12, 12, seed=1)
    layer = lone("tlora", W, transform_rank=2, rank=1)
    fitted(layer, W @ T, steps=30, lr=0.01)
    found = update_of(layer).T().detach().view(3, 4, 3, 4).permute(0, 2, 1, 3).reshape(9, 16)
    terms = torch.linalg.svdvals(found)
    assert terms[1] > 0.01 * terms[0]


def test_it_follows_a_rotation_that_lora_of_ten_times_its_size_cannot() -> None:
    parts = [torch.linalg.matrix_exp(0.5 * (S - S.T)) for S in (gaussian(8, 8, seed=k) for k in (1, 2))]
    W = gaussian(64, 64)
    target = W @ torch.kron(*parts) + 1e-2 * gaussian(64, 64, seed=3)
    layer = lone("tlora", W, transform_rank=1, rank=1)
    rank = 10 * count(layer) // 128 + 1
    values = torch.linalg.svdvals(target - W).square()
    best_lora = values[rank:].sum() / values.sum()
    assert fitted(layer, target, lr=0.02) < 0.05 < 0.3 < best_lora


def test_a_change_that_is_such_a_ring_is_found_by_the_residual_alone() -> None:
    W = gaussian(12, 12)
    teacher = update_of(stirred(lone("tlora", W, rank=2, seed=3)))
    left, right = teacher.residual()
    layer = lone("tlora", W, rank=3)
    for core in update_of(layer).transform:
        core.requires_grad_(False)
    assert fitted(layer, W + (left @ right).detach(), steps=600) < 1e-2


@pytest.mark.parametrize("factors", [2, 3])
def test_it_trains_as_many_numbers_as_both_formulas_say(factors: int) -> None:
    out, in_ = {2: ([2, 4], [3, 4]), 3: ([2, 2, 2], [2, 2, 3])}[factors]
    layer = lone("tlora", gaussian(8, 12), factors=factors, transform_rank=3, rank=2)
    assert count(layer) == 3**2 * sum(n * n for n in in_) + 2**2 * (sum(out) + sum(in_))


def test_every_core_of_the_transform_learns_from_the_first_step() -> None:
    layer = lone("tlora", gaussian(8, 12), factors=3)
    (layer(gaussian(5, 12)) * gaussian(5, 8, seed=1)).sum().backward()
    update: Any = update_of(layer)
    assert all(c.grad.any() for c in update.transform)
    moved = [bool(c.grad.any()) for c in [*update.left, *update.right]]
    assert moved == [True] + [False] * 5


def test_widths_without_factors_are_refused_with_a_way_out() -> None:
    with pytest.raises(ValueError, match=r"0: its width 13 is no product of 2 factors above 1.*\[1, 13\]"):
        lone("tlora", gaussian(8, 13))
    assert torch.equal(update_of(lone("tlora", gaussian(8, 13), sizes={"13": [1, 13]})).T(), torch.eye(13))
    with pytest.raises(ValueError, match=r"'12': \[5, 2\].*as \[3, 4\] do"):
        lone("tlora", gaussian(8, 12), sizes={"12": [5, 2]})
    for name in ("rank", "transform_rank", "factors"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            lone("tlora", gaussian(8, 12), **{name: 0})
