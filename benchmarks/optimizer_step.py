"""The step of every optimiser over that of torch's AdamW on the same parameters; and what GaLore adds to a step.

    python benchmarks/optimizer_step.py [--quick] [--layers 6] [--rank 128] [--interval 200] [--threads 1] [--json FILE]

Matrices of SmolLM2-135M's decoder blocks in float32, whose gradients are a decaying spectrum plus noise, the same ones
at every step. Each optimiser makes a first step and then one whole interval, step by step beside torch's AdamW on a
copy. CPU seconds of the process, so that waiting for a core does not count. "step" is the median, "amortised" the mean
over the interval, refreshes and all, both over AdamW's median; "worst" is the slowest step of the interval over the
median, "first" the very first one, which chooses all subspaces, over the median. "warm" follows the subspace by power
iteration, "stagger" spreads the refreshes over the interval. Q-GaLore's intervals are kept from growing, which they
would with gradients that stand still. Where `galore_torch` can be imported it is measured, too.

The second table is GaLore at rank 128 on one 2048x5632 weight, beside forward and backward of its layer on 512 tokens,
and the speed of its two products beside that of one large product of the same kind, which is called the peak.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from common import machine, table, write_json
from eckart.optimizers import DCTAdamW, Fira, Frugal, GaLore, LionK, QGaLore
from eckart.optimizers.modes import added, contract


def released_galore() -> Any:
    """The AdamW of `galore_torch`, without the rest of that package, which wants bitsandbytes; None without it."""
    found = importlib.util.find_spec("galore_torch")
    if found is None or found.submodule_search_locations is None:
        return None
    package = ModuleType("galore_torch")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["galore_torch"] = package
    return importlib.import_module("galore_torch.adamw").AdamW


Released = released_galore()
BLOCK = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576), "gate": (1536, 576), "up": (1536, 576),
         "down": (576, 1536)}  # fmt: skip
Make = Callable[[list[nn.Parameter], int, int], torch.optim.Optimizer]
SHARE_SHAPE, SHARE_RANK, SHARE_TOKENS, ALLOWED = (2048, 5632), 128, 512, 0.3


def preset(cls: Any, dial: str = "rank", **settings: Any) -> Make:
    """An optimiser of the wing, all of whose parameters are projected."""

    def make(params: list[nn.Parameter], rank: int, interval: int) -> torch.optim.Optimizer:
        group: dict[str, Any] = {"params": params, "interval": interval}
        if dial == "rank":
            group["rank"] = rank
        elif dial == "density":
            group["density"] = rank / statistics.mean(min(p.shape) for p in params)
        made: torch.optim.Optimizer = cls([group], lr=1e-3, **settings)
        return made

    return make


def released(params: list[nn.Parameter], rank: int, interval: int) -> torch.optim.Optimizer:
    group = {"params": params, "rank": rank, "update_proj_gap": interval, "scale": 0.25, "proj_type": "std"}
    made: torch.optim.Optimizer = Released([group], lr=1e-3, no_deprecation_warning=True)
    return made


OPTIMIZERS: dict[str, Make] = {
    "galore": preset(GaLore),
    "galore, lapack": preset(GaLore, svd="lapack"),
    "galore, stagger": preset(GaLore, stagger=True),
    "galore, warm": preset(GaLore, warm=1),
    "galore, warm, stagger": preset(GaLore, warm=1, stagger=True),
    "galore, adam8bit": preset(GaLore, inner="adam8bit"),
    "q_galore": preset(QGaLore, threshold=2.0),
    "q_galore, warm, stagger": preset(QGaLore, threshold=2.0, warm=1, stagger=True),
    "fira": preset(Fira),
    "fira, warm, stagger": preset(Fira, warm=1, stagger=True),
    "frugal": preset(Frugal, "density"),
    "frugal, svd": preset(Frugal, "density", subspace="svd"),
    "dct_adamw": preset(DCTAdamW),
    "lion_k": preset(LionK, "none"),
    **({"galore_torch": released} if Released is not None else {}),
}
EVERY_STEP = ("dct_adamw",)
"""Those that choose their subspace anew at every step, as their paper has it."""


def parameters(layers: int) -> list[nn.Parameter]:
    """The matrices of so many blocks, with gradients."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in [*BLOCK.values()] * layers:
        p = nn.Parameter(0.02 * torch.randn(shape, generator=generator))
        left, right = (torch.randn(n, 32, generator=generator) for n in shape)
        p.grad = left * torch.arange(1, 33) ** -0.5 @ right.T + torch.randn(shape, generator=generator)
        made.append(p)
    return made


def timed(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(name: str, layers: int, rank: int, interval: int) -> dict[str, Any]:
    """One row: an optimiser step by step beside AdamW."""
    ours, theirs = parameters(layers), parameters(layers)
    optimizer = OPTIMIZERS[name](ours, rank, 1 if name in EVERY_STEP else interval)
    reference = torch.optim.AdamW(theirs, lr=1e-3)
    reference.step()
    first = timed(optimizer.step)
    steps, adamw = [], []
    for _ in range(interval):
        steps.append(timed(optimizer.step))
        adamw.append(timed(reference.step))
    median, base = statistics.median(steps), statistics.median(adamw)
    state = sum(x.nbytes for s in optimizer.state.values() for x in s.values() if isinstance(x, Tensor))
    if name == "galore_torch":  # it keeps its bases in objects
        state += sum(s["projector"].ortho_matrix.nbytes for s in optimizer.state.values())
    return {
        "optimizer": name, "adamw_cpu_seconds": base, "step_cpu_seconds": median, "step": median / base,
        "amortised": statistics.mean(steps) / base, "worst": max(steps) / median, "first": first / median,
        "state": state / sum(8 * p.numel() for p in ours),
    }  # fmt: skip


def share(rounds: int) -> dict[str, float]:
    """GaLore's step over forward and backward of the same layer, and how fast its products are."""
    layer = nn.Linear(SHARE_SHAPE[1], SHARE_SHAPE[0], bias=False)
    x = torch.randn(SHARE_TOKENS, SHARE_SHAPE[1], requires_grad=True)
    y = torch.randn(SHARE_TOKENS, SHARE_SHAPE[0])
    optimizer = GaLore([{"params": [layer.weight], "rank": SHARE_RANK, "interval": 10**6}], warm=1)
    dense = torch.optim.AdamW([nn.Parameter(layer.weight.detach().clone())], lr=1e-3)
    factor, core = torch.randn(SHARE_SHAPE[0], SHARE_RANK), torch.randn(SHARE_RANK, SHARE_SHAPE[1])
    W = torch.randn(SHARE_SHAPE)
    big = torch.randn(2048, 2048), torch.randn(2048, 2048)
    found: dict[str, list[float]] = {n: [] for n in ("forward_backward", "step", "adamw", "down", "up", "peak")}
    for number in range(rounds + 1):
        layer.weight.grad = x.grad = None
        taken = {"forward_backward": timed(lambda: layer(x).backward(y))}
        dense.param_groups[0]["params"][0].grad = layer.weight.grad
        taken["step"] = timed(optimizer.step)
        taken["adamw"] = timed(dense.step)
        taken["down"] = timed(lambda: contract(W, {0: factor}))
        taken["up"] = timed(lambda: added(W, core, {0: factor}, 1e-6, out=W))
        taken["peak"] = timed(lambda: big[0] @ big[1])
        for name, seconds in taken.items():
            found[name] += [seconds] if number else []  # the first round chooses the subspace
    median = {name: statistics.median(seconds) for name, seconds in found.items()}
    flops = 2 * SHARE_RANK * SHARE_SHAPE[0] * SHARE_SHAPE[1]
    peak = 2 * 2048**3 / median["peak"]
    return {
        **{f"{name}_cpu_seconds": seconds for name, seconds in median.items()},
        "galore_over_forward_backward": median["step"] / median["forward_backward"],
        "adamw_over_forward_backward": median["adamw"] / median["forward_backward"],
        "products_over_step": (median["down"] + median["up"]) / median["step"],
        "peak_gflop_s": peak / 1e9,
        "projection_of_peak": flops / median["down"] / peak,
        "back_projection_of_peak": flops / median["up"] / peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one block, rank 64, an interval of 20")
    parser.add_argument("--layers", type=int, default=6, help="blocks (default 6 of SmolLM2's 30)")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--interval", type=int, default=200, help="steps between two refreshes (default 200)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", action="append", choices=list(OPTIMIZERS), help="may be repeated")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    a = parser.parse_args()
    if a.quick:
        a.layers, a.rank, a.interval = 1, 64, 20
    torch.set_num_threads(a.threads)
    console, rows = Console(width=None if sys.stdout.isatty() else 140), []
    title = f"{a.layers} blocks of SmolLM2-135M, rank {a.rank}, interval {a.interval}, {a.threads} threads"
    shown = table(title, ["optimiser"], ["CPU ms", "step", "amortised", "worst", "first", "state bytes"])
    for name in a.only or OPTIMIZERS:
        row = measure(name, a.layers, a.rank, a.interval)
        figures = [f"{1e3 * row['step_cpu_seconds']:.1f}", *(f"{row[k]:.2f}" for k in ("step", "amortised", "worst", "first")), f"{row['state']:.1%}"]  # fmt: skip # noqa: E501
        shown.add_row(name, *figures)
        console.print(f"{name}: {', '.join(figures)}", highlight=False)
        rows.append(row)
    console.print(shown)
    if Released is None:
        console.print("galore_torch cannot be imported here, and is left out")
    found = share(3 if a.quick else 15)
    rest = table(f"GaLore at rank {SHARE_RANK} on {SHARE_SHAPE[0]}x{SHARE_SHAPE[1]}, {SHARE_TOKENS} tokens", ["figure"], ["value"])  # fmt: skip # noqa: E501
    for name, value in found.items():
        rest.add_row(name.replace("_", " "), f"{value:.4g}")
    console.print(rest)
    kept = "holds" if found["galore_over_forward_backward"] <= ALLOWED else "does not hold"
    console.print(f"At most {ALLOWED} of forward and backward: {kept}.")
    if a.json:
        write_json({"machine": machine(), "layers": a.layers, "rank": a.rank, "interval": a.interval, "rows": rows, "share": found}, a.json)  # fmt: skip # noqa: E501


if __name__ == "__main__":
    main()
