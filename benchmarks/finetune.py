"""Adapters side by side at equal trained parameters: what they learn, what they forget, what they cost.

    python benchmarks/finetune.py [--json finetune.json] [--tasks decoder minilm smollm2] [--methods nola paca ...]
                                  [--ranks 2 16] [--steps 40] [--rates 3e-4 1e-3 ... 1e-1] [--seeds 1 2 3]
                                  [--threads 1] [--bfloat16] [--quick]

Two tasks on e-mails (mail.py): the decoder of `models/` learns to predict them (perplexity), and MiniLM learns to tell
spam (accuracy, with a trained linear head over the mean of its features). `--tasks smollm2` does the first on a model
of 135 million parameters. "forgotten" is what the model lost on what it was made for: nats a token on held-out texts of
the kinds that the decoder was trained on; for MiniLM the mean of 1 - cosine between its features of encyclopaedia
sentences before and after.

A column of budgets is the number of trained parameters of a LoRA of that rank on all linear layers; every method gets
its dial (rank, bases, ...) turned to the largest value that stays within it, and a method that cannot reach it has
fewer, as the table says; methods that move ranks get LoRA's rank as their mean, and hold more while they train. The
learning rate is the best of one grid for all, on validation mails with a seed of its own: two in the middle are tried,
then those beyond the better one until one is worse; a rate at the edge of the grid is marked. Then come the seeds, on
test mails: mean and spread (standard deviation). "MB" is counted: gradients, optimiser state, and what autograd keeps
of one batch. Seconds are medians of steps. Every run is written to the JSON file as it ends; the same command goes on
with what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import machine, table, write_json
from corpora import corpora
from eckart import adapters
from eckart.calibration.data import token_batches
from eckart.calibration.wikipedia import articles
from eckart.checkpoint.source import resolve
from eckart.registry import entries
from eckart.remarks import noting
from eckart.runs.counting import SavedBytes, gradient_bytes, state_bytes
from eckart.schedules import Schedule
from mail import Mail, mails
from models import FOLDERS, load
from pretrain_decoder import split
from tasks import SENTENCE

REFERENCES = {
    "full fine-tuning": None,
    "PEFT LoRA": {},
    "PEFT DoRA": {"use_dora": True},
    "PEFT PiSSA": {"init_lora_weights": "pissa"},
}
DIALS: dict[str, Callable[[int], dict[str, Any]]] = {
    "adalora": lambda v: {"rank": v, "initial_rank": v + max(1, v // 2)},
    "compacter": lambda v: {"reduction": max(1, 384 // v)},
    "householder_projector": lambda v: {"rank": v, "relative": True},
    "hydra": lambda v: {"rank": v, "sequential_rank": v},
    "increlora": lambda v: {"rank": v, "warmup": 4, "every": 4},
    "lift": lambda v: {"rank": v, "interval": 10},
    "nola": lambda v: {"bases": v},
    "snella": lambda v: {"rank": v, "interval": 4},
    "randlora": lambda v: {"rank": max(1, 512 // v)},
    "tlora": lambda v: {"rank": v, "transform_rank": max(1, v // 2)},
}
"""The settings of a size, where they are not its rank alone; intervals fit so short a run."""
RANKED = ("adalora", "diffora", "eva", "increlora", "sora")
"""Methods that move or cut ranks: they get LoRA's rank, as the mean that they end with or the most that they have."""
STARTING = {"eva": 16}
"""Batches that a start is made from, where 4 are too few: EVA's directions do not come to rest on them."""
ELSEWHERE = (
    "dp_lora", "fedsvd", "loku", "compress_then_prompt", "explora",  # other tasks than learning a text
    "welore_tune", "lq_lora_start", "eora_start",  # of compressed models
    "lora_c", "conv_dora", "cp_lora", "cp_dora",  # of convolutions: on linear layers they are LoRA and DoRA
)  # fmt: skip


LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)


class Task(ABC):
    """A model, batches to train it on, and two figures."""

    name: str
    better: str
    figure: str

    def __init__(self, quick: bool):
        self.mails, self.few = mails(), quick

    @abstractmethod
    def model(self) -> nn.Module:
        """A fresh copy of what is adapted."""

    def wrapped(self, adapted: nn.Module, seed: int) -> nn.Module:
        """What is trained: the adapted model and whatever else the task needs."""
        return adapted

    @abstractmethod
    def batches(self, steps: int, seed: int) -> Iterator[dict[str, Tensor]]: ...

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor: ...

    @abstractmethod
    def judge(self, model: nn.Module, part: str) -> float:
        """The figure on `validation` or `test`."""

    @abstractmethod
    def forgotten(self, model: nn.Module) -> float: ...


class Decoder(Task):
    """The domain: a text model of novels, speeches and encyclopaedias learns to predict e-mails."""

    name, better, figure = "decoder", "lower", "perplexity"
    length, size, judged = 64, 8, 96

    def __init__(self, quick: bool):
        super().__init__(quick)
        tokenizer = AutoTokenizer.from_pretrained(self.folder())
        self.windows = {p: self._windows(tokenizer, [m.text for m in part], p) for p, part in self.mails.items()}
        self.own = self._windows(tokenizer, [t[:40_000] for t in split(corpora())[1].values()], "own")
        self.before = self._nats(self.model(), self.own)

    def _windows(self, tokenizer: Any, texts: list[str], part: str) -> Tensor:
        samples = 16 if self.few else 2000 if part == "train" else self.judged
        return token_batches(texts, tokenizer, samples=samples, length=self.length, seed=0).ids

    def folder(self) -> Path:
        return FOLDERS["decoder"]()

    def model(self) -> nn.Module:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(self.folder(), dtype=torch.float32)
        return model

    def batches(self, steps: int, seed: int) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            ids = self.windows["train"][torch.randint(len(self.windows["train"]), (self.size,), generator=generator)]
            yield {"input_ids": ids, "labels": ids}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss

    @torch.no_grad()
    def _nats(self, model: nn.Module, windows: Tensor) -> float:
        return statistics.mean(float(self.loss(model, {"input_ids": w, "labels": w})) for w in windows.split(16))

    def judge(self, model: nn.Module, part: str) -> float:
        return math.exp(min(50.0, self._nats(model, self.windows[part])))

    def forgotten(self, model: nn.Module) -> float:
        return self._nats(model, self.own) - self.before


class SmolLM2(Decoder):
    """The same with SmolLM2-135M-Instruct: few windows, because a step takes seconds."""

    name = "smollm2"
    size, judged = 4, 32

    def folder(self) -> Path:
        return resolve("smollm2-135m").folder


class Classifier(nn.Module):
    """Mean features of real tokens, and a linear head."""

    def __init__(self, encoder: nn.Module, seed: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(384, 2)
        generator = torch.Generator().manual_seed(seed)
        self.head.weight.data.copy_(0.02 * torch.randn(2, 384, generator=generator))
        self.head.bias.data.zero_()

    def features(self, input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return (hidden * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)

    def forward(self, **batch: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(**batch))
        return logits


class MiniLM(Task):
    """Classification: spam or not."""

    name, better, figure = "minilm", "higher", "accuracy"
    length, size, judged = 48, 8, 400

    def __init__(self, quick: bool):
        super().__init__(quick)
        self.tokenizer = AutoTokenizer.from_pretrained(FOLDERS["minilm"]())
        sentences = [s for a in articles()[-6:] for s in SENTENCE.split(a) if 40 < len(s) < 400][: 16 if quick else 100]
        self.own = self._encode([Mail(s, 0) for s in sentences])
        with torch.no_grad():
            self.before = Classifier(self.model(), 0).features(**self.own)

    def _encode(self, part: list[Mail]) -> dict[str, Tensor]:
        words: Any = self.tokenizer([m.text[:2000] for m in part], truncation=True, padding="max_length",
                                    max_length=self.length, return_tensors="pt")  # fmt: skip
        return {"input_ids": words["input_ids"], "attention_mask": words["attention_mask"],
                "labels": torch.tensor([m.unwanted for m in part])}  # fmt: skip

    def model(self) -> nn.Module:
        return load("minilm", torch.float32)

    def wrapped(self, adapted: nn.Module, seed: int) -> nn.Module:
        return Classifier(adapted, seed)

    def batches(self, steps: int, seed: int) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        train = self.mails["train"]
        for _ in range(steps):
            yield self._encode(
                [train[i] for i in torch.randint(len(train), (self.size,), generator=generator).tolist()]
            )

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(**batch).float(), batch["labels"])

    @torch.no_grad()
    def judge(self, model: nn.Module, part: str) -> float:
        chosen = self.mails[part][: 32 if self.few else self.judged]
        right = 0
        for i in range(0, len(chosen), 32):
            batch = self._encode(chosen[i : i + 32])
            right += int((model(**batch).argmax(-1) == batch["labels"]).sum())
        return right / len(chosen)

    @torch.no_grad()
    def forgotten(self, model: nn.Module) -> float:
        after: Tensor = model.features(**self.own)  # type: ignore[operator]
        return float(1 - F.cosine_similarity(after.float(), self.before).mean())


TASKS: dict[str, type[Task]] = {"decoder": Decoder, "minilm": MiniLM, "smollm2": SmolLM2}


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
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", **settings)
        return get_peft_model(model, config)  # type: ignore[arg-type]
    fields = {f.name for f in dataclasses.fields(adapter_class(name))}
    words = {} if value is None else DIALS.get(name, lambda v: {"rank": v})(value)
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
    best = 0
    for value in LADDER:
        try:
            size = count(put(task, name, value, 0, 1))
        except ValueError:  # a rank that the layers cannot have
            continue
        if best and size > budget:
            break
        best = value
    return best


def one(task: Task, name: str, value: int | None, lr: float, seed: int, rank: int, part: str, a: argparse.Namespace) -> dict[str, Any]:  # fmt: skip # noqa: E501
    """Train once and judge; what goes wrong is part of the result."""
    found: dict[str, Any] = {"lr": lr, "seed": seed, "dial": value}
    try:
        adapted = put(task, name, value, seed, rank)
    except (RuntimeError, ValueError) as error:
        return found | {"error": f"{type(error).__name__}: {error}"}
    schedule = adapters.schedule(adapted) if hasattr(adapted, "peft_config") else Schedule()
    head = task.wrapped(adapted, seed)
    found["trained"] = count(adapted)
    optimizer = torch.optim.AdamW(trained(head), lr, weight_decay=0.0)
    schedule.begin(optimizer, a.steps)
    head.train()
    seconds, losses = [], []
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
            for name in a.methods:
                row = report["rows"].setdefault(f"{key}/{rank}/{name}", {"sweep": {}, "runs": {}})
                if "failed" in row or ("dial" not in row and not _dialled(row, task, name, budget, rank)):
                    write_json(report, a.json)
                    continue
                sign = 1 if task.better == "higher" else -1
                scores = {float(lr): scored(run, sign) for lr, run in row["sweep"].items()}
                while (lr := next_rate(a.rates, scores)) is not None:
                    row["sweep"][str(lr)] = one(task, name, row["dial"], lr, 0, rank, "validation", a)
                    scores[lr] = scored(row["sweep"][str(lr)], sign)
                    write_json(report, a.json)
                best = max(scores, key=scores.__getitem__)
                if scores[best] == -math.inf:
                    continue
                for seed in a.seeds:
                    if str(seed) not in row["runs"]:
                        row["runs"][str(seed)] = one(task, name, row["dial"], best, seed, rank, "test", a)
                        write_json(report, a.json)
                console.print(f"{key}, as LoRA of rank {rank}, {name}: {said(row)}", highlight=False)


def scored(run: dict[str, Any], sign: int) -> float:
    """Higher is better; a run that failed is worst."""
    return sign * run["figure"] if "figure" in run else -math.inf


def next_rate(rates: Sequence[float], scores: Mapping[float, float]) -> float | None:
    """Two in the middle first, then outwards from the best one until its neighbours have been tried."""
    middle = len(rates) // 2
    for lr in rates[max(0, middle - 1) : middle + 1]:
        if lr not in scores:
            return lr
    best = rates.index(max(scores, key=scores.__getitem__))
    beside = rates[max(0, best - 1) : best + 2]
    return next((lr for lr in beside if lr not in scores), None)


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
                edge = "*" if len(s["rates"]) > 1 and lr in (min(s["rates"]), max(s["rates"])) else ""
                file = runs[0]["file"]
                made.add_row(
                    name, f"{runs[0]['trained']:,}", f"{lr:g}{edge}", f"{statistics.mean(figures):.4g}",
                    f"{statistics.pstdev(figures):.2g}", f"{statistics.mean(r['forgotten'] for r in runs):.4f}",
                    f"{runs[0]['bytes'] / 1e6:.1f}", f"{statistics.median(r['seconds'] for r in runs):.2f}",
                    "-" if file is None else f"{file / 1e3:.0f}",
                )  # fmt: skip
            console.print(made)
    for name, row in report["rows"].items():
        if "failed" in row:
            console.print(f"{name}: {row['failed']}", markup=False)
    console.print("* at the edge of the grid of learning rates")


def opened(a: argparse.Namespace) -> dict[str, Any]:
    """The report of the same settings that is there, or a new one."""
    settings = {k: getattr(a, k) for k in ("steps", "rates", "seeds", "bfloat16", "quick")}
    if not a.json.exists():
        return {"machine": machine(), "settings": settings, "rows": {}}
    report: dict[str, Any] = json.loads(a.json.read_text(encoding="utf-8"))
    differ = [k for k in settings if report["settings"].get(k) != settings[k]]
    if differ:
        raise SystemExit(f"{a.json} holds runs with other settings ({', '.join(differ)}): name another file")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*REFERENCES, *(e.key for e in entries("adapters") if e.key not in ELSEWHERE)]
    parser.add_argument("--json", type=Path, default=Path("finetune.json"), help="the results, and where a run goes on")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["decoder", "minilm"])
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 16], help="of the LoRA whose size is the budget")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--bfloat16", action="store_true", help="train under bfloat16 autocast")
    parser.add_argument("--quick", action="store_true", help="a few windows, two steps, one rate, one seed")
    a = parser.parse_args()
    a.rates.sort()
    if a.quick:
        a.steps, a.rates, a.seeds, a.ranks = 2, a.rates[len(a.rates) // 2 :][:1], a.seeds[:1], a.ranks[:1]
    if a.threads:
        torch.set_num_threads(a.threads)
    console, report = Console(width=None if sys.stdout.isatty() else 160), opened(a)
    measure(report, a, console)
    show(report, a, console)


if __name__ == "__main__":
    main()
