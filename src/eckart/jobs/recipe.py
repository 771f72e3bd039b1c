"""What every compression method owes (`Method`), and the common case (`Recipe`): a form, a metric, an allocation."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.allocation import Allocator, Budget, BudgetError, Problem, Uniform
from eckart.allocation.base import Fitness
from eckart.calibration.calibrate import Request
from eckart.calibration.store import OUTSIDE
from eckart.calibration.stream import Stream
from eckart.calibration.subject import Subject, outside
from eckart.checkpoint.layout import Layout, file_bytes, layout_of
from eckart.checkpoint.ties import share, sharers
from eckart.forms import Curve, Dense, Form, LowRank, drop_in, parse
from eckart.forms.base import Shape
from eckart.forms.layers import kind_of, matrix_of, matrix_shape
from eckart.jobs.fits import Fits
from eckart.jobs.plan import Layer, Plan, join_notes, sample_spectrum
from eckart.jobs.solve import Executor, Fitted, Task, curve, fit
from eckart.metrics import InputCovariance, Metric, Plain, Statistics
from eckart.metrics.row_frequencies import RowFrequencies


class Tries(Protocol):
    """Measures plans; see `Trial`."""

    folder: Path

    def __call__(
        self, method: Method, plan: Plan, *, tokens: int | None = None, draw: int = 0, measure: str = "loss",
        keep: bool = False,
    ) -> float: ...  # fmt: skip


@dataclass
class Job:
    """What a method works with.

    Attributes:
        subject: the model, a part of which is loaded at a time.
        blocks: names of its blocks.
        budget: what was asked for.
        statistics: (layer, part) -> statistics of the original model.
        influence: of the blocks, where the method asked for it.
        layouts: for every part (the blocks, then what lies outside) the tensors of the input, as they are stored.
        executor: runs the work on layers.
        progress: told (stage, done, total).
        seed: of every random choice.
        trial: (method, plan) -> mean loss per token, on calibration text that no statistics saw, of the model as it
            would be after that plan; only for methods that ask to try plans.
        scratch: what methods keep in memory between their calls; empty again when a killed job is resumed.
        fits: fitted layers of plans that were tried, while plans are tried that share them.
        stream: the calibration data under way through the blocks, started, one for each name. In that called `hidden`,
            where the method is sequential, what enters a block is what the blocks that were rewritten put out.
    """

    subject: Subject
    blocks: list[str]
    budget: Budget
    statistics: Callable[[str, int], Statistics]
    influence: list[float]
    layouts: Mapping[int, Layout]
    executor: Executor
    progress: Callable[[str, int, int], None]
    seed: int
    trial: Tries | None = None
    scratch: dict[Any, Any] = field(default_factory=dict)
    fits: Fits | None = None
    stream: Callable[[str], Stream] | None = None

    @property
    def model(self) -> nn.Module:
        return self.subject.model

    @property
    def dtype(self) -> torch.dtype:
        return self.subject.storage_dtype

    @property
    def parts(self) -> list[int]:
        """The blocks in order, then what lies outside."""
        return [*range(len(self.blocks)), OUTSIDE]

    @property
    def input_bytes(self) -> int:
        """Of the input's weights, in this layout."""
        return sum(file_bytes(layout) for layout in self.layouts.values())

    def module_names(self, part: int) -> list[str]:
        """The modules that make up a part."""
        if part != OUTSIDE:
            return [self.blocks[part]]
        return outside(self.model, self.blocks)


@dataclass(frozen=True)
class Method(ABC):
    """A way to compress a model. Its dataclass fields are its hyperparameters."""

    key: ClassVar[str] = ""

    @property
    def sequential(self) -> bool:
        """Whether each block is fitted on what the compressed blocks before it put out."""
        return False

    @property
    def tries_plans(self) -> bool:
        """Whether the method needs calibration text set aside, on which it measures plans."""
        return False

    @abstractmethod
    def request(self, model: nn.Module, blocks: list[str]) -> Request:
        """What must be measured first."""

    def at_once(self, job: Job) -> Plan | None:
        """A plan that needs no statistics, where one is good enough: it saves the calibration."""
        return None

    @abstractmethod
    def plan(self, job: Job) -> Plan:
        """What to do with every layer. Nothing is changed."""

    @abstractmethod
    def rewrite(self, job: Job, plan: Plan, part: int) -> list[Layer]:
        """Change one part of the model, which is loaded, as planned; returns its layers with their measured errors.

        Modules are replaced and never written into, so that a plan can be tried and taken back.
        """

    def config_changes(self, plan: Plan) -> dict[str, Any]:
        """Entries of the model's config that are different once the plan is carried out."""
        return {}


@dataclass(frozen=True)
class Recipe(Method):
    """One form for all targeted layers, fitted in one metric, its dials set by one allocator.

    Args:
        form: an open form; the budget closes it.
        metric: which error counts.
        allocation: how the budget is spread.
        one_shot: fit all layers on statistics of the original model; otherwise block by block on the compressed one.
        targets: regular expression that the names of targeted layers match in full; empty for all linear layers,
            transformers' Conv1D and convolutions within the blocks, or all but the head where there are no blocks.
    """

    form: Form = field(default_factory=LowRank)
    metric: Metric = field(default_factory=Plain)
    allocation: Allocator = field(default_factory=Uniform)
    one_shot: bool = True
    targets: str = ""

    def __post_init__(self) -> None:
        try:
            re.compile(self.targets)
        except re.error as e:
            raise ValueError(f"targets={self.targets!r} is not a regular expression: {e}") from None

    @property
    def sequential(self) -> bool:
        return not self.one_shot and bool(self.metric.needs)

    @property
    def tries_plans(self) -> bool:
        return self.allocation.needs_fitness

    def sites(self, model: nn.Module, blocks: list[str]) -> dict[int, list[str]]:
        """Part -> names of the targeted layers."""
        found: dict[int, list[str]] = {}
        owner: Any = getattr(model, "get_output_embeddings", lambda: None)
        head = owner()
        for name, module in model.named_modules():
            kind = self.kind(module)
            if kind is None or not self._targeted(name, kind, blocks, module is head):
                continue
            found.setdefault(part_of(name, blocks), []).append(name)
        if not found:
            raise ValueError(f"no layer of {type(model).__name__} is targeted{f' by {self.targets!r}' if self.targets else ''}")  # fmt: skip # noqa: E501
        return found

    def kind(self, module: nn.Module) -> str | None:
        """What kind of layer a module is; None for what is never targeted."""
        return kind_of(module)

    def _targeted(self, name: str, kind: str, blocks: list[str], head: bool) -> bool:
        if self.targets:
            return re.fullmatch(self.targets, name) is not None
        if blocks:
            return kind != "embedding" and part_of(name, blocks) != OUTSIDE
        return kind != "embedding" and not head

    def request(self, model: nn.Module, blocks: list[str]) -> Request:
        needs = self.metric.needs
        sites = self.sites(model, blocks) if needs else {}
        probes = {
            part: [n for n in names if self._stays(model, n) is None and self.metric_of(model, n).needs]
            for part, names in sites.items()
        }
        return Request(
            probes={part: names for part, names in probes.items() if names},
            needs=needs,
            labels=self.metric.labels,
            influence=self.allocation.needs_influence,
        )

    def stays(self, model: nn.Module, name: str) -> str | None:
        """Why a targeted layer stays dense under any budget; None where nothing is in the way."""
        return None

    def _stays(self, model: nn.Module, name: str) -> str | None:
        why, table = self.stays(model, name), kind_of(model.get_submodule(name)) == "embedding"
        if why is None and table and self._centred(model, name) and sharers(model, name):
            return "a head shares it, which has no place for the mean of its rows"
        return why

    def form_of(self, model: nn.Module, name: str) -> Form:
        """The open form of one layer."""
        return self.form

    def metric_of(self, model: nn.Module, name: str) -> Metric:
        """The metric of one layer."""
        return self.metric

    def plan(self, job: Job) -> Plan:
        started = time.perf_counter()
        curves, layers, staying = {}, {}, []
        sites = self.sites(job.model, job.blocks)
        for part, names in sites.items():
            for name in names:
                why = self._stays(job.model, name)
                if why:
                    staying.append(self._layer(job, name, part, f"left dense: {why}"))
                else:
                    layers[name] = self._layer(job, name, part, None)
        fixed = job.input_bytes - sum(layer.dense_bytes for layer in layers.values())
        total = job.budget.total(
            input_bytes=job.input_bytes, weights=count_weights(job), target_bytes=job.input_bytes - fixed
        )
        rungs = self._rungs(job, layers)
        self._check(job, total, Problem(rungs, 0).smallest + fixed + self._headers(job, layers, rungs, fixed))
        for done, part in enumerate(job.parts):
            names = [name for name in sites.get(part, []) if name in layers]
            with job.subject.loaded(*names):
                tasks = (self._task(job, name, part, str(self.form_of(job.model, name))) for name in names)
                for name, (found, note) in zip(names, job.executor.map(curve, tasks), strict=True):
                    curves[name] = self._with_bias(job, name, found)
                    layers[name] = replace(layers[name], note=note)
            job.progress("plan", done + 1, len(job.parts))
        problem = Problem(
            self.judged(job, layers, curves),
            total - fixed - self._headers(job, layers, curves, fixed),
            {name: layer.part for name, layer in layers.items() if layer.part != OUTSIDE},
            job.influence,
            self._fitness(job, layers, curves),
            job.trial.folder / "search.json" if job.trial else None,
        )
        self._check(job, total, problem.smallest + total - problem.budget)
        choice = self.allocation.choose(problem)
        planned = [self._planned(layers[name], curves[name], choice[name]) for name in layers]
        after = output_bytes(job, {layer.name: self._layout(job, layer) for layer in planned})
        seconds = 1.2 * (time.perf_counter() - started)
        return Plan([*planned, *staying, *self._unknown(job)], job.input_bytes, after, total, seconds)

    def _unknown(self, job: Job) -> Iterator[Layer]:
        """Weights among the targets that no form can stand for, such as stacked experts: they are listed as dense."""
        for name, module in job.model.named_modules():
            if kind_of(module) is not None or not self._targeted(name, "", job.blocks, head=False):
                continue
            part = part_of(name, job.blocks)
            for own, weight in module.named_parameters(recurse=False):
                if weight.dim() > 1:
                    shape = weight.numel() // weight.shape[-1], weight.shape[-1]
                    nbytes = weight.numel() * job.dtype.itemsize
                    note = f"left dense: {type(module).__name__} is no layer that a form can stand for"
                    yield Layer(f"{name}.{own}", "", part, shape, str(Dense()), nbytes, nbytes, note=note)

    def _check(self, job: Job, total: int, smallest: int) -> None:
        """Raise `BudgetError` where the least possible output is above the budget."""
        if smallest > total:
            share = smallest / job.input_bytes
            raise BudgetError(f"the budget {job.budget} is {total} bytes; with {self.form} on these layers the smallest possible is {smallest} bytes ({share:.3f} of the input)")  # fmt: skip # noqa: E501

    def _rungs(self, job: Job, layers: Mapping[str, Layer]) -> dict[str, Curve]:
        """The bytes that each layer's form can take, told before anything is fitted; errors are not known yet."""
        known: dict[tuple[Form, Shape], Curve] = {}
        found = {}
        for name, layer in layers.items():
            key = self.form_of(job.model, name), layer.shape
            if key not in known:
                rungs = [(f.nbytes(layer.shape, job.dtype), f) for f in key[0].ladder(layer.shape)]
                paying = sorted((r for r in rungs if r[0] < layer.dense_bytes), key=lambda r: r[0])
                forms, nbytes = [*(f for _, f in paying), Dense()], [*(n for n, _ in paying), layer.dense_bytes]
                known[key] = Curve(forms, nbytes, [0.0] * len(forms), 0.0)
            found[name] = self._with_bias(job, name, known[key])
        return found

    def judged(self, job: Job, layers: Mapping[str, Layer], curves: Mapping[str, Curve]) -> Mapping[str, Curve]:
        """The curves as the allocation sees them: the same points, perhaps with other errors than the metric's."""
        return curves

    def _fitness(self, job: Job, layers: Mapping[str, Layer], curves: Mapping[str, Curve]) -> Fitness | None:
        """How far the model's answers move after a choice, in nats per token; None where the allocation adds up."""
        if not self.allocation.needs_fitness:
            return None
        trial = job.trial
        if trial is None:
            raise ValueError(f"{self.allocation} measures plans on calibration data: give at least two batches")

        def fitness(choice: Mapping[str, int], tokens: int, draw: int) -> float:
            plan = Plan([self._planned(layers[n], curves[n], i) for n, i in choice.items()], 0, 0, 0)
            return trial(self, plan, tokens=tokens, draw=draw, measure="divergence", keep=True)

        return fitness

    def _headers(self, job: Job, layers: Mapping[str, Layer], curves: Mapping[str, Curve], fixed: int) -> int:
        """Most bytes that names and shapes of new tensors add: with every layer at its dearest factored setting."""
        dearest = [self._planned(layer, curves[n], max(0, len(curves[n]) - 2)) for n, layer in layers.items()]
        data = fixed + sum(layer.bytes for layer in dearest)
        return output_bytes(job, {layer.name: self._layout(job, layer) for layer in dearest}) - data

    def _centred(self, model: nn.Module, name: str) -> bool:
        return getattr(self.metric_of(model, name), "centred", False)

    def _gains_bias(self, job: Job, name: str) -> bool:
        """Whether a layer without a bias gets one, for what the mean of its inputs loses."""
        return self._centred(job.model, name) and getattr(job.model.get_submodule(name), "bias", None) is None

    def _with_bias(self, job: Job, name: str, found: Curve) -> Curve:
        """The curve with the bytes of a new bias added to all points but the dense one."""
        module = job.model.get_submodule(name)
        width = bias_width(kind_of(module) or "", matrix_shape(module))
        extra = width * job.dtype.itemsize if self._gains_bias(job, name) else 0
        return replace(found, nbytes=[*(n + extra for n in found.nbytes[:-1]), found.nbytes[-1]])

    def _layout(self, job: Job, layer: Layer) -> Layout:
        """The tensors that a layer will hold, by their names in its module."""
        form, module = parse(layer.form), job.model.get_submodule(layer.name)
        if isinstance(form, Dense):
            return layout_of({k: v.to("meta", job.dtype) for k, v in module.state_dict().items()})
        own = layer.kind != "embedding" and getattr(module, "bias", None) is not None
        width = bias_width(layer.kind, layer.shape)
        bias = (
            torch.empty(width, dtype=job.dtype, device="meta") if own or self._centred(job.model, layer.name) else None
        )
        matrix = form.build(layer.shape, dtype=job.dtype, device="meta")
        return layout_of(drop_in(module, matrix, bias).state_dict())

    def _layer(self, job: Job, name: str, part: int, note: str | None) -> Layer:
        module = job.model.get_submodule(name)
        shape = matrix_shape(module)
        nbytes = shape[0] * shape[1] * job.dtype.itemsize
        return Layer(name, kind_of(module) or "", part, shape, str(Dense()), nbytes, nbytes, note=note)

    def _planned(self, layer: Layer, found: Curve, index: int) -> Layer:
        form = found.forms[index]
        dense = isinstance(form, Dense)
        return replace(
            layer,
            form=str(form),
            bytes=found.nbytes[index],
            predicted_error=found.errors[index],
            energy=found.energy,
            spectrum=None if found.spectrum is None else sample_spectrum(found.spectrum),
            note=join_notes(layer.note, "left dense: no smaller setting was worth it" if dense else None),
        )

    def _task(self, job: Job, name: str, part: int, form: str) -> Task:
        module = job.model.get_submodule(name)
        matrix = matrix_of(module).detach()
        metric = self.metric_of(job.model, name)
        statistics = job.statistics(name, part) if metric.needs else Statistics()
        if kind_of(module) != "embedding" or not isinstance(metric, InputCovariance):
            return Task(name, matrix, form, metric, statistics, job.dtype)
        mean = self._mean_row(job, name, part)
        matrix = matrix.double()  # rare rows are divided by their small weights
        return Task(name, matrix if mean is None else matrix - mean, form, RowFrequencies(), statistics, job.dtype)

    def _mean_row(self, job: Job, name: str, part: int) -> Float[Tensor, " dim"] | None:
        """The mean of the vectors looked up in a table, which its bias takes over when the metric is about the mean."""
        if not self._centred(job.model, name):
            return None
        f = RowFrequencies().frequencies(job.statistics(name, part), name)
        return f @ matrix_of(job.model.get_submodule(name)).detach().double()

    def _new_bias(self, job: Job, layer: Layer, shift: Float[Tensor, " out"] | None) -> Tensor | None:
        own: Tensor | None = getattr(job.model.get_submodule(layer.name), "bias", None)
        if layer.kind == "embedding":
            return self._mean_row(job, layer.name, layer.part)  # a bias of its own is part of its rows
        if shift is None:
            return own
        return shift if own is None else own.detach() + shift.to(own)

    def rewrite(self, job: Job, plan: Plan, part: int) -> list[Layer]:
        layers = plan.of(part)
        fitted = [layer for layer in layers if not isinstance(parse(layer.form), Dense)]

        def made(some: list[Layer]) -> Iterator[Fitted]:
            return job.executor.map(fit, (self._task(job, layer.name, part, layer.form) for layer in some))

        found = made(fitted) if job.fits is None else job.fits.of(fitted, str(self.metric), job.dtype, made)
        done = {layer.name: layer.measured(0.0) for layer in layers}
        for layer, result in zip(fitted, found, strict=True):
            module = job.model.get_submodule(layer.name)
            bias = self._new_bias(job, layer, result.bias_shift)
            replacement = drop_in(module, result.module, None if bias is None else bias.detach().to(job.dtype))
            job.model.set_submodule(layer.name, replacement.requires_grad_(False))
            share(job.model, layer.name)
            done[layer.name] = layer.measured(result.error, result.note)
        return list(done.values())


def part_of(name: str, blocks: list[str]) -> int:
    """The block in which a module lies, or `OUTSIDE`."""
    return next((i for i, b in enumerate(blocks) if name == b or name.startswith(b + ".")), OUTSIDE)


def bias_width(kind: str, shape: Shape) -> int:
    """Numbers in what a layer puts out: its rows, or the columns of a table."""
    return shape[1 if kind == "embedding" else 0]


def output_bytes(job: Job, replaced: Mapping[str, Layout]) -> int:
    """Bytes of all weight files, to the byte, when the modules called `replaced` hold these tensors instead."""
    total = 0
    for layout in job.layouts.values():
        kept = {k: v for k, v in layout.items() if k.rpartition(".")[0] not in replaced}
        for name in dict.fromkeys(k.rpartition(".")[0] for k in layout):
            kept |= {f"{name}.{k}": v for k, v in replaced.get(name, {}).items()}
        total += file_bytes(kept)
    return total


def count_weights(job: Job) -> int:
    """Numbers in the input, tied ones once."""
    return sum(torch.Size(shape).numel() for layout in job.layouts.values() for _, shape in layout.values())
