"""Adapters that clients with private data train together: what rules of joining and frozen factors are worth.

    python benchmarks/federation.py [--json federation.json] [--methods fedsvd ...] [--epsilons 6]
                                    [--rounds 10] [--rates 0.1 0.3 1 3 10 30] [--seeds 1 2 3] [--threads 1] [--quick]

MiniLM learns to tell spam. Its head was fitted to 64 public mails and is frozen. Other mails (mail.py) lie with six
clients, wanted and unwanted ones in shares that a Dirichlet distribution of 0.5 draws; three are asked in each round,
and take `--steps` steps of SGD, with `--batch` mails each on average, on LoRA factors of rank 8 at queries and values.
Rows are the model before, the adapter `dp_lora`, whose both factors are trained, by each of its rules, and `fedsvd`,
whose A is turned by the server, or never (FFA-LoRA).

With an epsilon, every client takes certified DP-SGD: gradients of single mails clipped to 0.5, and the noise that keeps
it within epsilon at delta = 1e-5 were it asked in every round; "epsilon" is the largest that the accounts then show.
The learning rate is the best of a grid on validation mails with a seed of its own, from the middle on until both
neighbours are worse; a rate at the edge of the grid is marked. Accuracy is on test mails: mean and spread of the seeds.
"KB" is what a round sends and receives. Runs are written to the JSON file as they end; the same command goes on.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from copy import deepcopy
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from common import accuracy_of, at_edge, opened, search_chosen, search_options, searched, table, write_json
from eckart import adapters
from eckart.adapters.federation import InProcess, LocalClient, Privacy, Server, noise_for
from mail import mails
from models import FOLDERS, load

CLIENTS, ASKED, CONCENTRATION = 6, 3, 0.5
CLIP, DELTA = 0.5, 1e-5
RANK, TARGETS = 8, ["query", "value"]
LENGTH, JUDGED, PUBLIC, DECAY = 32, 400, 64, 0.003
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "dp_lora, mean (FedAvg)": ("dp_lora", {}),
    "dp_lora, exact": ("dp_lora", {"aggregation": "exact"}),
    "dp_lora, stack (FLoRA)": ("dp_lora", {"aggregation": "stack"}),
    "dp_lora, residual (FedEx)": ("dp_lora", {"aggregation": "residual"}),
    "fedsvd, never turned (FFA)": ("fedsvd", {"period": 0}),
    "fedsvd": ("fedsvd", {}),
}


@cache
def encoded(part: str) -> dict[str, Tensor]:
    """Mails as the model takes them: of `train`, `validation`, `test`, or those of validation that are `public`."""
    rows = {"train": slice(None), "public": slice(JUDGED, JUDGED + PUBLIC)}.get(part, slice(JUDGED))
    chosen = mails()["validation" if part == "public" else part][rows]
    words: Any = AutoTokenizer.from_pretrained(FOLDERS["minilm"]())(
        [m.text[:2000] for m in chosen], truncation=True, padding="max_length", max_length=LENGTH, return_tensors="pt"
    )
    real = words["attention_mask"][:, None, None, :].bool().expand(-1, 1, LENGTH, LENGTH)
    mask = torch.zeros(real.shape).masked_fill_(~real, torch.finfo(torch.float32).min)  # vmap cannot see one made
    return {
        "input_ids": words["input_ids"],
        "attention_mask": mask,
        "labels": torch.tensor([m.unwanted for m in chosen]),
    }


@cache
def base() -> Any:
    """MiniLM with a head fitted to the public mails, by logistic regression with a little weight decay."""
    encoder: Any = load("minilm", torch.float32)
    model: Any = AutoModelForSequenceClassification.from_config(encoder.config, attn_implementation="eager")
    model.bert.load_state_dict(encoder.state_dict())
    model.classifier = head = nn.Linear(encoder.config.hidden_size, 2)
    data = encoded("public")
    with torch.no_grad():
        seen = model.eval().bert(data["input_ids"], data["attention_mask"]).pooler_output
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200)

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = nn.functional.cross_entropy(head(seen), data["labels"]) + DECAY * head.weight.square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    return model


def shared(labels: Tensor, seed: int) -> list[Tensor]:
    """Rows of each client: of every label in shares of their own, drawn anew until all clients can fill a batch."""
    chance = np.random.default_rng(seed)
    while True:
        parts: list[list[Tensor]] = [[] for _ in range(CLIENTS)]
        for label in labels.unique():
            rows = (
                (labels == label)
                .nonzero()
                .flatten()[torch.from_numpy(chance.permutation(int((labels == label).sum())))]
            )
            cuts = np.cumsum(chance.dirichlet([CONCENTRATION] * CLIENTS))[:-1] * len(rows)
            for part, own in zip(parts, rows.tensor_split(torch.from_numpy(cuts.astype(int))), strict=True):
                part.append(own)
        if min(sum(map(len, part)) for part in parts) >= 100:
            return [torch.cat(part) for part in parts]


def halved(model: nn.Module, batch: Any) -> Tensor:
    """The model's own loss, in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        loss: Tensor = model(**batch).loss
    return loss.float()


def one(name: str, epsilon: float, a: argparse.Namespace, lr: float, seed: int, part: str) -> dict[str, Any]:
    """Train once and judge; what goes wrong is part of the result."""
    method, settings = WAYS[name]
    found: dict[str, Any] = {"lr": lr, "seed": seed}
    begin, data = time.perf_counter(), encoded("train")
    words: dict[str, Any] = {"rank": RANK, "alpha": float(RANK), "target_modules": TARGETS, "seed": seed}
    model = adapters.adapt(deepcopy(base()), method, **words, **settings)
    clients = []
    for k, rows in enumerate(shared(data["labels"], seed)):
        own = {n: t[rows] for n, t in data.items()}
        privacy = None
        if math.isfinite(epsilon):
            noise = noise_for(epsilon, DELTA, a.batch / len(rows), a.rounds * a.steps)
            privacy = Privacy(CLIP, noise, vectorised=True, at_once=32)
        clients.append(LocalClient(model, own, CLIENTS * seed + k, a.batch, a.steps, lr, privacy, halved))
    server = Server(model, InProcess(clients), per_round=ASKED, seed=seed)
    try:
        rounds = server.run(a.rounds)
    except (RuntimeError, ValueError) as error:
        return found | {"error": f"{type(error).__name__}: {error}"}
    spent = max(account.epsilon or 0.0 for account in server.privacy(DELTA))
    nats, right = judged(model, encoded(part))
    return found | {
        "accuracy": right, "loss": nats, "epsilon": spent if math.isfinite(epsilon) else None,
        "bytes": statistics.mean(r.sent + r.received for r in rounds), "seconds": time.perf_counter() - begin,
    }  # fmt: skip


@torch.no_grad()
def judged(model: nn.Module, data: dict[str, Tensor]) -> tuple[float, float]:
    """Mean loss in nats, and accuracy."""
    model.eval()
    logits = torch.cat([model(input_ids=i, attention_mask=m).logits for i, m in
                        zip(data["input_ids"].split(50), data["attention_mask"].split(50), strict=True)])  # fmt: skip
    nats = nn.functional.cross_entropy(logits, data["labels"])
    return float(nats), float((logits.argmax(-1) == data["labels"]).float().mean())


def measure(report: dict[str, Any], a: argparse.Namespace, console: Console) -> None:
    """Add the runs that the report lacks."""
    report.setdefault("before", dict(zip(("loss", "accuracy"), judged(base(), encoded("test")), strict=True)))
    for epsilon in a.epsilons:
        for name in a.methods:
            row = report["rows"].setdefault(f"{epsilon:g}/{name}", {"sweep": {}, "runs": {}})
            searched(
                row, a.rates, a.seeds, partial(one, name, epsilon, a), accuracy_of, partial(write_json, report, a.json)
            )
            runs = [run for run in row["runs"].values() if "accuracy" in run]
            said = f"{statistics.mean(r['accuracy'] for r in runs):.2%} at {runs[0]['lr']:g}" if runs else "failed"
            console.print(f"epsilon {epsilon:g}, {name}: {said}", highlight=False, markup=False)


def show(report: dict[str, Any], a: argparse.Namespace, console: Console) -> None:
    title = f"{a.rounds} rounds, {ASKED} of {CLIENTS} clients, {a.steps} steps of {a.batch} mails, {len(a.seeds)} seeds"
    made = table(title, ["method"], ["epsilon", "rate", "accuracy", "spread", "loss", "KB a round", "s a run"])
    before, errors = report["before"], []
    made.add_row("before", "-", "-", f"{before['accuracy']:.1%}", "-", f"{before['loss']:.3f}", "-", "-")
    for name, row in report["rows"].items():
        runs = [run for run in row["runs"].values() if "accuracy" in run]
        errors += [f"{name}: {r['error']}" for r in (*row["sweep"].values(), *row["runs"].values()) if "error" in r]
        if not runs:
            made.add_row(name.partition("/")[2], "failed")
            continue
        spent, lr = [run["epsilon"] for run in runs if run["epsilon"] is not None], runs[0]["lr"]
        means = {key: statistics.mean(run[key] for run in runs) for key in ("accuracy", "loss", "bytes")}
        made.add_row(
            name.partition("/")[2], f"{max(spent):.2f}" if spent else "-",
            f"{lr:g}{at_edge(report['settings']['rates'], lr)}", f"{means['accuracy']:.1%}",
            f"{statistics.pstdev(r['accuracy'] for r in runs):.1%}", f"{means['loss']:.3f}",
            f"{means['bytes'] / 1e3:.0f}", f"{statistics.median(r['seconds'] for r in runs):.0f}",
        )  # fmt: skip
    console.print(made)
    console.print("* at the edge of the grid")
    for line in dict.fromkeys(errors):
        console.print(line, markup=False)


def main() -> None:
    quick = "one round of one step, one rate, one seed"
    parser = search_options(__doc__, "federation.json", [0.1, 0.3, 1.0, 3.0, 10.0, 30.0], quick)
    parser.add_argument("--methods", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--epsilons", type=float, nargs="+", default=[6.0], help="inf is without privacy")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=4, help="of a client in a round")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="that the best rate is judged with")
    a, console = search_chosen(parser)
    if a.quick:
        a.rounds, a.steps, a.batch, a.seeds = 1, 1, 4, a.seeds[:1]
    report = opened(a.json, {k: getattr(a, k) for k in ("rounds", "steps", "batch", "rates", "seeds", "quick")})
    measure(report, a, console)
    show(report, a, console)


if __name__ == "__main__":
    main()
