"""Tokens per second, and how near they come to what the machine can do."""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from eckart.downloads import Progress, silent
from eckart.evaluation.logits import evaluating
from eckart.evaluation.memory import storages

GEMV, GEMM = 8192, 1536  # sides of the square matrices that the peaks are measured on; 256 MiB, so not from a cache


@dataclass(frozen=True)
class Machine:
    """Measured peaks in float32: reading from memory, and arithmetic. Best of the runs, since a peak is asked for."""

    bandwidth_gb_s: float
    gflop_s: float
    threads: int

    @classmethod
    def measure(cls, device: torch.device | str = "cpu", seconds: float = 0.5) -> Machine:
        """A matrix-vector product for bandwidth, a matrix-matrix product for arithmetic; about `seconds` of each."""
        device = torch.device(device)
        matrix, vector = torch.ones(GEMV, GEMV, device=device), torch.ones(GEMV, device=device)
        gemv = _best(lambda: matrix @ vector, device, seconds)
        a, b = torch.ones(GEMM, GEMM, device=device), torch.ones(GEMM, GEMM, device=device)
        gemm = _best(lambda: a @ b, device, seconds)
        return cls(4e-9 * GEMV**2 / gemv, 2e-9 * GEMM**3 / gemm, torch.get_num_threads())


@dataclass(frozen=True)
class Speed:
    """What one sequence takes (batch 1).

    Attributes:
        prefill_tokens_per_second: reading a prompt in one pass.
        decode_tokens_per_second: greedy generation behind that prompt, with a key-value cache.
        prompt: tokens in the prompt.
        bytes_per_token: bytes of weights that decoding one token touches.
        flops_per_token: floating-point operations of the prefill's matrix products, over its tokens.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prompt: int
    bytes_per_token: int
    flops_per_token: float

    def bandwidth_fraction(self, machine: Machine) -> float:
        """Share of the machine's bandwidth that reading weights takes when decoding (nothing else is counted)."""
        return 1e-9 * self.bytes_per_token * self.decode_tokens_per_second / machine.bandwidth_gb_s

    def flops_fraction(self, machine: Machine) -> float:
        """Share of the machine's float32 arithmetic that the prefill uses; a narrower type can exceed 1."""
        return 1e-9 * self.flops_per_token * self.prefill_tokens_per_second / machine.gflop_s


@torch.no_grad()
def speed(
    model: PreTrainedModel,
    prompt: Int[Tensor, " length"],
    *,
    new_tokens: int = 24,
    repeats: int = 3,
    seconds: float = 20.0,
    progress: Progress = silent,
) -> Speed:
    """Time a causal language model: medians of `repeats` prefills and of all decoding steps, after a warm-up.

    Where that takes longer than `seconds`, no further repeat is begun.

    Raises:
        ValueError: the prompt is empty, or there is nothing to repeat.
    """
    if prompt.ndim != 1 or not len(prompt) or new_tokens < 1 or repeats < 1:
        raise ValueError("a prompt (length,) of at least one token, one new token and one repeat are needed")
    ids, begin = prompt[None].to(model.device), time.perf_counter()
    prefills: list[float] = []
    steps: list[float] = []
    with evaluating(model):
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            _generate(model, ids, 0)
        _generate(model, ids[:, :1], 1)
        for repeat in range(repeats):
            prefill, *decode = _generate(model, ids, new_tokens)
            prefills.append(prefill)
            steps += decode
            progress("speed", repeat + 1, repeats)
            if time.perf_counter() - begin > seconds:
                break
    return Speed(
        prefill_tokens_per_second=len(prompt) / statistics.median(prefills),
        decode_tokens_per_second=1 / statistics.median(steps),
        prompt=len(prompt),
        bytes_per_token=bytes_per_token(model),
        flops_per_token=counter.get_total_flops() / len(prompt),
    )


def bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of weights that one decoded token touches: all but an input embedding that is not the output head's too.

    Of that, one row is read, which is not counted. A mixture of experts touches fewer than counted here.
    """
    embedding = set(model.get_input_embeddings().modules())
    touched: dict[int, int] = {}
    for module in model.modules():
        if module not in embedding:
            touched |= storages(module, recurse=False)
    return sum(touched.values())


def _generate(model: PreTrainedModel, ids: Int[Tensor, "1 length"], new_tokens: int) -> list[float]:
    """Seconds of the prefill and of each greedy decoding step behind it."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    seconds, cache = [], None
    for _ in range(1 + new_tokens):
        start = _now(ids.device)
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, **last)
        ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        seconds.append(_now(ids.device) - start)
    return seconds


def _attention(
    query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Operations of attention, queries with keys and weights with values, from shapes (batch, heads, length, width)."""
    return 2 * math.prod(query[:3]) * key[2] * (query[3] + value[3])


COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}  # torch counts it elsewhere only


def _best(run: Callable[[], Tensor], device: torch.device, seconds: float) -> float:
    """The shortest of as many runs as fit into `seconds`, three at least, after one to warm up."""
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = _now(device)
        run()
        times.append(_now(device) - start)
    return min(times)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
