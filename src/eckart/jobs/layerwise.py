"""Layers fitted one by one, each in its own form and metric: what recipes do with a plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.checkpoint.layout import Layout, layout_of
from eckart.checkpoint.ties import share
from eckart.forms import Curve, Dense, Form, LowRank, drop_in, parse
from eckart.forms.base import Shape
from eckart.forms.layers import kind_of, matrix_of, matrix_shape
from eckart.jobs.method import Job, Method
from eckart.jobs.plan import Layer, Plan
from eckart.jobs.solve import Fitted, Task, fit
from eckart.metrics import InputCovariance, Metric, Plain, Statistics
from eckart.metrics.row_frequencies import RowFrequencies


@dataclass(frozen=True)
class Layerwise(Method):
    """Every layer by itself: what it is fitted on, what it becomes, and the bytes that this takes.

    Args:
        form: an open form; the budget closes it.
        metric: which error counts.
    """

    form: Form = field(default_factory=LowRank)
    metric: Metric = field(default_factory=Plain)

    def form_of(self, model: nn.Module, name: str) -> Form:
        """The open form of one layer."""
        return self.form

    def metric_of(self, model: nn.Module, name: str) -> Metric:
        """The metric of one layer."""
        return self.metric

    def _layer(self, job: Job, name: str, part: int, note: str | None) -> Layer:
        module = job.model.get_submodule(name)
        shape = matrix_shape(module)
        nbytes = shape[0] * shape[1] * job.dtype.itemsize
        return Layer(name, kind_of(module) or "", part, shape, str(Dense()), nbytes, nbytes, note=note)

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

        found = made(fitted) if job.fits is None else job.fits.of(fitted, str(self.metric), made)
        done = {layer.name: layer.measured(0.0) for layer in layers}
        for layer, result in zip(fitted, found, strict=True):
            module = job.model.get_submodule(layer.name)
            bias = self._new_bias(job, layer, result.bias_shift)
            replacement = drop_in(module, result.module, None if bias is None else bias.detach().to(job.dtype))
            job.model.set_submodule(layer.name, replacement.requires_grad_(False))
            share(job.model, layer.name)
            done[layer.name] = layer.measured(result.error, result.note)
        return list(done.values())


def bias_width(kind: str, shape: Shape) -> int:
    """Numbers in what a layer puts out: its rows, or the columns of a table."""
    return shape[1 if kind == "embedding" else 0]
