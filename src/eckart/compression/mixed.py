"""Many forms at once under one budget: what `auto` is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from eckart.allocation import Allocator
from eckart.allocation.base import largest_within
from eckart.allocation.evolutionary import Evolutionary
from eckart.calibration.store import OUTSIDE
from eckart.forms import Curve, Dense, Form, Quantized, parse
from eckart.forms.layers import kind_of
from eckart.jobs.method import Job, count_weights, part_of
from eckart.jobs.plan import Layer, Plan
from eckart.jobs.recipe import Recipe
from eckart.metrics import Kronecker, Metric, Plain

TRUST = 100.0
"""By how much a measured loss may correct a predicted one."""

Kind = tuple[str, str]
LAYERS = "layers"


def everything() -> Form:
    """Low rank, codes of 8 to 2 bits, and codes of 3 and 2 bits repaired by a low rank."""
    few = [f"quantized(bits={bits}, rounding=gptq())" for bits in (4, 3, 2)]
    repaired = [f"in_turn(first={codes}, second=low_rank(multiple=16))" for codes in few[1:]]
    return parse(" | ".join(["low_rank(multiple=8)", "quantized(bits=8)", "quantized(bits=6)", *few, *repaired]))


@dataclass(frozen=True)
class Mixed(Recipe):
    """Whatever form serves each weight best, by predicted, then by measured loss.

    Kronecker-factored curvature predicts what each setting of each layer costs in nats. For every kind of form one
    plan is tried, and what it is measured to cost corrects the predictions of that kind. The allocation that follows
    adds up predictions, and is then searched around by measuring whole plans.

    Args:
        table: form of the tables (of tokens, positions, ...), which have no curvature of their own: their errors count
            as they are, times what one trial of each says; None leaves them.
    """

    form: Form = field(default_factory=everything)
    metric: Metric = field(default_factory=Kronecker)
    allocation: Allocator = field(default_factory=lambda: Evolutionary("error", 6, 6, (2, 1), (1024, 4096)))
    table: Form | None = field(default_factory=lambda: Quantized())

    def sites(self, model: nn.Module, blocks: list[str]) -> dict[int, list[str]]:
        found = super().sites(model, blocks)
        tables = [t for t in self._tables(model, blocks) if t not in found.get(OUTSIDE, [])]
        return {**found, OUTSIDE: [*found.get(OUTSIDE, []), *tables]} if tables else found

    def _tables(self, model: nn.Module, blocks: list[str]) -> list[str]:
        """The tables outside the blocks, where they are to be treated."""
        if self.table is None:
            return []
        tables = (name for name, module in model.named_modules() if type(module) is nn.Embedding)
        return [name for name in tables if not blocks or part_of(name, blocks) == OUTSIDE]

    def form_of(self, model: nn.Module, name: str) -> Form:
        table = kind_of(model.get_submodule(name)) == "embedding"
        return self.table if table and self.table is not None else self.form

    def metric_of(self, model: nn.Module, name: str) -> Metric:
        return Plain() if kind_of(model.get_submodule(name)) == "embedding" else self.metric

    def judged(self, job: Job, layers: Mapping[str, Layer], curves: Mapping[str, Curve]) -> Mapping[str, Curve]:
        """The curves in nats, every kind of form corrected by what one plan made of it alone is measured to cost."""
        if job.trial is None:
            raise ValueError("mixed forms are judged on calibration data: give at least two batches")
        share = _share(job)
        factors: dict[Kind, float] = {}
        for kind in sorted({_kind(layers[n], f) for n, c in curves.items() for f in c.forms if not isinstance(f, Dense)}):  # fmt: skip # noqa: E501
            choice = _of_one_kind(layers, curves, kind, share)
            predicted = sum(curves[n].errors[i] for n, i in choice.items()) / 2
            plan = Plan([self._planned(layers[n], curves[n], i) for n, i in choice.items()], 0, 0, 0)
            measured = job.trial(self, plan, measure="divergence", keep=True)
            factors[kind] = _factor(measured, predicted, bounded=kind[0] == LAYERS) if predicted > 0 else 1.0

        def judge(name: str) -> Callable[[float, Form], float]:
            return lambda error, form: error / 2 * factors.get(_kind(layers[name], form), 1.0)

        return {
            n: replace(c, errors=[judge(n)(e, f) for e, f in zip(c.errors, c.forms, strict=True)])
            for n, c in curves.items()
        }


def _share(job: Job) -> float:
    """What the budget leaves of the input."""
    total = job.budget.total(input_bytes=job.input_bytes, weights=count_weights(job), target_bytes=job.input_bytes)
    return total / job.input_bytes


def _factor(measured: float, predicted: float, bounded: bool) -> float:
    """What predictions are multiplied by. What is measured next to nothing says little, and is not taken for zero."""
    factor = max(measured, 1e-6) / predicted
    return min(TRUST, max(1 / TRUST, factor)) if bounded else factor


def _kind(layer: Layer, form: Form) -> Kind:
    """Forms that one factor corrects: those of one word, of all layers or of one table."""
    return layer.name if layer.kind == "embedding" else LAYERS, getattr(form, "word", "")


def _of_one_kind(layers: Mapping[str, Layer], curves: Mapping[str, Curve], kind: Kind, share: float) -> dict[str, int]:
    """For every weight the dearest setting of that kind within its share of the budget; the others stay dense."""
    choice = {}
    for name, curve in curves.items():
        own = [i for i, form in enumerate(curve.forms) if _kind(layers[name], form) == kind]
        if own:
            choice[name] = own[largest_within(curve.only(own), share * layers[name].dense_bytes)]
        else:
            choice[name] = len(curve) - 1
    return choice
