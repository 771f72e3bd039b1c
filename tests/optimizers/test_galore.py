"""GaLore: the released trajectories, rank and memory, tensors, per-layer updates, and a small language model."""

from __future__ import annotations

import pytest
import torch
from drive import SHAPES, drive, gradients, groups, naive_galore, parameter, trained
from torch import Tensor, nn

from eckart.optimizers import SGD, SVD, Adam, GaLore, Projected, Random
from eckart.testing import error_ratio

T, RANK = 4, 3


def galore(p: nn.Parameter, rank: int = RANK, **settings: object) -> GaLore:
    return GaLore([{"params": [p], "rank": rank}], interval=T, **settings)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("svd", ["auto", "exact", "lapack"])
def test_trajectories_are_the_textbooks(shape: tuple[int, int], svd: str) -> None:
    p, grads = parameter(*shape), gradients(shape, 2 * T + 5)
    wanted = naive_galore(
        p.detach(), grads, rank=RANK, interval=T, lr=0.01, scale=0.25, decay=0.1, eps=0.05, agreeing=svd != "lapack"
    )
    found = drive(galore(p, svd=svd, weight_decay=0.1, eps=0.05), p, grads)
    for step, (a, b) in enumerate(zip(found, wanted, strict=True)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0, msg=f"step {step}")
    assert float((found[-1] - found[0]).abs().max()) > 1e-2


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_trajectories_are_those_of_the_released_package(shape: tuple[int, int]) -> None:
    released = pytest.importorskip("galore_torch")
    p, q, grads = parameter(*shape), parameter(*shape), gradients(shape, 2 * T + 5)
    group = {"rank": RANK, "update_proj_gap": T, "scale": 0.25, "proj_type": "std", "proj_quant": False}
    theirs = released.GaLoreAdamW([{"params": [q], **group}], lr=0.01, no_deprecation_warning=True)
    for a, b in zip(drive(galore(p, svd="lapack"), p, grads), drive(theirs, q, grads), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["std", "reverse", "left", "right", "full"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_at_full_rank_gradient_descent_is_gradient_descent_and_adam_is_not_adam(shape: tuple[int, int], side: str) -> None:  # fmt: skip # noqa: E501
    grads, rank = gradients(shape, 3), min(shape)
    p, q = parameter(*shape), parameter(*shape)
    plain = torch.optim.SGD([q], lr=0.1)
    projected = Projected([{"params": [p], "rank": rank}], projector=SVD(side), inner=SGD(), lr=0.1, interval=1)
    for a, b in zip(drive(projected, p, grads), drive(plain, q, grads), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    p, q = parameter(*shape), parameter(*shape)
    adam = torch.optim.AdamW([q], lr=0.1, weight_decay=0, eps=1e-6)
    (a,), (b,) = drive(galore(p, rank, lr=0.1, scale=1.0, side=side), p, grads[:1]), drive(adam, q, grads[:1])
    assert error_ratio(a - parameter(*shape), b - parameter(*shape)) > 0.1


def test_signs_of_singular_vectors_do_not_matter() -> None:
    class Flipped(SVD):
        def _vectors(self, A: Tensor, rank: int, draw: object) -> tuple[Tensor, Tensor]:
            U, V = super()._vectors(A, rank, draw)
            signs = torch.where(torch.arange(rank) % 2 == draw.refresh % 2, -1.0, 1.0)
            return U * signs, V * signs

    grads, paths = gradients((9, 7), 11), []
    for projector in (SVD(), Flipped()):
        p = parameter(9, 7)
        optimizer = galore(p)
        optimizer.projector = projector
        paths.append(drive(optimizer, p, grads))
    torch.testing.assert_close(paths[0], paths[1], atol=1e-6, rtol=0)


def test_updates_have_low_rank_within_a_period_and_not_over_several() -> None:
    p = nn.Parameter(torch.zeros(16, 12))
    path = drive(galore(p), p, [parameter(16, 12, seed=i).detach() for i in range(3 * T)])
    within = torch.linalg.svdvals(path[T - 1])
    assert within[RANK] < 1e-5 * within[0]
    assert within[RANK - 1] > 1e-2 * within[0]
    over = torch.linalg.svdvals(path[-1])
    assert over[RANK] > 1e-2 * over[0]


@pytest.mark.parametrize(("m", "n"), SHAPES.values(), ids=SHAPES)
def test_state_is_as_large_as_the_formula_says(m: int, n: int) -> None:
    p = parameter(m, n)
    optimizer = galore(p)
    drive(optimizer, p, gradients((m, n), 2))
    assert optimizer.state_bytes() == 4 * RANK * (min(m, n) + 2 * max(m, n)) == optimizer.expected_state_bytes()


def test_tensors_are_projected_along_all_modes_and_follow_their_gradients() -> None:
    shape = (6, 5, 3, 4)
    p = parameter(*shape)
    optimizer = galore(p, 2, lr=1.0, scale=1.0, inner="sgd")
    for seed in range(2 * T + 1):
        G, before = gradients(shape, 1, seed)[0], p.detach().clone()
        drive(optimizer, p, [G])
        update = before - p.detach()
        for mode in range(4):
            values = torch.linalg.svdvals(update.movedim(mode, 0).flatten(1))
            assert float(values[2:].sum()) < 1e-4 * float(values[0])
        # an orthogonal projection: what is kept stands at right angles to what is lost
        torch.testing.assert_close((update * (G - update)).sum(), torch.zeros(()), atol=1e-3, rtol=0)
    assert optimizer.state[p]["refreshes"] == 3
    p = parameter(*shape)
    full = galore(p, 90, lr=1.0, scale=1.0, inner="sgd")
    before = p.detach().clone()
    drive(full, p, [G])
    torch.testing.assert_close(before - p.detach(), G, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("inner", ["adafactor", "adam8bit", "lion", "sgd"])
def test_other_inner_rules_reduce_a_loss(inner: str) -> None:
    target, p = parameter(12, 8, seed=5).detach(), parameter(12, 8)
    optimizer = galore(p, 4, inner=inner, scale=1.0, lr={"sgd": 1.0}.get(inner, 0.1))
    first = float((p.detach() - target).square().sum())
    for _ in range(60):
        p.grad = p.detach() - target
        optimizer.step()
    assert float((p.detach() - target).square().sum()) < 0.2 * first


def test_8_bit_moments_take_a_quarter_and_follow_32_bit_ones() -> None:
    grads, found = gradients((64, 48), 10), []
    for inner in ("adam", "adam8bit"):
        p = parameter(64, 48)
        optimizer = galore(p, 16, inner=inner)
        start = p.detach().clone()
        found.append((drive(optimizer, p, grads)[-1] - start, optimizer.state_bytes() - 4 * 48 * 16))
    (exact, whole), (near, eighth) = found
    assert error_ratio(near, exact) < 0.05
    assert eighth == whole / 4 + 2 * 4 * 64 * 16 // 256


def test_a_small_language_model_learns_in_the_papers_order() -> None:
    adam = trained(lambda model, lr: torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0))
    moving = trained(lambda model, lr: GaLore(groups(model, rank=2), lr=lr, scale=1.0, interval=20))
    frozen = trained(
        lambda model, lr: Projected(groups(model, rank=2), projector=Random(), inner=Adam(), lr=lr, interval=10**6)
    )
    assert adam <= moving + 0.02
    assert moving < frozen - 0.02
