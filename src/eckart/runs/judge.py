"""What a model is worth on rows that it was not trained on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from eckart.downloads import Progress, silent
from eckart.runs.batches import Batches, on
from eckart.runs.config import Precision


@dataclass(frozen=True)
class Judged:
    """Figures on held-out rows.

    Attributes:
        loss: mean over the labels, in nats.
        accuracy: share of the examples whose class was told rightly; None where there are no classes.
    """

    loss: float
    accuracy: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def judge(
    model: Any, data: Batches, batch: int, precision: Precision = "float32", progress: Progress = silent
) -> Judged:
    """Loss, and accuracy where the labels are classes, in evaluation mode; the model's mode is put back."""
    device, before = next(model.parameters()).device, model.training
    model.eval()
    loss, right, classes = 0.0, 0, False
    parts = torch.arange(len(data)).split(batch)
    for number, rows in enumerate(parts, 1):
        count = data.targets(rows)
        inputs = on(device, data.batch(rows))
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            said = model(**inputs)
        loss += float(said.loss) * count if count else 0.0
        classes = inputs["labels"].dim() == 1
        if classes:
            right += int((said.logits.argmax(-1) == inputs["labels"]).sum())
        progress("evaluate", number, len(parts))
    model.train(before)
    return Judged(loss / data.targets(torch.arange(len(data))), right / len(data) if classes else None)
