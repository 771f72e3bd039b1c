"""Pre-training with low-rank gradients and low-rank weights, side by side: quality, memory, time.

    python benchmarks/pretrain.py [--json pretrain.json] [--page pretrain.html] [--size 5m|11m] [--methods GaLore ...]
                                  [--start drawn|trained] [--tokens 614400] [--rates 1e-4 3e-4 ... 1e-1]
                                  [--threads 1] [--device cuda] [--quick]

Every method trains the decoder of pretrain_decoder.py from the same weights on the same texts, in the same order, in
bfloat16 autocast, with the loop of `eckart train`. Its learning rate is the best of one grid for all: the middle one,
then the neighbours of the best so far, until both are worse, each on all tokens, as what is best for a shorter run is
not best for this one. A rate at the edge of the grid is marked. Adam's betas, the ranks, and the steps between
refreshes are the same for all; the other settings are those of the papers, as the library has them.

`--start trained` cuts down the trained decoder of `models/` instead, and repairs it on the texts that it was made from;
"before" is the perplexity at that start. Its rows are the methods that take a trained model.

"bytes" are counted, tensor by tensor: weights, gradients and optimiser state at the last step, and what autograd keeps
of one batch. Perplexity is on windows of the held-out texts, of the model as it would be saved. Every run is written
to the JSON file as it ends, and the same command goes on with what is missing. "parameters" are the first step's.
The usual size took six hours of one busy core, or three where two processes share the rows, in a file each;
`--quick` takes two minutes, which say nothing about quality.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoTokenizer

import eckart
from common import at_edge, machine, next_rate, opened, search_chosen, search_options, table, write_json
from corpora import corpora
from eckart.calibration.data import token_batches
from eckart.calibration.tokens import Tokens
from eckart.evaluation import perplexity
from eckart.forms import Dense, LowRank
from eckart.forms.algebra import SumMatrix
from eckart.remarks import noting
from eckart.report.axis import Axis
from eckart.report.numbers import size
from eckart.report.page import figure, legend, section, shell, write
from eckart.report.svg import Chart, category, shape
from eckart.runs import Loop, Optimizer, Training, finish
from eckart.runs.build import optimizer_for
from eckart.training.base import Born, dtype_of, like
from models import decoder, load
from pretrain_decoder import LENGTH, SIZES, new_model, split

BATCH, BETAS, JUDGED, CUT = 8, (0.9, 0.95), 128, 150_000
STARTS = ("drawn", "trained")
KEPT = ("weight_bytes", "gradient_bytes", "state_bytes", "activation_bytes")


@dataclass(frozen=True)
class Frozen(Born):
    """LoRA from scratch: W stays as it was drawn, and B A beside it learns."""

    rank: int = 64

    def stand_in(self, module: nn.Module, W: Tensor, generator: torch.Generator) -> nn.Module:
        dtype = dtype_of(module)
        base, low = Dense().fit(W, dtype=dtype), LowRank(self.rank).build((W.shape[0], W.shape[1]), dtype=dtype)
        B, A = low.parameters()
        nn.init.zeros_(B)
        A.data.copy_(torch.empty(A.shape).uniform_(-1, 1, generator=generator) / math.sqrt(A.shape[1]))
        return like(module, SumMatrix([base.requires_grad_(False), low], Dense() + LowRank(self.rank)))


@dataclass(frozen=True)
class Way:
    """One row: an optimiser, and a structure of the weights, with the settings that differ from the usual ones.

    `scale` multiplies the rate of AdamW for the matrices that others project, as GaLore's own scale does for its.
    """

    optimizer: str = "adamw"
    settings: dict[str, Any] = field(default_factory=dict)
    form: str = ""
    method: str = ""
    structure: dict[str, Any] = field(default_factory=dict)
    scale: float = 1.0


def ways(start: str, rank: int = 64, density: float = 0.25, interval: int = 50) -> dict[str, Way]:
    """All rows of a start. Convolutions have theirs in convolutions.py, Linformer's are in attention.py."""
    projected, often = {"rank": rank, "interval": interval}, max(1, interval // 5)
    shared = {
        "TRP": Way(method="trp"),
        "DSFormer": Way(method="dsformer_stf", structure={"refresh": interval}),
        "gradual pruning to a half": Way(method="gradual_pruning", structure={"sparsity": 0.5, "every": often}),
        "2:4 by gradient flow": Way(method="nm_gradient_flow"),
        "compander": Way(method="weight_compander"),
    }
    if start == "trained":
        alone = {"ratio": 2.0, "alpha": 0.0, "gamma": 0.0}
        return {
            "AdamW, nothing cut": Way(),
            "factors of half the size": Way(method="pela", structure=alone),
            "PELA, features alone": Way(method="pela", structure={"ratio": 2.0, "gamma": 0.0}),
            "PELA": Way(method="pela", structure={"ratio": 2.0}),
            **shared,
        }
    return {
        "AdamW, full rank": Way(),
        "AdamW, matrices at a quarter of the rate": Way(scale=0.25),
        "low-rank factors": Way(form=f"low_rank(rank={rank})"),
        "LoRA-type": Way(method="frozen", structure={"rank": rank}),
        "GaLore": Way("galore", projected),
        "Q-GaLore": Way("q_galore", {**projected, "int8": True}),
        "Fira": Way("fira", projected),
        "FRUGAL": Way("frugal", {"density": density, "interval": interval}),
        "DCT-AdamW": Way("dct_adamw", {"rank": rank}),
        "Lion": Way("lion_k"),
        "SLTrain": Way(method="sltrain", structure={"rank": rank}),
        "LOST": Way(method="lost", structure={"rank": rank}),
        "SST": Way(method="sst", structure={"rank": rank, "every": interval}),
        "LED, a quarter of the rank": Way(method="greenformers", structure={"rank": 0.25}),
        "Maestro": Way(method="maestro", structure={"shrink_every": interval}),
        **shared,
    }


def texts(quick: bool) -> tuple[Tokens, Tokens]:
    """Windows to train on, and windows of the held-out texts."""
    train, held = split(corpora())
    tokenizer = AutoTokenizer.from_pretrained(decoder())
    if quick:
        train, held = [t[:CUT] for t in train], {n: t[: CUT // 20] for n, t in held.items()}
    windows, judged = (token_batches(t, tokenizer, samples=None, length=LENGTH) for t in (train, [*held.values()]))
    return windows, judged[:: max(1, len(judged) // JUDGED)]


def one(way: Way, lr: float, tokens: int, windows: Tokens, judged: Tokens, a: argparse.Namespace) -> dict[str, Any]:
    """Train once; a run that diverges has no perplexity, and says why."""
    model = (new_model(a.size, a.seed) if a.start == "drawn" else load("decoder", torch.float32)).to(a.device)
    schedule = None
    if way.form or way.method:
        method: Any = Frozen() if way.method == "frozen" else way.method or None
        with noting():  # of narrow matrices, two factors are no smaller
            schedule = eckart.training.structure(model, method, form=way.form or None, seed=a.seed, **way.structure)
    extra = dict(way.settings)
    dials = {k: extra.pop(k) for k in ("rank", "density", "int8") if k in extra}
    optimizer: torch.optim.Optimizer
    if way.scale == 1:
        settings = Optimizer(way.optimizer, lr, **dials, settings={"betas": BETAS, **extra})
        optimizer = optimizer_for(model, settings, a.seed)
    else:
        groups = eckart.optimizers.param_groups(model, rank=a.rank, lr=way.scale * lr)
        optimizer = torch.optim.AdamW(groups, lr, betas=BETAS)
    training = Training(steps=max(1, tokens // (BATCH * LENGTH)), batch=BATCH, precision="bfloat16", device=a.device)
    loop = Loop(model, optimizer, windows, training, schedule=schedule, seed=a.seed)
    found: dict[str, Any] = {"lr": lr, "tokens": tokens, "parameters": sum(p.numel() for p in model.parameters())}
    if a.start == "trained":
        found["before"] = perplexity(model, judged, BATCH).value
    begin, measured = time.perf_counter(), []
    try:
        while loop.steps < training.steps:
            measured.append(loop.step())
        finish(loop)
        found["perplexity"] = perplexity(model, judged, BATCH).value
    except (RuntimeError, ValueError) as error:
        found |= {"perplexity": None, "error": str(error)}
    if measured:
        found |= {name: asdict(measured[-1])[name] for name in KEPT}
        found["seconds_per_step"] = statistics.median(m.seconds for m in measured)
        found["loss"] = statistics.mean(m.loss for m in measured[-max(1, len(measured) // 20) :])
    return found | {"seconds": time.perf_counter() - begin, "load": machine()["load"]}


def measure(report: dict[str, Any], windows: Tokens, judged: Tokens, a: argparse.Namespace, console: Console) -> None:
    """Add the runs that the report lacks."""
    for name, way in ways(a.start, a.rank, a.density, a.interval).items():
        if a.methods and name not in a.methods:
            continue
        runs = report["rows"].setdefault(name, {"way": asdict(way), "runs": {}})["runs"]
        while (lr := next_rate(a.rates, {float(r): -ended(run) for r, run in runs.items()})) is not None:
            runs[str(lr)] = one(way, lr, a.tokens, windows, judged, a)
            write_json(report, a.json)
            console.print(f"{name}, rate {lr:g}: {said(runs[str(lr)])}", highlight=False)


def ended(run: dict[str, Any]) -> float:
    """The perplexity; a run that failed, diverged for instance, has the worst."""
    return math.inf if run["perplexity"] is None else run["perplexity"]


def best(row: dict[str, Any]) -> dict[str, Any] | None:
    """The run at the best rate, of those that ended well."""
    return min((run for run in row["runs"].values() if run["perplexity"] is not None), key=ended, default=None)


def said(run: dict[str, Any]) -> str:
    if run["perplexity"] is None:
        return run["error"]
    return f"perplexity {run['perplexity']:.1f}, {run['seconds_per_step']:.2f} s a step, {run['seconds']:.0f} s in all"


def show(report: dict[str, Any], console: Console) -> None:
    s = report["settings"]
    title = f"{s['size']}, {s['tokens']:,} tokens, rank {s['rank']}; the best rate of {s['rates']}"
    before = ["before"] if s["start"] == "trained" else []
    heads = ["rate", *before, "perplexity", "parameters", *(k.replace("_bytes", " MB") for k in KEPT), "s/step"]
    shown = table(title, ["method"], heads)
    for name, row in report["rows"].items():
        run = best(row)
        if run is None:
            shown.add_row(name, "-", "failed" if row["runs"] else "-")
            continue
        shown.add_row(
            name, f"{run['lr']:g}{at_edge(s['rates'], run['lr'])}", *(f"{run[k]:.2f}" for k in [*before, "perplexity"]),
            f"{run['parameters']:,}", *(f"{run[k] / 1e6:.1f}" for k in KEPT), f"{run['seconds_per_step']:.2f}",
        )  # fmt: skip
    console.print(shown)
    console.print("* at the edge of the grid")
    for name, row in report["rows"].items():
        for error in {run["error"] for run in row["runs"].values() if "error" in run}:
            console.print(f"{name}: {error}", markup=False)


def page(report: dict[str, Any]) -> str:
    """HTML: perplexity over the counted bytes."""
    runs = {n: run for n, row in report["rows"].items() if (run := best(row))}
    figures = []
    for heading, keys in (("Weights, gradients and optimiser state", KEPT[:3]), ("Activations, too", KEPT)):
        points = {n: (sum(r[k] for k in keys) / 1e6, r["perplexity"]) for n, r in runs.items()}
        chart = Chart(
            Axis.around([x for x, _ in points.values()], zero=True, label="MB"),
            Axis.around([y for _, y in points.values()], label="held-out perplexity"), title=heading, height=320,
        )  # fmt: skip
        for i, (name, (x, y)) in enumerate(points.items()):
            chart.mark(x, y, i, category(i), f"{name}: {y:.2f} at {size(1e6 * x)}")
        figures.append(figure(heading, chart.render()))
    key = legend((shape(i, category(i)), name) for i, name in enumerate(runs))
    s, what = report["settings"], "Pre-training with low-rank gradients and low-rank weights"
    lead = f"{s['size']} parameters, {s['tokens']:,} tokens, rank {s['rank']}"
    body = section("Perplexity over memory", key + "".join(figures))
    return shell(title=what, kicker="eckart · benchmarks", lead=lead, body=body, foot="Written by pretrain.py.")


def main() -> None:
    rates = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
    parser = search_options(__doc__, "pretrain.json", rates, "a little text, a few steps, one rate")
    names = list(dict.fromkeys(name for start in STARTS for name in ways(start)))
    parser.add_argument("--page", type=Path, help="also draw perplexity over memory into this HTML file")
    parser.add_argument("--size", choices=list(SIZES), default="5m")
    parser.add_argument("--methods", nargs="+", choices=names, help="rows to run (default all)")
    parser.add_argument("--start", choices=STARTS, default="drawn", help="drawn weights, or the trained decoder")
    parser.add_argument("--tokens", type=int, default=614_400, help="of every run")
    parser.add_argument("--rank", type=int, default=64, help="of projectors and factors (default 64)")
    parser.add_argument("--density", type=float, default=0.25, help="of FRUGAL, which has no rank")
    parser.add_argument("--interval", type=int, default=50, help="steps between refreshes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    a, console = search_chosen(parser)
    if a.start == "trained" and a.size != "5m":
        parser.error(f"--start trained: the trained decoder has the size 5m, not {a.size}")
    if a.quick:
        a.tokens, a.interval = 4 * BATCH * LENGTH, 2
    named = ("start", "size", "tokens", "rates", "rank", "density", "interval", "seed", "quick")
    report = opened(a.json, {k: getattr(a, k) for k in named})
    windows, judged = texts(a.quick)
    if a.quick:
        judged = judged[:8]
    measure(report, windows, judged, a, console)
    show(report, console)
    if a.page and any(best(row) for row in report["rows"].values()):
        write(page(report), a.page)


if __name__ == "__main__":
    main()
