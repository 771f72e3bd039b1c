"""SST against its card: exact starts, enhanced gradients, sampling, what stays frozen, state, and saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import nn
from transformers import AutoModelForCausalLM

import tiny
from eckart.testing import gaussian
from eckart.training import structure
from eckart.training.base import generator_of
from eckart.training.sst import SST, SpectralMatrix, spectral_product

OUT, IN, RANK = 9, 7, 2


def matrix(model: nn.Module, name: str = "0") -> SpectralMatrix:
    module: Any = model.get_submodule(name)
    assert isinstance(module.matrix, SpectralMatrix)
    return module.matrix


def layer(dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[nn.Sequential, Any]:
    model = toys.mlp(IN, OUT, dtype=dtype)
    return model, structure(model, "sst", **{"rank": RANK, "every": 3, "warmup": 0, **settings})


def test_start_and_decomposition_leave_the_output() -> None:
    model = toys.mlp(IN, OUT)
    x = gaussian(5, IN, seed=1)
    wanted = model(x).detach()
    structure(model, "sst", rank=RANK)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    m = matrix(model)
    m.activate(torch.tensor([5, 1]))
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        m.u.add_(0.1 * gaussian(OUT, RANK, seed=3))
        m.v.add_(0.1 * gaussian(RANK, IN, seed=4))
    m.retract()
    U, V = m.vectors()
    torch.testing.assert_close(U.norm(dim=0), torch.ones(IN))
    torch.testing.assert_close(V.norm(dim=1), torch.ones(IN))
    assert float((U.T @ U - torch.eye(IN)).detach().abs().max()) > 1e-2
    before = model(x).detach()
    m.decompose_again()
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    U, V = m.vectors()
    for gram in (U.T @ U, V @ V.T):
        torch.testing.assert_close(gram, torch.eye(IN), rtol=0, atol=1e-5)


@pytest.mark.parametrize("small", [1.0, 1e-8])
def test_enhanced_gradients_are_autograds_over_s(small: float) -> None:
    x = gaussian(2, 4, IN, seed=1, dtype=torch.float64).requires_grad_()
    u, v = gaussian(OUT, 3, seed=2, dtype=torch.float64), gaussian(3, IN, seed=3, dtype=torch.float64)
    s = torch.tensor([2.0, 0.5, small], dtype=torch.float64)
    weight = gaussian(2, 4, OUT, seed=4, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (u, s, v)]
    y, wanted = spectral_product(x, u, s, v), F.linear(x, u * s @ v)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    du, ds, dv, dx = torch.autograd.grad((y * weight).sum(), [*inputs, x])
    eu, es, ev, ex = torch.autograd.grad((wanted * weight).sum(), [*inputs, x])
    torch.testing.assert_close(ds, es, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dx, ex, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(du, eu / s, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dv, ev / s[:, None], rtol=1e-6, atol=1e-6)


def test_without_enhancement_gradients_are_autograds() -> None:
    model, _ = layer(torch.float64, enhanced=False)
    m, x = matrix(model), gaussian(4, IN, seed=1, dtype=torch.float64)
    found = torch.autograd.grad(m(x).square().sum(), [m.u, m.s, m.v])
    wanted = torch.autograd.grad((x @ m.dense().T).square().sum(), [m.u, m.s, m.v])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_pairs_are_drawn_by_their_values() -> None:
    model, _ = layer()
    m = matrix(model)
    m.s.data = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5, 0.2, 0.0])
    counts = torch.zeros(IN)
    generator = generator_of(0)
    for _ in range(4000):
        pairs = m.draw(generator)
        assert len(set(pairs.tolist())) == RANK
        counts[pairs] += 1
    assert counts.tolist() == sorted(counts.tolist(), reverse=True)
    assert counts[-1] == 0
    m.s.data = torch.tensor([0.0, 0, 0, 5.0, 0, 0, 0])
    assert 3 in m.draw(generator).tolist()
    m.s.data.zero_()
    assert len(set(m.draw(generator).tolist())) == RANK


def test_frozen_vectors_stay_and_every_value_learns() -> None:
    model, schedule = layer()
    m, data = matrix(model), toys.regression(IN, OUT)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule.begin(optimizer)
    active = sorted(m.order[:RANK].tolist())
    frozen = [i for i in range(IN) if i not in active]
    U, V = (t.detach().clone() for t in m.vectors())
    for _ in range(2):
        values = m.s.detach().clone()
        F.mse_loss(model(data[0]), data[1]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        assert bool((m.s != values).all())
    newU, newV = m.vectors()
    assert torch.equal(newU[:, frozen], U[:, frozen])
    assert torch.equal(newV[frozen], V[frozen])
    assert not bool((newU[:, active] == U[:, active]).any())
    held = {id(p): p for p in (m.u, m.v, m.s)}
    floats = sum(p.numel() for p in held.values()) + sum(s[k].numel() for p, s in optimizer.state.items() if id(p) in held for k in ("exp_avg", "exp_avg_sq"))  # fmt: skip # noqa: E501
    assert floats == 3 * (RANK * (OUT + IN) + IN)


def test_a_swap_makes_the_optimiser_forget_and_a_round_ends_orthogonal() -> None:
    model, schedule = layer(every=2)
    m, data = matrix(model), toys.regression(IN, OUT)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule.begin(optimizer)
    kept: list[bool] = []
    for step in range(1, 9):
        F.mse_loss(model(data[0]), data[1]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        assert (m.u in optimizer.state) == (step % 2 != 0)
        kept.append(m.s in optimizer.state)
    assert kept == [True] * 7 + [False]  # four iterations of two steps are a round
    U = m.vectors()[0]
    torch.testing.assert_close(U.T @ U, torch.eye(IN), rtol=0, atol=1e-5)
    assert bool((m.s[1:] <= m.s[:-1]).all())


def test_a_value_stops_at_zero_and_can_come_back() -> None:
    model, schedule = layer()
    m = matrix(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule.begin(optimizer)
    for sign in (100.0, -0.5):
        m.s.grad = torch.zeros_like(m.s)
        m.s.grad[0] = sign
        optimizer.step()
        schedule.step()
        assert float(m.s.detach().min()) >= 0
        assert float(m.s.detach()[0]) == pytest.approx(0.0 if sign > 0 else 0.5)


def test_the_rate_rises_after_a_swap_and_is_given_back() -> None:
    model, schedule = layer(every=6, warmup=4)
    seen = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.8)
    schedule.begin(optimizer)
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    for _ in range(8):
        optimizer.step()
        schedule.step()
        assert optimizer.param_groups[0]["lr"] == 0.8
    assert seen == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.2, 0.4])


def test_learns_directions_that_few_trained_factors_do_not_reach() -> None:
    """As few vectors at a time as low-rank factors have, but all values and all pairs in turn: a lower loss."""
    data, losses = toys.regression(24, 24), {}
    for name in ("sst", "low"):
        model = toys.mlp(24, 48, 24)
        schedule = structure(model, "sst", rank=4, every=20, warmup=0) if name == "sst" else structure(model, form="low_rank(rank=4)")  # fmt: skip # noqa: E501
        toys.train(model, schedule, data, 250, lr=5e-3)
        losses[name] = toys.loss(model, data)
    assert losses["sst"] < 0.8 * losses["low"]


def test_resumes_bit_for_bit() -> None:
    data = toys.regression(IN, OUT)
    whole, schedule = layer()
    toys.train(whole, schedule, data, 13)
    cut, schedule = layer()
    optimizer = toys.train(cut, schedule, data, 7, total=13)
    again, second = layer(seed=0)
    again.load_state_dict(cut.state_dict())
    second.load_state_dict(schedule.state_dict())
    other = torch.optim.Adam(again.parameters(), lr=3e-3)
    other.load_state_dict(optimizer.state_dict())
    toys.train(again, second, data, 13, optimizer=other, start=7)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_is_saved_and_loaded_by_plain_transformers(keep: float, tmp_path: Path) -> None:
    model = tiny.build("llama", num_hidden_layers=1)
    batch = tiny.batches((2,))[0]
    wanted = model(**batch).logits.detach()
    schedule = structure(model, "sst", rank=4, keep=keep)
    torch.testing.assert_close(model(**batch).logits, wanted, rtol=1e-4, atol=1e-4)
    schedule.finish()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, rtol=1e-6, atol=1e-6)
    if keep == 1.0:
        torch.testing.assert_close(again(**batch).logits, wanted, rtol=1e-4, atol=1e-4)
        assert type(again.model.layers[0].mlp.up_proj) is nn.Linear
    else:
        assert again.config.quantization_config.modules


def test_refusals() -> None:
    for settings, message in (
        ({"rank": 0}, "rank=0.*at least 1"),
        ({"every": 0}, "every=0.*at least 1"),
        ({"warmup": -1}, "warmup=-1.*at least 0"),
        ({"keep": 0.0}, "a share above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            SST(**settings)
    with pytest.raises(ValueError, match=r"0: sst\(rank=8\) does not fit.*at most 7"):
        layer(rank=8)
    model = toys.mlp(IN, OUT)
    model[0].weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="the weight of 0"):
        structure(model, "sst", rank=RANK)
    with pytest.raises(ValueError, match="give it, begin"):
        layer()[1].begin()
