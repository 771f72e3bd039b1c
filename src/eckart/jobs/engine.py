"""The main job: calibrate, plan, fit, part by part, over a model in memory or in a folder, resumable at any moment."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eckart.allocation import Budget
from eckart.calibration.calibrate import calibrate, covered, influence
from eckart.calibration.collect import Collector
from eckart.calibration.store import OUTSIDE, StatisticsStore, fingerprint
from eckart.calibration.stream import Batch, Stream, fast_products
from eckart.calibration.subject import InMemory, Subject, block_names, outside
from eckart.checkpoint.folder import part_state
from eckart.checkpoint.layout import Layout, layout_of
from eckart.checkpoint.ties import tied_keys
from eckart.downloads import Progress, silent
from eckart.jobs.method import Job, Method
from eckart.jobs.plan import Layer, Plan
from eckart.jobs.solve import Executor, Threads
from eckart.jobs.trial import Trial
from eckart.metrics import Statistics
from eckart.metrics.statistics import GRADIENT_SUMS


class Persistence:
    """What a job keeps so that it can go on after being killed. This one keeps nothing."""

    def load_plan(self) -> tuple[Plan, list[float]] | None:
        return None

    def save_plan(self, plan: Plan, influence: list[float]) -> None:
        pass

    def done(self, part: int) -> list[Layer] | None:
        """The result of a part that was finished before."""
        return None

    def finish_part(self, part: int, layers: list[Layer]) -> None:
        """A part of the model has been rewritten and is still loaded."""


@dataclass
class Run:
    """What a job found: the plan, the layers as measured, and where the time went."""

    plan: Plan
    layers: list[Layer] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


class Engine:
    """One job over one model.

    Args:
        subject: the model.
        method: what to do.
        budget: what it may take.
        batches: calibration data; may be empty for methods that need none.
        work: a folder for statistics and hidden states.
        statistics: another folder to keep statistics in, so that other jobs on this model use them again where they
            have the same data.
    """

    def __init__(
        self, subject: Subject, method: Method, budget: Budget, batches: Sequence[Batch], work: Path, *,
        seed: int = 0, executor: Executor | None = None, progress: Progress = silent,
        statistics: Path | None = None, persistence: Persistence | None = None,
    ):  # fmt: skip
        self.subject, self.method, self.progress = subject, method, progress
        self.model = subject.model
        self.blocks = block_names(self.model)
        self.batches, aside = self._split(list(batches))
        self.work, self.seed = work, seed
        self.persistence = persistence or Persistence()
        self.request = method.request(self.model, self.blocks)
        kept = statistics / fingerprint(self.batches) if statistics else work / "statistics"
        self.store = StatisticsStore(kept, self.request.gradient_files(seed))
        self.seconds: dict[str, float] = {}
        self.streams: dict[str, Stream] = {}
        self.job = Job(
            subject=subject, blocks=self.blocks, budget=budget, statistics=self.store.of, influence=[],
            layouts=part_layouts(subject, self.blocks), executor=executor or Threads(), progress=progress, seed=seed,
            stream=self._stream,
        )  # fmt: skip

        if aside:
            self.job.trial = Trial(self.job, aside, work / "trial")

    def _split(self, batches: list[Batch]) -> tuple[list[Batch], list[Batch]]:
        """Calibration batches, and those on which plans are tried: an eighth, where the method asks for it."""
        if not self.method.tries_plans or not batches:
            return batches, []
        if len(batches) < 2:
            raise ValueError(f"{self.method.key or 'this method'} sets calibration data aside: give at least two batches")  # fmt: skip # noqa: E501
        aside = batches_aside(len(batches))
        return batches[:-aside], batches[-aside:]

    def plan(self) -> Plan:
        """Calibrate where the method needs it, and decide. Nothing of the model is changed."""
        found = self.persistence.load_plan()
        if found is not None:
            if found[0].statistics and (not self.method.sequential or self.request.gradients):
                self._calibrate("again")  # does nothing, unless the statistics were removed since
            self.job.influence = found[1]
            return found[0]
        with self._timed("plan"), torch.no_grad():
            early = self.method.at_once(self.job)
        if early is None:
            self._calibrate("hidden")
        with self._timed("plan"), torch.no_grad():
            plan = early or self.method.plan(self.job)
        plan.peak_memory = self._peak_memory()
        if self.method.sequential:
            plan.seconds += 2 * self.seconds.get("calibrate", 0.0)
        self.persistence.save_plan(plan, self.job.influence)
        return plan

    def _calibrate(self, folder: str) -> None:
        total = len(self.blocks)
        if self.request.any and not covered(self.request, self.store, total):
            with self._timed("calibrate"), fast_products():
                calibrate(self._stream(folder), self.request, self.store, seed=self.seed, progress=self.progress)
        self.job.influence = influence(self.store, total) if self.request.influence else []

    def fit(self, plan: Plan) -> Run:
        """Change the model, part by part, as planned."""
        run = Run(plan)
        with self._timed("fit"):
            for done, part in enumerate(self.job.parts):
                layers = self.persistence.done(part)
                if layers is None:
                    layers = self._rewrite(plan, part)
                run.layers += layers
                self.progress("fit", done + 1, len(self.job.parts))
        order = {layer.name: i for i, layer in enumerate(plan.layers)}
        run.layers.sort(key=lambda layer: order.get(layer.name, len(order)))
        run.seconds = dict(self.seconds)
        return run

    def _rewrite(self, plan: Plan, part: int) -> list[Layer]:
        sequential = self.method.sequential and part != OUTSIDE
        with self.subject.loaded(*self.job.module_names(part)):
            if sequential and self.request.any:
                self._collect(part)
            with torch.no_grad():
                layers = self.method.rewrite(self.job, plan, part)
            if sequential:
                self._advance(part)
            self.persistence.finish_part(part, layers)
        if sequential and part > 0:
            self._stream("hidden").hidden(part).path.unlink(missing_ok=True)
        return layers

    def _collect(self, part: int) -> None:
        """Statistics of a block as it is, on what the compressed blocks before it put out."""
        stream = self._stream("hidden")
        collector = Collector(self.request.needs)
        with collector.hooked(self.model, self.request.probes.get(part, [])), fast_products():
            stream.advance(part, before=lambda b: collector.next_batch(stream.mask(b)), write=False)

        def statistics(name: str, index: int) -> Statistics:
            if index != part:  # what lies outside the blocks has those of the original
                return self.store.of(name, index)
            found = Statistics(dict(collector.of(name).sums))
            if self.request.needs & GRADIENT_SUMS:
                own = self.store.of(name, index).sums
                kept = GRADIENT_SUMS | {"examples", "grad_tokens"}
                found.sums.update({k: v for k, v in own.items() if k in kept})
            return found

        self.job.statistics = statistics

    def _advance(self, part: int) -> None:
        block = self.model.get_submodule(self.blocks[part])
        stored = {k: p.dtype for k, p in block.named_parameters()}
        block.float()
        with fast_products():
            self._stream("hidden").advance(part)
        for name, parameter in block.named_parameters():
            parameter.data = parameter.data.to(stored[name])

    def _stream(self, name: str) -> Stream:
        """A stream that has been started, its hidden states in a folder of that name."""
        if name not in self.streams:
            if not self.batches:
                raise ValueError(f"{self.method.key or 'this method'} needs calibration data: give texts or batches")
            folder = self.work / name
            folder.mkdir(parents=True, exist_ok=True)
            stream = Stream(self.subject, self.batches, folder, self.blocks)
            stream.start()
            self.streams[name] = stream
        return self.streams[name]

    def _peak_memory(self) -> int:
        """The largest part in float32, with the sums over its inputs."""
        parts = [sum(4 * torch.Size(shape).numel() for _, shape in layout.values()) for layout in self.job.layouts.values()]  # fmt: skip # noqa: E501
        sums = [p.stat().st_size for p in self.store.folder.glob("*.safetensors")]
        return 2 * max(parts, default=0) + 2 * max(sums, default=0)

    @contextmanager
    def _timed(self, stage: str) -> Any:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


def batches_aside(count: int) -> int:
    """How many of `count` batches plans are tried on: an eighth, and at least one."""
    return max(1, count // 8)


def part_layouts(subject: Subject, blocks: list[str]) -> dict[int, Layout]:
    """The tensors of every part as they are stored, tied ones once, without loading any."""
    model = subject.model
    tied = tied_keys(model)
    layouts: dict[int, Layout] = {}
    for part in [*range(len(blocks)), OUTSIDE]:
        names = outside(model, blocks) if part == OUTSIDE else [blocks[part]]
        state = part_state(model, names, tied, subject.storage_dtype)
        layouts[part] = layout_of({k.removeprefix("."): t for k, t in state.items()})  # the model's own name is empty
    return layouts


def run_in_memory(model: nn.Module, method: Method, budget: Budget, batches: Sequence[Batch], **settings: Any) -> Run:
    """Compress a model where it is."""
    training = model.training
    model.eval()
    try:
        with tempfile.TemporaryDirectory(prefix="eckart-") as work:
            engine = Engine(InMemory(model), method, budget, batches, Path(work), **settings)
            return engine.fit(engine.plan())
    finally:
        model.train(training)
