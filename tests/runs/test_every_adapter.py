"""Every adapter of the catalogue by the command's own path: trained, cut, resumed, loaded, and written as a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_examples
import torch
from peft import AutoPeftModelForCausalLM

import tiny
from eckart import compress_to
from eckart.checkpoint.source import resolve
from eckart.export import export
from eckart.registry import entries
from eckart.runs import Finetuning
from eckart.runs.judge import judge
from eckart.runs.prepare import prepare
from eckart.testing.adapters import settings_of

FAST = ("eva", "s2_lora", "sora")
"""One of PEFT's own that starts from data, one whose layers share tensors, one whose ranks change."""
FORM = {"form": "quantized(bits=4, group=16)", "rank": 2}
COMPRESSED: dict[str, tuple[str, dict[str, Any]]] = {
    "welore_tune": ("svd", {}), "eora_start": ("eora", FORM), "lq_lora_start": ("lq_lora", FORM)
}  # fmt: skip
"""Adapters that start from what a method of compression left -> the method, and its settings."""


class Cut(Exception):
    pass


def cut(stage: str, done: int, total: int) -> None:
    if (stage, done) == ("train", 5):
        raise Cut


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # of PEFT's AdaLoRA
@pytest.mark.parametrize(
    "key", [pytest.param(e.key, marks=[pytest.mark.slow] * (e.key not in FAST)) for e in entries("adapters")]
)
def test_it_is_trained_cut_resumed_loaded_and_exported(tmp_path: Path, key: str) -> None:
    words: dict[str, Any] = {"adapter": key, "settings": dict(settings_of(key)), "lr": 0.03, "samples": 4}
    if key in COMPRESSED:
        method, settings = COMPRESSED[key]
        data = {"data": tiny.save_text(tmp_path / "t.txt"), "samples": 4, "length": 12, **settings}
        compress_to(tmp_path / "llama", small_examples.model(tmp_path / "m"), method, budget=0.9, **data)
    done = small_examples.tuned(tmp_path, "text", out="whole", **words)
    assert done.before is not None
    assert done.after is not None
    assert done.after["loss"] < done.before["loss"]
    with pytest.raises(Cut):
        small_examples.tuned(tmp_path, "text", progress=cut, **words)
    small_examples.tuned(tmp_path, "text", resume=True, **words)
    whole, out = (tiny.hashes(tmp_path / name) for name in ("whole", "out"))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert whole[name] == out[name]
    job = Finetuning(str(tmp_path / "llama"), key, str(tmp_path / "text.jsonl"), "", length=16)
    _, data = prepare(job, resolve(job.model))
    assert data.held is not None
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert judge(
        again if again.active_peft_config.is_prompt_learning else again.get_base_model(), data.held, 4
    ).loss == pytest.approx(done.after["loss"], rel=1e-4)
    if done.exports is None:
        with pytest.raises(ValueError, match="LoRA"):
            export(tmp_path / "out", "lora", tmp_path / "lora", rank=32)
        return
    export(tmp_path / "out", "lora", tmp_path / "lora", rank=None if done.exports == "exactly" else 32)
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora", dtype=torch.float32)
    assert judge(plain, data.held, 4).loss == pytest.approx(done.after["loss"], rel=1e-4)
