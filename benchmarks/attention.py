"""Attention that projects the sequence (Linformer) and low-rank layers, beside exact attention: quality, time, memory.

    python benchmarks/attention.py [--json attention.json] [--methods exact ...] [--tokens 128] [--steps 40]
                                   [--rates 1e-5 3e-5 ... 1e-2] [--seeds 1 2 3] [--lengths 128 512 2048] [--threads 1]
                                   [--quick]

First MiniLM learns to tell spam from other e-mails (mail.py) by their first 128 tokens, trained as a whole, from its
trained weights: Linformer begins as means over neighbours, layers of low rank (LED) with their SVD. The learning rate
is the best of one grid for all on validation mails: the middle one, then the neighbours of the best so far, until both
are worse; one at the edge of the grid is marked. Then come the seeds, on test mails: mean and spread (standard
deviation). Every run is written to the JSON file as it ends, and the same command goes on with what is missing.

Then an encoder of the same shape, with drawn weights and as many positions as wanted, runs forward and backward on
2,048 tokens in sequences of several lengths: seconds over those of exact attention, medians of runs that take turns,
and what autograd keeps, counted.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, BertModel

import eckart
from common import (
    accuracy_of,
    machine,
    opened,
    search_chosen,
    search_options,
    searched,
    show_accuracies,
    table,
    write_json,
)
from eckart.checkpoint.source import no_bars
from eckart.runs import Loop, Training, finish
from eckart.runs.batches import Example, Examples
from eckart.runs.counting import SavedBytes
from mail import mails
from models import FOLDERS

BATCH, JUDGED, CHARACTERS, RUN_TOKENS, ROUNDS = 8, 300, 2000, 2048, 3


@dataclass(frozen=True)
class Way:
    """One row: slots of Linformer, 0 for exact attention, and whether the layers are of low rank."""

    slots: int = 0
    led: bool = False

    def put(self, model: nn.Module, length: int) -> nn.Module:
        """Change a model, in place."""
        if self.led:
            eckart.training.structure(model, "greenformers", rank=0.25, layers=r".*layer\..*")
        if self.slots:
            eckart.training.use_linformer(model, length=length, rank=self.slots)
        return model


WAYS = {
    "exact": Way(),
    "Linformer, 32 slots": Way(32),
    "Linformer, 8 slots": Way(8),
    "LED, a quarter of the rank": Way(led=True),
    "LED and Linformer, 32 slots": Way(32, led=True),
}


def examples(part: str, tokens: int, most: int | None = None) -> Examples:
    """E-mails and whether they are spam."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDERS["minilm"]())
    found = []
    for mail in mails()[part][:most]:
        ids = tokenizer(mail.text[:CHARACTERS], truncation=True, max_length=tokens)["input_ids"]
        found.append(Example(ids, mail.unwanted))
    return Examples(found, tokenizer.pad_token_id)


def one(
    name: str, learned: Examples, parts: dict[str, Examples], a: argparse.Namespace, lr: float, seed: int, part: str
) -> dict[str, Any]:
    """Train once; a run that fails says why."""
    torch.manual_seed(seed)
    with no_bars():
        model = AutoModelForSequenceClassification.from_pretrained(FOLDERS["minilm"](), num_labels=2)
    WAYS[name].put(model, a.tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    loop = Loop(model, optimizer, learned, Training(steps=a.steps, batch=BATCH, clip=1.0), seed=seed)
    found: dict[str, Any] = {"lr": lr, "seed": seed}
    try:
        measured = [loop.step() for _ in range(a.steps)]
        finish(loop)
    except (RuntimeError, ValueError) as error:
        return found | {"error": str(error)}
    return found | {
        "accuracy": accuracy(model, parts[part]), "parameters": sum(p.numel() for p in model.parameters()),
        "loss": statistics.mean(m.loss for m in measured[-10:]),
        "step": statistics.median(m.seconds for m in measured), "load": machine()["load"],
    }  # fmt: skip


@torch.no_grad()
def accuracy(model: nn.Module, judged: Examples) -> float:
    model.eval()
    right = 0
    for rows in torch.arange(len(judged)).split(16):
        batch = judged.batch(rows)
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return right / len(judged)


def measure(report: dict[str, Any], a: argparse.Namespace, console: Console) -> None:
    """Add the runs that the report lacks."""
    most = 32 if a.quick else JUDGED
    learned = examples("train", a.tokens, 64 if a.quick else None)
    parts = {part: examples(part, a.tokens, most) for part in ("validation", "test")}
    for name in a.methods:
        row = report["rows"].setdefault(name, {"sweep": {}, "runs": {}})
        run, save = partial(one, name, learned, parts, a), partial(write_json, report, a.json)
        searched(row, a.rates, a.seeds, run, accuracy_of, save)
        console.print(f"{name}: {[r.get('accuracy', r.get('error')) for r in row['runs'].values()]}", markup=False)
    for length in a.lengths:
        times = report.setdefault("times", {})
        if str(length) not in times:
            times[str(length)] = timed(a.methods, length)
            write_json(report, a.json)


def timed(methods: list[str], length: int) -> dict[str, dict[str, float]]:
    """Seconds of forward and backward, and bytes that autograd keeps."""
    config = AutoConfig.from_pretrained(FOLDERS["minilm"](), max_position_embeddings=length)
    models: dict[str, nn.Module] = {}
    for name in methods:
        torch.manual_seed(0)
        models[name] = WAYS[name].put(BertModel(config, add_pooling_layer=False), length).train()
    ids = torch.randint(config.vocab_size, (max(1, RUN_TOKENS // length), length))
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    kept: dict[str, int] = {}
    for turn in range(ROUNDS + 1):
        for name, model in models.items():
            begin = time.perf_counter()
            with SavedBytes(model) as saved:
                loss = model(input_ids=ids).last_hidden_state.square().mean()
            loss.backward()
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - begin)
            kept[name] = saved.total
            model.zero_grad(set_to_none=True)
    return {name: {"seconds": statistics.median(seconds[name]), "bytes": kept[name]} for name in methods}


def show(report: dict[str, Any], console: Console) -> None:
    s = report["settings"]
    title = f"MiniLM, spam, {s['tokens']} tokens, {s['steps']} steps, {len(s['seeds'])} seeds"
    show_accuracies(report, title, console)
    if "times" not in report:
        return
    lengths = list(report["times"])
    shown = table("Forward and backward of 2,048 tokens; seconds over exact attention", ["method"],
                  [f"{what} at {n}" for n in lengths for what in ("time", "MB")])  # fmt: skip
    for name in report["times"][lengths[0]]:
        cells = []
        for found in report["times"].values():
            ratio = found[name]["seconds"] / found["exact"]["seconds"] if "exact" in found else math.nan
            cells += [f"{ratio:.2f}", f"{found[name]['bytes'] / 1e6:.0f}"]
        shown.add_row(name, *cells)
    console.print(shown)


def main() -> None:
    quick = "few mails, two steps, one rate, one seed, one length"
    parser = search_options(__doc__, "attention.json", [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2], quick)
    parser.add_argument("--methods", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--tokens", type=int, default=128, help="of an e-mail")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="that the best rate is judged with")
    parser.add_argument("--lengths", type=int, nargs="*", default=[128, 512, 2048], help="that time is measured at")
    a, console = search_chosen(parser)
    transformers.logging.set_verbosity_error()  # that a new head has no weights yet
    if a.quick:
        a.steps, a.seeds, a.lengths = 2, a.seeds[:1], a.lengths[:1]
    report = opened(a.json, {k: getattr(a, k) for k in ("tokens", "steps", "rates", "seeds", "quick")})
    measure(report, a, console)
    show(report, console)


if __name__ == "__main__":
    main()
