"""Samples of what enters layers: which rows, who shares them, and where a run ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from eckart.calibration.samples import entering, shared_inputs
from eckart.calibration.store import OUTSIDE
from eckart.calibration.stream import Stream
from eckart.calibration.subject import InMemory

NAMES = [f"model.layers.0.{n}" for n in ("mlp.up_proj", "self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj")]


def started(model: Any, folder: Path, **settings: Any) -> Stream:
    stream = Stream(InMemory(model), tiny.batches(**settings), folder)
    stream.start()
    return stream


def test_layers_that_read_one_tensor_share_its_rows_without_padding(tmp_path: Path) -> None:
    model = tiny.build("llama")
    stream = started(model, tmp_path, padded=True)
    first, second = shared_inputs(stream, 0, NAMES, 10**6)
    assert (first.names, second.names) == ((NAMES[1], NAMES[2]), (NAMES[0], NAMES[3]))
    wanted = []
    for batch in stream.batches:
        embedded = model.model.embed_tokens(batch["input_ids"])
        wanted.append(model.model.layers[0].input_layernorm(embedded)[batch["attention_mask"].bool()])
    assert torch.allclose(first.x, torch.cat(wanted), atol=1e-6)
    assert len(second.x) == sum(int(b["attention_mask"].sum()) for b in stream.batches)


def test_takes_as_many_rows_of_every_batch(tmp_path: Path) -> None:
    stream = started(tiny.build("llama"), tmp_path)
    whole, some = (shared_inputs(stream, 0, NAMES[1:2], rows)[0].x for rows in (10**6, 9))
    assert (len(whole), len(some)) == (45, 9)
    assert torch.equal(some[:3], whole[[0, 8, 17]])


def test_outside_the_blocks(tmp_path: Path) -> None:
    model = tiny.build("llama")
    stream = started(model, tmp_path)
    for part in range(3):
        stream.advance(part)
    (found,) = shared_inputs(stream, OUTSIDE, ["lm_head"], 10**6)
    with torch.no_grad():
        wanted = torch.cat([model.model(**b).last_hidden_state.flatten(0, 1) for b in stream.batches])
    assert torch.allclose(found.x, wanted, atol=1e-5)


def test_a_run_ends_where_no_more_is_wanted() -> None:
    model = tiny.build("llama")
    reached: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda *_: reached.append(1))
    found = entering(model, NAMES, lambda: model(**tiny.batches()[0]), NAMES[1])
    assert set(found) <= {NAMES[1], NAMES[2]}
    assert not reached
    assert len(entering(model, NAMES, lambda: model(**tiny.batches()[0]))) == 4
    assert reached
    handle.remove()
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_what_is_not_reached_or_not_finite_is_named(tmp_path: Path) -> None:
    model = tiny.build("llama")
    stream = started(model, tmp_path)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj is not reached by the calibration data"):
        shared_inputs(stream, 0, ["model.layers.1.mlp.up_proj"], 10)
    model.model.layers[0].input_layernorm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj receives NaN"):
        shared_inputs(stream, 0, NAMES, 10)
