"""Trying a plan: the loss of the model as it would be, measured block by block, and the model as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from eckart.calibration.store import OUTSIDE
from eckart.calibration.stream import Batch, Stream, fast_products, single_rows
from eckart.jobs.plan import Plan
from eckart.jobs.recipe import Job, Method


class Trial:
    """Measures plans on windows of text set aside for it.

    Args:
        job: whose model it is.
        batches: windows with `input_ids`.
        folder: for hidden states.
    """

    def __init__(self, job: Job, batches: Sequence[Batch], folder: Path):
        self.job, self.batches, self.folder = job, single_rows(batches), folder

    def __call__(self, method: Method, plan: Plan) -> float:
        """Mean cross-entropy per predicted token, in nats."""
        job, model = self.job, self.job.model
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob("hidden-*"):
            left.unlink()
        stream = Stream(job.subject, self.batches, self.folder, job.blocks)
        names = job.module_names(OUTSIDE)
        with job.subject.loaded(*names), _restoring(model, names), torch.no_grad():
            method.rewrite(job, plan, OUTSIDE)
            _compute_in_float(model, names)
            stream.start()
            for part, block in enumerate(job.blocks):
                with job.subject.loaded(block), _restoring(model, [block]):
                    method.rewrite(job, plan, part)
                    _compute_in_float(model, [block])
                    with fast_products():
                        stream.advance(part)
                stream.hidden(part).path.unlink()
                job.progress("trial", part + 1, len(job.blocks))
            with fast_products():
                return self._loss(stream)

    def _loss(self, stream: Stream) -> float:
        total, count = 0.0, 0
        last = stream.hidden(len(stream.blocks))
        for b, batch in enumerate(self.batches):
            logits = stream.finish(last.read(stream.shapes, b), b).logits
            losses, real = token_losses(logits, batch)
            total += float((losses * real).sum())
            count += int(real.sum())
        return total / max(1, count)


def token_losses(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every next token (b, length - 1), and where it counts."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    losses = nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    return losses, real[:, 1:] & real[:, :-1]


@contextmanager
def _restoring(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within the context, modules below `names` may be replaced; afterwards the old ones are back."""
    before = {inner: module for name in names for inner, module in model.get_submodule(name).named_modules(prefix=name)}
    try:
        yield
    finally:
        for name, module in before.items():
            if _at(model, name) is not module:
                model.set_submodule(name, module)


def _at(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _compute_in_float(model: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        model.get_submodule(name).float()
