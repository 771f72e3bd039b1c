"""DP-SGD and its accounts: clipping of single examples, noise, and epsilon."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from federated import accuracy, adapted, drawn, federation, loss, network, squares
from scipy.special import comb, ndtr
from torch import Tensor, nn

from eckart.adapters.federation import LocalClient, Privacy, Steps, epsilon, noise_for
from eckart.adapters.federation.accountant import ORDERS, chosen, rdp_epsilon, renyi
from eckart.adapters.federation.privacy import (
    Gradients,
    clipped_sum,
    each_gradient,
    gradient,
    gradients_together,
    noisy,
    taken,
)
from eckart.testing.adapters import batches, small_model

needs_opacus = pytest.mark.skipif(importlib.util.find_spec("opacus") is None, reason="opacus is not installed")


def line(seed: int = 0) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(5, 3)


def points(count: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, n, generator=generator) for name, n in (("x", 5), ("y", 3))}


def distance(a: Gradients, b: Gradients, times: float = 1.0) -> float:
    return times * float(torch.stack([(a[n] - b[n]).norm() for n in a]).norm())


def as_described(model: nn.Module, data: Any, clip: float) -> Gradients:
    privacy = Privacy(clip=clip, noise=0.0, mode="as described")
    return privacy.gradients(model, squares, data, len(data["x"]), np.random.default_rng(0))


def test_one_example_moves_the_sum_by_its_clip_and_the_literal_reading_by_more() -> None:
    model, pool, clip, size = line(), points(120), 0.5, 6
    generator = torch.Generator().manual_seed(1)
    literal = 0.0
    for _ in range(100):
        rows = torch.randperm(120, generator=generator)[: size + 1]
        one, other = taken(pool, rows[:-1]), taken(pool, rows[1:])  # the first is replaced by the last
        sums = [clipped_sum(model, squares, d, clip) for d in (one, other, taken(pool, rows[1:-1]))]
        assert distance(sums[0], sums[1]) <= 2 * clip * (1 + 1e-5)
        assert distance(sums[0], sums[2]) <= clip * (1 + 1e-5)
        change = distance(as_described(model, one, clip), as_described(model, other, clip), times=size)
        literal = max(literal, change)
    assert literal > 2 * clip


@pytest.mark.parametrize("at_once", [None, 3])
def test_a_planted_outlier_is_clipped_and_the_others_are_left_alone(at_once: int | None) -> None:
    model, honest = line(), points(8)
    each = list(each_gradient(model, squares, honest))
    norms = [math.sqrt(sum(float(t.square().sum()) for t in g.values())) for g in each]
    clip = sorted(norms)[4]  # about half are clipped
    planted = {n: torch.cat([t, 1e4 * torch.ones(1, t.shape[1])]) for n, t in honest.items()}
    without, beside = (clipped_sum(model, squares, d, clip, at_once) for d in (honest, planted))
    assert distance(beside, without) == pytest.approx(clip, rel=1e-4)
    expected = {n: sum(g[n] * min(1.0, clip / norm) for g, norm in zip(each, norms, strict=True)) for n in without}
    assert distance(without, expected) < 1e-4  # type: ignore[arg-type]
    literal, outlier = as_described(model, planted, clip), gradient(model, squares, taken(planted, torch.tensor([8])))
    flat = [torch.cat([g[n].flatten() for n in g]) for g in (literal, outlier)]
    assert float(torch.cosine_similarity(*flat, dim=0)) > 0.999, "the mean's clip leaves nothing but the outlier"


def test_examples_together_have_the_gradients_that_they_have_one_by_one() -> None:
    model, data = adapted("dp_lora"), drawn(5, seed=3)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1
    together = gradients_together(model, loss, data)
    for i, g in enumerate(each_gradient(model, loss, data)):
        for name in g:
            torch.testing.assert_close(together[name][i], g[name], rtol=1e-4, atol=1e-6)
    sums = [clipped_sum(model, loss, data, 0.3, at_once) for at_once in (None, 2)]
    for name in sums[0]:
        torch.testing.assert_close(sums[0][name], sums[1][name], rtol=1e-4, atol=1e-6)


def test_a_language_models_examples_add_up_to_its_batch() -> None:
    from eckart import adapters

    model = adapters.adapt(small_model(), "dp_lora", rank=2)
    ids = batches(1)[0]["input_ids"]
    mask = torch.tensor([[1] * 9, [1] * 9])
    client = LocalClient(model, {"input_ids": ids, "labels": ids, "attention_mask": mask}, seed=0, batch=2)
    whole = gradient(model, client.loss, client.data)
    parts = clipped_sum(model, client.loss, client.data, math.inf)
    assert any(bool(g.any()) for g in whole.values())
    for name in whole:
        torch.testing.assert_close(parts[name] / 2, whole[name], rtol=1e-4, atol=1e-7)


def test_noise_has_its_variance_whatever_the_batch_and_is_new_for_each_client_and_step() -> None:
    sigma, clip = 1.5, 0.8
    zeros = {"a": torch.zeros(2000), "b": torch.zeros(5, 3)}
    drawn_once = noisy(zeros, sigma * clip, np.random.default_rng(0))["a"]
    assert float(drawn_once.var()) == pytest.approx((sigma * clip) ** 2, rel=0.1)
    model, privacy = line(), Privacy(clip=clip, noise=sigma)
    generator = np.random.default_rng(1)
    empty = taken(points(1), torch.arange(0))
    draws = torch.stack([torch.cat([g.flatten() for g in privacy.gradients(model, squares, empty, 4, generator).values()]) for _ in range(2000)])  # fmt: skip # noqa: E501
    assert float((4 * draws).square().mean()) == pytest.approx((sigma * clip) ** 2, rel=0.05)
    noises = []
    for data in (points(3), points(5, seed=8)):
        found = privacy.gradients(model, squares, data, 4, np.random.default_rng(7))
        plain = clipped_sum(model, squares, data, clip)
        noises.append({n: 4 * found[n] - plain[n] for n in found})
    assert distance(*noises) < 1e-4
    network = adapted("dp_lora")
    one, other = (LocalClient(network, drawn(20, 1), seed=k, batch=1, lr=1.0, loss=loss, privacy=Privacy(1e-6, 1e6)) for k in (1, 2))  # fmt: skip # noqa: E501
    from eckart.adapters.federation.state import state_of

    start = state_of(network)
    replies = [client.train(start, number).state["0.B"] for client in (one, other) for number in (1, 2)]
    for i, a in enumerate(replies):
        for b in replies[:i]:
            assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.5
    assert torch.equal(one.train(start, 1).state["0.B"], replies[0]), "a round is a function of its number"


def test_examples_are_drawn_as_the_accounts_assume() -> None:
    generator = np.random.default_rng(0)
    certified, literal = Privacy(), Privacy(mode="as described")
    drawn_rows = [certified.rows(40, 10, generator) for _ in range(400)]
    sizes = torch.tensor([len(r) for r in drawn_rows], dtype=torch.float)
    assert float(sizes.mean()) == pytest.approx(10, rel=0.1)
    assert float(sizes.var()) == pytest.approx(40 * 0.25 * 0.75, rel=0.3)
    counts = torch.bincount(torch.cat(drawn_rows), minlength=40)
    assert 60 < int(counts.min()) <= int(counts.max()) < 140
    assert {len(literal.rows(40, 10, generator)) for _ in range(20)} == {10}


@needs_opacus
def test_gradients_of_single_examples_are_those_of_opacus() -> None:
    from opacus import GradSampleModule

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 2, bias=False), nn.Linear(2, 3, bias=False))
    data = points(6)
    ours = gradients_together(model, squares, data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs: Any = GradSampleModule(model)
        squares(theirs, data).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad_sample, rtol=1e-4, atol=1e-6)


@needs_opacus
@pytest.mark.parametrize(("noise", "rate", "steps"), [(1.1, 256 / 60000, 14000), (0.6, 0.01, 100), (2.0, 0.1, 300), (4.0, 0.5, 20), (1.0, 1.0, 5)])  # fmt: skip # noqa: E501
def test_epsilon_is_that_of_opacus(noise: float, rate: float, steps: int) -> None:
    from opacus.accountants import PRVAccountant, RDPAccountant

    history, theirs = [Steps(noise, rate, steps)], RDPAccountant()
    theirs.history = [(noise, rate, steps)]
    assert rdp_epsilon(history, 1e-5) == pytest.approx(theirs.get_epsilon(1e-5, alphas=list(ORDERS)), rel=1e-6)
    assert rdp_epsilon(history, 1e-5) == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-4)
    if steps == 300:
        tighter = PRVAccountant()
        tighter.history = theirs.history
        assert chosen("auto") == "prv"
        assert epsilon(history, 1e-5) == pytest.approx(tighter.get_epsilon(1e-5), rel=1e-4)
        assert epsilon(history, 1e-5) < epsilon(history, 1e-5, "rdp")


def test_the_divergence_of_a_step_is_that_of_the_formulas() -> None:
    for noise, rate in ((0.7, 0.2), (1.0, 0.01), (3.0, 0.6)):
        for order in (2, 5, 20):  # Mironov et al., 2019, equation 7
            ks = range(order + 1)
            total = sum(comb(order, k, exact=True) * (1 - rate) ** (order - k) * rate**k * math.exp((k * k - k) / (2 * noise**2)) for k in ks)  # fmt: skip # noqa: E501
            assert renyi(noise, rate, float(order)) == pytest.approx(math.log(total) / (order - 1), rel=1e-9)
        assert renyi(noise, 1.0, 3.5) == 3.5 / (2 * noise**2)
    few = 1e-4  # to second order in the rate
    assert renyi(1.3, few, 2.5) == pytest.approx(2.5 / 2 * few**2 * math.expm1(1 / 1.3**2), rel=1e-2)
    assert renyi(1.3, 0.1, 2.49) < renyi(1.3, 0.1, 2.5) < renyi(1.3, 0.1, 2.51)


def test_without_sampling_epsilon_is_a_little_above_the_exact_one() -> None:
    def delta_of(eps: float, s: float) -> float:  # Balle and Wang, 2018, theorem 8
        return float(ndtr(0.5 / s - eps * s) - math.exp(eps) * ndtr(-0.5 / s - eps * s))

    for noise, steps in ((2.0, 1), (4.0, 10), (10.0, 40)):
        found = rdp_epsilon([Steps(noise, 1.0, steps)], 1e-5)
        s = noise / math.sqrt(steps)
        low, high = 0.0, 100.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (middle, high) if delta_of(middle, s) > 1e-5 else (low, middle)
        assert high < found < 1.15 * high


def test_epsilon_grows_with_steps_and_falls_with_noise() -> None:
    def of(noise: float = 1.2, rate: float = 0.1, steps: int = 50) -> float:
        return epsilon([Steps(noise, rate, steps)], 1e-4, "rdp")

    assert of() < of(steps=51) < of(steps=100)
    assert of() > of(noise=1.3) > of(noise=5.0)
    assert of() < of(rate=0.2)
    assert of() == pytest.approx(epsilon([Steps(1.2, 0.1, 20), Steps(1.2, 0.1, 30)], 1e-4, "rdp"), rel=1e-12)
    assert of() < epsilon([Steps(1.2, 0.1, 50), Steps(3.0, 0.2, 50)], 1e-4, "rdp")
    assert epsilon([], 1e-4) == 0
    assert of(noise=0.0) == math.inf
    noise = noise_for(3.0, 1e-4, 0.1, 50, "rdp")
    assert 3.0 * 0.98 < of(noise=noise) <= 3.0


def test_accounts_hold_all_local_steps_of_all_rounds_with_each_clients_own_rate() -> None:
    parts = [drawn(20, 1), drawn(50, 2)]
    server = federation(adapted("dp_lora"), parts, batch=2, steps=2, privacy=Privacy(1.0, 1.5, vectorised=True))
    server.run(2)
    for part, account in zip(parts, server.privacy(1e-3, "rdp"), strict=True):
        assert account.steps == 4
        assert account.epsilon == pytest.approx(epsilon([Steps(1.5, 2 / len(part["y"]), 4)], 1e-3, "rdp"))
    first, second = server.privacy(1e-3, "rdp")
    assert first.epsilon > second.epsilon  # type: ignore[operator]
    assert all(r.loss is None for r in server.rounds), "the loss is as private as the gradients"
    with pytest.raises(ValueError, match=r"client 0 has 20 examples, and delta must lie between 0 and 0\.05"):
        server.privacy(0.05)


def test_the_literal_reading_reports_no_epsilon() -> None:
    privacy = Privacy(1.0, 2.0, mode="as described")
    assert not privacy.certified
    server = federation(adapted("dp_lora"), [drawn(20, 1), drawn(20, 2)], batch=4, privacy=privacy)
    server.run(1)
    assert [a.epsilon for a in server.privacy(1e-3)] == [None, None]
    assert all(a.said.startswith("not certified") for a in server.privacy(1e-3))


def test_noise_hides_who_was_there_and_still_lets_learn() -> None:
    """Canaries have random labels: how often is the loss of one below that of another that was never seen?"""
    generator = torch.Generator().manual_seed(5)

    def canaries(count: int) -> dict[str, Tensor]:
        x = 1.5 * torch.randn(count, 24, generator=generator)
        return {"x": x, "y": torch.randint(0, 6, (count,), generator=generator)}

    def losses(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(data["x"]), data["y"], reduction="none").detach()

    seen, never, clean, rounds = canaries(20), canaries(200), drawn(100, 3), 30
    data = {n: torch.cat([clean[n], seen[n]]) for n in clean}
    private = Privacy(1.0, noise_for(8.0, 1e-3, 0.25, rounds, "rdp"), vectorised=True, at_once=64)
    told, right = [], []
    for privacy, lr, steps in ((None, 0.3, 4), (private, 1.0, 1)):
        model = adapted("dp_lora", rank=6)
        server = federation(model, [data], batch=30, lr=lr, steps=steps, privacy=privacy)
        server.run(rounds)
        told.append(float((losses(model, seen)[:, None] < losses(model, never)).float().mean()))
        right.append(accuracy(model, drawn(400, 9)))
    assert server.privacy(1e-3, "rdp")[0].epsilon == pytest.approx(8.0, rel=0.02)
    assert told[0] > 0.85
    assert told[1] < told[0] - 0.1
    assert right[1] > 0.6 > accuracy(network(), drawn(400, 9))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Privacy(clip=0.0), r"privacy\(clip=0\.0\)"),
        (lambda: Privacy(clip=-1.0), r"privacy\(clip=-1\.0\)"),
        (lambda: Privacy(noise=-0.1), r"privacy\(noise=-0\.1\)"),
        (lambda: Privacy(clip=math.inf, noise=1.0), "noise is measured in clipping norms"),
        (lambda: Privacy(mode="strict"), r"'certified' or 'as described'"),
        (lambda: Privacy(at_once=0), r"privacy\(at_once=0\)"),
        (lambda: Steps(1.0, 0.0, 3), "the sampling rate is above 0"),
        (lambda: Steps(1.0, 1.5, 3), "the sampling rate is above 0"),
        (lambda: epsilon([], 1.0), "delta=1.0"),
        (lambda: epsilon([Steps(1.0, 0.1, 1)], 1e-5, "gdp"), "accountant='gdp'"),
        (lambda: noise_for(-1.0, 1e-5, 0.1, 10), "epsilon=-1.0"),
        (lambda: noise_for(1e-9, 1e-5, 1.0, 10, "rdp"), "no noise gives epsilon"),
    ],
)
def test_bad_settings_are_named(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_what_cannot_be_private_is_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"1 is a BatchNorm1d, which mixes the examples"):
        Privacy().gradients(model, squares, points(4), 4, np.random.default_rng(0))
    broken = points(3)
    broken["x"][1] = math.nan
    with pytest.raises(RuntimeError, match="the gradient of an example is not finite"):
        clipped_sum(line(), squares, broken, 1.0)
    with pytest.raises(ValueError, match="counts examples, and these differ"):
        clipped_sum(line(), squares, {"x": torch.zeros(3, 5), "y": torch.zeros(2, 3)}, 1.0)

    class Looking(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if bool(x.sum() > 0) else x

    with pytest.raises(RuntimeError, match=r"Looking cannot be vectorised .*Privacy\(vectorised=False\)"):
        gradients_together(Looking(5, 3), squares, points(3))


@pytest.mark.skipif(importlib.util.find_spec("opacus") is not None, reason="opacus is installed")
def test_the_accountant_of_opacus_is_asked_for_by_name() -> None:
    assert chosen("auto") == "rdp"
    with pytest.raises(ImportError, match=r"eckart\[privacy\]"):
        epsilon([Steps(1.0, 0.1, 1)], 1e-5, "prv")
