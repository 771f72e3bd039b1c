"""Tokens per second of decoding one sequence, beside torch, torchao and llama.cpp at like bytes.

    pip install torchao llama-cpp-python
    python benchmarks/decoding.py [--layers 4] [--rounds 9] [--tokens 8] [--threads 1] [--json FILE]

One decoder, 2048 and 5632 wide, with random weights and a small head, so that what is timed is reading the linear
layers' weights. Every row holds the same matrices: rounded, factored, or as they are. llama.cpp loads the GGUF files
that `eckart export` writes of the rows beside it. "MB" are those of all tensors that a step touches; the bound is the
machine's measured bandwidth over these bytes, and "of bound" the share of it that is reached. Rows take turns round by
round; figures are medians. With one thread CPU seconds are counted, so that waiting for a core does not count.
The error is that of the logits of a prompt, relative to dense float32: of random weights, so it compares kernels of one
width with one another, and says nothing of a trained model.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import eckart
from common import linears, machine, table, write_json
from eckart.evaluation.speed import Machine, bytes_per_token
from eckart.export import export
from eckart.forms import kernels
from inference import quantised, rank_of
from peers_quantize import stored

VOCABULARY, PROMPT = 256, 16
CODES = "quantized(bits={bits}, group=32, grid=uniform(symmetric=True))"  # what llama.cpp's Q8_0 and Q4_0 hold
ROWS_OF_8 = "quantized(bits=8, group=None, grid=uniform(symmetric=True))"
HALF, FULL = torch.bfloat16, torch.float32
Step = Callable[[], None]


@dataclass
class Row:
    """A model to be timed: begins a sequence, gives the prompt's logits, and does one step."""

    nbytes: int
    logits: Tensor | None
    step: Step


def dense(layers: int, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32,
        vocab_size=VOCABULARY, max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False).eval().to(dtype)


def of_torch(model: Any, touched: int, rounded: bool = False) -> Row:
    """A model of transformers. `rounded`: activations may be rounded to 8 bits."""

    @torch.no_grad()
    def run(ids: Tensor, cache: Any) -> Any:
        with kernels.activations("int8" if rounded else "exact"):
            return model(input_ids=ids, past_key_values=cache, use_cache=True)

    out = run(prompt()[None], None)
    state = {"cache": out.past_key_values, "ids": out.logits[:, -1:].argmax(-1)}

    def step() -> None:
        out = run(state["ids"], state["cache"])
        state.update(cache=out.past_key_values, ids=out.logits[:, -1:].argmax(-1))

    return Row(touched, out.logits[0].float(), step)


def prompt() -> Tensor:
    return torch.randint(3, VOCABULARY, (PROMPT,), generator=torch.Generator().manual_seed(0))


def ours(form: str, dtype: torch.dtype, layers: int) -> Any:
    """The model in this form, everything else in `dtype`."""
    model = dense(layers, dtype)
    eckart.compress(model, form=form, budget="1.0", allocation="uniform()")
    return model


def torch_row(dtype: torch.dtype, layers: int) -> Row:
    model = dense(layers, dtype)
    return of_torch(model, bytes_per_token(model))


def eckart_row(form: str, dtype: torch.dtype, layers: int, rounded: bool = False) -> Row:
    model = ours(form, dtype, layers)
    return of_torch(model, bytes_per_token(model), rounded)


def torchao_row(name: str, dtype: torch.dtype, layers: int) -> Row:
    from torchao import quantization as ao

    configs = {
        "int8": lambda: ao.Int8WeightOnlyConfig(),
        "int8 dynamic": lambda: ao.Int8DynamicActivationInt8WeightConfig(),
        "int4": lambda: ao.IntxWeightOnlyConfig(
            weight_dtype=torch.int4,  # type: ignore[attr-defined]
            granularity=ao.PerGroup(32),
        ),
    }
    model = dense(layers, dtype)
    names = set(linears(model))
    rest = bytes_per_token(model) - sum(stored(m.weight) for m in linears(model).values())
    ao.quantize_(model, configs[name](), filter_fn=lambda module, path: path in names)
    held = sum(stored(m.weight) for n, m in model.named_modules() if n in names)
    return of_torch(model, rest + held)


def llama_row(bits: int | None, layers: int, threads: int, folder: Path) -> Row:
    """llama.cpp with the GGUF of the model in half precision, or in codes of so many bits."""
    import llama_cpp

    model = dense(layers, torch.float16)
    if bits is not None:
        eckart.compress(model, form=CODES.format(bits=bits), budget="1.0", allocation="uniform()")
    source, out = folder / f"model-{bits}", folder / f"gguf-{bits}"
    model.save_pretrained(source)
    export(source, "gguf", out)
    read = llama_cpp.Llama(str(out / "model.gguf"), n_ctx=1024, n_threads=threads, n_threads_batch=threads, logits_all=True, verbose=False)  # fmt: skip # noqa: E501
    read.eval(prompt().tolist())
    logits = torch.from_numpy(read.scores[:PROMPT].copy())
    state = {"id": int(logits[-1].argmax())}

    def step() -> None:
        read.eval([state["id"]])
        state["id"] = int(read.scores[read.n_tokens - 1].argmax())

    touched = (out / "model.gguf").stat().st_size - VOCABULARY * 2048 * 2
    return Row(touched, logits, step)


def low_rank_row(layers: int, rounded: bool = False) -> Row:
    """Half of the weights in two factors of 8 bits, of random codes: what they approximate does not matter here."""
    model = dense(layers, FULL)
    for name, layer in linears(model).items():
        rank = rank_of((layer.out_features, layer.in_features), 0.5) // 16 * 16
        model.set_submodule(name, quantised(f"low_rank(rank={rank}, factors={ROWS_OF_8})", layer, FULL))
    row = of_torch(model, bytes_per_token(model), rounded)
    row.logits = None
    return row


def makers(layers: int, threads: int, folder: Path) -> dict[str, Callable[[], Row]]:
    return {
        "torch float32": lambda: torch_row(FULL, layers),
        "torch bfloat16": lambda: torch_row(HALF, layers),
        "torch float16": lambda: torch_row(torch.float16, layers),
        "llama.cpp F16": lambda: llama_row(None, layers, threads, folder),
        "eckart 8 bits": lambda: eckart_row(ROWS_OF_8, FULL, layers),
        "torchao int8, bfloat16": lambda: torchao_row("int8", HALF, layers),
        "torchao int8, dynamic": lambda: torchao_row("int8 dynamic", HALF, layers),
        "llama.cpp Q8_0": lambda: llama_row(8, layers, threads, folder),
        "eckart low rank 0.5, 8 bits": lambda: low_rank_row(layers),
        "eckart 4 bits": lambda: eckart_row(CODES.format(bits=4), FULL, layers),
        "eckart 4 bits, bfloat16": lambda: eckart_row(CODES.format(bits=4), HALF, layers),
        "torchao int4, bfloat16": lambda: torchao_row("int4", HALF, layers),
        "llama.cpp Q4_0": lambda: llama_row(4, layers, threads, folder),
    }


def measure(rows: dict[str, Row], rounds: int, tokens: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds a token, round by round, every round beginning with another row."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(rounds + 1):
        order = list(rows)
        for name in order[number % len(order) :] + order[: number % len(order)]:
            start = clock()
            for _ in range(tokens):
                rows[name].step()
            if number:  # the first round warms up
                times[name].append((clock() - start) / tokens)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=8, help="tokens a row and round (default 8)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    console, peaks = Console(), Machine.measure(seconds=1.0)
    rows: dict[str, Row] = {}
    errors: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, make in makers(arguments.layers, arguments.threads, Path(folder)).items():
            with console.status(name):
                try:
                    rows[name] = make()
                except Exception as error:  # a peer that cannot is a row, whatever stops it
                    errors[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        with console.status("decoding"):
            times = measure(rows, arguments.rounds, arguments.tokens, clock)
    first = next(iter(times))
    wanted = rows[first].logits
    assert wanted is not None
    found: list[dict[str, Any]] = []
    for name, own in times.items():
        median = statistics.median(own)
        bound = 1e9 * peaks.bandwidth_gb_s / rows[name].nbytes
        logits = rows[name].logits
        found.append(
            {
                "way": name, "mbytes": rows[name].nbytes / 1e6, "tokens_per_second": 1 / median,
                "speed_up": statistics.median(a / b for a, b in zip(times[first], own, strict=True)),
                "bound": bound, "of_bound": 1 / median / bound,
                "error": None if logits is None else float((logits - wanted).norm() / wanted.norm()),
            }
        )  # fmt: skip
    if arguments.json:
        settings = {k: str(v) for k, v in vars(arguments).items()}
        about = machine() | {"gb_s": peaks.bandwidth_gb_s, "gflop_s": peaks.gflop_s}
        write_json({"machine": about, "settings": settings, "rows": found, "errors": errors}, arguments.json)
    title = f"Llama, {arguments.layers} x (2048, 5632), {arguments.threads} thread(s), {peaks.bandwidth_gb_s:.1f} GB/s"
    shown = table(title, ["way"], ["MB", "tokens/s", "speed-up", "bound", "of bound", "error"])
    for row in found:
        off = "" if row["error"] is None else f"{row['error']:.0e}"
        shown.add_row(
            row["way"], f"{row['mbytes']:.0f}", f"{row['tokens_per_second']:.1f}", f"{row['speed_up']:.2f}",
            f"{row['bound']:.1f}", f"{row['of_bound']:.2f}", off,
        )  # fmt: skip
    console.print(shown)
    for name, reason in errors.items():
        console.print(f"{name}: {reason}", highlight=False)


if __name__ == "__main__":
    main()
