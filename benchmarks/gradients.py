"""What two processes send each other of their gradients: bytes, quality, time.

    python benchmarks/gradients.py [--json gradients.json] [--methods "L-GreCo, ranks" ...] [--steps 100] [--rate 3e-3]
                                   [--quick]

Two processes on one machine, with one thread each, train the decoder of pretrain_decoder.py together from drawn weights
on windows of their own, through DistributedDataParallel and gloo: with gradients as they are, compressed by one setting
for all layers (torch's PowerSGD hook among them), and by settings that L-GreCo chooses layer by layer, whose error is
that of the one setting. The first ten steps send all. "MB" are counted, of what a process hands over: in the median
step, and on average with the first steps and all planning. Perplexity is on held-out texts, after AdamW at one rate for
all rows. On one machine nothing is gained by sending less: seconds say what compressing costs, over those of gradients
as they are. Every run is written to the JSON file as it ends; the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as torchs
from torch.nn.parallel import DistributedDataParallel

from common import machine, opened, table, write_json
from eckart.evaluation import perplexity
from eckart.optimizers.communication import QSGD, Compressor, PowerSGD, TopK
from eckart.optimizers.l_greco import LGreCo
from pretrain import BETAS, texts
from pretrain_decoder import new_model

WORLD, BATCH, START, REFRESH = 2, 4, 10, 30
RANK, DENSITY, BITS = 16, 0.02, 4

Sent = Callable[[int], int]
"""Bytes that this process has sent after so many steps."""


def whole(ddp: DistributedDataParallel) -> int:
    return sum(p.nbytes for p in ddp.parameters())


def plain(ddp: DistributedDataParallel) -> Sent:
    size = whole(ddp)
    return lambda steps: steps * size


def power_sgd_of_torch(ddp: DistributedDataParallel) -> Sent:
    state = torchs.PowerSGDState(None, RANK, start_powerSGD_iter=START)
    ddp.register_comm_hook(state, torchs.powerSGD_hook)
    size = whole(ddp)
    return lambda steps: min(steps, START) * size + 4 * state.total_numel_after_compression


def compressed(compressor: Compressor, refresh: int | None = None) -> Callable[[DistributedDataParallel], Sent]:
    def put(ddp: DistributedDataParallel) -> Sent:
        hook = LGreCo(ddp, compressor, start=START, refresh=refresh)
        return lambda _: hook.sent.total()

    return put


WAYS: dict[str, Callable[[DistributedDataParallel], Sent]] = {
    "as they are": plain,
    f"torch's PowerSGD, rank {RANK}": power_sgd_of_torch,
    f"PowerSGD, rank {RANK}": compressed(PowerSGD(RANK)),
    "L-GreCo, ranks": compressed(PowerSGD(RANK), REFRESH),
    f"largest {DENSITY:.0%}": compressed(TopK(DENSITY)),
    "L-GreCo, densities": compressed(TopK(DENSITY), REFRESH),
    f"QSGD, {BITS} bits": compressed(QSGD(BITS)),
    "L-GreCo, bits": compressed(QSGD(BITS), REFRESH),
}


def member(rank: int, folder: Path, name: str, a: argparse.Namespace) -> None:
    """One of the processes; the first writes what it found."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    windows, judged = texts(a.quick)
    model = new_model("5m", a.seed)
    found = trained(DistributedDataParallel(model), name, windows.ids, WORLD * a.seed + rank, a)
    if rank == 0:
        found["perplexity"] = perplexity(model.eval(), judged[: 8 if a.quick else None], BATCH).value
        write_json(found | {"load": machine()["load"]}, folder / "found.json")
    gc.collect()  # a parallel model that outlives its group can block for good
    distributed.destroy_process_group()


def trained(ddp: DistributedDataParallel, name: str, ids: Tensor, seed: int, a: argparse.Namespace) -> dict[str, float]:
    """Train the model on windows drawn by the seed, and count."""
    sent = WAYS[name](ddp)
    optimizer = torch.optim.AdamW(ddp.parameters(), a.rate, betas=BETAS)
    generator = torch.Generator().manual_seed(seed)
    seconds, totals = [], [0]
    for step in range(a.steps):
        rows = ids[torch.randint(len(ids), (BATCH,), generator=generator)]
        begin = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = a.rate * min(1, 10 * (step + 1) / a.steps) * (1 - step / a.steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = ddp(input_ids=rows, labels=rows).loss
        loss.backward()
        nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
        totals.append(sent(step + 1))
    steps = [after - before for before, after in pairwise(totals)]
    return {
        "bytes": statistics.median(steps), "mean_bytes": totals[-1] / a.steps, "whole_bytes": whole(ddp),
        "seconds": statistics.median(seconds), "loss": float(loss.detach()),
    }  # fmt: skip


def one(name: str, a: argparse.Namespace) -> dict[str, Any]:
    """A row; one that fails says so."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        members = [context.Process(target=member, args=(rank, Path(folder), name, a)) for rank in range(WORLD)]
        for process in members:
            process.start()
        for process in members:
            process.join()
        codes = [process.exitcode for process in members]
        if any(codes):
            return {"error": f"the processes ended with {codes}"}
        found: dict[str, Any] = json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))
        return found


def show(report: dict[str, Any], console: Console) -> None:
    s, rows = report["settings"], report["rows"]
    base = rows.get("as they are", {}).get("seconds")
    title = f"Two processes, {s['steps']} steps of {WORLD * BATCH} windows, AdamW at {s['rate']:g}"
    made = table(title, ["gradients"], ["MB a step", "of all", "mean MB", "perplexity", "time"])
    for name, row in rows.items():
        if "error" in row:
            made.add_row(name, row["error"])
            continue
        ratio = f"{row['seconds'] / base:.2f}" if base else "-"
        made.add_row(
            name, f"{row['bytes'] / 1e6:.2f}", f"{row['bytes'] / row['whole_bytes']:.1%}",
            f"{row['mean_bytes'] / 1e6:.2f}", f"{row['perplexity']:.1f}", ratio,
        )  # fmt: skip
    console.print(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("gradients.json"), help="results, and where a run goes on")
    parser.add_argument("--methods", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a little text and sixteen steps")
    a = parser.parse_args()
    if a.quick:
        a.steps = 16
    console = Console(width=None if sys.stdout.isatty() else 120)
    report = opened(a.json, {k: getattr(a, k) for k in ("steps", "rate", "seed", "quick")})
    for name in a.methods:
        if name not in report["rows"]:
            report["rows"][name] = one(name, a)
            write_json(report, a.json)
            console.print(name, report["rows"][name], highlight=False)
    show(report, console)


if __name__ == "__main__":
    main()
