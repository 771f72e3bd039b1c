"""From a file to what fine-tuning runs on: the task, its rows to train on, and those to judge on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from eckart.calibration.data import token_batches
from eckart.checkpoint.source import Source
from eckart.downloads import Progress, silent
from eckart.runs.base import rows_held_out, tokenizer_of
from eckart.runs.batches import Batches, Examples, Windows
from eckart.runs.examples import Encoded, Table, Task, classes, instructions, labels_of, read_table, task_of, text_of
from eckart.runs.finetuning import Finetuning


@dataclass(frozen=True)
class Prepared:
    """Data for a task: rows to train on, rows to judge on, and what is to be said of them."""

    task: Task
    train: Batches
    held: Batches | None
    labels: list[str] | None
    notes: list[str]


def prepare(job: Finetuning, source: Source, progress: Progress = silent) -> tuple[Any, Prepared]:
    """The tokenizer, and the data as the task takes them. Raises `ValueError` where there are too few rows."""
    table = read_table(job.data, job.columns, progress)
    task, columns = task_of(table, None if job.task == "auto" else job.task)
    notes = [f"the task is {task}, guessed from the columns {' and '.join(columns)}"] if job.task == "auto" else []
    tokenizer = tokenizer_of(source, padded=task != "text")
    if task == "text":
        return tokenizer, _windows(table, tokenizer, job, notes, progress)
    labels = labels_of(table) if task == "classification" else None
    if labels is None:
        found = instructions(table, columns, tokenizer, job.length, progress)
    else:
        found = classes(table, tokenizer, labels, job.length, progress)
    notes += _shortened(found, job.length)
    examples = Examples(found.examples, tokenizer.pad_token_id)
    train, held = examples.split(_held(len(examples), "examples", job), job.seed)
    judged = Examples(held.examples[: job.judged], held.pad) if len(held) else None
    return tokenizer, Prepared(task, train, judged, labels, notes)


def _windows(table: Table, tokenizer: Any, job: Finetuning, notes: list[str], progress: Progress) -> Prepared:
    """Text, packed into windows, of which the last ones are held out."""
    texts = [text_of(where, row, "text") for where, row in table.rows]
    tokens = token_batches(texts, tokenizer, samples=None, length=job.length, padding="allow", progress=progress)
    border = len(tokens) - _held(len(tokens), f"windows of {job.length} tokens", job)
    held = Windows(tokens[border:][: job.judged])
    judged = held if len(held) and held.targets(torch.arange(len(held))) else None
    return Prepared("text", Windows(tokens[:border]), judged, None, notes)


def _held(rows: int, what: str, job: Finetuning) -> int:
    """How many rows are held out. Raises `ValueError` where none would be left to train on."""
    held = rows_held_out(job.held_out, rows)
    if held == rows:
        raise ValueError(f"held_out: of {rows} {what}, {held} would be held out: give more data, or another share (0 holds out none)")  # fmt: skip # noqa: E501
    return held


def _shortened(found: Encoded, length: int) -> list[str]:
    notes = []
    if found.cut:
        notes.append(f"{found.cut} of {len(found.examples)} examples are longer than {length} tokens: their ends were cut off")  # fmt: skip # noqa: E501
    if found.dropped:
        notes.append(f"{found.dropped} examples were left out: nothing to learn begins within their first {length} tokens")  # fmt: skip # noqa: E501
    return notes
