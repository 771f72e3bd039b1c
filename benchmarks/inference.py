"""Inference with factored linear layers beside dense ones, and beside what their bytes and operations promise.

    python benchmarks/inference.py [--quick] [--threads N] [--rounds N] [--only PART] [--json FILE]

float32, random weights. At batch 1 every variant goes through a stack of layers of at least 400 MB, so that weights
come from memory and not from a cache; at batch 512 arithmetic decides. "dense" is nn.Linear, "eckart" the drop-in of
`low_rank(rank=..)`, "functions" the same two factors through torch.nn.functional.linear without any module, "columns"
those with the left factor laid out by columns (faster for one vector, slower for two to four). The ideal speed-up is
dense bytes over factored bytes at batch 1 and the ratio of the operations at batch 512, which are the same number.
Variants take turns round by round; times are medians, speed-ups medians over rounds of the ratio within a round. With
one thread CPU seconds are counted, so that waiting for a core does not count; with more, seconds on the wall. Peaks
are a matrix-vector product of 256 MiB and a product of matrices 1536 wide.

Tables of quantised layers follow, beside the same dense float32: "int8" has one scale a row, "int4" one for 64 columns.
Their activations are float32, or bfloat16 where the name says so, and count in full, but for "int8 x int8", where they
are rounded to 8 bits. The error is of the product, against the same matrix in float64; it is not what quantisation
loses. "bytes" is what a layer stores, as a share of dense float32.

The last tables are of whole models: decoders 2048 and 5632 wide with random weights, tokens per second on the wall.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from common import load, machine, table, write_json
from eckart.evaluation.speed import Machine, Speed, speed
from eckart.forms import LowRank, drop_in, kernels, parse
from eckart.forms.algebra import ProductMatrix
from eckart.forms.layers import FactoredLinear
from eckart.forms.quantized import QuantizedMatrix

SHAPES = ((576, 1536), (2048, 5632), (4096, 11008))  # (in, out)
RATIOS = (0.8, 0.5, 0.25)
PREFILL = 512
STACK = 400e6  # bytes that a stack of layers holds at least
QUANTISED_STACK = 150e6  # the same, of quantised layers, whose layouts are held beside their codes
ENOUGH = 1e10  # operations in one timing at batch 512
INT8 = "quantized(bits=8, group=None, grid=uniform(symmetric=True))"
INT4 = "quantized(bits=4, group=64)"
Run = Callable[[Tensor], Tensor]
Row = dict[str, Any]
K = TypeVar("K")
PARTS = ("layers", "quantised", "models")


def factored(layer: nn.Linear, ratio: float) -> nn.Module:
    """The drop-in of the rank that keeps `ratio` of a layer's weights, its values random."""
    shape = (layer.out_features, layer.in_features)
    matrix = LowRank(rank_of(shape, ratio)).build(shape)
    for factor in matrix.parameters():
        nn.init.normal_(factor, std=factor.shape[1] ** -0.5).requires_grad_(False)
    return drop_in(layer, matrix)


def rank_of(shape: tuple[int, int], ratio: float) -> int:
    return max(1, round(ratio * shape[0] * shape[1] / (shape[0] + shape[1])))


def factors(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.matrix.left.weight, layer.matrix.right.weight


def functions(layer: nn.Module) -> Run:
    left, right = factors(layer)
    return lambda x: F.linear(F.linear(x, right), left)


def columns(layer: nn.Module) -> Run:
    left, right = factors(layer)
    across = left.T.contiguous()
    return lambda x: F.linear(x, right) @ across


def weights(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters())


def stack(width: int, out: int, ratio: float | None) -> list[nn.Module]:
    """Layers of `STACK` bytes together, dense or factored."""
    layers: list[nn.Module] = []
    while 4 * sum(weights(layer) for layer in layers) < STACK:
        dense = nn.Linear(width, out, bias=False, device="cpu" if ratio is None else "meta")
        layers.append(dense.requires_grad_(False) if ratio is None else factored(dense, ratio))
    return layers


@torch.no_grad()
def seconds(runs: list[Run], x: Tensor, clock: Callable[[], float]) -> float:
    """What one layer takes, over a pass through all."""
    start = clock()
    for run in runs:
        run(x)
    return (clock() - start) / len(runs)


def in_turns(variants: dict[K, list[Run]], x: Tensor, rounds: int, clock: Callable[[], float]) -> dict[K, list[float]]:
    """What a layer of each variant takes, round by round, every round beginning with another one."""
    times: dict[K, list[float]] = {key: [] for key in variants}
    for runs in variants.values():
        seconds(runs, x, clock)
    for number in range(rounds):
        order = list(variants)
        for key in order[number % len(order) :] + order[: number % len(order)]:
            times[key].append(seconds(variants[key], x, clock))
    return times


def measure(width: int, out: int, batch: int, rounds: int, clock: Callable[[], float], peaks: Machine) -> list[Row]:
    variants: dict[tuple[str, float], list[Run]] = {}
    sizes: dict[tuple[str, float], int] = {}
    for ratio in (None, *RATIOS):
        layers = stack(width, out, ratio)
        if batch > 1:
            layers = layers[: math.ceil(ENOUGH / (2 * batch * width * out))]
        variants["dense" if ratio is None else "eckart", ratio or 1.0] = list(layers)
        if ratio is not None:
            variants["functions", ratio] = [functions(layer) for layer in layers]
            variants["columns", ratio] = [columns(layer) for layer in layers]
        sizes |= {key: weights(layers[0]) for key in variants if key[1] == (ratio or 1.0)}
    x = torch.randn(batch, width, generator=torch.Generator().manual_seed(0))
    times = in_turns(variants, x, rounds, clock)
    dense = times["dense", 1.0]
    rows = []
    for (name, ratio), own in times.items():
        kept, median = sizes[name, ratio], statistics.median(own)
        gains = statistics.median(a / b for a, b in zip(dense, own, strict=True))
        ideal = sizes["dense", 1.0] / kept
        rate = 4e-9 * kept / median if batch == 1 else 2e-9 * batch * kept / median
        peak = peaks.bandwidth_gb_s if batch == 1 else peaks.gflop_s
        rows.append(
            {
                "in": width, "out": out, "batch": batch, "variant": name, "kept": ratio,
                "rank": None if name == "dense" else kept // (width + out), "seconds": median, "speed_up": gains,
                "ideal": ideal, "of_ideal": gains / ideal, "rate": rate, "of_peak": rate / peak,
                "fastest": min(own), "load": load(),
            }
        )  # fmt: skip
    return rows


def show(rows: list[Row], console: Console) -> None:
    first = rows[0]
    unit = "GB/s" if first["batch"] == 1 else "GFLOP/s"
    shown = table(
        f"{first['in']} -> {first['out']}, batch {first['batch']}",
        ["variant"],
        ["kept", "rank", "ms", "speed-up", "of ideal", unit, "of peak"],
    )
    for row in rows:
        dense = row["variant"] == "dense"
        shown.add_row(
            row["variant"],
            f"{row['kept']:g}",
            "" if dense else str(row["rank"]),
            f"{1e3 * row['seconds']:.3f}",
            "" if dense else f"{row['speed_up']:.2f}",
            "" if dense else f"{row['of_ideal']:.2f}",
            f"{row['rate']:.1f}",
            f"{row['of_peak']:.2f}",
        )
    console.print(shown)


def quantised(form: str, layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """The drop-in of this form with random codes, and entries of about the size of a layer's."""
    matrix = parse(form).build((layer.out_features, layer.in_features), dtype=dtype)
    for part in matrix.modules():
        if isinstance(part, QuantizedMatrix):
            part.codes.random_(256)
            for scale in part.parameters():
                scale.requires_grad_(False).uniform_(0.02, 0.03).mul_(part.shape[1] ** -0.5)
    return drop_in(layer, matrix)


def rounding(layer: nn.Module) -> Run:
    """The layer where activations may be rounded to 8 bits."""

    def run(x: Tensor) -> Tensor:
        with kernels.activations("int8"):
            return layer(x)

    return run


def measure_quantised(
    width: int, out: int, batch: int, rounds: int, clock: Callable[[], float], peaks: Machine
) -> list[Row]:
    """One table: dense layers, low-rank ones, quantised ones, and low-rank ones with quantised factors."""
    shape = torch.nn.Linear(width, out, bias=False, device="meta")
    rank = max(16, rank_of((out, width), 0.5) // 16 * 16)
    half, full = torch.bfloat16, torch.float32
    low_rank = f"low_rank(rank={rank}, factors={INT8})"
    makers: dict[str, tuple[torch.dtype, Callable[[], nn.Module]]] = {
        "dense": (full, lambda: nn.Linear(width, out, bias=False).requires_grad_(False)),
        "dense bf16": (half, lambda: nn.Linear(width, out, bias=False, dtype=half).requires_grad_(False)),
        "low rank": (full, lambda: factored(shape, 0.5)),
        "int8": (full, lambda: quantised(INT8, shape, full)),
        "int8 bf16": (half, lambda: quantised(INT8, shape, half)),
        "int4": (full, lambda: quantised(INT4, shape, full)),
        "int4 bf16": (half, lambda: quantised(INT4, shape, half)),
        "low rank, int8": (full, lambda: quantised(low_rank, shape, full)),
    }
    variants: dict[str, tuple[list[Run], torch.dtype]] = {}
    sizes: dict[str, int] = {}
    errors: dict[str, float] = {}
    for name, (dtype, make) in makers.items():
        layers = [make()]
        sizes[name] = sum(t.numel() * t.element_size() for t in layers[0].state_dict().values())
        share = QUANTISED_STACK / sizes[name] if batch == 1 else ENOUGH / (2 * batch * width * out)
        layers += [make() for _ in range(math.ceil(share) - 1)]
        variants[name] = (list(layers), dtype)
        if "int8" in name and batch > 1:
            variants[f"{name} x int8"] = ([rounding(layer) for layer in layers], dtype)
            sizes[f"{name} x int8"] = sizes[name]
        for key in (name, f"{name} x int8"):
            if key in variants:
                errors[key] = error_of(variants[key][0][0], layers[0], batch, dtype)
    x = torch.randn(batch, width, generator=torch.Generator().manual_seed(0))
    runs = {name: [as_dtype(run, dtype) for run in own] for name, (own, dtype) in variants.items()}
    times = in_turns(runs, x, rounds, clock)
    rows = []
    for name, own in times.items():
        median = statistics.median(own)
        moved = 1e-9 * sizes[name] / median
        rows.append(
            {
                "in": width, "out": out, "batch": batch, "variant": name, "bytes": sizes[name] / sizes["dense"],
                "rank": rank if "low rank" in name else None, "seconds": median, "fastest": min(own),
                "speed_up": statistics.median(a / b for a, b in zip(times["dense"], own, strict=True)),
                "gb_s": moved, "of_bandwidth": moved / peaks.bandwidth_gb_s, "error": errors[name], "load": load(),
            }
        )  # fmt: skip
    return rows


def as_dtype(run: Run, dtype: torch.dtype) -> Run:
    return run if dtype == torch.float32 else lambda x: run(x.to(dtype))


@torch.no_grad()
def error_of(run: Run, layer: Any, batch: int, dtype: torch.dtype) -> float:
    """Of the product, relative to that with the layer's own numbers in float64."""
    matrix = layer.matrix if isinstance(layer, FactoredLinear) else None
    x = torch.randn(batch, layer.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    if isinstance(matrix, ProductMatrix):
        wanted = x.double() @ matrix.right.dense().double().T @ matrix.left.dense().double().T
    else:
        wanted = x.double() @ layer.weight.double().T
    return float((run(x) - wanted).norm() / wanted.norm())


def show_quantised(rows: list[Row], console: Console) -> None:
    first = rows[0]
    shown = table(
        f"{first['in']} -> {first['out']}, batch {first['batch']}, quantised",
        ["variant"],
        ["bytes", "ms", "speed-up", "GB/s", "of peak", "error"],
    )
    for row in rows:
        shown.add_row(
            row["variant"],
            f"{row['bytes']:.3f}",
            f"{1e3 * row['seconds']:.3f}",
            f"{row['speed_up']:.2f}",
            f"{row['gb_s']:.1f}",
            f"{row['of_bandwidth']:.2f}",
            f"{row['error']:.0e}",
        )
    console.print(shown)


def decoder(layers: int, ratio: float | None) -> LlamaForCausalLM:
    """A Llama of random weights with a small head, its other linear layers dense or factored."""
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32, vocab_size=256
    )
    model = LlamaForCausalLM(config).requires_grad_(False).eval()
    if ratio is not None:
        for name, layer in [(n, m) for n, m in model.model.named_modules() if isinstance(m, nn.Linear)]:
            model.model.set_submodule(name, factored(layer, ratio))
    return model


def measure_models(layers: int, rounds: int, peaks: Machine) -> list[Row]:
    """Decoding and prefill of whole models, in turns."""
    models = {ratio or 1.0: decoder(layers, ratio) for ratio in (None, *RATIOS)}
    prompt = torch.randint(256, (PREFILL,), generator=torch.Generator().manual_seed(0))
    found: dict[float, list[Speed]] = {ratio: [] for ratio in models}
    for _ in range(rounds):
        for ratio, model in models.items():
            found[ratio].append(speed(model, prompt, new_tokens=8, repeats=1))
    rows = []
    for ratio, own in found.items():
        pairs = list(zip(own, found[1.0], strict=True))
        one, dense = pairs[0]
        decode = statistics.median(a.decode_tokens_per_second / b.decode_tokens_per_second for a, b in pairs)
        prefill = statistics.median(a.prefill_tokens_per_second / b.prefill_tokens_per_second for a, b in pairs)
        rows.append(
            {
                "layers": layers, "kept": ratio, "bytes_per_token": one.bytes_per_token, "decode_speed_up": decode,
                "decode_of_ideal": decode * one.bytes_per_token / dense.bytes_per_token,
                "decode_tokens_per_second": statistics.median(s.decode_tokens_per_second for s in own),
                "of_bandwidth": statistics.median(s.bandwidth_fraction(peaks) for s in own),
                "prefill_speed_up": prefill,
                "prefill_of_ideal": prefill * one.flops_per_token / dense.flops_per_token,
                "prefill_tokens_per_second": statistics.median(s.prefill_tokens_per_second for s in own),
                "of_arithmetic": statistics.median(s.flops_fraction(peaks) for s in own), "load": load(),
            }
        )  # fmt: skip
    return rows


def show_models(rows: list[Row], console: Console) -> None:
    numbers = ["kept", "tokens/s", "speed-up", "of ideal", "of peak"]
    for stage, rate, share in (
        ("decode", "decode", "of_bandwidth"),
        (f"prefill of {PREFILL}", "prefill", "of_arithmetic"),
    ):
        shown = table(f"Llama, {rows[0]['layers']} x (2048, 5632), {stage}", [], numbers)
        for row in rows:
            dense = row["kept"] == 1
            shown.add_row(
                f"{row['kept']:g}",
                f"{row[f'{rate}_tokens_per_second']:.1f}",
                "" if dense else f"{row[f'{rate}_speed_up']:.2f}",
                "" if dense else f"{row[f'{rate}_of_ideal']:.2f}",
                f"{row[share]:.2f}",
            )
        console.print(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description="Factored and quantised linear layers beside dense ones.")
    parser.add_argument("--quick", action="store_true", help="without 4096 x 11008, a shallow model, fewer rounds")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--rounds", type=int, help="rounds of every comparison (default 15, or 5)")
    parser.add_argument("--only", choices=PARTS, action="append", help="one part, may be repeated (default all)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file, as they come")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    parts = arguments.only or PARTS
    rounds = arguments.rounds or (5 if arguments.quick else 15)
    console, peaks = Console(), Machine.measure(seconds=1.0)
    console.print(
        f"{machine()['cpu']}, {peaks.threads} thread(s): {peaks.bandwidth_gb_s:.1f} GB/s, {peaks.gflop_s:.0f} GFLOP/s, "
        f"load {load()}",
        highlight=False,
    )
    report: dict[str, Any] = {
        "machine": machine() | {"peaks": asdict(peaks)},
        "layers": [],
        "quantised": [],
        "models": [],
    }

    def save() -> None:
        if arguments.json:
            write_json(report, arguments.json)

    for width, out in SHAPES[:2] if arguments.quick else SHAPES:
        for batch in (1, PREFILL):
            for part, take, print_ in (("layers", measure, show), ("quantised", measure_quantised, show_quantised)):
                if part in parts:
                    rows = take(width, out, batch, rounds if batch == 1 else max(5, rounds // 2), clock, peaks)
                    report[part] += rows
                    print_(rows, console)
                    save()
    if "models" in parts:
        report["models"] = measure_models(2 if arguments.quick else 4, 3 if arguments.quick else 5, peaks)
        show_models(report["models"], console)
    save()


if __name__ == "__main__":
    main()
