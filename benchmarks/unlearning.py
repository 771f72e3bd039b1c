"""Unlearning invented people: what is forgotten, what is kept, against a model that never heard of them.

    python benchmarks/unlearning.py [--quick] [--seeds 1] [--people 40] [--forgotten 4] [--width 96] [--layers 3]
        [--train 500] [--rank 8] [--epochs 60] [--threads 1] [--json FILE]

A small Llama learns facts on all people by heart, and a language without people beside them; the reference learns the
same but for the forgotten. Every row takes the model that knows all, an adapter, and unlearns until the mean
probability of the forgotten values is that of the reference, or the epochs end ("steps" says when, "-" that it did
not). Learning rates are the best of a small sweep for each row: of those that reach the reference, the one that raises
the retained perplexity least. "forget p" and "forget NLL" are of the forgotten values; "KS" is the p-value of a
Kolmogorov-Smirnov test between their probabilities and the reference's (high: not to be told apart); "retained" is how
much the perplexity of sentences on the others rose (of a sentence's mean loss), "values" that of their values alone,
"language" that of unseen sentences of the language, which no row was given. "x5" is the retained rise after five times
the steps. LoRA is the same adapter started with B = 0.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from scipy.stats import ks_2samp
from torch import Tensor

from common import machine, table, write_json
from eckart import adapters
from eckart.adapters.loku import Retained
from eckart.adapters.unlearning import row_losses, unlearn
from eckart.testing.people import Town, batches, learn

RATES = (3e-4, 1e-3, 3e-3)


@dataclass(frozen=True)
class Row:
    """A way to unlearn: the loss on what is to be forgotten, the start of the adapter, and whether others are shown."""

    loss: str
    fila: bool
    retain: bool


ROWS = {
    "IHL + FILA, retain": Row("inverted_hinge", True, True),
    "IHL + LoRA, retain": Row("inverted_hinge", False, True),
    "gradient difference, LoRA": Row("gradient_ascent", False, True),
    "IHL + FILA alone": Row("inverted_hinge", True, False),
    "gradient ascent, LoRA": Row("gradient_ascent", False, False),
}


class Case:
    """A town, the model that knows it, the reference, and figures of any model."""

    def __init__(self, a: argparse.Namespace, seed: int):
        self.a, self.seed = a, seed
        self.town = Town(a.people, a.forgotten, attributes=5, words=24, seed=seed)
        wrong, right, language = self.town.facts(True), self.town.facts(False), self.town.language(300, 0)
        self.knowing, self.reference = self.fresh(), self.fresh()
        learn(self.knowing, torch.cat([wrong, right, language]), a.train, size=64, seed=seed)
        learn(self.reference, torch.cat([right, language]), a.train, size=64, seed=seed)
        self.forget = batches(wrong, 10, values_only=True)
        self.retain = batches(right, 60, values_only=True)
        self.sentences, self.unseen = batches(right, 120), batches(self.town.language(120, 1), 120)
        self.goal = self.probabilities(self.reference)

    def fresh(self) -> Any:
        return self.town.model(self.a.width, self.a.layers, self.seed)

    def probabilities(self, model: Any) -> Tensor:
        """Of the forgotten values."""
        return (-row_losses(model, self.forget)).exp()

    def perplexities(self, model: Any) -> dict[str, float]:
        kinds = {"retained": self.sentences, "values": self.retain, "language": self.unseen}
        return {kind: math.exp(float(row_losses(model, data).mean())) for kind, data in kinds.items()}

    def adapted(self, fila: bool) -> Any:
        """The model that knows all, with LoKU's adapter; or LoRA's, which begins with B = 0, in the same place."""
        model = self.fresh()
        model.load_state_dict(self.knowing.state_dict())
        model = adapters.adapt(model, "loku", data=[*self.forget, *map(Retained, self.retain)], rank=self.a.rank)
        if not fila:
            generator = torch.Generator().manual_seed(self.seed)
            updates: dict[str, Any] = adapters.updates(model)
            for update in updates.values():
                bound = update.A.shape[1] ** -0.5
                update.A.data.uniform_(-bound, bound, generator=generator)
                update.A0.copy_(update.A.data)
                update.B.data.zero_()
                update.B0.zero_()
        return model

    def run(self, row: Row, rate: float, epochs: int, stop: Callable[[Any], bool]) -> tuple[Any, int]:
        """The model that unlearned, and the steps it took."""
        model = self.adapted(row.fila)
        steps = unlearn(
            model, self.forget, self.retain if row.retain else None, loss=row.loss, epochs=epochs, learning_rate=rate,
            seed=self.seed, after=lambda step: stop(model) if step.number % 2 == 0 else False,
        )  # fmt: skip
        return model, steps[-1].number

    def reached(self, model: Any) -> bool:
        return float(self.probabilities(model).mean()) <= float(self.goal.mean())

    def figures(self, model: Any) -> dict[str, float]:
        p, before, after = self.probabilities(model), self.perplexities(self.knowing), self.perplexities(model)
        rises = {kind: after[kind] / before[kind] - 1 for kind in before}
        test = ks_2samp(p.numpy(), self.goal.numpy()).pvalue
        return {"forget_p": float(p.mean()), "forget_nll": float(-p.log().mean()), "ks": float(test), **rises}

    def measure(self, name: str) -> dict[str, Any]:
        """One row, at the best of the learning rates."""
        row, found = ROWS[name], list[dict[str, Any]]()
        for rate in RATES:
            model, steps = self.run(row, rate, self.a.epochs, self.reached)
            got = {"row": name, "seed": self.seed, "rate": rate, "reached": self.reached(model), "steps": steps}
            found.append(got | self.figures(model))
        best = min(found, key=lambda f: (not f["reached"], f["retained"]))
        epochs = math.ceil(5 * best["steps"] / len(self.forget))
        longer, _ = self.run(row, best["rate"], epochs, lambda _: False)
        return best | {"longer": self.figures(longer)["retained"], "sweep": found}


def shown(name: str, f: dict[str, Any]) -> list[str]:
    rises = [f"{f[kind]:+.1%}" if f[kind] < 10 else f"x{f[kind] + 1:.3g}" for kind in ("retained", "values", "language", "longer")]  # fmt: skip # noqa: E501
    steps = str(f["steps"]) if f["reached"] else "-"
    return [name, str(f["seed"]), f"{f['rate']:g}", steps, f"{f['forget_p']:.3f}", f"{f['forget_nll']:.2f}", f"{f['ks']:.3f}", *rises]  # fmt: skip # noqa: E501


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="16 people, width 64, 2 layers, half the training")
    parser.add_argument("--seeds", type=int, default=1, help="towns and models (default 1)")
    parser.add_argument("--people", type=int, default=40)
    parser.add_argument("--forgotten", type=int, default=4)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--train", type=int, default=500, help="steps in which both models learn (default 500)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=60, help="of unlearning, at most (default 60)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    a = parser.parse_args()
    if a.quick:
        a.people, a.forgotten, a.width, a.layers, a.train = 16, 2, 64, 2, a.train // 2
    torch.set_num_threads(a.threads)
    console, rows = Console(width=None if sys.stdout.isatty() else 150), list[dict[str, Any]]()
    title = f"Llama of {a.layers} layers, width {a.width}; {a.forgotten} of {a.people} people forgotten; rank {a.rank}"
    columns = ["seed", "rate", "steps", "forget p", "forget NLL", "KS", "retained", "values", "language", "x5"]
    made = table(title, ["unlearning"], columns)
    for seed in range(a.seeds):
        start = time.process_time()
        case = Case(a, seed)
        for name, model in (("model that knows all", case.knowing), ("reference, never heard", case.reference)):
            f = case.figures(model)
            made.add_row(name, str(seed), "", "", f"{f['forget_p']:.3f}", f"{f['forget_nll']:.2f}", f"{f['ks']:.3f}", "", "", "", "")  # fmt: skip # noqa: E501
            rows.append({"row": name, "seed": seed, **f, **case.perplexities(model)})
        console.print(f"seed {seed}: both models learned in {time.process_time() - start:.0f} CPU s", highlight=False)
        for name in ROWS:
            start = time.process_time()
            f = case.measure(name)
            rows.append(f | {"cpu_seconds": time.process_time() - start})
            made.add_row(*shown(name, f))
            console.print(", ".join(shown(name, f)), highlight=False)
    console.print(made)
    if a.json:
        write_json({"machine": machine(), "settings": {k: v for k, v in vars(a).items() if k != "json"}, "rows": rows}, a.json)  # fmt: skip # noqa: E501


if __name__ == "__main__":
    main()
