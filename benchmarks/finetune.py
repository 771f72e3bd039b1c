"""Adapters side by side at equal trained parameters: what they learn, what they forget, what they cost.

    python benchmarks/finetune.py [--json finetune.json] [--tasks decoder minilm smollm2 ...] [--methods nola paca ...]
                                  [--ranks 2 16] [--steps 40] [--rates 3e-4 1e-3 ... 1e-1] [--seeds 1 2 3]
                                  [--threads 1] [--bfloat16] [--quick]

The tasks are those of adapter_tasks.py. On e-mails (mail.py) the decoder of `models/` learns to predict them
(perplexity), and MiniLM to tell spam (accuracy, with a trained linear head over the mean of its features); `smollm2` is
the first on a model of 135 million parameters, `quantised` and `factored` are the first on a compressed decoder, with
the adapters made for that. `garments` is for adapters of convolutions: a network of 3x3 kernels that knows pictures of
upright garments learns them lying on their sides. "forgotten" is what the model lost on what it was made for: nats a
token on held-out texts of the kinds that the decoder was trained on, nats on upright garments; for MiniLM the mean of
1 - cosine between its features of encyclopaedia sentences before and after.

A column of budgets is the number of trained parameters of a LoRA of that rank on all linear layers; every method gets
its dial (rank, bases, ...) turned to the largest value that stays within it, and a method that cannot reach it has
fewer, as the table says, or more: ExPLoRA frees a whole block; methods that move ranks get LoRA's rank as their mean,
and hold more while they train. The learning rate is the best of one grid for all, on validation mails with a seed of
its own: the middle one, then the neighbours of the best so far, until both are worse; a rate at the edge of the grid is
marked. Then come the seeds, on test mails: mean and spread (standard deviation). "MB" is counted: gradients, optimiser
state, and what autograd keeps of one batch. Seconds are medians of steps. Every run is written to the JSON file as it
ends; the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import nn

from adapter_tasks import DORA, LORA, PISSA, TASKS, WHOLE, Task
from common import FAILED, Score, at_edge, opened, search_chosen, search_options, searched, table, write_json
from eckart import adapters
from eckart.adapters.diffora import Search
from eckart.registry import entries
from eckart.remarks import noting
from eckart.runs.counting import SavedBytes, gradient_bytes, state_bytes
from eckart.schedules import Schedule

REFERENCES = {WHOLE: None, LORA: {}, DORA: {"use_dora": True}, PISSA: {"init_lora_weights": "pissa"}}
DIALS: dict[str, Callable[[int], dict[str, Any]]] = {
    "adalora": lambda v: {"rank": v, "initial_rank": v + max(1, v // 2)},
    "compress_then_prompt": lambda v: {"tokens": v},
    "compacter": lambda v: {"reduction": max(1, 384 // v)},
    "householder_projector": lambda v: {"rank": v, "relative": True},
    "hydra": lambda v: {"rank": v, "sequential_rank": v},
    "increlora": lambda v: {"rank": v, "warmup": 4, "every": 4},
    "lift": lambda v: {"rank": v, "interval": 10},
    "nola": lambda v: {"bases": v},
    "snella": lambda v: {"rank": v, "interval": 4},
    "randlora": lambda v: {"rank": max(1, 512 // v)},
    "tlora": lambda v: {"rank": v, "transform_rank": max(1, v // 2)},
    "welore_tune": lambda v: {},
}
"""The settings of a size, where they are not its rank alone; intervals fit so short a run."""
RANKED = ("adalora", "diffora", "eva", "increlora", "sora")
"""Methods that move or cut ranks: they get LoRA's rank, as the mean that they end with or the most that they have."""
STARTING = {"eva": 16}
"""Batches that a start is made from, where 4 are too few: EVA's directions do not come to rest on them."""
LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in trained(model))


def put(task: Task, name: str, value: int | None, seed: int, rank: int) -> nn.Module:
    """The task's model with a method on it."""
    model = task.model()
    if name in REFERENCES:
        settings = REFERENCES[name]
        if settings is None:
            return model.requires_grad_(True)
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=task.targets, **settings)
        return get_peft_model(model, config)
    fields = {f.name for f in dataclasses.fields(adapter_class(name))}
    words = task.words(name) | ({} if value is None else DIALS.get(name, lambda v: {"rank": v})(value))
    if "seed" in fields:
        words["seed"] = seed
    else:
        torch.manual_seed(seed)
    with noting():
        return adapters.adapt(model, name, data=list(task.batches(STARTING.get(name, 4), seed)), **words)


def adapter_class(name: str) -> Any:
    return next(e.cls for e in entries("adapters") if e.key == name)


def dial(task: Task, name: str, budget: int, rank: int) -> int | None:
    """The largest setting of a method's dial that keeps within the budget; its least where none does."""
    if name in REFERENCES:
        return None
    if name in RANKED:
        return rank
    best, refused = 0, None
    for value in LADDER:
        try:
            size = count(put(task, name, value, 0, 1))
        except ValueError as error:  # a rank that the layers cannot have
            refused = error
            continue
        if best and size > budget:
            break
        best = value
    if not best and refused:
        raise refused
    return best


def one(
    task: Task, name: str, value: int | None, rank: int, a: argparse.Namespace, lr: float, seed: int, part: str
) -> dict[str, Any]:
    """Train once and judge; what goes wrong is part of the result."""
    found: dict[str, Any] = {"lr": lr, "seed": seed, "dial": value}
    try:
        adapted = put(task, name, value, seed, rank)
    except (RuntimeError, ValueError) as error:
        return found | {"error": f"{type(error).__name__}: {error}"}
    schedule = adapters.schedule(adapted) if hasattr(adapted, "peft_config") else Schedule()
    head = task.wrapped(adapted, seed)
    if isinstance(schedule, Search):  # which has held-out batches, and a model that may give no loss of its own
        schedule.loss = lambda _, batch: task.loss(head, batch)
    found["trained"] = count(adapted)
    optimizer = torch.optim.AdamW(trained(head), lr, weight_decay=0.0)
    schedule.begin(optimizer, a.steps)
    head.train()
    seconds, losses = [], []
    torch.manual_seed(seed)  # of dropout
    try:
        for step, batch in enumerate(task.batches(a.steps, seed)):
            begin = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / max(1, a.steps // 10)) * (1 - step / a.steps)
            with SavedBytes(head) as saved, torch.autocast("cpu", torch.bfloat16, enabled=a.bfloat16):
                loss = task.loss(head, batch)
            loss.backward()
            if not math.isfinite(float(loss.detach())):
                raise RuntimeError(f"the loss is {float(loss.detach())} at step {step}")
            optimizer.step()
            schedule.step()
            if step == a.steps - 1:
                found["bytes"] = saved.total + gradient_bytes(head) + state_bytes(optimizer)
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - begin)
            losses.append(float(loss.detach()))
        schedule.finish()
        head.eval()
        found |= {"figure": task.judge(head, part), "forgotten": task.forgotten(head), "loss": losses[-1]}
        found |= {"seconds": statistics.median(seconds), "file": file_bytes(adapted)}
    except (RuntimeError, ValueError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    return found


def file_bytes(model: Any) -> int | None:
    """Of the saved adapter."""
    if not hasattr(model, "peft_config"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))


def measure(report: dict[str, Any], a: argparse.Namespace, console: Console) -> None:
    """Add the runs that the report lacks."""
    for key in a.tasks:
        task = TASKS[key](a.quick)
        for rank in a.ranks:
            budget = count(put(task, "PEFT LoRA", None, 0, rank))
            for name in (name for name in task.rows if name in a.methods):
                row = report["rows"].setdefault(f"{key}/{rank}/{name}", {"sweep": {}, "runs": {}})
                if "failed" in row or ("dial" not in row and not _dialled(row, task, name, budget, rank)):
                    write_json(report, a.json)
                    continue
                sign = 1 if task.better == "higher" else -1
                run = partial(one, task, name, row["dial"], rank, a)
                searched(row, a.rates, a.seeds, run, partial(scored, sign=sign), partial(write_json, report, a.json))
                if not row["runs"]:
                    continue
                console.print(f"{key}, as LoRA of rank {rank}, {name}: {said(row)}", highlight=False)


def scored(run: dict[str, Any], sign: int) -> Score:
    """The figure; of equal ones, the loss of the last step."""
    return (sign * run["figure"], -run["loss"]) if "figure" in run else FAILED


def _dialled(row: dict[str, Any], task: Task, name: str, budget: int, rank: int) -> bool:
    try:
        row["dial"] = dial(task, name, budget, rank)
    except (RuntimeError, ValueError, TypeError) as error:
        row["failed"] = f"{type(error).__name__}: {error}"
    return "dial" in row


def said(row: dict[str, Any]) -> str:
    runs = [r for r in row["runs"].values() if "figure" in r]
    if not runs:
        return next((r["error"] for r in row["runs"].values() if "error" in r), "no run")
    return f"{statistics.mean(r['figure'] for r in runs):.4f} at {runs[0]['lr']:g}, {runs[0]['trained']:,} trained"


def show(report: dict[str, Any], a: argparse.Namespace, console: Console) -> None:
    s = report["settings"]
    for key in a.tasks:
        for rank in a.ranks:
            title = f"{key}; as many parameters as LoRA of rank {rank}; {s['steps']} steps, {len(s['seeds'])} seeds"
            made = table(title, ["method"], ["trained", "rate", TASKS[key].figure, "spread", "forgotten", "MB", "s/step", "file KB"])  # fmt: skip # noqa: E501
            rows = {n.split("/", 2)[2]: r for n, r in report["rows"].items() if n.startswith(f"{key}/{rank}/")}
            for name, row in rows.items():
                runs = [r for r in row["runs"].values() if "figure" in r]
                if not runs:
                    made.add_row(name, "-", "failed" if "failed" in row or row["sweep"] else "-")
                    continue
                figures, lr = [r["figure"] for r in runs], runs[0]["lr"]
                file = runs[0]["file"]
                made.add_row(
                    name, f"{runs[0]['trained']:,}", f"{lr:g}{at_edge(s['rates'], lr)}",
                    f"{statistics.mean(figures):.4g}", f"{statistics.pstdev(figures):.2g}",
                    f"{statistics.mean(r['forgotten'] for r in runs):.4f}",
                    f"{runs[0]['bytes'] / 1e6:.1f}", f"{statistics.median(r['seconds'] for r in runs):.2f}",
                    "-" if file is None else f"{file / 1e3:.0f}",
                )  # fmt: skip
            console.print(made)
    for name, row in report["rows"].items():
        errors = {run["error"] for run in (*row["sweep"].values(), *row["runs"].values()) if "error" in run}
        for error in [row["failed"]] if "failed" in row else sorted(errors):
            console.print(f"{name}: {error}", markup=False)
    console.print("* at the edge of the grid of learning rates")


def main() -> None:
    quick = "a few windows, two steps, one rate, one seed"
    parser = search_options(__doc__, "finetune.json", [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1], quick)
    names = list(dict.fromkeys(name for task in TASKS.values() for name in task.rows))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["decoder", "minilm"])
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 16], help="of the LoRA whose size is the budget")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="that the best rate is judged with")
    parser.add_argument("--bfloat16", action="store_true", help="train under bfloat16 autocast")
    a, console = search_chosen(parser)
    if a.quick:
        a.steps, a.seeds, a.ranks = 2, a.seeds[:1], a.ranks[:1]
    report = opened(a.json, {k: getattr(a, k) for k in ("steps", "rates", "seeds", "bfloat16", "quick")})
    measure(report, a, console)
    show(report, a, console)


if __name__ == "__main__":
    main()
