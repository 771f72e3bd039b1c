"""FRUGAL: its limits, the split, state under every switch, the order of blocks, and its order beside GaLore."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from drive import drive, gradients, groups, parameter, trained
from torch import Tensor, nn

from eckart.optimizers import DCT, SVD, Columns, Frugal, GaLore, Random
from eckart.optimizers.modes import contract, expand
from eckart.optimizers.projectors import Blocks, Draw, Projector

SUBSPACES = ["blocks", "columns", "rows", "svd", "random", "dct"]


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int) -> None:
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = gradients(tuple(p.shape), steps, seed=i)[step]
        optimizer.step()


def params() -> list[nn.Parameter]:
    return [parameter(8, 6), parameter(6, 10, seed=1), parameter(5, seed=2)]


@pytest.mark.parametrize("subspace", ["blocks", "columns", "rows"])
def test_density_one_is_adamw(subspace: str) -> None:
    ours, theirs = params(), params()
    optimizer = Frugal(
        [{"params": ours[:2], "density": 1.0}, {"params": ours[2:]}], lr=0.01, weight_decay=0.1, eps=0.05, interval=2,
        subspace=subspace, reset=False,
    )  # fmt: skip
    run(optimizer, ours, 7)
    run(torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1, eps=0.05), theirs, 7)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_density_zero_is_the_sign_on_matrices_and_adamw_on_the_rest(subspace: str) -> None:
    ours, theirs = params(), params()
    optimizer = Frugal(
        [{"params": ours[:2], "density": 0.0}, {"params": ours[2:]}], lr=0.01, subspace=subspace, scale=0.5
    )
    run(optimizer, ours, 3)
    adam = torch.optim.AdamW(theirs[2:], lr=0.01, weight_decay=0)
    for step in range(3):
        for i in (0, 1):
            theirs[i].data -= 0.005 * gradients(tuple(theirs[i].shape), 3, seed=i)[step].sign()
        theirs[2].grad = gradients((5,), 3, seed=2)[step]
        adam.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert optimizer.state_bytes() == 4 * 2 * 5


def test_a_density_that_rounds_to_no_rank_is_without_state() -> None:
    p = parameter(8, 6)
    optimizer = Frugal([{"params": [p], "density": 0.05}], lr=0.1, subspace="svd")
    before, G = p.detach().clone(), gradients((8, 6), 1)[0]
    (after,) = drive(optimizer, p, [G])
    torch.testing.assert_close(after, before - 0.1 * G.sign())
    assert optimizer.state_bytes() == 0


@pytest.mark.parametrize("projector", [SVD(), SVD("reverse"), SVD("full"), Random(), DCT()], ids=str)
@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_bases_split_the_gradient_at_right_angles(projector: Projector, shape: tuple[int, int]) -> None:
    G = gradients(shape, 1)[0]
    kept, lost = split(projector, G)
    torch.testing.assert_close((kept * lost).sum(), torch.zeros(()), atol=1e-4, rtol=0)
    torch.testing.assert_close(kept.square().sum() + lost.square().sum(), G.square().sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("projector", [Columns(), Columns("left"), Columns("full")], ids=str)
def test_selections_split_the_gradient_bit_for_bit(projector: Projector) -> None:
    G = gradients((12, 8), 1)[0]
    kept, lost = split(projector, G)
    assert torch.equal(kept + lost, G)
    assert not (kept.bool() & lost.bool()).any()


def split(projector: Projector, G: Tensor) -> tuple[Tensor, Tensor]:
    """What a projector keeps of a gradient at rank 3, and what it does not."""
    draw, shape = Draw(), tuple(G.shape)
    ranks = projector.ranks(shape, {"rank": 3, "density": None}, draw)
    factors = projector.factors(projector.choose(G, ranks, {}, draw), G)
    kept = expand(contract(G, factors), factors, shape)
    return kept, G - kept


@pytest.mark.parametrize("subspace", ["svd", "random", "columns", "dct"])
def test_updates_are_of_full_rank_only_with_a_rule_for_the_rest(subspace: str) -> None:
    values = {}
    for rest in ("sign", "sgd", "drop"):
        p = nn.Parameter(torch.zeros(10, 8))
        optimizer = Frugal([{"params": [p], "density": 0.25}], lr=0.1, rest=rest, subspace=subspace)
        values[rest] = torch.linalg.svdvals(drive(optimizer, p, gradients((10, 8), 1))[0])
    assert min(values[rest][-1] / values[rest][0] for rest in ("sign", "sgd")) > 1e-3
    assert values["drop"][1] > 1e-3 * values["drop"][0]
    assert values["drop"][2] < 1e-5 * values["drop"][0]


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_moments_take_their_share_at_every_step(subspace: str) -> None:
    eight = [parameter(8, 12, seed=i) for i in range(8)]
    optimizer = Frugal([{"params": eight, "density": 0.25}], interval=2, subspace=subspace)
    for _ in range(7):
        run(optimizer, eight, 1)
        moments = [state[name].numel() for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        assert sum(moments) == 2 * 0.25 * sum(p.numel() for p in eight)
        assert optimizer.state_bytes() == optimizer.expected_state_bytes()


def test_blocks_without_moments_can_have_8_bit_ones() -> None:
    four = [parameter(8, 12, seed=i) for i in range(4)]
    optimizer = Frugal([{"params": four, "density": 0.5}], interval=2, inner="adam8bit")
    for _ in range(5):
        run(optimizer, four, 1)
        assert optimizer.state_bytes() == optimizer.expected_state_bytes() == 2 * 2 * (96 + 4)


@pytest.mark.parametrize("order", ["ascending", "descending", "mirror"])
@pytest.mark.parametrize(("count", "number"), [(8, 2), (6, 4), (8, 6)])
def test_blocks_take_turns(order: str, count: int, number: int) -> None:
    seen: set[int] = set()
    for period in range(math.ceil(count / number)):
        active = Blocks(order=order).active(number, Draw(count=count, refresh=period))
        assert len(active) == number
        seen |= active
    assert seen == set(range(count))
    first = Blocks(order=order).active(2, Draw(count=count))
    assert first == {"ascending": {0, 1}, "descending": {count - 1, count - 2}, "mirror": {0, count - 1}}[order]


def test_blocks_can_be_drawn() -> None:
    draws = [Blocks(order="random").active(3, Draw(count=9, refresh=r)) for r in range(5)]
    assert all(len(found) == 3 and found <= set(range(9)) for found in draws)
    assert len({tuple(sorted(found)) for found in draws}) > 1
    assert draws == [Blocks(order="random").active(3, Draw(count=9, refresh=r)) for r in range(5)]


def test_a_reset_restarts_the_bias_correction_too() -> None:
    p, grads = parameter(8, 8), [torch.ones(8, 8)] * 5
    optimizer = Frugal([{"params": [p], "density": 0.5}], lr=0.1, interval=4, subspace="columns", rest="drop")
    path = [p.detach().clone(), *drive(optimizer, p, grads)]
    for before, after in itertools.pairwise(path):
        moved = (before - after)[(before - after).bool()]
        torch.testing.assert_close(moved, torch.full_like(moved, 0.1), rtol=1e-4, atol=0)
        assert moved.numel() == 32


def test_it_recovers_galore() -> None:
    grads = gradients((10, 6), 9)
    p, q = parameter(10, 6), parameter(10, 6)
    galore = GaLore([{"params": [q], "rank": 3}], lr=0.01, interval=4, scale=0.25, eps=0)
    frugal = Frugal(
        [{"params": [p], "density": 0.5}], lr=0.01, interval=4, scale=0.25, eps=0, subspace="svd", rest="drop",
        reset=False,
    )  # fmt: skip
    torch.testing.assert_close(drive(frugal, p, grads), drive(galore, q, grads), atol=1e-5, rtol=0)


def test_half_precision_sees_no_rest_inside_of_the_subspace() -> None:
    p = parameter(8, 6, dtype=torch.bfloat16)
    before, G = p.detach().clone(), gradients((8, 6), 1)[0].bfloat16()
    optimizer = Frugal([{"params": [p], "density": 0.5}], lr=0.5, subspace="columns", rest_scale=1.0)
    (after,) = drive(optimizer, p, [G])
    torch.testing.assert_close(after.float(), before.float() - 0.5 * G.float().sign(), atol=0.02, rtol=0.01)


def test_it_learns_better_than_galore() -> None:
    galore = trained(lambda model, lr: GaLore(groups(model, rank=8), lr=lr, scale=1.0, interval=20))
    for density in (0.25, 0.0):
        frugal = trained(
            lambda model, lr, d=density: Frugal(groups(model, density=d), lr=lr, interval=20, subspace="columns")
        )
        assert frugal < galore - 0.02, density


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 1.5}, "density of group 0 is from 0 to 1"),
        ({"density": -0.1}, "density of group 0 is from 0 to 1"),
        ({"density": 0.0, "rest": "drop"}, "never be updated"),
        ({"density": 0.5, "subspace": "collumns"}, "did you mean 'columns'"),
        ({"density": 0.5, "rest": "adam"}, "unknown rule for the rest"),
        ({"density": 0.5, "order": "upwards"}, "order of blocks"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Frugal([parameter(4, 4)], **settings)


def test_mirrored_blocks_go_in_pairs_and_vectors_cannot_be_split() -> None:
    three = [parameter(4, 4, seed=i) for i in range(3)]
    optimizer = Frugal([{"params": three, "density": 0.34}], order="mirror")
    with pytest.raises(ValueError, match="1 of 3 tensors would be active"):
        run(optimizer, three, 1)
    with pytest.raises(ValueError, match="parameter 0 of group 0 has shape \\(4,\\)"):
        Frugal([{"params": [parameter(4)], "density": 0.5}], subspace="columns")
    with pytest.raises(ValueError, match="whole tensors"):
        Frugal([{"params": [parameter(4, 4)], "rank": 2}])
