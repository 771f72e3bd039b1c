"""Trying a plan: the loss of the model as it would be, measured block by block, and the model as it was afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eckart.calibration.store import OUTSIDE
from eckart.calibration.stream import Batch, Stream, fast_products, single_rows
from eckart.jobs.fits import Fits
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
        self.fits = Fits(folder / "fits")
        self.original: Stream | None = None

    def __call__(
        self, method: Method, plan: Plan, *, tokens: int | None = None, draw: int = 0, measure: str = "loss",
        keep: bool = False,
    ) -> float:  # fmt: skip
        """A mean over tokens, of the model after the plan.

        Args:
            method: whose plan it is.
            tokens: measure on as few whole windows as hold that many, or all where they do not; None for all.
            draw: decides which windows these are.
            measure: `loss`, cross-entropy of the next token in nats; `divergence`, KL in nats from the answers of the
                model as it is to those after the plan; `squares`, squared differences between both's logits.
            keep: remember fitted layers for other plans that are tried.
        """
        if measure not in MEASURES:
            raise ValueError(f"measure={measure!r}: it is {' or '.join(map(repr, MEASURES))}")
        self.folder.mkdir(parents=True, exist_ok=True)
        chosen = self._drawn(tokens, draw)
        if measure != "loss" and self.original is None:
            self.original = self._advanced(list(range(len(self.batches))), lambda part: None, "original")
        self.job.fits = self.fits if keep else None
        try:
            names = self.job.module_names(OUTSIDE)
            with self.job.subject.loaded(*names), _restoring(self.job.model, names) as before:
                stream = self._advanced(chosen, lambda part: method.rewrite(self.job, plan, part), "hidden")
                with fast_products(), torch.no_grad():
                    return self._mean(stream, chosen, MEASURES[measure], before if measure != "loss" else None)
        finally:
            self.job.fits = None

    def _drawn(self, tokens: int | None, draw: int) -> list[int]:
        """Which windows to measure on, ascending."""
        if tokens is None:
            return list(range(len(self.batches)))
        order = torch.randperm(len(self.batches), generator=torch.Generator().manual_seed(draw)).tolist()
        chosen: list[int] = []
        for i in order:
            if tokens <= 0:
                break
            chosen.append(i)
            tokens -= int(_real(self.batches[i]).sum())
        return sorted(chosen)

    @torch.no_grad()
    def _advanced(self, chosen: list[int], rewrite: Callable[[int], object], folder: str) -> Stream:
        """Windows run through all blocks, each rewritten for that; what leaves the last one is kept in that folder."""
        job, model, where = self.job, self.job.model, self.folder / folder
        where.mkdir(exist_ok=True)
        for left in where.glob("hidden-*"):
            left.unlink()
        stream = Stream(job.subject, [self.batches[i] for i in chosen], where, job.blocks)
        names = job.module_names(OUTSIDE)
        with job.subject.loaded(*names):
            rewrite(OUTSIDE)
            _compute_in_float(model, names)
            stream.start()
            for part, block in enumerate(job.blocks):
                with job.subject.loaded(block), _restoring(model, [block]):
                    rewrite(part)
                    _compute_in_float(model, [block])
                    with fast_products():
                        stream.advance(part)
                stream.hidden(part).path.unlink()
                job.progress("trial", part + 1, len(job.blocks))
        return stream

    def _mean(
        self, stream: Stream, chosen: list[int], measure: Measure, before: Mapping[str, nn.Module] | None
    ) -> float:
        total, count = 0.0, 0
        for b, i in enumerate(chosen):
            logits, wanted = _logits(stream, b), None
            if before is not None and self.original is not None:
                with _put_back(self.job.model, before):
                    wanted = _logits(self.original, i)
            values, real = measure(logits, wanted, self.batches[i])
            total += float((values * real).sum())
            count += int(real.sum())
        return total / max(1, count)


def _logits(stream: Stream, batch: int) -> Tensor:
    last = stream.hidden(len(stream.blocks)).read(stream.shapes, batch)
    found: Tensor | None = getattr(stream.finish(last, batch), "logits", None)
    if found is None:
        raise ValueError(f"{type(stream.model).__name__} puts out no logits, by which plans are tried: use a method that tries none")  # fmt: skip # noqa: E501
    return found.float()


def token_losses(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every next token (b, length - 1), and where it counts."""
    ids, real = batch["input_ids"], _real(batch)
    losses = nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    return losses, real[:, 1:] & real[:, :-1]


def _real(batch: Batch) -> Tensor:
    """(b, length) True where a token is real."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def divergence(logits: Tensor, wanted: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """KL(wanted || found) of every token (b, length), and where it counts."""
    p, q = wanted.log_softmax(-1), logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1), _real(batch)


def squares(logits: Tensor, wanted: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean squared difference over the vocabulary of every token (b, length), and where it counts."""
    return (logits - wanted).square().mean(-1), _real(batch)


Measure = Callable[[Tensor, Any, Batch], tuple[Tensor, Tensor]]
MEASURES: dict[str, Measure] = {
    "loss": lambda logits, wanted, batch: token_losses(logits, batch), "divergence": divergence, "squares": squares
}  # fmt: skip


@contextmanager
def _put_back(model: nn.Module, before: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within the context, modules that were replaced since `before` are those of before."""
    replaced = {name: now for name, module in before.items() if (now := _at(model, name)) not in (module, None)}
    try:
        for name in replaced:
            model.set_submodule(name, before[name])
        yield
    finally:
        for name, module in replaced.items():
            if module is not None:
                model.set_submodule(name, module)


@contextmanager
def _restoring(model: nn.Module, names: Sequence[str]) -> Iterator[Mapping[str, nn.Module]]:
    """Within the context, modules below `names` may be replaced; afterwards the old ones, which it gives, are back."""
    before = {inner: module for name in names for inner, module in model.get_submodule(name).named_modules(prefix=name)}
    try:
        yield before
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
