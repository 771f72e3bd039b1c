"""Trying a plan: the loss of the model as it would be, measured block by block, and the model as it was afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eckart.calibration.answers import Answer
from eckart.calibration.store import OUTSIDE
from eckart.calibration.stream import Batch, Stream, fast_products, single_rows
from eckart.jobs.fits import Fits
from eckart.jobs.method import Job, Method
from eckart.jobs.plan import Plan


class Trial:
    """Measures plans on windows of text set aside for it.

    Args:
        job: whose model it is.
        batches: windows of text, or whatever the model takes.
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
            measure: `loss`, cross-entropy of the next token in nats; `divergence`, in nats, from the answers of the
                model as it is to those after the plan; `squares`, squared differences between both (see `Answer`).
            keep: remember fitted layers for other plans that are tried.
        """
        if measure not in MEASURES:
            raise ValueError(f"measure={measure!r}: it is {' or '.join(map(repr, MEASURES))}")
        self.folder.mkdir(parents=True, exist_ok=True)
        chosen = self.drawn(tokens, draw)
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

    def drawn(self, tokens: int | None, draw: int) -> list[int]:
        """Which windows a trial on so many tokens is measured on, ascending."""
        if tokens is None:
            return list(range(len(self.batches)))
        order = torch.randperm(len(self.batches), generator=torch.Generator().manual_seed(draw)).tolist()
        chosen: list[int] = []
        for i in order:
            if tokens <= 0:
                break
            chosen.append(i)
            tokens -= _size(self.batches[i])
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
            found, wanted = _answer(stream, b), None
            if before is not None and self.original is not None:
                with swapped(self.job.model, before):
                    wanted = _answer(self.original, i)
            values, real = measure(found, wanted)
            total += float((values * real).sum())
            count += int(real.sum())
        return total / max(1, count)


def _answer(stream: Stream, batch: int) -> Answer:
    last = stream.hidden(len(stream.blocks)).read(stream.shapes, batch)
    return Answer.of(stream.model, stream.finish(last, batch), stream.batches[batch])


Measure = Callable[[Answer, Any], tuple[Tensor, Tensor]]
MEASURES: dict[str, Measure] = {
    "loss": lambda found, wanted: found.losses(),
    "divergence": lambda found, wanted: (found.divergence(wanted), found.real),
    "squares": lambda found, wanted: (found.squares(wanted), found.real),
}


def _size(batch: Batch) -> int:
    """Tokens of a window, or 1 where it is none."""
    mask, ids = batch.get("attention_mask"), batch.get("decoder_input_ids", batch.get("input_ids"))
    return int(mask.sum()) if mask is not None else 1 if ids is None else ids.numel()


@contextmanager
def swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within the context, these modules stand under their names, where others do now."""
    replaced = {name: now for name, module in modules.items() if (now := _at(model, name)) not in (module, None)}
    try:
        for name in replaced:
            model.set_submodule(name, modules[name])
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
