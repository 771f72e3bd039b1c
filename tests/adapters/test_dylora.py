"""DyLoRA: draws, steps that touch only what was drawn, and leading parts that are adapters of their own."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from planted import Rows, fit, inputs, loss, teach
from torch import Tensor, nn

from eckart import adapters
from eckart.adapters.dylora import DyLoRA, at_rank, truncate
from eckart.testing.adapters import adapted, answers, layers, near, small_model, trained


def rows(**settings: Any) -> Any:
    return adapters.adapt(Rows(1), "dylora", target_modules=r"layers\.\d", **{"rank": 6, "alpha": 6.0, **settings})


def nested(model: Any) -> Any:
    return layers(model)[0].updates["default"]


def spectrum(falling: float = 0.7) -> Any:
    """A teacher whose change of the weight has singular values 1, 0.7, 0.49, ..."""
    generator = torch.Generator().manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator))
    V, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator))
    return teach([U * falling ** torch.arange(8) @ V.T])


def as_lora(model: Any, b: int) -> Any:
    """A LoRA of PEFT's own, made of the leading components."""
    settings = model.peft_config["default"]
    plain = get_peft_model(small_model(), LoraConfig(r=b, lora_alpha=settings.alpha, target_modules="all-linear"))
    modules = dict(plain.base_model.model.named_modules())
    for layer in layers(model):
        update, lora = layer.updates["default"], modules[layer.host.name]
        lora.lora_B["default"].weight.data.copy_(update.B[:, :b])
        lora.lora_A["default"].weight.data.copy_(update.A[:b])
    return plain.eval()


def test_every_leading_part_is_a_lora(tmp_path: Path) -> None:
    model = trained(adapted("dylora"), steps=6)
    for b in range(1, 5):
        expected = answers(as_lora(model, b))
        with at_rank(model, b):
            assert near(answers(model), expected, 1e-6)
    full = answers(model)
    truncate(model, 2)
    assert near(answers(model), answers(as_lora(model, 2)), 1e-6)
    assert not near(answers(model), full)
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(small_model(), tmp_path).eval()
    assert torch.equal(answers(other), answers(model))
    assert nested(other).A.shape[0] == 2


def moved(model: Any, steps: int, **words: Any) -> list[tuple[int, Tensor, Tensor]]:
    """(rank drawn, rows of A that moved, columns of B that moved), for every step."""
    found, update, teacher = [], nested(model), spectrum()
    model.train()
    optimizer = torch.optim.AdamW([update.A, update.B], 1e-2, weight_decay=0.1, **words)
    schedule = adapters.schedule(model)
    schedule.begin(optimizer, steps)
    for x in inputs(steps, 1):
        A, B, b = update.A.detach().clone(), update.B.detach().clone(), update.drawn
        (model(x) - teacher(x)).square().mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append((b, (update.A != A).any(1), (update.B != B).any(0)))
    return found


@pytest.mark.parametrize(("frozen", "block"), [(False, 1), (True, 1), (False, 2), (True, 3)])
def test_a_step_moves_what_was_drawn_and_nothing_else(frozen: bool, block: int) -> None:
    found = moved(rows(frozen=frozen, block=block), 12)
    assert len({b for b, _, _ in found}) > 1
    for b, A, B in found:
        expected = [(b - block if frozen else 0) <= i < b for i in range(6)]
        assert B.tolist() == expected
        assert A.tolist() == expected


def test_without_the_mask_momentum_and_decay_move_the_rest() -> None:
    found = moved(rows(masked=False), 12)
    assert any(bool(A[b:].any()) for b, A, _ in found)


def test_with_one_rank_alone_it_is_lora_step_by_step() -> None:
    model, teacher = rows(lowest=6), spectrum()
    update = nested(model)
    B, A = (nn.Parameter(t.detach().clone()) for t in (update.B, update.A))
    by_hand, layer = torch.optim.AdamW([B, A], 1e-2), Rows(1).layers[0]
    fit(model, teacher, 8, adapters.schedule(model), torch.optim.AdamW([update.B, update.A], 1e-2), 1)
    for x in inputs(8, 1):
        (layer(x[:, 0]) + x[:, 0] @ A.T @ B.T - teacher(x)[:, 0]).square().mean().backward()
        by_hand.step()
        by_hand.zero_grad()
    assert near(update.B, B, 1e-6)
    assert near(update.A, A, 1e-6)


@pytest.mark.parametrize(("frozen", "falling", "better"), [(False, 0.5, 5), (True, 0.7, 1)])
def test_components_come_in_their_order_and_small_ranks_are_better_than_a_cut_lora(
    frozen: bool, falling: float, better: int
) -> None:
    def losses(model: Any, scales: list[float]) -> list[float]:
        update, found = nested(model), []
        for rate, steps in ((3e-2, 180), (2e-3, 40)):
            optimizer = torch.optim.AdamW([update.A, update.B], rate, weight_decay=0.0)
            fit(model, teacher, steps, adapters.schedule(model), optimizer, 1)
        for update.asked, update.scale in enumerate(scales, 1):
            found.append(loss(model, teacher, 1))
        return found

    teacher = spectrum(falling)
    found = losses(rows(frozen=frozen), [6.0] * 6)
    cut = losses(rows(lowest=6), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])  # scales that leave a component of LoRA as it was
    assert all(b < 1.2 * a for a, b in pairwise(found))  # the scale alpha / b leaves no order that is exact
    assert found[-1] < 0.5 * found[0]
    assert all(a < b for a, b in zip(found[:better], cut, strict=False))


def test_draws_depend_on_seed_and_step_and_cover_the_range() -> None:
    config = DyLoRA(rank=6, lowest=3, seed=4)
    state = torch.get_rng_state()
    drawn = [config.rank_at(t) for t in range(2000)]
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn[700:] == [DyLoRA(rank=6, lowest=3, seed=4).rank_at(t) for t in range(700, 2000)]
    assert drawn != [DyLoRA(rank=6, lowest=3, seed=5).rank_at(t) for t in range(2000)]
    counts = Counter(drawn)
    assert set(counts) == {3, 4, 5, 6}
    assert all(430 < n < 570 for n in counts.values())
    falling = Counter(DyLoRA(rank=3, decay=0.5).rank_at(t) for t in range(2000))
    assert falling[1] > 1.6 * falling[2] > 2.4 * falling[3]
    assert {DyLoRA(rank=8, block=4).rank_at(t) for t in range(50)} == {4, 8}


def test_a_resumed_run_draws_what_it_would_have_drawn() -> None:
    schedule = adapters.schedule(model := rows())
    schedule.load_state_dict({"steps": 5})
    schedule.begin(torch.optim.SGD(nested(model).parameters(), 0.1), 10)
    assert nested(model).drawn == model.peft_config["default"].rank_at(5)


def test_one_rank_holds_for_all_layers_and_all_batches_of_a_step_and_not_in_evaluation() -> None:
    model = adapted("dylora")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    schedule = adapters.schedule(model)
    schedule.begin(optimizer, 9)
    seen = set()
    for _ in range(9):
        (b,) = {layer.updates["default"].drawn for layer in layers(model)}
        model.train()
        assert {layer.get_factors("default")[1].shape[0] for layer in layers(model)} == {b}
        model.eval()
        assert {layer.get_factors("default")[1].shape[0] for layer in layers(model)} == {4}
        optimizer.step()
        schedule.step()
        seen.add(b)
    assert len(seen) > 1


def test_ranks_may_differ_between_layers() -> None:
    model = trained(adapted("dylora"))
    name = layers(model)[0].host.name
    truncate(model, {name: 1})
    assert model.peft_config["default"].rank_pattern == {name: 1}
    assert [len(layer.updates["default"].A) for layer in layers(model)][:2] == [1, 4]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lowest": 0}, "lowest=0"),
        ({"lowest": 7}, "at most the rank, 6"),
        ({"block": 4}, "blocks of 4 do not make up"),
        ({"decay": 1.5}, "decay=1.5"),
        ({"rank": 9}, "rank 9 is more than"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rows(**settings)


def test_ranks_outside_the_range_are_refused() -> None:
    model = rows(lowest=2)
    for bad in (1, 7):
        with pytest.raises(ValueError, match=rf"rank {bad} is outside .* 2 to 6"):
            truncate(model, bad)
    with pytest.raises(ValueError, match=r"no dylora adapter on q_proj: it sits on layers\.0"):
        truncate(model, {"q_proj": 2})
    with pytest.raises(ValueError, match="only an adapter that dylora trained"):
        truncate(adapted("svfit"), 2)
