"""IncreLoRA: where ranks grow, what the optimiser has of new components, scores, resuming, and what is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lone import gaussian, lone, update_of
from peft import LoraConfig, PeftModel, get_peft_model
from planted import Rows, change, fit, loss, teach
from torch import Tensor, nn

from eckart import adapters
from eckart.adapters.growing import READY
from eckart.adapters.orthogonality import pull
from eckart.testing.adapters import adapted, answers, batches, near, small_model, state

STEPS = 8


def rows(count: int = 4, **settings: Any) -> Any:
    words = {"rank": 2, "alpha": 4.0, "warmup": 10, "every": 5, "top": 1}
    return adapters.adapt(Rows(count), "increlora", target_modules=r"layers\.\d", **{**words, **settings})


def adam(model: Any, lr: float = 2e-2, weight_decay: float = 0.0) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, weight_decay=weight_decay)


def ranks(model: Any) -> list[int]:
    return [u.rank for u in adapters.updates(model).values()]


def go(model: Any, schedule: Any, optimizer: Any, steps: range, total: int = STEPS) -> list[list[int]]:
    """Train, and note the ranks after every step."""
    model.train()
    schedule.steps = steps.start
    schedule.begin(optimizer, total)
    noted = []
    for step in steps:
        for part in range(2):
            batch = batches(1, seed=2 * step + part)[0]
            model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        noted.append(ranks(model))
    schedule.release()
    return noted


def test_it_starts_at_the_model_but_for_what_waits() -> None:
    plain = answers(small_model())
    assert torch.equal(answers(adapted("increlora", advance=False)), plain)
    waiting = adapted("increlora", alpha=16.0)
    assert not torch.equal(answers(waiting), plain)
    assert near(answers(waiting), plain, 1e-5)
    for layer in (m for m in waiting.modules() if hasattr(m, "updates")):
        update = layer.updates["default"]
        B, A = torch.cat(list(update.B), 1), torch.cat(list(update.A))
        assert near(update.delta(layer.host), 16 * READY * B[:, 1:2] @ A[1:2], 1e-9)


def test_ranks_gather_where_the_change_is_and_add_up_to_the_target() -> None:
    teacher = teach([change(r, seed=5) for r in (0, 6)])
    model = rows(2, rank=4)
    schedule, optimizer = adapters.schedule(model), adam(model)
    fit(model, teacher, 150, schedule, optimizer, 2)
    found = ranks(model)
    assert sum(found) == 8
    assert found[1] >= 6
    schedule.finish()
    assert model.peft_config["default"].rank_pattern == {"layers.0": found[0], "layers.1": found[1]}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 8 * (8 + 8 + 1)


def test_growing_beats_one_rank_for_all_at_as_many_parameters() -> None:
    teacher = teach([change(r, seed=5) for r in (6, 0, 1, 1)])
    model = rows(4, alpha=2.0)
    schedule = adapters.schedule(model)
    fit(model, teacher, 120, schedule, adam(model, 3e-2), 4)
    torch.manual_seed(0)
    plain = get_peft_model(Rows(4), LoraConfig(r=2, lora_alpha=2, target_modules=r".*layers\.\d"))
    fit(plain, teacher, 120, adapters.schedule(plain), adam(plain, 3e-2), 4)
    assert sum(ranks(model)) == 8
    assert ranks(model)[0] >= 4
    assert loss(model, teacher, 4) < 0.7 * loss(plain, teacher, 4)


def test_the_last_round_is_cut_to_the_target_and_no_layer_passes_its_limit() -> None:
    for limit in (0, 4):
        model = adapted("increlora", rank=3, growth=2, top=4, warmup=2, every=1, max_rank=limit)
        noted = go(model, adapters.schedule(model), adam(model), range(STEPS))
        totals = [sum(r) for r in noted]
        assert totals == [14, 22, 30, 38, 42, 42, 42, 42] if not limit else (totals[-1], max(noted[-1])) == (42, 4)
        assert all(u.counted[1] == 0 for u in adapters.updates(model).values())


def test_new_components_are_in_the_optimiser_once_with_state_of_their_own() -> None:
    model = adapted("increlora", rank=2, growth=1, top=5, warmup=3, every=2, advance=False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len(parameters) == 14 * 8 * 3
    optimizer, schedule = adam(model, weight_decay=0.5), adapters.schedule(model)
    drawn = state(model)
    seen: dict[int, Tensor] = {}

    def steps_of() -> dict[int, int]:
        return {id(p): int(s["step"]) for p, s in optimizer.state.items()}

    go(model, schedule, optimizer, range(3))
    assert set(steps_of().values()) == {3}
    assert len(steps_of()) == 14 * 3
    seen = {id(p): s["exp_avg"].clone() for p, s in optimizer.state.items()}
    go(model, schedule, optimizer, range(3, 4))
    assert len(steps_of()) == (14 + 5) * 3
    for parameter, own in optimizer.state.items():
        if id(parameter) in seen:
            assert int(own["step"]) == 4
            assert torch.allclose(own["exp_avg"], 0.9 * seen[id(parameter)] + 0.1 * _last(own, seen[id(parameter)]))
        else:
            assert int(own["step"]) == 1
    listed = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(listed) == sorted({id(p) for p in parameters})
    used = {id(p) for p in optimizer.state}
    names = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in used]
    assert len(names) == (14 * 8 - 19) * 3
    assert all(torch.equal(model.get_parameter(n), drawn[n]) for n in names)


def _last(own: dict[str, Tensor], before: Tensor) -> Tensor:
    """The gradient of the step that took the moving average from what it was."""
    return (own["exp_avg"] - 0.9 * before) / 0.1


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "conv": {"stride": 2, "padding": 1},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "same": {"padding": "same", "dilation": 2},
    "grouped": {"padding": 1, "groups": 2},
}


@pytest.mark.parametrize("kind", ["linear", *CONVOLUTIONS])
def test_the_score_is_that_of_the_dense_gradient(kind: str) -> None:
    torch.manual_seed(0)
    base = nn.Linear(12, 10) if kind == "linear" else nn.Conv2d(4, 10, 2, **CONVOLUTIONS[kind])
    layer = lone("increlora", base, rank=3, initial_rank=3)
    update = update_of(layer)
    for e in update.E:
        e.data.normal_()
    update.watched = True
    layer.train()
    inputs = [torch.randn(2, 5, 12) if kind == "linear" else torch.randn(2, 4, 6, 6) for _ in range(2)]
    expected = 0.0
    for x in inputs:
        target = torch.randn_like(layer(x))
        (layer(x) - target).square().sum().backward()
        D = update.delta(layer.host).detach().requires_grad_(True)
        (base(x) + layer.host.apply(x, D) - target).square().sum().backward()
        assert D.grad is not None
        expected += float((D * D.grad).detach().abs().sum()) / D.numel() ** 0.5
    assert float(update.sensitivity) == pytest.approx(expected, rel=1e-5)
    layer.eval()
    update.sensitivity = None
    layer(inputs[0]).sum().backward()
    assert update.sensitivity is None


def test_scores_are_smoothed_and_multiplied_by_their_uncertainty() -> None:
    model = rows(1, rank=2, beta1=0.7, beta2=0.6)
    schedule, (update,) = adapters.schedule(model), adapters.updates(model).values()
    schedule.begin(adam(model), 100)
    importance = uncertainty = 0.0
    for step, s in enumerate((1.0, 3.0, 0.5)):
        update.sensitivity = torch.tensor(s)
        schedule.gradients(step)
        importance = 0.7 * importance + 0.3 * s
        uncertainty = 0.6 * uncertainty + 0.4 * abs(s - importance)
        assert update.scores.tolist() == pytest.approx([importance, uncertainty])


def test_a_layer_that_grows_keeps_its_function() -> None:
    layer = lone("increlora", gaussian(10, 12), rank=4, advance=False)
    update = update_of(layer)
    update.E[0].data.fill_(2.0)
    before = update.delta(layer.host).clone()
    update.grow(3, 0, step=7)
    assert update.rank == 4
    assert near(update.delta(layer.host), before, 1e-6)
    assert update.E[0].item() == 8.0


@pytest.mark.parametrize("advance", [True, False])
def test_what_waits_learns_its_direction_in_advance(advance: bool) -> None:
    model = adapted("increlora", rank=4, growth=2, warmup=100, advance=advance)
    drawn = state(model)
    with pytest.warns(UserWarning, match="will not have grown to rank 4 in the 3 steps of this run, but in 101"):
        go(model, adapters.schedule(model), adam(model), range(3), 3)
    moved = {n.split(".updates.default.")[1] for n, v in state(model).items() if not torch.equal(v, drawn[n])}
    waiting = {"A.1", "A.2", "B.1", "B.2"} if advance else set()
    assert moved == {"A.0", "B.0", "E.0", "scores"} | waiting
    assert all(u.E[1].item() == pytest.approx(READY if advance else 0.0) for u in adapters.updates(model).values())


def test_first_steps_of_new_components_are_shortened() -> None:
    def moves(ramp: int) -> list[float]:
        model = rows(1, rank=4, growth=3, warmup=2, every=1, advance=False, ramp=ramp, orthogonality=0)
        (update,) = adapters.updates(model).values()
        optimizer, schedule = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1), adapters.schedule(model)  # fmt: skip # noqa: E501
        schedule.begin(optimizer, 9)
        found = []
        for step in range(6):
            before = update.B[2].detach().clone()
            for p in model.parameters():
                p.grad = torch.ones_like(p) if step >= 2 or p is update.E[0] else None
            optimizer.step()
            schedule.step()
            found.append(float((before - update.B[2].detach()).mean()))
        return found

    assert moves(0)[2:] == pytest.approx([0.1] * 4)
    assert moves(3)[2:] == pytest.approx([0.025, 0.05, 0.075, 0.1])


def test_the_pull_is_the_gradient_of_the_distance_from_orthonormal() -> None:
    a = [nn.Parameter(gaussian(1, 6, seed=s)) for s in range(3)]
    b = [nn.Parameter(gaussian(5, 1, seed=s + 9)) for s in range(2)]
    a[0].grad = torch.ones(1, 6)
    pull([(a, 0), (b, 1)], 0.4)
    A, B = torch.cat([p.detach() for p in a]).requires_grad_(), torch.cat([p.detach() for p in b], 1).requires_grad_()
    (0.4 * ((A @ A.T - torch.eye(3)).norm() + (B.T @ B - torch.eye(2)).norm()) / 2).backward()
    assert A.grad is not None
    assert B.grad is not None
    for i, p in enumerate(a):
        assert torch.allclose(p.grad, A.grad[i : i + 1] + (i == 0), atol=1e-6)
    for i, p in enumerate(b):
        assert torch.allclose(p.grad, B.grad[:, i : i + 1], atol=1e-6)


@pytest.mark.filterwarnings("ignore:increlora will not have grown")
def test_a_run_that_was_cut_goes_on_as_if_it_were_not(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rank": 2, "growth": 1, "top": 3, "warmup": 2, "every": 2, "ramp": 2}

    def fresh() -> Any:
        return adapted("increlora", **settings)

    whole, first = fresh(), fresh()
    optimizer = adam(first)
    go(whole, adapters.schedule(whole), adam(whole), range(STEPS))
    go(first, adapters.schedule(first), optimizer, range(5))
    first.save_pretrained(tmp_path)
    second = PeftModel.from_pretrained(small_model(), tmp_path, is_trainable=True)
    again = adam(second)
    again.load_state_dict(optimizer.state_dict())
    go(second, adapters.schedule(second), again, range(5, STEPS))
    assert ranks(second) == ranks(whole)
    assert max(ranks(whole)) > 1
    expected, found = state(whole), state(second)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[n], found[n]) for n in expected)


def test_settings_that_do_not_do_are_named() -> None:
    for settings, words in (
        ({"rank": 2, "initial_rank": 3}, "ranks begin at 3"), ({"beta1": 0.0}, "beta1=0.0"), ({"beta2": 1.0}, "beta2"),
        ({"top": 0}, "top=0"), ({"rank": 4, "max_rank": 3}, "max_rank=3"), ({"every": 0}, "every=0"),
        ({"ramp": -1}, "ramp=-1"), ({"rank": 9}, r"k_proj: rank 9 is more than a matrix of shape \(8, 16\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            adapted("increlora", **settings)
