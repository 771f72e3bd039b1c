"""L-GreCo: plans against every choice, compressors against what they claim, the hook alone and on two processes."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drive import reloaded
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd
from torch.nn.parallel import DistributedDataParallel as DDP

import tiny
from eckart.linalg.power import random_basis
from eckart.optimizers.communication import (
    QSGD,
    Compressor,
    Draw,
    Layer,
    NoPlan,
    PowerSGD,
    TopK,
    Wire,
    choose,
)
from eckart.optimizers.l_greco import LGreCo
from eckart.testing.numbers import gaussian

SMALL = {"power_sgd": PowerSGD(rank=2), "top_k": TopK(density=0.05), "qsgd": QSGD(bits=4, group=64)}
WORLD, STEPS = 2, 50

# what settings are chosen


def brute_force(errors: list[np.ndarray], sizes: list[np.ndarray], bound: float) -> float:
    """The least size of all choices within the bound."""
    every = itertools.product(*(range(len(e)) for e in errors))
    e, b = (np.array(list(itertools.product(*values))).sum(1) for values in (errors, sizes))
    assert len(e) == len(list(every))
    return float(b[e <= bound].min())


def measured(seed: int) -> tuple[list[np.ndarray], list[np.ndarray], list[int]]:
    """Five layers by seven ranks, of gradients whose spectra fall at different rates; the default is rank 4."""
    draw = np.random.default_rng(seed)
    errors, sizes = [], []
    for _ in range(5):
        n, m = (int(x) for x in draw.integers(10, 60, 2))
        spectrum = np.arange(1, 11) ** -draw.uniform(0.1, 2.5) * draw.uniform(0.5, 2)
        errors.append(np.array([math.sqrt(float((spectrum[r:] ** 2).sum())) for r in range(2, 9)]))
        sizes.append(np.array([r * (n + m) for r in range(2, 9)], float))
    return errors, sizes, [2] * 5


@pytest.mark.parametrize("seed", range(4))
def test_the_plan_is_the_best_of_all_choices_and_keeps_the_bound(seed: int) -> None:
    errors, sizes, default = measured(seed)
    uniform = sum(float(e[2]) for e in errors)
    choice = choose(errors, sizes, default)
    assert choice is not None
    size = sum(float(b[i]) for b, i in zip(sizes, choice, strict=True))
    assert sum(float(e[i]) for e, i in zip(errors, choice, strict=True)) <= uniform * (1 + 1e-12)
    assert size == brute_force(errors, sizes, uniform)
    assert size < sum(float(b[2]) for b in sizes)


@given(st.integers(0, 10_000), st.integers(1, 60), st.floats(0.3, 3))
@settings(deadline=None, max_examples=40)
def test_a_coarse_resolution_keeps_the_bound_and_is_never_worse_than_uniform(seed: int, steps: int, alpha: float) -> None:  # fmt: skip # noqa: E501
    errors, sizes, default = measured(seed)
    uniform = sum(float(e[2]) for e in errors)
    choice = choose(errors, sizes, default, alpha, steps)
    assert choice is not None
    size = sum(float(b[i]) for b, i in zip(sizes, choice, strict=True))
    if sum(float(e.min()) for e in errors) > alpha * uniform:
        assert choice == [6] * 5
        return
    assert sum(float(e[i]) for e, i in zip(errors, choice, strict=True)) <= alpha * uniform * (1 + 1e-12)
    assert size >= brute_force(errors, sizes, alpha * uniform * (1 + 1e-12))
    if alpha >= 1:
        assert size <= sum(float(b[2]) for b in sizes)
    shrunken = alpha * uniform - 6 * uniform / steps
    if shrunken >= sum(float(e.min()) for e in errors):
        assert size <= brute_force(errors, sizes, shrunken)


@pytest.mark.parametrize("steps", [7, 10_000])
def test_more_error_allowed_is_never_a_larger_size(steps: int) -> None:
    for seed in range(3):
        errors, sizes, default = measured(seed)
        found = []
        for alpha in np.linspace(0.2, 2.5, 24):
            choice = choose(errors, sizes, default, float(alpha), steps)
            assert choice is not None
            found.append(sum(float(b[i]) for b, i in zip(sizes, choice, strict=True)))
        assert all(b <= a for a, b in itertools.pairwise(found))
        assert found[-1] < found[0]


def test_nothing_is_chosen_where_errors_tell_nothing() -> None:
    errors, sizes, default = measured(0)
    assert choose([0 * e for e in errors], sizes, default) is None
    errors[3][1] = np.nan
    assert choose(errors, sizes, default) is None


# what is sent


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[distributed.ProcessGroup]:
    """A process group of this process."""
    rendezvous = tmp_path_factory.mktemp("alone") / "rendezvous"
    distributed.init_process_group("gloo", f"file://{rendezvous}", rank=0, world_size=1)
    yield distributed.group.WORLD  # type: ignore[misc]
    distributed.destroy_process_group()


def exchanged(
    compressor: Compressor, layer: Layer, M: Tensor, group: distributed.ProcessGroup, step: int = 0
) -> tuple[Tensor, int]:
    """What arrives of a matrix, and the bytes that were sent."""
    wire = Wire(group)
    rounds = compressor.exchange([layer], [M], M.dtype, wire, Draw(0, step, 0))
    while True:
        try:
            next(rounds).wait()
        except StopIteration as done:
            (mean, own) = done.value[0]
            assert torch.equal(mean, own)
            return mean, wire.sent["compressed"]


def layer_of(compressor: Compressor, shape: tuple[int, int], dial: int) -> Layer:
    return Layer("w", 0, shape, dial, compressor.dials(shape), dial)


def test_errors_by_singular_values_are_those_of_converged_power_iteration(alone: distributed.ProcessGroup) -> None:
    U, V = (torch.linalg.qr(gaussian(n, 12, seed=n))[0] for n in (30, 20))
    M = U @ torch.diag(torch.tensor([0.6**i for i in range(12)])) @ V.T
    compressor = PowerSGD(rank=4)
    assert compressor.dials((30, 20)) == tuple(range(2, 9))
    for rank, error in zip(range(2, 9), compressor.errors(M, range(2, 9)), strict=True):
        layer, first = layer_of(compressor, (30, 20), rank), math.inf
        for _ in range(12):
            found, sent = exchanged(compressor, layer, M, alone)
            first = min(first, float((M - found).norm()))
        assert sent == 4 * rank * 50
        assert float((M - found).norm()) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("shape", [(9, 14), (1, 37), (16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_numbers_arrive_as_they_are(shape: tuple[int, int], dtype: torch.dtype, alone: distributed.ProcessGroup) -> None:  # fmt: skip # noqa: E501
    M, compressor = gaussian(*shape, seed=1, dtype=dtype), TopK(density=0.1)
    for k, error in zip(compressor.dials(shape), compressor.errors(M, compressor.dials(shape)), strict=True):
        found, sent = exchanged(compressor, layer_of(compressor, shape, k), M, alone)
        kept = M.abs().flatten().sort(descending=True).values[k - 1]
        assert torch.equal(found, torch.where(M.abs() >= kept, M, 0))
        assert float((M - found).norm()) == pytest.approx(error, rel=1e-6, abs=1e-12)
        bits = k * math.ceil(math.log2(M.numel()))
        assert sent == compressor.nbytes(shape, k, dtype.itemsize) == k * dtype.itemsize + math.ceil(bits / 8)


@pytest.mark.parametrize("shape", [(9, 14), (1, 37), (16, 16)])
def test_few_bits_are_right_on_average_and_as_wrong_as_foreseen(shape: tuple[int, int], alone: distributed.ProcessGroup) -> None:  # fmt: skip # noqa: E501
    M, compressor = gaussian(*shape, seed=2), QSGD(bits=4, group=50)
    assert compressor.dials(shape) == tuple(range(2, 9))
    groups = math.ceil(M.numel() / min(50, M.numel()))
    for bits, error in zip(range(2, 9), compressor.errors(M, range(2, 9)), strict=True):
        layer, draws = layer_of(compressor, shape, bits), []
        for step in range(100):
            found, sent = exchanged(compressor, layer, M, alone, step)
            draws.append(found)
        assert sent == compressor.nbytes(shape, bits, 4) == 8 * groups + math.ceil(M.numel() * bits / 8)
        squares = torch.stack([(M - found).square().sum() for found in draws])
        assert float(squares.mean().sqrt()) == pytest.approx(error, rel=0.05)
        assert float((M - torch.stack(draws).mean(0)).norm()) < 0.2 * error
        again, _ = exchanged(compressor, layer, M, alone, 99)
        assert torch.equal(again, draws[-1])
        assert not torch.equal(again, draws[0])
    constant = torch.full(shape, 0.3)
    assert torch.equal(exchanged(compressor, layer_of(compressor, shape, 2), constant, alone)[0], constant)


def test_settings_to_choose_from_stay_within_the_layer() -> None:
    assert PowerSGD(rank=5).dials((40, 40)) == tuple(range(2, 11))
    assert PowerSGD(rank=5).dials((7, 40)) == tuple(range(2, 8))
    assert PowerSGD(rank=1).dials((7, 40)) == (1, 2)
    assert QSGD(bits=8).dials((7, 7)) == (4, 5, 6, 7, 8)
    assert QSGD(bits=1).dials((7, 7)) == (1, 2)
    dials = TopK(density=0.5).dials((4, 5))
    assert (dials[0], dials[-1]) == (2, 20)
    assert 10 in dials
    for compressor in (PowerSGD(), TopK(), QSGD()):
        sizes = [compressor.nbytes((40, 30), dial, 4) for dial in compressor.dials((40, 30))]
        assert sizes == sorted(set(sizes))
    assert not PowerSGD(rank=4).shrinks((16, 16), 4)
    assert PowerSGD(rank=4).shrinks((17, 17), 4)


# the hook, alone


class Net(nn.Module):
    """A convolution, two linear layers and what is too small to compress."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.conv = nn.Conv1d(3, 24, 5)
        self.first = nn.Linear(24, 2 * width)
        self.second = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.conv(x)).mean(-1)
        return self.head(torch.tanh(self.second(torch.tanh(self.first(h)))))


COMPRESSED = {"conv.weight": (24, 15), "first.weight": (48, 24), "second.weight": (24, 48)}
"""At rank 2; the head's gradient is too narrow for that, and shrinks otherwise."""


def compressed(word: str) -> dict[str, tuple[int, int]]:
    return COMPRESSED if word == "power_sgd" else {**COMPRESSED, "head.weight": (3, 24)}


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def batch(step: int, size: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Sums of rows of noise, and noise that cannot be learnt, as targets."""
    x = gaussian(size, 3, 9, seed=step)
    y = torch.stack([x[:, 0].sum(-1), x[:, 1].sum(-1), x[:, 2, 0]], 1) / 3
    return x.to(dtype), (y + 0.3 * gaussian(size, 3, seed=step + 20_000)).to(dtype)


def train(model: nn.Module, steps: range, lr: float = 0.05, size: int = 16) -> list[float]:
    """Plain gradient descent, so that the sum of updates is told by the weights."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=lr), []
    dtype = next(model.parameters()).dtype
    for step in steps:
        x, y = batch(step, size, dtype)
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def gradients(module: nn.Module, step: int) -> dict[str, Tensor]:
    x, y = batch(step)
    (module(x) - y).square().mean().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters()}  # type: ignore[union-attr]


@pytest.mark.parametrize("word", SMALL)
def test_what_is_not_sent_is_kept(word: str, alone: distributed.ProcessGroup) -> None:
    """Gradients at fixed weights: all that arrived and what is left make the sum of all that there were."""
    module, reference = net(), net()
    ddp = DDP(module)
    hook = LGreCo(ddp, SMALL[word], start=1, refresh=3, window=2, feedback=True)
    assert {layer.name: layer.shape for layer in hook.layers} == compressed(word)
    arrived: dict[str, Tensor] = {}
    wanted: dict[str, Tensor] = {}
    for step in range(9):
        for model, found in ((ddp, arrived), (reference, wanted)):
            model.zero_grad()
            for name, g in gradients(model, step).items():
                name = name.removeprefix("module.")
                found[name] = found.get(name, 0) + g
    assert hook.plan is not None
    for layer in hook.layers:
        assert layer.error is not None
        whole = arrived[layer.name] + layer.error.view_as(arrived[layer.name])
        assert torch.allclose(whole, wanted.pop(layer.name), atol=1e-6)
        assert float(layer.error.norm()) > 1e-3
    for name, g in wanted.items():
        assert torch.allclose(arrived[name], g, atol=1e-6)


def test_one_step_and_its_error_make_the_gradient(alone: distributed.ProcessGroup) -> None:
    wanted, ddp = gradients(net(), 3), DDP(net())
    hook = LGreCo(ddp, PowerSGD(rank=2), start=0)
    found = gradients(ddp, 3)
    for layer in hook.layers:
        assert layer.error is not None
        arrived = found[f"module.{layer.name}"].view(layer.shape)
        assert torch.linalg.matrix_rank(arrived) == 2
        assert torch.allclose(arrived + layer.error, wanted[layer.name].view(layer.shape), atol=1e-6)


def test_at_a_fixed_density_it_is_the_textbooks_loop(alone: distributed.ProcessGroup) -> None:
    """From the first step on, though DDP sorts its buckets anew after it."""
    ddp, module, kept = DDP(net(), bucket_cap_mb=0.002), net(), {}
    LGreCo(ddp, TopK(density=0.1), start=0, refresh=None)
    losses = train(ddp, range(12))
    for step in range(12):
        found = gradients(module, step)
        for name, p in module.named_parameters():
            if p.dim() > 1:
                M = found[name] + kept.get(name, 0)
                least = M.abs().flatten().sort(descending=True).values[round(0.1 * M.numel()) - 1]
                found[name] = torch.where(M.abs() >= least, M, 0)
                kept[name] = M - found[name]
            p.data -= 0.05 * found[name]
            p.grad = None
    for p, q in zip(ddp.parameters(), module.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)
    assert losses[-1] < losses[0]


def test_the_error_allowed_may_change_while_training(alone: distributed.ProcessGroup) -> None:
    ddp = DDP(net())
    hook = LGreCo(ddp, TopK(density=0.1), start=2, refresh=3)
    train(ddp, range(3), lr=0.0)
    before, hook.alpha = hook.nbytes, 1.3
    train(ddp, range(3, 6), lr=0.0)
    assert hook.plan is not None
    assert hook.plan.step == 5
    assert hook.nbytes < before


def test_bytes_are_those_of_the_plan(alone: distributed.ProcessGroup) -> None:
    for word, compressor in SMALL.items():
        module = net()
        ddp = DDP(module)
        hook = LGreCo(ddp, compressor, start=2, refresh=4, window=2)
        rest = sum(p.nbytes for n, p in module.named_parameters() if n not in compressed(word))
        whole = sum(p.nbytes for p in module.parameters())
        foreseen = 0
        for step in range(11):
            foreseen += hook.nbytes if step >= 2 else 0
            train(ddp, range(step, step + 1))
        settings_sent = sum(8 * len(layer.dials) for layer in hook.layers) + 8 * len(hook.layers)
        assert hook.plans == 3
        assert dict(hook.sent) == {
            "start": 2 * whole, "dense": 9 * rest, "compressed": foreseen,
            "planning": 3 * (whole - rest + settings_sent),
        }  # fmt: skip
        assert hook.plan is not None
        assert hook.plan.nbytes == hook.nbytes <= hook.plan.uniform_nbytes
        assert hook.plan.error <= hook.plan.bound * (1 + 1e-12)
        assert hook.plan.step == 10


def test_settings_are_chosen_from_the_mean_gradient_of_the_window(alone: distributed.ProcessGroup) -> None:
    ddp = DDP(net())
    hook = LGreCo(ddp, PowerSGD(rank=3), alpha=1.2, start=3, refresh=5, window=2)
    found: dict[str, Tensor] = {}
    for step in range(3):
        ddp.zero_grad()
        for name, g in gradients(ddp, step).items():
            found[name.removeprefix("module.")] = found.get(name.removeprefix("module."), 0) + (g / 2 if step else 0 * g)  # fmt: skip # noqa: E501
    errors = [PowerSGD().errors(found[layer.name].view(layer.shape), layer.dials) for layer in hook.layers]
    sizes = [np.array([4.0 * r * sum(layer.shape) for r in layer.dials]) for layer in hook.layers]
    choice = choose(errors, sizes, [layer.dials.index(3) for layer in hook.layers], 1.2)
    assert choice is not None
    assert hook.plan is not None
    assert [hook.plan.dials[layer.name] for layer in hook.layers] == [layer.dials[i] for layer, i in zip(hook.layers, choice, strict=True)]  # fmt: skip # noqa: E501
    assert hook.plan.error == pytest.approx(sum(e[i] for e, i in zip(errors, choice, strict=True)), rel=1e-5)
    assert len({*hook.plan.dials.values()}) > 1


def test_squares_are_another_bound(alone: distributed.ProcessGroup) -> None:
    plans = []
    for squares in (False, True):
        ddp = DDP(net())
        hook = LGreCo(ddp, PowerSGD(rank=2), start=3, squares=squares)
        train(ddp, range(4), lr=0.0)
        assert hook.plan is not None
        plans.append(hook.plan)
    assert plans[0].bound ** 2 > plans[1].bound > plans[0].bound ** 2 / len(COMPRESSED) * 0.999


@pytest.mark.parametrize("word", SMALL)
def test_gradients_that_are_not_finite_leave_no_trace(word: str, alone: distributed.ProcessGroup) -> None:
    ddp = DDP(net())
    hook = LGreCo(ddp, SMALL[word], start=2, refresh=5, window=3, feedback=True)
    train(ddp, range(4))
    before = reloaded(hook.state_dict())["layers"]
    ddp.zero_grad()
    (ddp(batch(4)[0]).sum() * math.inf).backward()
    after = hook.state_dict()["layers"]
    assert all(p.grad is not None and not p.grad.isfinite().any() for p in ddp.parameters())
    for name in compressed(word):
        for kept in before[name].keys() - {"total", "dial"}:
            assert torch.equal(before[name][kept], after[name][kept]), (name, kept)
    dials = [layer.dial for layer in hook.layers]
    with pytest.warns(NoPlan, match=f"after step 7: gradients of {', '.join(compressed(word))} hold NaN or"):
        train(ddp, range(5, 7))
    assert dials == [layer.dial for layer in hook.layers]
    train(ddp, range(7, 12))
    assert hook.plan is not None
    assert hook.plan.step == 12
    assert all(p.isfinite().all() for p in ddp.parameters())


@pytest.mark.parametrize("word", SMALL)
def test_gradients_of_zero_are_no_reason_to_choose(word: str, alone: distributed.ProcessGroup) -> None:
    ddp = DDP(net())
    hook = LGreCo(ddp, SMALL[word], start=1, refresh=2)
    with pytest.warns(NoPlan, match="after step 1: the uniform setting makes no error"):
        (0 * ddp(batch(0)[0]).sum()).backward()
    (0 * ddp(batch(0)[0]).sum()).backward()
    assert hook.plan is None
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in ddp.parameters())  # type: ignore[arg-type]


@pytest.mark.parametrize("word", SMALL)
def test_a_run_from_a_checkpoint_continues_bit_for_bit(word: str, alone: distributed.ProcessGroup) -> None:
    def hooked(module: nn.Module, **changed: Any) -> tuple[DDP, LGreCo]:
        ddp = DDP(module, bucket_cap_mb=0.002)
        return ddp, LGreCo(ddp, changed.get("compressor", SMALL[word]), start=2, refresh=4, window=3)

    first, hook = hooked(net())
    train(first, range(8))
    resumed = net()
    resumed.load_state_dict(first.module.state_dict())
    second, other = hooked(resumed)
    other.load_state_dict(reloaded(hook.state_dict()))
    train(first, range(8, 16))
    train(second, range(8, 16))
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    assert other.plan == hook.plan
    _, wrong = hooked(nn.Sequential(nn.Linear(40, 40)))
    with pytest.raises(ValueError, match=r"another model or compressor: 0\.weight, conv\.weight"):
        wrong.load_state_dict(hook.state_dict())
    state = hook.state_dict()
    state["layers"]["conv.weight"]["dial"] = 999
    with pytest.raises(ValueError, match=r"sets conv\.weight to 999, which is none of"):
        other.load_state_dict(state)
    if word == "power_sgd":
        state["layers"]["conv.weight"]["dial"] = 3 if hook.layers[0].dial != 3 else 2
        with pytest.raises(ValueError, match=r"basis of shape .* for conv\.weight, not \(15, "):
            other.load_state_dict(state)


def test_narrow_gradients_are_sent_narrow(alone: distributed.ProcessGroup) -> None:
    for compressor, factor in ((PowerSGD(rank=2), 2), (TopK(density=0.05), 1)):
        wide, narrow = DDP(net()), DDP(net(torch.bfloat16))
        hooks = [LGreCo(ddp, compressor, start=0, refresh=None) for ddp in (wide, narrow)]
        losses = [train(ddp, range(30)) for ddp in (wide, narrow)]
        assert losses[1][-1] == pytest.approx(losses[0][-1], rel=0.1)
        assert hooks[0].nbytes > 1.5 * hooks[1].nbytes
        if factor == 2:
            assert hooks[0].nbytes == 2 * hooks[1].nbytes
        assert all(layer.error is not None and layer.error.dtype == torch.float32 for layer in hooks[1].layers)


def test_ignored_and_frozen_parameters_are_not_compressed(alone: distributed.ProcessGroup) -> None:
    module = net()
    module.first.weight.requires_grad_(False)
    DDP._set_params_and_buffers_to_ignore_for_model(module, ["second.weight"])
    hook = LGreCo(ddp := DDP(module), PowerSGD(rank=2), start=1)
    assert [layer.name for layer in hook.layers] == ["conv.weight"]
    train(ddp, range(3))
    assert hook.plan is not None


def test_refusals(alone: distributed.ProcessGroup) -> None:
    with pytest.raises(TypeError, match="not a Net: wrap the model first, or train without it where there is one"):
        LGreCo(net())  # type: ignore[arg-type]
    ddp = DDP(net())
    with pytest.raises(ValueError, match="unknown compressor 'topk'; did you mean 'top_k'"):
        LGreCo(ddp, "topk")
    with pytest.raises(ValueError, match=r"no gradient of Net shrinks by more than 2 under PowerSGD.*rank=20"):
        LGreCo(ddp, PowerSGD(rank=20))
    with pytest.raises(ValueError, match="alpha of l_greco is a positive number, not 0"):
        LGreCo(ddp, alpha=0)
    for name, value in {"refresh": 0, "start": -1, "window": 0, "resolution": 1.5, "seed": -3}.items():
        with pytest.raises(ValueError, match=f"the {name} of l_greco is a whole number of at least"):
            LGreCo(ddp, **{name: value})
    bad: list[tuple[Any, str]] = [
        (lambda: PowerSGD(rank=0), "the rank of power_sgd is a whole number of at least 1, not 0"),
        (lambda: QSGD(bits=9), "the number of bits of qsgd is a whole number from 1 to 8, not 9"),
        (lambda: QSGD(group=0), "the group of qsgd"), (lambda: TopK(density=0.0), "the density of top_k"),
        (lambda: TopK(points=0), "the number of points of top_k"), (lambda: QSGD(low=1.5), "settings range from low"),
        (lambda: PowerSGD(min_rate=0), "min_rate is a positive factor"),
    ]  # fmt: skip
    for make, message in bad:
        with pytest.raises(ValueError, match=message):
            make()
    sparse = DDP(nn.Sequential(nn.Embedding(50, 40, sparse=True)))
    LGreCo(sparse, PowerSGD(rank=2))
    with pytest.raises(RuntimeError, match="cannot compress sparse gradients"):
        sparse(torch.tensor([1, 2])).sum().backward()


# the hook on two processes


RUNS: dict[str, Compressor | None] = {
    "plain": None, "power_sgd": PowerSGD(rank=3), "top_k": TopK(density=0.15), "qsgd": QSGD(group=64),
}  # fmt: skip
INDEX = {torch.Size((24, 3, 5)): 0, torch.Size((48, 24)): 1, torch.Size((24, 48)): 2}


def injecting(state: powersgd.PowerSGDState, bucket: distributed.GradBucket) -> Any:
    """torch's hook, which starts from this library's random bases."""
    if state.iter >= state.start_powerSGD_iter and bucket.index() not in state.p_memory_dict:
        bases, size = [], 0
        for g in bucket.gradients():
            if g.shape in INDEX:
                n, m = g.view(g.shape[0], -1).shape
                layer = Layer("", INDEX[g.shape], (n, m), 2, (2,), 2)
                bases.append(random_basis(m, 2, Draw(0, state.iter, 0).shared(layer), g).flatten())
                size += 2 * n
        state.p_memory_dict[bucket.index()] = torch.empty(size)
        state.q_memory_dict[bucket.index()] = torch.cat(bases)
    return powersgd.powerSGD_hook(state, bucket)


def counted(sent: list[int]) -> None:
    """Count the bytes that collectives are given."""
    for name in ("all_reduce", "all_gather", "broadcast"):
        real = getattr(distributed, name)

        def counting(x: Tensor, *rest: Any, real: Any = real, name: str = name, **named: Any) -> Any:
            sent.append(rest[0].nbytes if name == "all_gather" else x.nbytes)
            return real(x, *rest, **named)

        setattr(distributed, name, counting)


def worker(rank: int, folder: Path) -> None:
    warnings.simplefilter("error", NoPlan)
    weights, told, sent = {}, {}, []
    counted(sent)
    for name, compressor in RUNS.items():
        ddp, hook = DDP(net(), bucket_cap_mb=0.004), None
        if compressor:
            hook = LGreCo(ddp, compressor, start=5, refresh=15, window=5)
        del sent[:]
        losses = sharded(ddp, rank)
        weights |= {f"{name}.{n}": p.detach().clone() for n, p in ddp.module.named_parameters()}
        told[name] = {"loss": sum(losses[-5:]) / 5}
        if hook:
            assert hook.plan is not None
            told[name] |= {"dials": dict(hook.plan.dials), "sent": dict(hook.sent), "given": sum(sent)}
            told[name] |= {"nbytes": hook.plan.nbytes, "uniform": hook.plan.uniform_nbytes}
    ddp = DDP(net())
    hook = LGreCo(ddp, PowerSGD(rank=3), alpha=1.2, start=5, average=False)
    sharded(ddp, rank, 6)
    assert hook.plan is not None
    told["own"] = {"dials": dict(hook.plan.dials), "sent": dict(hook.sent)}
    ddp = DDP(net())
    LGreCo(ddp, PowerSGD(rank=2), start=2, refresh=None)
    sharded(ddp, rank)
    weights |= {f"ours.{n}": p.detach().clone() for n, p in ddp.module.named_parameters()}
    ddp = DDP(net())
    ddp.register_comm_hook(powersgd.PowerSGDState(None, 2, start_powerSGD_iter=2), lambda state, bucket: injecting(state, bucket))  # fmt: skip # noqa: E501
    sharded(ddp, rank)
    weights |= {f"torch.{n}": p.detach().clone() for n, p in ddp.module.named_parameters()}
    save_file(weights, folder / f"rank-{rank}.safetensors")
    (folder / f"rank-{rank}.json").write_text(json.dumps(told))


def sharded(ddp: DDP, rank: int, steps: int = STEPS) -> list[float]:
    """The loss on all data, from training on data of each process's own."""
    optimizer, losses = torch.optim.SGD(ddp.parameters(), lr=0.2), []
    x, y = batch(10_000, 64)
    for step in range(steps):
        own = batch(WORLD * step + rank, 16)
        optimizer.zero_grad()
        (ddp(own[0]) - own[1]).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            losses.append((ddp.module(x) - y).square().mean().item())
    return losses


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    """Weights and figures of both processes."""
    folder = tmp_path_factory.mktemp("two")
    with tiny.two_processes(worker, folder):
        pass
    return [
        (load_file(folder / f"rank-{rank}.safetensors"), json.loads((folder / f"rank-{rank}.json").read_text()))
        for rank in range(WORLD)
    ]


Two = list[tuple[dict[str, Tensor], dict[str, Any]]]


def test_two_processes_have_the_same_weights_and_settings(two: Two) -> None:
    (first, told), (second, also) = two
    assert all(torch.equal(p, second[name]) for name, p in first.items())
    for word in SMALL:
        assert told[word]["dials"] == also[word]["dials"]
        assert told[word]["nbytes"] < told[word]["uniform"]
        assert not torch.equal(first[f"{word}.first.weight"], first["plain.first.weight"])


def test_the_first_process_may_choose_by_its_own_gradients(two: Two) -> None:
    (_, told), (_, also) = two
    assert told["own"]["dials"] == also["own"]["dials"] != dict.fromkeys(COMPRESSED, 3)
    assert told["own"]["sent"]["planning"] < 1000


def test_two_processes_learn_nearly_as_well_as_uncompressed(two: Two) -> None:
    _, told = two[0]
    x, y = batch(10_000, 64)
    start = (net()(x) - y).square().mean().item()
    assert told["plain"]["loss"] < 0.5 * start
    for word in SMALL:
        assert told[word]["loss"] == pytest.approx(told["plain"]["loss"], rel=0.02), word


def test_two_processes_send_what_they_say(two: Two) -> None:
    for rank, (_, told) in enumerate(two):
        for word in SMALL:
            sent, names = told[word]["sent"], compressed(word)
            whole, rest = (sum(p.nbytes for n, p in net().named_parameters() if n not in out) for out in ((), names))
            # a broadcast is given its tensor on both processes, and counted where it comes from
            assert told[word]["given"] == sum(sent.values()) + (0 if rank == 0 else 4 * 8 * len(names))
            assert sent["start"] == 5 * whole
            assert sent["dense"] == 45 * rest
            assert sent["compressed"] < 0.5 * 45 * (whole - rest)


def test_at_a_fixed_rank_it_is_torchs_powersgd(two: Two) -> None:
    weights, _ = two[0]
    for name, p in net().named_parameters():
        ours, theirs = weights[f"ours.{name}"], weights[f"torch.{name}"]
        assert float((ours - theirs).norm()) < 1e-4 * float((theirs - p.detach()).norm()), name
