"""Up or down to the neighbour on the grid, chosen for all weights together by what the model then answers."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from eckart.calibration.stream import Stream, single_rows
from eckart.compression.relaxed import Descent, Relaxed, RelaxedModel, answer
from eckart.forms import Form, OneOf, Quantized, parse
from eckart.jobs.fits import Fits
from eckart.jobs.method import Job
from eckart.jobs.plan import Layer, Plan
from eckart.jobs.recipe import Recipe
from eckart.jobs.solve import Fitted
from eckart.registry import method


@method("discquant", family="quantised", paper="DiscQuant: A Quantization Method for Neural Networks Inspired by Discrepancy Theory, Chee et al., COLT 2025, arXiv 2501.06417")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class DiscQuant(Recipe):
    """Any grid, on which distillation chooses between each weight's two neighbours, with a pull to the nearest.

    A weight between the numbers L and U is (1 - x) L + x U. The x of all layers together descend rho KL(original ||
    relaxed model) - <c, x> with c = 2 y - 1, y being the original weight's place, and are projected to [0, 1]; on
    vertices the linear term is the squared distance to the original weights, up to a constant. At the end x is
    rounded, and what is stored is an ordinary quantised layer. The whole model is in memory in float32, with a dozen
    more numbers for every targeted weight. A job that was killed goes on from the state that was saved last.

    Departs from the paper: no weight decay, which would pull to the lower number; the learning rate rises over a tenth
    of the steps and decays as a cosine; grids are those that `form` chooses, its rounding left aside. Models without
    logits are distilled by the features that they put out. Allocations that try plans measure them as `form` rounds.

    Args:
        rho: weight of the divergence's gradient against the pull.
        clamp: largest entry of that weighted gradient.
        lr: of AdamW.
        steps: how many.
        batch: windows in a step; all where there are fewer.
        start: where x begins: `random`, or `weights` for the original model.
        every: steps after which the state is saved.
    """

    form: Form = field(default_factory=Quantized)
    rho: float = 200.0
    clamp: float = 0.5
    lr: float = 0.1
    steps: int = 128
    batch: int = 8
    start: str = "random"
    every: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        forms = self.form.forms if isinstance(self.form, OneOf) else (self.form,)
        if not all(isinstance(form, Quantized) for form in forms):
            raise ValueError(f"discquant chooses the codes of quantized(...), not of {self.form}")
        if not self.one_shot:
            raise ValueError("discquant optimises all layers together: leave one_shot true")
        if getattr(self.metric, "centred", False):
            raise ValueError(f"discquant leaves biases as they are: {self.metric} moves the mean into them")
        if self.start not in ("random", "weights"):
            raise ValueError(f"start={self.start!r}: it is 'random' or 'weights'")
        _ = self.descent  # refuses nonsense

    @property
    def descent(self) -> Descent:
        return Descent(self.rho, self.clamp, self.lr, self.steps, self.batch, self.every)

    def plan(self, job: Job) -> Plan:
        windows = single_rows(_stream(job).batches)
        plan = super().plan(job)
        with job.subject.loaded(*_modules(job)), torch.no_grad():
            started = time.perf_counter()
            answer(job.model, windows[0])
            passes = 4 * self.steps * min(self.batch, len(windows))  # of two models, and one backward
            plan.seconds += passes * (time.perf_counter() - started)
        return plan

    def rewrite(self, job: Job, plan: Plan, part: int) -> list[Layer]:
        if job.fits is not None:  # plans are being tried
            return super().rewrite(job, plan, part)
        key = (self, *((layer.name, layer.form) for layer in plan.layers))
        if key not in job.scratch:
            job.scratch[key] = self._chosen(job, plan)
        return super().rewrite(replace(job, fits=job.scratch[key]), plan, part)

    def _chosen(self, job: Job, plan: Plan) -> Chosen:
        """All layers as they will be, found on the original model: no part of it may have been rewritten."""
        stream, layers = _stream(job), [x for x in plan.layers if isinstance(parse(x.form), Quantized)]
        words = repr((self, job.seed, [(layer.name, layer.form) for layer in layers]))
        kept = stream.folder / f"discquant-{hashlib.sha256(words.encode()).hexdigest()[:16]}.safetensors"
        with job.subject.loaded(*_modules(job)):
            tasks = (self._task(job, layer.name, layer.part, layer.form) for layer in layers)
            model = RelaxedModel(job.model, [Relaxed.of(task) for task in tasks])
            model.start(self.start, job.seed)
            self.descent.run(model, single_rows(stream.batches), seed=job.seed, kept=kept, progress=job.progress)
            tasks = (self._task(job, layer.name, layer.part, layer.form) for layer in layers)
            return Chosen({task.name: found.fitted(task) for task, found in zip(tasks, model.layers, strict=True)})


def _stream(job: Job) -> Stream:
    """The calibration data, with a folder of the job's. Raises `ValueError` where there is none."""
    if job.stream is None:
        raise ValueError("discquant distils the model on calibration data: give texts or batches")
    return job.stream("hidden")


def _modules(job: Job) -> list[str]:
    """What the whole model is made of."""
    return [name for part in job.parts for name in job.module_names(part)]


class Chosen(Fits):
    """Layers that are there already, for a recipe to put into a model."""

    def __init__(self, fitted: Mapping[str, Fitted]):
        self.fitted = fitted

    def of(
        self, layers: Sequence[Layer], metric: str, fitted: Callable[[list[Layer]], Iterable[Fitted]]
    ) -> Iterator[Fitted]:
        return iter([self.fitted[layer.name] for layer in layers])
