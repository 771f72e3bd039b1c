"""One pass over the calibration data, block by block: statistics of the model as it is, kept in a store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.calibration.collect import Collector, collect_gradients
from eckart.calibration.store import OUTSIDE, StatisticsStore
from eckart.calibration.stream import Stream
from eckart.downloads import Progress
from eckart.metrics.statistics import FORWARD_SUMS, GRADIENT_SUMS, Statistics


@dataclass(frozen=True)
class Request:
    """What a method wants to be measured.

    Attributes:
        probes: block index (`OUTSIDE` for none) -> names of the modules whose inputs are summed.
        needs: names of the sums.
        labels: targets of the backward pass, `data` or `model`.
        influence: whether 1 - mean cosine between what enters and what leaves each block is wanted.
        gradient_samples: sequences in the backward pass.
    """

    probes: Mapping[int, Sequence[str]]
    needs: frozenset[str]
    labels: str = "data"
    influence: bool = False
    gradient_samples: int = 16

    @property
    def any(self) -> bool:
        return bool(self.needs) or self.influence

    @property
    def gradients(self) -> bool:
        return bool(self.needs & GRADIENT_SUMS)

    def gradient_files(self, seed: int) -> str:
        """A name for the gradient sums of this loss on these samples; the seed counts where it draws the targets."""
        return f"gradients-{self.labels}-{self.gradient_samples}" + (f"-{seed}" if self.labels == "model" else "")


def calibrate(stream: Stream, request: Request, store: StatisticsStore, *, seed: int, progress: Progress) -> list[float]:  # fmt: skip # noqa: E501
    """Fill `store` with what `request` asks for; blocks that it already holds are not run again.

    Returns the influence of the blocks, where asked for. The stream must have been started.
    """
    total, slopes = len(stream.blocks), request.needs & GRADIENT_SUMS
    known, outside, gradients = _covered(request, store, total)
    wants_outside, wants_gradients = not outside, not gradients
    if not all(known) or wants_outside or wants_gradients:
        for i in range(_resume_at(stream, known, wants_gradients), total):
            _one_block(stream, request, store, i, collect=not known[i])
            if not wants_gradients and i > 0:
                stream.hidden(i).path.unlink(missing_ok=True)
            progress("calibrate", i + 1, total)
    if wants_outside:
        _outside(stream, request, store)
    if wants_gradients:
        parts = [i for i in [OUTSIDE, *range(total)] if request.probes.get(i) or i != OUTSIDE]
        wanted = {i: store.joined(i, slopes, request.probes.get(i, ()), store.gradients) for i in parts}
        targets = {i: names for i, (_, names) in wanted.items()}
        needs = frozenset().union(*(found for found, _ in wanted.values()))
        for i, sums in collect_gradients(
            stream, targets, needs, request.labels, seed, request.gradient_samples, progress
        ):
            store.save(i, sums, {name: name for name in sums}, store.gradients)
    for i in range(1, total + 1):
        stream.hidden(i).path.unlink(missing_ok=True)
    return influence(store, total) if request.influence else []


def covered(request: Request, store: StatisticsStore, total: int) -> bool:
    """Whether a store holds all that is asked for of a model with so many blocks."""
    known, outside, gradients = _covered(request, store, total)
    return all(known) and outside and gradients


def _covered(request: Request, store: StatisticsStore, total: int) -> tuple[list[bool], bool, bool]:
    """The same for every block's inputs, for the inputs outside the blocks, and for gradients."""
    inputs, slopes = request.needs & FORWARD_SUMS, request.needs & GRADIENT_SUMS
    probes = [request.probes.get(i, ()) for i in range(total)]
    known = [store.covers(i, inputs, names) for i, names in enumerate(probes)]
    outside = request.probes.get(OUTSIDE, ())
    slopes_known = [store.covers(i, slopes, names, store.gradients) for i, names in enumerate(probes)]
    if outside:
        slopes_known.append(store.covers(OUTSIDE, slopes, outside, store.gradients))
    return known, not outside or store.covers(OUTSIDE, inputs, outside), not slopes or all(slopes_known)


def _resume_at(stream: Stream, known: list[bool], all_needed: bool) -> int:
    """The block to go on with: what enters it lies on disk, and so it does for all before it where `all_needed`."""
    first = known.index(False) if False in known else len(known)
    there = [stream.hidden(i).path.exists() for i in range(first + 1)]
    if all_needed:
        return there.index(False) - 1 if False in there else first
    return max(i for i, exists in enumerate(there) if exists)


def _one_block(stream: Stream, request: Request, store: StatisticsStore, index: int, collect: bool) -> None:
    needs, names = store.joined(index, request.needs, request.probes.get(index, ()))
    collector = Collector(needs)
    cosines = Statistics()
    names = names if collect else []
    with stream.subject.loaded(stream.blocks[index]), collector.hooked(stream.model, names):
        stream.advance(
            index,
            before=lambda b: collector.next_batch(stream.mask(b)),
            after=_cosine_sum(cosines, stream) if collect else None,
        )
    if collect:
        store.save(index, {**collector.sums, "influence": cosines}, collector.leaders)


def _cosine_sum(into: Statistics, stream: Stream) -> Callable[[int, Tensor, Tensor], None]:
    def add(batch: int, x: Tensor, y: Tensor) -> None:
        mask = stream.mask(batch)
        cosine = torch.cosine_similarity(x.float(), y.float(), dim=-1)[..., None]
        into.add_inputs(cosine, frozenset({"x"}), mask)

    return add


def influence(store: StatisticsStore, total: int) -> list[float]:
    """1 - mean cosine between what enters and what leaves each of `total` blocks."""
    return [1.0 - float(store.of("influence", i).mean("x")) for i in range(total)]


@torch.no_grad()
def _outside(stream: Stream, request: Request, store: StatisticsStore) -> None:
    """Statistics of the head and of other layers after (or before) the blocks."""
    needs, names = store.joined(OUTSIDE, request.needs, request.probes[OUTSIDE])
    collector = Collector(needs)
    with stream.subject.loaded(*stream.outside), collector.hooked(stream.model, names):
        for b in range(len(stream.batches)):
            collector.next_batch(stream.mask(b))
            stream.finish(stream.hidden(len(stream.blocks)).read(stream.shapes, b), b)
    store.save(OUTSIDE, collector.sums, collector.leaders)
