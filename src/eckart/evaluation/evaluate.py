"""All figures of one model, measured: quality, size, speed."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from eckart.calibration.tokens import Tokens
from eckart.checkpoint.source import no_bars, resolve
from eckart.downloads import Progress, silent
from eckart.evaluation.agreement import agreement
from eckart.evaluation.memory import PeakMemory, model_bytes
from eckart.evaluation.perplexity import perplexity
from eckart.evaluation.speed import Machine, Speed
from eckart.evaluation.speed import speed as measure_speed


@dataclass(frozen=True)
class Evaluation:
    """What was measured; None where it was not.

    Attributes:
        perplexity, perplexity_stderr: on `tokens` predicted tokens of `text`.
        perplexity_original, kl, top1_agreement: against the original.
        bytes_disk: of the weight files.
        bytes_memory: of the parameters and buffers as loaded, in `dtype`.
        prefill_tokens_per_second, decode_tokens_per_second: one sequence; see `speed`.
        bandwidth_fraction, flops_fraction: of `machine`'s limits, when decoding and when reading the prompt.
        peak_memory: most resident bytes of the process while the model was loaded (if it was) and timed, before the
            original was loaded.
        original: bytes and speed of the original under the same names.
        text: what it was measured on, in words.
        seconds: that the evaluation took.
    """

    perplexity: float
    perplexity_stderr: float | None
    tokens: int
    bytes_memory: int
    dtype: str
    seconds: float
    text: str = ""
    perplexity_original: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    bytes_disk: int | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    bandwidth_fraction: float | None = None
    flops_fraction: float | None = None
    peak_memory: int | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    original: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it: a number that is not finite becomes None."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


def evaluate(
    model: PreTrainedModel | str | Path,
    against: PreTrainedModel | str | Path | None = None,
    *,
    tokens: Tokens,
    text: str = "",
    batch_size: int = 4,
    speed: bool = True,
    time_original: bool = True,
    machine: Machine | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> Evaluation:
    """Measure a causal language model, alone or against the original it was made from.

    Args:
        model, against: models, or what `resolve` takes, to be loaded.
        tokens: held-out windows; the first of them is the prompt of the timing.
        text: what the tokens are, for the record.
        speed: whether to time the models and to measure the peak of memory.
        time_original: whether to time `against`, too.
        machine: the machine's peaks, where they are known already.
        dtype: type to load folders in; float32 on a CPU, where narrower types are slower, and as stored elsewhere.
        device: where to load folders.

    Raises:
        ValueError: no such model, different vocabularies, or nothing to predict.
        RuntimeError: the model's logits are not finite.
    """
    begin = time.perf_counter()
    if not len(tokens):
        raise ValueError("there are no tokens to evaluate on")
    prompt = tokens.ids[0][tokens.mask[0]]
    with PeakMemory() as memory:
        subject, bytes_disk = _open(model, dtype, device, progress)
        timing = measure_speed(subject, prompt, progress=progress) if speed else None
    if speed and machine is None:
        machine = Machine.measure(subject.device)
    quality: dict[str, Any]
    original: dict[str, Any] = {}
    if against is None:
        own = perplexity(subject, tokens, batch_size, progress=progress)
        quality = {}
    else:
        other, other_disk = _open(against, dtype, device, progress)
        both = agreement(other, subject, tokens, batch_size, progress=progress)
        own = both.compressed
        quality = {"perplexity_original": both.original.value, "kl": both.kl, "top1_agreement": both.top1}
        original = {"perplexity": both.original.value, "bytes_disk": other_disk, "bytes_memory": model_bytes(other)}
        if speed and time_original:
            original |= _figures(measure_speed(other, prompt, progress=progress), machine)
    return Evaluation(
        perplexity=own.value,
        perplexity_stderr=own.stderr,
        tokens=own.tokens,
        bytes_disk=bytes_disk,
        bytes_memory=model_bytes(subject),
        dtype=str(subject.dtype).removeprefix("torch."),
        seconds=time.perf_counter() - begin,
        text=text,
        peak_memory=memory.peak if speed else None,
        machine={} if machine is None else asdict(machine),
        original=original,
        **quality,
        **_figures(timing, machine),
    )


def _open(
    model: PreTrainedModel | str | Path, dtype: torch.dtype | None, device: torch.device | str, progress: Progress
) -> tuple[PreTrainedModel, int | None]:
    """The model, loaded if it is not, and the bytes of its weight files if it has any."""
    if isinstance(model, nn.Module):
        return model, None
    source = resolve(model, progress=progress)
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else source.dtype
    progress("load", 0, 1)
    with no_bars():
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype).to(device)
    progress("load", 1, 1)
    return loaded, source.bytes


def _figures(timing: Speed | None, machine: Machine | None) -> dict[str, Any]:
    if timing is None or machine is None:
        return {}
    return {
        "prefill_tokens_per_second": timing.prefill_tokens_per_second,
        "decode_tokens_per_second": timing.decode_tokens_per_second,
        "bandwidth_fraction": timing.bandwidth_fraction(machine),
        "flops_fraction": timing.flops_fraction(machine),
    }
