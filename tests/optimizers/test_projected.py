"""The projected optimiser's own parts: refresh policies, warm starts, transport, rules, storage, hooks of others."""

from __future__ import annotations

import itertools

import pytest
import torch
from drive import drive, gradients, naive_galore, parameter
from torch import Tensor, nn

from eckart.linalg.svd import truncated_svd
from eckart.optimizers import (
    DCT,
    SGD,
    SVD,
    Adafactor,
    Adam,
    Adam8bit,
    Blocks,
    Columns,
    ErrorFeedback,
    Every,
    GaLore,
    Lion,
    NormScaled,
    Projected,
    Projector,
    Random,
    Residual,
    Rule,
    Sign,
)
from eckart.optimizers.projectors import Draw
from eckart.optimizers.storage import Blocks as InBlocks
from eckart.optimizers.storage import Dynamic, dynamic_levels
from eckart.testing import error_ratio

PROJECTORS = [SVD(), SVD("full"), SVD(warm=1), Random(), Columns(), DCT()]
RULES = [Adam(), Adam8bit(), Adafactor(), SGD(), SGD(0.9), Lion()]
RESIDUALS = [None, Sign(0.1), NormScaled(), ErrorFeedback()]


def kind(part: object) -> str:
    return type(part).__name__


@pytest.mark.parametrize(
    ("projector", "inner", "residual"),
    itertools.product(PROJECTORS, RULES, RESIDUALS),
    ids=kind,
)
def test_all_parts_go_together(projector: Projector, inner: Rule, residual: Residual | None) -> None:
    target, p = parameter(10, 6, seed=5).detach(), parameter(10, 6)
    optimizer = Projected(
        [{"params": [p], "rank": 3}], projector=projector, inner=inner, residual=residual, lr=0.05, interval=2
    )
    start = (p.detach() - target).square().sum()
    for _ in range(60):
        p.grad = p.detach() - target
        optimizer.step()
    assert (p.detach() - target).square().sum() < 0.8 * start
    foreseen = optimizer.expected_state_bytes()
    assert foreseen == optimizer.state_bytes()


@pytest.mark.parametrize("side", ["std", "left", "right", "full"])
@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (6, 5, 4)])
def test_warm_starts_follow_the_leading_subspace(side: str, shape: tuple[int, ...]) -> None:
    p, G = parameter(*shape), parameter(*shape, seed=3).detach()
    U, S, Vh = torch.linalg.svd(G.flatten(1), full_matrices=False)
    G = (U * 0.5 ** torch.arange(len(S)) @ Vh).view(shape)
    optimizer = Projected([{"params": [p], "rank": 3}], projector=SVD(side, warm=1), inner=SGD(), lr=0.0, interval=1)
    drive(optimizer, p, [G + 1e-3 * parameter(*shape, seed=i).detach() for i in range(12)])
    for mode in SVD(side).modes(shape):
        basis = optimizer.state[p][f"basis_{mode}"]
        torch.testing.assert_close(basis.T @ basis, torch.eye(3), atol=1e-5, rtol=0)
        unfolded = G.movedim(mode, 0).flatten(1)
        best = truncated_svd(unfolded, 3).error
        assert float((unfolded - basis @ (basis.T @ unfolded)).norm()) < 1.02 * best + 0.01


def test_staggered_refreshes_are_spread_evenly_and_keep_their_interval() -> None:
    params = [parameter(6, 4, seed=i) for i in range(8)]
    optimizer = Projected([{"params": params, "rank": 2}], projector=SVD(), inner=SGD(), refresh=Every(stagger=True), lr=0.1, interval=4)  # fmt: skip # noqa: E501
    done: list[list[int]] = [[] for _ in params]
    for step in range(16):
        before = [optimizer.state[p].get("refreshes", 0) for p in params]
        for p in params:
            p.grad = parameter(6, 4, seed=step).detach()
        optimizer.step()
        for i, p in enumerate(params):
            if optimizer.state[p]["refreshes"] > before[i]:
                done[i].append(step)
    for step in range(1, 16):
        assert sum(step in steps for steps in done) == 2
    assert all(b - a == 4 for steps in done for a, b in itertools.pairwise(steps[1:]))
    assert all(steps[0] == 0 for steps in done)


def test_refreshes_come_at_the_first_step_and_every_interval_after_it() -> None:
    p = parameter(6, 4)
    optimizer = GaLore([{"params": [p], "rank": 2}], interval=3)
    found = []
    for step, G in enumerate(gradients((6, 4), 10)):
        drive(optimizer, p, [G])
        found.append((step, optimizer.state[p]["refreshes"]))
    assert found == [(step, step // 3 + 1) for step in range(10)]


def test_moments_can_be_rotated_into_any_new_basis() -> None:
    p = nn.Parameter(torch.zeros(10, 6))
    optimizer = Projected(
        [{"params": [p], "rank": 3}], projector=Random(), inner=Adam(), lr=0.1, interval=2, transport="rotate"
    )
    grads = gradients((10, 6), 3)
    drive(optimizer, p, grads[:2])
    old = {name: optimizer.state[p][name].clone() for name in ("exp_avg", "exp_avg_sq", "basis_1")}
    drive(optimizer, p, grads[2:])
    Q = optimizer.state[p]["basis_1"]
    turn, R = old["basis_1"].T @ Q, grads[2] @ Q
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], 0.9 * old["exp_avg"] @ turn + 0.1 * R)
    second = (old["exp_avg_sq"] @ turn).abs()
    torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], 0.999 * second + 0.001 * R.square())
    with pytest.raises(ValueError, match="no coordinates"):
        Projected([p], projector=Blocks(), inner=Adam(), lr=0.1, transport="rotate")


@pytest.mark.parametrize(
    ("inner", "theirs"),
    [
        (Adam(), lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)),
        (SGD(), lambda p: torch.optim.SGD(p, lr=0.01)),
        (SGD(0.9), lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)),
    ],
    ids=["adam", "sgd", "momentum"],
)
def test_rules_without_a_projection_are_those_of_torch(inner: Rule, theirs: object) -> None:
    for foreach in (False, True):
        ours, others = ([parameter(7, 5), parameter(4, seed=1)] for _ in range(2))
        decay = 0.1 if isinstance(inner, Adam) else 0.0
        optimizer = Projected(
            ours, projector=SVD(), inner=inner, lr=0.01, weight_decay=decay, decay_first=True, foreach=foreach
        )
        reference = theirs(others)
        for step in range(20):
            for i, (p, q) in enumerate(zip(ours, others, strict=True)):
                p.grad, q.grad = (gradients(tuple(p.shape), 20, seed=i)[step] for _ in range(2))
            optimizer.step()
            reference.step()
        torch.testing.assert_close(ours, others, atol=1e-6, rtol=0)


def test_adafactor_is_the_one_of_transformers() -> None:
    from transformers.optimization import Adafactor as Reference

    p, q, b, c = parameter(7, 5), parameter(7, 5), parameter(4), parameter(4)
    ours = Projected([p, b], projector=SVD(), inner=Adafactor(), lr=0.01)
    theirs = Reference([q, c], lr=0.01, relative_step=False, scale_parameter=False, warmup_init=False)
    for step in range(20):
        for i, x in enumerate((p, q, b, c)):
            x.grad = gradients(tuple(x.shape), 20, seed=i // 2)[step]
        ours.step()
        theirs.step()
    torch.testing.assert_close([p, b], [q, c], atol=1e-5, rtol=0)
    assert ours.state_bytes() == 4 * (7 + 5 + 4) == ours.expected_state_bytes()


def test_dynamic_levels_cover_seven_decades() -> None:
    for signed in (True, False):
        levels = dynamic_levels(8, signed)
        assert len(levels.unique()) == 256
        assert 0.0 in levels
        assert levels.max() == 1.0
        assert 0 < levels[levels > 0].min() < 1e-6
    x = 10 ** torch.linspace(-5, 0, 200)
    state: dict[str, object] = {}
    storage = InBlocks(8, 256, Dynamic(signed=False), root=True)
    storage.put(state, "x", x)
    assert error_ratio(storage.get(state, "x"), x) < 0.02
    assert float(((storage.get(state, "x") - x) / x).abs().max()) < 0.3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_follow_single_precision(dtype: torch.dtype) -> None:
    grads = gradients((12, 8), 9)
    wanted = naive_galore(parameter(12, 8).detach(), grads, rank=3, interval=4, lr=0.1, scale=0.25, agreeing=True)[-1]
    p = parameter(12, 8, dtype=dtype)
    optimizer = GaLore([{"params": [p], "rank": 3}], lr=0.1, interval=4)
    found = drive(optimizer, p, grads)[-1]
    assert found.dtype == dtype
    assert error_ratio(found.float(), wanted) < (2e-2 if dtype.itemsize == 2 else 1e-5)
    assert optimizer.state[p]["basis_1"].dtype == dtype
    assert optimizer.state[p]["exp_avg"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert optimizer.state_bytes() == optimizer.expected_state_bytes()


def test_too_large_ranks_are_clamped_with_a_warning() -> None:
    p, q, G = parameter(6, 4), parameter(6, 4), gradients((6, 4), 3)
    with pytest.warns(UserWarning, match="rank 9 is more than parameter 0 of group 0 of shape \\(6, 4\\) has: 4"):
        clamped = GaLore([{"params": [p], "rank": 9}])
    exact = GaLore([{"params": [q], "rank": 4}])
    assert torch.equal(drive(clamped, p, G)[-1], drive(exact, q, G)[-1])


def test_errors_name_parameters_that_have_names() -> None:
    p = parameter(4, 4)
    optimizer = GaLore([{"params": [("blocks.0.q.weight", p)], "rank": 2}])
    p.grad = torch.full((4, 4), torch.inf)
    with pytest.raises(RuntimeError, match=r"gradient of blocks\.0\.q\.weight holds NaN"):
        optimizer.step()


def test_subspaces_chosen_at_random_depend_on_seed_parameter_and_time() -> None:
    numbers = [Draw(index=i, refresh=r, seed=s).number for i in range(3) for r in range(3) for s in range(3)]
    assert len(set(numbers)) == 27
    runs = []
    for seed in (0, 0, 1):
        p = nn.Parameter(torch.zeros(8, 6))
        optimizer = Projected([{"params": [p], "rank": 2}], projector=Random(), inner=SGD(), lr=0.1, seed=seed)
        runs.append(drive(optimizer, p, gradients((8, 6), 2))[-1])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_parameters_can_be_exchanged_in_the_groups_as_sharding_wrappers_do() -> None:
    grads, paths = gradients((8, 6), 5), []
    for exchanged in (False, True):
        p = parameter(8, 6)
        optimizer = Projected([{"params": [p], "rank": 2}], projector=Random(), inner=Adam(), lr=0.1, interval=2)
        if exchanged:
            p = parameter(8, 6)
            optimizer.param_groups[0]["params"] = [p]
        paths.append(drive(optimizer, p, grads)[-1])
    assert torch.equal(*paths)


def test_gradient_accumulation_counts_one_update() -> None:
    p = parameter(6, 4)
    optimizer = GaLore([{"params": [p], "rank": 2}], interval=2)
    x = torch.ones(4)
    for _ in range(3):
        for _ in range(4):
            (p @ x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.state[p]["step"] == 3
    assert optimizer.state[p]["refreshes"] == 2


def test_no_gradient_flows_into_the_update_and_no_graph_is_kept() -> None:
    p = parameter(6, 4)
    optimizer = GaLore([{"params": [p], "rank": 2}])
    p.square().sum().backward(create_graph=False)
    optimizer.step()
    assert p.is_leaf
    assert not any(x.requires_grad for x in optimizer.state[p].values() if isinstance(x, Tensor))
