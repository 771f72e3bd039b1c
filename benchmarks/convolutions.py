"""Convolutions that are small from the first step on, or become so while they are trained, side by side.

    python benchmarks/convolutions.py [--json convolutions.json] [--methods dense ...] [--pictures 10000] [--epochs 2]
                                      [--rates 1e-4 3e-4 ... 1e-1] [--seeds 1 2 3] [--threads 1] [--quick]

A residual network with seven kernels of 3x3 learns to tell ten kinds of garments (garments.py) from 10,000 pictures.
Only kernels within its blocks are structured. The learning rate is the best of one grid for all, on 5,000 other
pictures and with a seed of its own: the middle one, then the neighbours of the best so far, until both are worse; one
at the edge of the grid is marked. Then come the seeds, on the 10,000 pictures to be judged on: mean and spread
(standard deviation).
"narrower" is the same network with fewer channels and no structure, which is what a structure has to be better than.
"seen" is the accuracy on the pictures that were learned from. Parameters are those that would be saved. Every run is
written to the JSON file as it ends, and the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import eckart
from common import accuracy_of, machine, opened, search_chosen, search_options, searched, show_accuracies, write_json
from eckart.remarks import noting
from garments import KINDS, Garments, garments

BATCH, HELD_OUT = 64, 5000
MEAN, SPREAD = 72.9, 90.0  # of the pixels to learn from
WIDTHS, NARROWER = (32, 64, 128), (16, 32, 64)


class Residual(nn.Module):
    """Two convolutions of 3x3 beside a shortcut, which is one of 1x1 where channels or size change."""

    def __init__(self, into: int, out: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(out) for _ in range(2))
        self.shortcut = nn.Identity() if into == out else nn.Conv2d(into, out, 1, stride, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.shortcut(x) + self.norms[1](self.second(y)))


class Network(nn.Module):
    """Logits of ten kinds for grey pictures of 28 x 28."""

    def __init__(self, widths: tuple[int, int, int]):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        into = (widths[0], *widths[:-1])
        self.blocks = nn.ModuleList(Residual(a, b, 1 if a == b else 2) for a, b in zip(into, widths, strict=True))
        self.head = nn.Linear(widths[-1], KINDS)

    def forward(self, x: Float[Tensor, "b 1 28 28"]) -> Float[Tensor, "b 10"]:
        x = self.stem((x - MEAN) / SPREAD)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean((-2, -1)))
        return logits


@dataclass(frozen=True)
class Way:
    """One row: a method with the settings that are not its usual ones, and the channels."""

    method: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    widths: tuple[int, int, int] = WIDTHS


WAYS = {
    "dense": Way(),
    "dense, narrower": Way(widths=NARROWER),
    "apriori_conv, cp": Way("apriori_conv"),
    "apriori_conv, cp of half the rank": Way("apriori_conv", {"rank": 0.5}),
    "apriori_conv, separable": Way("apriori_conv", {"scheme": "separable", "rank": 0.5}),
    "apriori_conv, depth-separable": Way("apriori_conv", {"scheme": "depth_separable"}),
    "greenformers, a quarter of the rank": Way("greenformers", {"rank": 0.25, "solver": "random"}),
    "maestro": Way("maestro", {"shrink_every": 100}),
    "trp": Way("trp"),
    "trp, every 100 steps": Way("trp", {"period": 100}),
}


def one(way: Way, lr: float, seed: int, learned: Garments, judged: Garments, epochs: int) -> dict[str, Any]:
    """Train once; a run that fails says why."""
    torch.manual_seed(seed)
    model = Network(way.widths)
    schedule = None
    if way.method:
        with noting():  # a kernel or two may be too small for two factors
            schedule = eckart.training.structure(model, way.method, layers=r"blocks\..*", seed=seed, **way.settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    steps = epochs * (len(learned.kinds) // BATCH)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, cycle_momentum=False)
    found: dict[str, Any] = {"lr": lr, "seed": seed}
    begin, seconds = time.perf_counter(), []
    try:
        if schedule is not None:
            schedule.begin(optimizer, steps)
        for rows in batches(len(learned.kinds), epochs, seed):
            start = time.perf_counter()
            loss = F.cross_entropy(model(learned.pictures[rows]), learned.kinds[rows])
            if not math.isfinite(float(loss.detach())):
                raise RuntimeError("the loss is not finite")
            loss.backward()
            optimizer.step()
            rates.step()
            if schedule is not None:
                schedule.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - start)
        if schedule is not None:
            schedule.finish()
    except (RuntimeError, ValueError) as error:
        return found | {"error": str(error)}
    return found | {
        "accuracy": accuracy(model, judged), "seen": accuracy(model, learned),
        "parameters": sum(p.numel() for p in model.parameters()), "step": statistics.median(seconds),
        "seconds": time.perf_counter() - begin, "load": machine()["load"],
    }  # fmt: skip


def batches(rows: int, epochs: int, seed: int) -> list[Tensor]:
    """Numbers of the rows of every step; what does not fill a batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(rows, generator=generator)[: rows // BATCH * BATCH] for _ in range(epochs)]
    return list(torch.cat(orders).split(BATCH))


@torch.no_grad()
def accuracy(model: nn.Module, judged: Garments) -> float:
    model.eval()
    parts = zip(judged.pictures.split(500), judged.kinds.split(500), strict=True)
    return sum(int((model(x).argmax(-1) == y).sum()) for x, y in parts) / len(judged.kinds)


def measure(report: dict[str, Any], a: argparse.Namespace, console: Console) -> None:
    """Add the runs that the report lacks."""
    whole, judged = garments("train"), garments("t10k")
    learned = whole.rows(slice(a.pictures))
    parts = {"validation": whole.rows(slice(-HELD_OUT, None)), "test": judged}
    if a.quick:
        parts = {name: part.rows(slice(200)) for name, part in parts.items()}
    for name in a.methods:
        row = report["rows"].setdefault(name, {"sweep": {}, "runs": {}})

        def run(lr: float, seed: int, part: str, way: Way = WAYS[name]) -> dict[str, Any]:
            return one(way, lr, seed, learned, parts[part], a.epochs)

        searched(row, a.rates, a.seeds, run, accuracy_of, partial(write_json, report, a.json))
        console.print(f"{name}: {said(row)}", highlight=False, markup=False)


def said(row: dict[str, Any]) -> str:
    runs = [run for run in row["runs"].values() if "accuracy" in run]
    if not runs:
        return next(run["error"] for run in [*row["sweep"].values(), *row["runs"].values()] if "error" in run)
    return f"{statistics.mean(run['accuracy'] for run in runs):.2%} at {runs[0]['lr']:g}"


def main() -> None:
    rates = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
    parser = search_options(__doc__, "convolutions.json", rates, "a few pictures, one rate, one seed")
    parser.add_argument("--methods", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--pictures", type=int, default=10_000, help="to learn from")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="that the best rate is judged with")
    a, console = search_chosen(parser)
    if a.quick:
        a.pictures, a.epochs, a.seeds = 10 * BATCH, 1, a.seeds[:1]
    report = opened(a.json, {k: getattr(a, k) for k in ("pictures", "epochs", "rates", "seeds", "quick")})
    measure(report, a, console)
    title = f"{a.pictures:,} pictures, {a.epochs} epochs, {len(a.seeds)} seeds"
    show_accuracies(report, title, console, ["seen"])


if __name__ == "__main__":
    main()
