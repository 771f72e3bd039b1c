"""What methods share whose forms leave nothing to the budget: it is enough, or the job is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eckart.allocation import BudgetError
from eckart.checkpoint.layout import layout_of
from eckart.checkpoint.ties import share
from eckart.forms import Dense, Factored, Form, drop_in
from eckart.forms.layers import kind_of, matrix_shape
from eckart.jobs.method import Job, count_weights, output_bytes
from eckart.jobs.plan import Layer, Plan
from eckart.linalg.whitening import check_finite


@dataclass(frozen=True)
class Settled:
    """One layer and the closed form it gets; `dense()` leaves it."""

    name: str
    part: int
    form: Form
    note: str | None = None
    predicted_error: float | None = None
    energy: float | None = None


def settled_plan(job: Job, key: str, settled: Sequence[Settled], extra: dict[str, Any] | None = None) -> Plan:
    """The plan that gives every layer its form. Raises `BudgetError` where the budget is smaller than that takes."""
    layers, layouts = [], {}
    for one in settled:
        module = job.model.get_submodule(one.name)
        shape, own = matrix_shape(module), getattr(module, "bias", None)
        matrix = one.form.build(shape, dtype=job.dtype, device="meta")
        layers.append(
            Layer(
                one.name, kind_of(module) or "", one.part, shape, str(one.form),
                shape[0] * shape[1] * job.dtype.itemsize, matrix.nbytes, one.predicted_error, one.energy, note=one.note,
            )
        )  # fmt: skip
        if one.form != Dense():
            bias = None if own is None else torch.empty(shape[0], dtype=job.dtype, device="meta")
            layouts[one.name] = layout_of(drop_in(module, matrix, bias).state_dict())
    after = output_bytes(job, layouts)
    target = sum(layer.dense_bytes for layer in layers if layer.name in layouts)
    total = job.budget.total(input_bytes=job.input_bytes, weights=count_weights(job), target_bytes=target)
    if after > total:
        form = next((layer.form for layer in layers if layer.name in layouts), str(Dense()))
        raise BudgetError(f"the budget {job.budget} is {total} bytes; {key} leaves nothing to choose: with these layers in {form} it takes {after} bytes ({after / job.input_bytes:.3f} of the input)")  # fmt: skip # noqa: E501
    return Plan(layers, job.input_bytes, after, total, extra=extra or {})


def put(job: Job, name: str, matrix: Factored, bias: Tensor | None = None) -> None:
    """Let a matrix stand in for a layer, with the layer's own bias where none is given."""
    module = job.model.get_submodule(name)
    bias = getattr(module, "bias", None) if bias is None else bias
    for parameter in matrix.parameters():
        check_finite(parameter, f"{name}, stored as {job.dtype},")
    made = drop_in(module, matrix, None if bias is None else bias.detach().to(job.dtype))
    job.model.set_submodule(name, made.requires_grad_(False))
    share(job.model, name)
