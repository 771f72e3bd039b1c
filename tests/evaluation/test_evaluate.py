"""One call gives every figure, each of them what its own function gives."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from eckart.calibration.data import load_texts, token_batches
from eckart.calibration.tokens import Tokens
from eckart.checkpoint.source import resolve
from eckart.evaluation.agreement import agreement
from eckart.evaluation.evaluate import evaluate
from eckart.evaluation.memory import model_bytes
from eckart.evaluation.perplexity import perplexity
from eckart.evaluation.speed import Machine, bytes_per_token

Make = Callable[..., transformers.LlamaForCausalLM]
MACHINE = Machine(bandwidth_gb_s=10.0, gflop_s=50.0, threads=1)


def test_a_folder_against_its_original(llama: Make, windows: Tokens, tmp_path: Path) -> None:
    for seed, name in enumerate(["original", "compressed"]):
        llama(seed).half().save_pretrained(tmp_path / name)
    original, compressed = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("original", "compressed")
    )
    found = evaluate(str(tmp_path / "compressed"), tmp_path / "original", tokens=windows, text="noise", machine=MACHINE)
    expected = agreement(original, compressed, windows)
    assert found.perplexity == pytest.approx(expected.compressed.value, rel=1e-6)
    assert found.perplexity_original == pytest.approx(expected.original.value, rel=1e-6)
    assert (found.perplexity_stderr, found.tokens) == (pytest.approx(expected.compressed.stderr, rel=1e-5), 31)
    assert (found.kl, found.top1_agreement) == (pytest.approx(expected.kl, rel=1e-5), expected.top1)
    assert found.bytes_disk == (tmp_path / "compressed" / "model.safetensors").stat().st_size
    assert (found.bytes_memory, found.dtype, found.text) == (model_bytes(compressed), "float32", "noise")
    assert found.original["bytes_disk"] == (tmp_path / "original" / "model.safetensors").stat().st_size
    assert found.original["bytes_memory"] == model_bytes(original)
    assert found.original["decode_tokens_per_second"] > 0
    assert found.decode_tokens_per_second is not None
    assert found.bandwidth_fraction == pytest.approx(
        bytes_per_token(compressed) * found.decode_tokens_per_second / 10e9, rel=1e-9
    )
    assert found.flops_fraction is not None
    assert found.peak_memory is not None
    assert found.peak_memory > found.bytes_memory
    assert found.machine == {"bandwidth_gb_s": 10.0, "gflop_s": 50.0, "threads": 1}
    assert found.seconds > 0
    assert json.loads(json.dumps(found.to_json(), allow_nan=False)) == found.to_json()


def test_a_model_alone(llama: Make, windows: Tokens) -> None:
    model = llama()
    found = evaluate(model, tokens=windows, speed=False)
    assert found.perplexity == perplexity(model, windows).value
    assert found.kl is found.top1_agreement is found.perplexity_original is found.bytes_disk is None
    assert found.decode_tokens_per_second is found.bandwidth_fraction is found.peak_memory is None
    assert (found.machine, found.original) == ({}, {})


def test_folders_load_in_the_type_asked_for(llama: Make, windows: Tokens, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    found = evaluate(tmp_path, tokens=windows, speed=False, dtype=torch.bfloat16)
    assert found.dtype == "bfloat16"
    assert found.bytes_memory < model_bytes(llama())


def test_the_machine_is_measured_where_it_is_not_known(
    llama: Make, windows: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Machine, "measure", lambda device: MACHINE)
    assert evaluate(llama(), tokens=windows).machine["gflop_s"] == 50.0


def test_figures_that_json_cannot_hold(llama: Make, windows: Tokens) -> None:
    found = replace(evaluate(llama(), tokens=windows, speed=False), perplexity=math.inf)
    assert found.to_json()["perplexity"] is None


def test_progress_names_the_stages(llama: Make, windows: Tokens, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    stages: list[Any] = []
    evaluate(tmp_path, llama(), tokens=windows, machine=MACHINE, progress=lambda *step: stages.append(step[0]))
    assert list(dict.fromkeys(stages)) == ["load", "speed", "agreement"]


def test_no_tokens(llama: Make, windows: Tokens) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        evaluate(llama(), tokens=windows[:0])


def test_no_model(windows: Tokens, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        evaluate(tmp_path, tokens=windows)


@pytest.mark.model
def test_the_real_builtin_on_held_out_text() -> None:
    folder = resolve("builtin").folder
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = token_batches(load_texts("builtin", split="heldout"), tokenizer, samples=None)[:8]
    found = evaluate("builtin", tokens=tokens)
    assert 10 < found.perplexity < 25
    assert found.bytes_memory >= 4 * 134_515_008
    assert found.bandwidth_fraction is not None
    assert 0 < found.bandwidth_fraction < 1.2
