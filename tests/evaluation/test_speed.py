"""Timing counts the right tokens, bytes and operations."""

from __future__ import annotations

import importlib
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from eckart.evaluation.speed import Machine, Speed, bytes_per_token, speed

speed_module = importlib.import_module("eckart.evaluation.speed")  # the package has a function of that name
Make = Callable[..., transformers.LlamaForCausalLM]


def test_medians_of_a_known_clock(llama: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, clock = llama(), itertools.count()
    lengths: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda *args: lengths.append(args[1][0].shape[1]))
    monkeypatch.setattr(speed_module, "_now", lambda device: 0.5 * next(clock))
    found = speed(model, torch.arange(12), new_tokens=3, repeats=2)
    assert lengths == [12, 1, 1, *[12, 1, 1, 1] * 2]
    assert found.prefill_tokens_per_second == 12 / 0.5
    assert found.decode_tokens_per_second == 1 / 0.5
    assert found.prompt == 12


def test_a_slow_model_is_not_repeated(llama: Make) -> None:
    steps: list[tuple[str, int, int]] = []
    speed(llama(), torch.arange(12), repeats=5, seconds=0, progress=lambda *step: steps.append(step))
    assert steps == [("speed", 1, 5)]


def test_decoding_is_greedy_generation(llama: Make) -> None:
    model, prompt = llama(), torch.arange(1, 13)
    expected = model.generate(prompt[None], max_new_tokens=6, eos_token_id=None, do_sample=False, pad_token_id=0)
    fed: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda *args: fed.append(int(args[1][0][0, -1])))
    speed(model, prompt, new_tokens=6, repeats=1)
    assert fed[-7:] == expected[0, 11:18].tolist()


def test_operations_are_those_of_the_matrices(llama: Make) -> None:
    model = llama(tie_word_embeddings=False)
    length, layers = 12, 2
    linears = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear))
    head = 2 * 50 * 16  # of the last token only
    attention = 2 * 2 * length**2 * 16 * layers
    found = speed(model, torch.arange(length), new_tokens=1, repeats=1)
    assert found.flops_per_token == pytest.approx((2 * length * linears + head + attention) / length, rel=0.01)


def test_decoding_does_not_touch_an_untied_embedding(llama: Make) -> None:
    tied, untied = llama(tie_word_embeddings=True), llama(tie_word_embeddings=False)
    weights = 4 * sum(p.numel() for p in tied.parameters())
    rotary = 4 * sum(b.numel() for b in tied.buffers())
    assert bytes_per_token(tied) == bytes_per_token(untied) == weights + rotary


def test_fractions_of_the_machine() -> None:
    machine = Machine(bandwidth_gb_s=20.0, gflop_s=100.0, threads=1)
    found = Speed(
        prefill_tokens_per_second=200.0,
        decode_tokens_per_second=20.0,
        prompt=512,
        bytes_per_token=500_000_000,
        flops_per_token=3e8,
    )
    assert found.bandwidth_fraction(machine) == pytest.approx(0.5)
    assert found.flops_fraction(machine) == pytest.approx(0.6)


def test_a_machine_is_measured_by_its_best_run(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0, 3, 10, 12, 20, 24, 30, 31, 40, 41, 50, 54])  # runs of 3, 2, 4 and of 1, 1, 4 seconds
    monkeypatch.setattr(speed_module, "_now", lambda device: next(times))
    monkeypatch.setattr(speed_module, "GEMV", 100)
    monkeypatch.setattr(speed_module, "GEMM", 10)
    machine = Machine.measure(seconds=0.1)
    assert machine.bandwidth_gb_s == pytest.approx(4 * 100**2 / 2 / 1e9)
    assert machine.gflop_s == pytest.approx(2 * 10**3 / 1 / 1e9)
    assert machine.threads == torch.get_num_threads()


def test_a_real_measurement_is_quick_and_sane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_module, "GEMV", 1024)
    monkeypatch.setattr(speed_module, "GEMM", 256)
    start = time.perf_counter()
    machine = Machine.measure(seconds=0.02)
    assert time.perf_counter() - start < 5
    assert 0.1 < machine.bandwidth_gb_s < 1e5
    assert 0.1 < machine.gflop_s < 1e6


@pytest.mark.parametrize(
    ("prompt", "options"), [([], {}), ([[1]], {}), ([1], {"new_tokens": 0}), ([1], {"repeats": 0})]
)
def test_nothing_to_time(llama: Make, prompt: list[int], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        speed(llama(), torch.tensor(prompt), **options)
