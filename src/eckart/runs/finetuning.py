"""The settings of fine-tuning, checked when they are given."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from eckart.runs.config import Decay, Device, Optimizer, Precision, Training, least

Asked = Literal["auto", "text", "instruction", "classification"]


@dataclass(frozen=True)
class Finetuning:
    """A model, an adapter, data, and how the one is fitted to the other by means of the second.

    Args:
        model: any MODEL: hub id, folder (of `eckart compress`, too), GGUF file, or `builtin`.
        adapter: key of a method of the wing `adapters`.
        data: `builtin`, a .txt, .jsonl or .csv file, or the name of a data set that the package `datasets` finds.
        output: the new folder.
        task: `text` (next words), `instruction` (responses only), `classification`, or `auto`, by the columns.
        columns: `text`, `label`, `prompt`, `response` or `messages` -> the column of the data that is taken for it.
        settings: of the adapter.
        steps: of the optimiser; None for as many as `epochs` take.
        epochs: how often each row is seen.
        batch_size: rows that run together.
        accumulate: batches of an optimiser step.
        length: tokens in a window of text; an example that is longer is cut.
        lr: the highest learning rate.
        warmup: steps (a whole number) or share of the run (0.0 to 1.0) over which it rises linearly.
        decay: how it falls afterwards.
        clip: largest norm of all gradients together; 0 does not clip.
        weight_decay: of the trained tensors.
        precision: `bfloat16` holds the frozen weights in it and computes in autocast; trained tensors are float32.
        save_every: steps between checkpoints.
        device: `auto` takes a GPU where there is one.
        seed: of every random choice.
        samples: rows that an adapter which starts from data is shown.
        held_out: share of the rows that is not trained on but judged on; one at least, unless 0.
        judged: rows of these that are judged on, at most.
    """

    model: str
    adapter: str
    data: str
    output: str
    task: Asked = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    accumulate: int = 1
    length: int = 512
    lr: float = 5e-4
    warmup: int | float = 0.1
    decay: Decay = "cosine"
    clip: float = 1.0
    weight_decay: float = 0.0
    precision: Precision = "float32"
    save_every: int = 100
    device: Device = "auto"
    seed: int = 0
    samples: int = 32
    held_out: float = 0.1
    judged: int = 256

    def __post_init__(self) -> None:
        for name in ("samples", "judged"):
            least(name, getattr(self, name), 1)
        least("length", self.length, 2)
        for name, words in (("task", Asked), ("decay", Decay), ("precision", Precision), ("device", Device)):
            if getattr(self, name) not in get_args(words):
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(get_args(words))}")
        if not self.epochs > 0:
            raise ValueError(f"epochs: {self.epochs} is not above 0")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out: {self.held_out} is not a share from 0, below 1")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay: {self.weight_decay} is not a number from 0")
        try:
            self.training(rows=10**12)
            self.optimizer()
        except ValueError as e:
            raise ValueError(str(e).removeprefix("training.").removeprefix("optimizer.")) from None

    def training(self, rows: int) -> Training:
        """What the loop is told, for so many rows. Raises `ValueError` where a number is too small."""
        least("batch_size", self.batch_size, 1)
        least("accumulate", self.accumulate, 1)
        steps = self.steps
        if steps is None:
            steps = math.ceil(self.epochs * rows / (self.batch_size * self.accumulate))
        return Training(
            steps=steps, batch=self.batch_size, accumulate=self.accumulate, warmup=self.warmup, decay=self.decay,
            clip=self.clip, precision=self.precision, save_every=self.save_every, device=self.device,
        )  # fmt: skip

    def optimizer(self) -> Optimizer:
        """AdamW, as the settings say."""
        return Optimizer(name="adamw", lr=self.lr, settings={"weight_decay": self.weight_decay})

    def to_json(self) -> dict[str, Any]:
        """All settings but where the result goes."""
        return {k: v for k, v in asdict(self).items() if k != "output"}
