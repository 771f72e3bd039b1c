"""Small data for each task, in the words of `tiny`'s tokenizer, and fine-tuning that takes a second."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import tiny
from eckart.runs import Finetuned, finetune

TEMPLATE = (
    "{% for m in messages %}{{ 'w1' if m.role == 'user' else 'w2' }} {{ m.content }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}w2 {% endif %}"
)
"""Writes w1 before what a user says and w2 before an answer, and ends every turn."""
SHORT: dict[str, Any] = {"steps": 8, "batch_size": 4, "length": 16, "lr": 1e-2, "warmup": 2, "save_every": 3}


def rows(task: str, count: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a task: the class is told by the words, an answer follows from its prompt."""
    draw = random.Random(seed)
    if task == "classification":
        return [_class(draw) for _ in range(count)]
    if task == "text":
        return [{"text": " ".join(f"w{(i + k) % 20 + 3}" for k in range(30))} for i in range(count)]
    asked = [(f"w{i}", f"w{i + 1} w{i + 2}") for i in (draw.randrange(3, 90) for _ in range(count))]
    if task == "instruction":
        return [{"prompt": p, "response": r} for p, r in asked]
    return [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": r}]} for p, r in asked]


def _class(draw: random.Random) -> dict[str, Any]:
    kind = draw.randrange(2)
    words = [f"w{draw.randrange(3, 60) + 57 * kind}" for _ in range(draw.randrange(3, 9))]
    return {"text": " ".join(words), "label": ("low", "high")[kind]}


def write(path: Path, task: str, **more: Any) -> Path:
    """The same as a .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(task, **more)), encoding="utf-8")
    return path


def model(folder: Path, name: str = "llama", **settings: Any) -> Path:
    """A model with a tokenizer, made once."""
    if not folder.exists():
        tiny.save_model(folder, name, **settings)
    return folder


def tuned(
    folder: Path, kind: str, /, adapter: str = "svfit", out: str = "out", base: str = "llama", **options: Any
) -> Finetuned:
    """An adapter on a model in `folder`, fitted to the data of a kind there."""
    data = folder / f"{kind}.jsonl"
    if not data.exists():
        write(data, kind)
    words = {**SHORT, "settings": {"rank": 4}, **options}
    return finetune(model(folder / base, base), adapter, data, folder / out, **words)
