"""The loop: what it computes, in which order it reads, and what it counts."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from eckart.calibration.tokens import Tokens
from eckart.optimizers import GaLore, param_groups
from eckart.runs import Loop, Training
from eckart.runs.batches import NOTHING, Example, Examples
from eckart.runs.counting import SavedBytes, state_bytes
from eckart.runs.loop import share
from eckart.training import structure


def windows(count: int = 10, length: int = 8, padded: bool = False) -> Tokens:
    batch = tiny.batches((count,), length=length, padded=padded)[0]
    return Tokens(batch["input_ids"], batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool())


def loop(model: Any = None, tokens: Tokens | Examples | None = None, **settings: Any) -> Loop:
    model = model or tiny.build("llama", num_hidden_layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    words = {"steps": 6, "batch": 3, "warmup": 2, "clip": 0.0, **settings}
    return Loop(model, optimizer, windows() if tokens is None else tokens, Training(**words))


def test_a_run_is_the_plain_loop_with_torch() -> None:
    ours, plain = loop(clip=0.5), tiny.build("llama", num_hidden_layers=1).train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for step in range(4):
        ids = windows().ids[ours.rows(step)]
        loss = plain(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = 1e-2 * share(step, ours.settings)
        optimizer.step()
        optimizer.zero_grad()
        measured = ours.step()
        assert measured.loss == loss.item()
        assert measured.lr == pytest.approx(1e-2 * share(step, ours.settings))
    for p, q in zip(ours.model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


def test_accumulated_batches_are_one_large_batch() -> None:
    whole, parts = loop(batch=6), loop(batch=2, accumulate=3)
    a, b = whole.step(), parts.step()
    assert a.loss == pytest.approx(b.loss, rel=1e-5)
    for p, q in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_a_step_is_the_mean_over_its_labels_however_they_are_batched() -> None:
    tokens = windows(count=6, padded=True)
    assert len(set(tokens.mask.sum(1).tolist())) > 1
    whole, parts = loop(tokens=tokens, batch=6), loop(tokens=tokens, batch=2, accumulate=3)
    assert whole.step().loss == pytest.approx(parts.step().loss, rel=1e-5)
    examples = Examples([Example(ids[mask].tolist(), ids[mask].tolist()) for ids, mask in zip(tokens.ids, tokens.mask, strict=True)], pad=0)  # fmt: skip # noqa: E501
    assert loop(tokens=examples, batch=6).step().loss == pytest.approx(loop(tokens=tokens, batch=6).step().loss, rel=1e-5)  # fmt: skip # noqa: E501
    silent = Example([5, 6], [NOTHING, NOTHING])
    mixed = Examples([silent, examples.examples[0]], pad=0)
    assert math.isfinite(loop(tokens=mixed, batch=1, accumulate=2).step().loss)
    with pytest.raises(ValueError, match="not one token to predict"):
        loop(tokens=Examples([silent], pad=0))


def test_every_window_is_seen_once_an_epoch_in_another_order() -> None:
    seen = torch.cat([loop(batch=4).rows(step) for step in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist() != list(range(10))
    other = loop(batch=4)
    other.seed = 1
    assert other.rows(0).tolist() != seen[:4].tolist()


def test_padding_is_neither_predicted_nor_seen() -> None:
    made = windows(padded=True)
    changed = Tokens(made.ids.masked_fill(~made.mask, 7), made.mask)
    assert loop(tokens=made).step().loss == pytest.approx(loop(tokens=changed).step().loss, rel=1e-6)
    with pytest.raises(ValueError, match="not one token to predict"):
        loop(tokens=Tokens(made.ids, torch.zeros_like(made.mask)))


def test_learning_rates_rise_and_fall() -> None:
    settings = Training(steps=10, warmup=0.2, floor=0.1)
    rates = [share(step, settings) for step in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[10] == pytest.approx(0.1)
    linear = Training(steps=10, warmup=0, floor=0.0, decay="linear")
    assert [share(step, linear) for step in (0, 5, 10)] == [1.0, 0.5, 0.0]
    assert share(9, Training(steps=10, warmup=0, decay="none")) == 1.0


def test_bytes_are_those_of_the_tensors() -> None:
    made = loop()
    measured = made.step()
    numbers = sum(p.numel() for p in made.model.parameters())
    buffers = sum(b.nbytes for b in made.model.buffers())
    assert measured.gradient_bytes == 4 * numbers
    assert measured.weight_bytes == 4 * numbers + buffers
    assert 8 * numbers <= measured.state_bytes <= 8 * numbers + 4 * len(list(made.model.parameters()))
    assert measured.activation_bytes == made.step().activation_bytes > 0
    model = tiny.build("llama", num_hidden_layers=1)
    galore = GaLore(param_groups(model, rank=4))
    Loop(model, galore, windows(), Training(steps=2, batch=3, warmup=0)).step()
    assert state_bytes(galore) == galore.state_bytes()


def test_state_is_counted_before_a_schedule_drops_some() -> None:
    model = tiny.build("llama", num_hidden_layers=1)
    schedule = structure(model, "sst", rank=3, every=1, warmup=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    made = Loop(model, optimizer, windows(), Training(steps=3, batch=3, warmup=0), schedule=schedule)
    trained = sum(p.numel() for p in model.parameters())
    assert made.step().state_bytes == made.step().state_bytes >= 8 * trained


def test_saved_bytes_count_storages_once_and_no_weights() -> None:
    layer, x = nn.Linear(6, 5), torch.randn(7, 6)
    with SavedBytes(layer) as counting:
        layer(x)
        layer(x.view(7, 6))
    assert counting.total == x.nbytes
    with SavedBytes(layer) as counting:
        torch.sigmoid(layer(x))
    assert counting.total == x.nbytes + 7 * 5 * 4


def test_half_precision_keeps_weights_and_moments_whole() -> None:
    whole, half = loop(), loop(precision="bfloat16")
    a, b = [whole.step() for _ in range(3)], [half.step() for _ in range(3)]
    assert b[0].loss == pytest.approx(a[0].loss, rel=2e-2)
    assert b[0].loss != a[0].loss
    assert all(p.dtype == torch.float32 for p in half.model.parameters())
    assert b[-1].state_bytes == a[-1].state_bytes


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step() -> None:
    made = loop()
    made.step()
    next(made.model.parameters()).data.fill_(math.nan)
    with pytest.raises(RuntimeError, match="the loss of step 2 is nan: training has diverged"):
        made.step()


def test_a_state_holds_all_that_the_next_steps_depend_on() -> None:
    def dropping() -> Loop:
        model = tiny.build("llama", num_hidden_layers=1, attention_dropout=0.5)
        schedule = structure(model, "sst", rank=3, every=2, warmup=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(0)
        return Loop(model, optimizer, windows(), Training(steps=6, batch=3, warmup=2), schedule=schedule)

    first, file = dropping(), io.BytesIO()
    for _ in range(3):
        first.step()
    torch.save(first.state(), file)
    expected = [first.step().loss for _ in range(3)]
    file.seek(0)
    again = dropping()
    again.load(torch.load(file, weights_only=True))
    assert [again.step().loss for _ in range(3)] == expected
    file.seek(0)
    other = loop(tokens=windows(9))
    with pytest.raises(ValueError, match="the texts are not those that this run began with"):
        other.load(torch.load(file, weights_only=True))
