"""LaMDA: a core whose projections freeze, and LaMDA++'s ranks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from lone import gaussian, layer_of, learning, lone, update_of
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from eckart import adapters
from eckart.adapters.spectral_ranks import ranks_at_one_energy
from eckart.testing.adapters import small_model

STARTS = ["residual", "additive", "lora"]


@pytest.mark.parametrize("start", STARTS)
def test_start_is_exact(start: str) -> None:
    W, x = gaussian(12, 8), gaussian(5, 8, seed=1)
    layer = lone("lamda", W, rank=3, start=start, scale=2.0)
    assert torch.equal(layer(x), x @ W.T)
    core = update_of(layer)
    B, C, A = core.B.detach(), core.C.detach(), core.A
    svd = torch.linalg.svd(W, full_matrices=False)
    if start == "residual":
        best = svd.U[:, :3] * svd.S[:3] @ svd.Vh[:3]
        torch.testing.assert_close(2 * B @ C @ A, best, rtol=0, atol=1e-5)
        torch.testing.assert_close(core.start, B @ C)
    else:
        assert not bool((C if start == "additive" else B).any())


def run(steps: int, rank: int = 6, total: int = 40, decay: float = 0.1) -> tuple[Any, list[dict[str, Tensor]], Any]:
    """What B, C and A were before each step of AdamW and after the last one."""
    model = adapters.adapt(nn.Sequential(layer_of(gaussian(12, 8))), "lamda", rank=rank, freeze=0.5)
    core: Any = next(iter(adapters.updates(model).values()))
    optimizer = torch.optim.AdamW(core.parameters(), 0.01, weight_decay=decay)
    schedule = adapters.schedule(model)
    schedule.begin(optimizer, total)
    seen = [{n: t.clone() for n, t in core.state_dict().items()}]
    for step in range(steps):
        (model(gaussian(4, 8, seed=step)) - 1).square().sum().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seen.append({n: t.clone() for n, t in core.state_dict().items()})
    return model, seen, optimizer


def test_columns_freeze_one_after_the_other_under_momentum_and_decay() -> None:
    model, seen, optimizer = run(40)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 36
    for step, (before, after) in enumerate(pairwise(seen)):
        frozen = min(6, 6 * step // 20)
        moved = (before["B"] != after["B"]).any(0)
        assert moved.tolist() == [False] * frozen + [True] * (6 - frozen), f"step {step}"
        assert not torch.equal(before["C"], after["C"])
        assert torch.equal(before["A"], after["A"])
    assert torch.equal(seen[20]["B"], seen[40]["B"])
    held = [t for s in optimizer.state.values() for t in s.values() if t.dim() > 0]
    assert sum(t.numel() for t in held) == 2 * 36, "B's moments are gone"


def test_trained_numbers_before_and_after() -> None:
    for steps, expected in ((19, 36 + 12 * 6), (20, 36)):
        model, _, _ = run(steps)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    model.set_adapter("default")  # PEFT lets all learn again
    assert [n for n, p in model.named_parameters() if p.requires_grad and n.endswith("B")] == []


def test_a_resumed_run_is_the_run_that_was_not_cut() -> None:
    _, whole, _ = run(30)
    model, _, optimizer = run(23)
    core: Any = next(iter(adapters.updates(model).values()))
    other: Any = adapters.adapt(nn.Sequential(layer_of(gaussian(12, 8))), "lamda", rank=6, freeze=0.5)
    again: Any = next(iter(adapters.updates(other).values()))
    again.load_state_dict(core.state_dict())
    resumed = torch.optim.AdamW(again.parameters(), 0.01, weight_decay=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    schedule = adapters.schedule(other)
    schedule.load_state_dict({"steps": 23})
    schedule.begin(resumed, 40)
    for step in range(23, 30):
        (other(gaussian(4, 8, seed=step)) - 1).square().sum().backward()
        resumed.step()
        schedule.step()
        resumed.zero_grad()
    assert all(torch.equal(again.state_dict()[n], whole[-1][n]) for n in ("A", "B", "C"))


def test_little_waits_for_the_backward_pass() -> None:
    tokens, out, in_, rank = 50, 64, 48, 4
    x = gaussian(tokens, in_)

    def saved(model: nn.Module) -> int:
        seen: dict[int, int] = {}

        def keep(t: Tensor) -> Tensor:
            if t.dim() and t.shape[0] == tokens:
                seen[t.data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = model(x)
        assert y.requires_grad
        return sum(seen.values())

    model = adapters.adapt(nn.Sequential(layer_of(gaussian(out, in_))), "lamda", rank=rank, freeze=0.1)
    before = saved(model)
    schedule = adapters.schedule(model)
    schedule.steps = 10
    schedule.begin(torch.optim.SGD(model.parameters(), 0.1), 100)
    lora = get_peft_model(nn.Sequential(layer_of(gaussian(out, in_))), LoraConfig(r=rank, target_modules=["0"]))
    assert 0 < saved(model) <= before <= 2 * tokens * rank
    assert saved(lora) >= tokens * in_


def test_it_reaches_what_its_rows_see_and_nothing_else() -> None:
    W = gaussian(12, 8)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    x = gaussian(64, 8, seed=4)

    def loss(target: Tensor) -> float:
        layer = lone("lamda", W, rank=3)
        parameters = learning(layer)
        optimizer = torch.optim.Adam([parameters["C"]], 0.05)
        value = first = torch.zeros(())
        for step in range(400):
            optimizer.zero_grad()
            value = (layer(x) - x @ target.T).square().mean()
            first = value if step == 0 else first
            value.backward()
            optimizer.step()
        return float(value.detach() / first.detach())

    assert loss(W + U[:, :3] @ gaussian(3, 3, seed=2) @ Vh[:3]) < 1e-4
    change = gaussian(12, 5, seed=3) @ Vh[3:]
    white = torch.linalg.qr(x).Q * 8
    x = white
    assert loss(W + change) > 0.99


def test_ranks_follow_the_spectra_and_keep_their_mean() -> None:
    flat = torch.ones(16)
    steep = 0.5 ** torch.arange(16)
    two = torch.cat([torch.tensor([3.0, 2.0]), torch.zeros(14)])
    ranks = ranks_at_one_energy({"flat": flat, "steep": steep, "two": two}, 6)
    assert sum(ranks.values()) == 18
    assert ranks["two"] == 3 <= ranks["steep"] < ranks["flat"] <= 12
    assert ranks_at_one_energy({"a": flat, "b": 7 * flat}, 4) == {"a": 4, "b": 4}
    for mean in range(1, 16):
        found = ranks_at_one_energy({"flat": flat, "steep": steep, "short": flat[:15]}, mean)
        assert sum(found.values()) == 3 * mean
    with pytest.raises(ValueError, match="short: a mean rank of 16"):
        ranks_at_one_energy({"flat": flat, "short": flat[:15]}, 16)


def test_adaptive_ranks_are_saved_and_built_again(tmp_path: Any) -> None:
    from peft import PeftModel

    base = small_model()
    low = base.model.layers[0].mlp.up_proj.weight
    low.data = gaussian(24, 2) @ gaussian(2, 16, seed=1)
    again = small_model()
    again.load_state_dict(base.state_dict())
    model = adapters.adapt(base, "lamda", rank=4, adaptive=True)
    ranks = {n: len(u.C) for n, u in adapters.updates(model).items()}  # type: ignore[arg-type]
    assert sum(ranks.values()) == 4 * len(ranks)
    assert ranks["model.layers.0.mlp.up_proj"] == 2
    assert len(set(ranks.values())) > 1
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(again, tmp_path)
    assert {n: len(u.C) for n, u in adapters.updates(other).items()} == ranks  # type: ignore[arg-type]


def test_bad_settings_are_named() -> None:
    for settings in ({"rank": 0}, {"scale": 0.0}, {"freeze": 0.0}, {"freeze": 1.1}, {"start": "pissa"}):
        with pytest.raises(ValueError, match=rf"lamda\({next(iter(settings))}="):
            lone("lamda", gaussian(6, 6), **settings)
    with pytest.raises(ValueError, match="0: rank 7 is more than a matrix of shape"):
        lone("lamda", gaussian(6, 9), rank=7)
    model = adapters.adapt(nn.Sequential(layer_of(gaussian(6, 6))), "lamda", rank=2)
    with pytest.raises(ValueError, match="say how many optimiser steps"):
        adapters.schedule(model).begin(torch.optim.SGD(model.parameters(), 0.1))
