"""Peaks belong to their block, and weights are counted once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from eckart.evaluation import memory
from eckart.evaluation.memory import PeakMemory, model_bytes, resident

MB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is reset on Linux only")


def touch(megabytes: int) -> None:
    """Hold that much for a moment."""
    torch.ones(megabytes * MB // 4).sum()


@linux
def test_the_peak_is_seen_after_it_has_passed() -> None:
    with PeakMemory() as region:
        before = resident()
        touch(200)
        after = resident()
    assert after - before < 50 * MB
    assert 195 * MB < region.added < 260 * MB


@linux
def test_an_earlier_peak_does_not_count() -> None:
    touch(200)
    with PeakMemory() as region:
        touch(20)
    assert region.exact
    assert region.added < 80 * MB


@linux
def test_regions_nest() -> None:
    with PeakMemory() as outer:
        touch(200)
        with PeakMemory() as inner:
            touch(60)
        with PeakMemory() as second:
            pass
    assert inner.added < 120 * MB
    assert second.added < 40 * MB
    assert outer.added > 195 * MB
    with PeakMemory() as outer, PeakMemory():
        touch(200)
    assert outer.added > 195 * MB


def test_a_region_closes_when_its_block_fails() -> None:
    with pytest.raises(ZeroDivisionError), PeakMemory():
        1 / 0  # noqa: B018
    assert PeakMemory._open == []


def test_without_the_kernels_help(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "no" / "clear_refs")
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    with PeakMemory() as region:
        touch(20)
    assert not region.exact
    assert region.peak >= region.start > 50 * MB


def test_tied_weights_are_counted_once(llama: Callable[..., transformers.LlamaForCausalLM]) -> None:
    tied, untied = llama(tie_word_embeddings=True), llama(tie_word_embeddings=False)
    assert model_bytes(untied) - model_bytes(tied) == 4 * 50 * 16
    parameters = sum(p.numel() for p in tied.parameters())
    buffers = sum(b.numel() for b in tied.buffers())
    assert model_bytes(tied) == 4 * (parameters + buffers)
    assert model_bytes(tied.half()) < model_bytes(untied)


def test_a_view_holds_its_whole_storage() -> None:
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.zeros(100, 10)[:3])
    module.register_buffer("packed", torch.zeros(7, dtype=torch.uint8))
    module.register_buffer("later", torch.zeros(1000, device="meta"))
    assert model_bytes(module) == 4000 + 7
