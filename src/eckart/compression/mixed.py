"""Many forms at once under one budget: what `auto` is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import numpy as np
from torch import nn

from eckart.allocation import Allocator
from eckart.allocation.base import largest_within
from eckart.allocation.evolutionary import Evolutionary
from eckart.calibration.store import OUTSIDE
from eckart.calibration.subject import block_names
from eckart.checkpoint.ties import tied_keys
from eckart.forms import Curve, Dense, Form, parse
from eckart.forms.layers import kind_of
from eckart.jobs.plan import Layer, Plan
from eckart.jobs.recipe import Job, Recipe, count_weights, part_of
from eckart.metrics import Kronecker, Metric, Plain

TRUST = 100.0
"""By how much a measured loss may correct a predicted one."""
SHARES = (1.0, 1.5)
"""At which multiples of the budget's share a kind of form is tried."""
SCALES = 0.3
"""Bits for each weight that the scales and zero points of groups of 64 take, about."""
BEARABLE = 0.5
"""Nats that a plan which is tried for one kind of form is predicted to cost at most."""
NOTHING = 1e-9
"""Nats that are no divergence at all."""

SEARCHED, WHOLE = "uniform(search=5)", "uniform()"
"""Grids of which one trial each says whether it pays to cut off what lies far out."""

POINTS = " | ".join(
    f"rotated(pyramid(pulses={pulses}, group={group}, gain_bits=3))"
    for group, pulses in ((32, 4), (32, 8), (32, 12), (16, 8), (16, 12), (16, 19), (16, 31))
)
"""Points of the pyramid lattice from 0.8 to 3.4 bits. The largest groups whose points can be numbered serve best."""

Kind = tuple[str, str]
LAYERS = "layers"
KNOWN: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()
"""The names of models' blocks, which are asked for with every layer of every trial."""


def everything(grid: str = SEARCHED) -> Form:
    """Low rank, codes of 8 bits to 1, those of few bits on this grid, and points of the pyramid lattice."""
    return parse(f"low_rank(multiple=8) | quantized(bits=8) | quantized(bits=6) | {_few((5, 4, 3, 2), grid, ', rounding=gptq()')} | {POINTS}")  # fmt: skip # noqa: E501


def plain_codes() -> Form:
    """Codes of 8 bits to 1 that need no statistics, those of few bits on grids that were searched for, and points."""
    codes = " | ".join(f"quantized(bits={bits})" for bits in (8, 6, 5, 4))
    return parse(f"{codes} | {_few((3, 2), SEARCHED, '')} | {POINTS}")


def _few(widths: Sequence[int], grid: str, rounding: str) -> str:
    """Codes of these widths in groups of 64, and the smallest there are: of 2 bits and 1 with whole rows for groups."""
    settings = [f"bits={bits}, grid={grid}" for bits in widths]
    settings.append(f"bits=2, group=None, grid={SEARCHED}")
    settings.append("bits=1, group=None, grid=uniform(symmetric=True, search=5)")
    return " | ".join(f"quantized({s}{rounding})" for s in settings)


@dataclass(frozen=True)
class Mixed(Recipe):
    """Whatever form serves each weight best, by predicted, then by measured loss.

    Within the blocks, Kronecker-factored curvature predicts what each setting of each layer costs in nats; outside
    them, errors count as they are. Of grids for codes of few bits, the one that is measured to lose less within the
    blocks is taken there. For every kind of form, in the blocks and in every branch outside them, plans are
    tried that treat nothing else, and what they are measured to cost corrects the predictions of that kind. The
    allocation that follows adds up predictions, and is then searched around by measuring whole plans.

    Args:
        outside: form of what lies outside the blocks: tables (of tokens, positions, ...), heads, poolers; None leaves
            that.
    """

    form: Form = field(default_factory=everything)
    metric: Metric = field(default_factory=Kronecker)
    allocation: Allocator = field(default_factory=lambda: Evolutionary("error", 6, 6, (2, 1), (1024, 4096)))
    outside: Form | None = field(default_factory=plain_codes)

    def sites(self, model: nn.Module, blocks: list[str]) -> dict[int, list[str]]:
        found = super().sites(model, blocks)
        return {**found, OUTSIDE: [*found.get(OUTSIDE, []), *more]} if (more := self._more(model, blocks)) else found

    def _more(self, model: nn.Module, blocks: list[str]) -> list[str]:
        """Layers and tables outside the blocks, but those that a table holds the weight of."""
        if self.outside is None:
            return []
        tied = tied_keys(model)
        return [
            name
            for name, module in model.named_modules()
            if (kind := kind_of(module)) is not None
            and not self._own(model, name, blocks)
            and (not blocks or part_of(name, blocks) == OUTSIDE)
            and (kind != "embedding" or type(module) is nn.Embedding)
            and f"{name}.weight" not in tied
        ]

    def _own(self, model: nn.Module, name: str, blocks: list[str]) -> bool:
        """Whether a layer is one of those that every recipe targets."""
        head = getattr(model, "get_output_embeddings", lambda: None)()
        module = model.get_submodule(name)
        return self._targeted(name, kind_of(module) or "", blocks, module is head)

    def form_of(self, model: nn.Module, name: str) -> Form:
        return self.form if self.outside is None or self._own(model, name, _blocks(model)) else self.outside

    def metric_of(self, model: nn.Module, name: str) -> Metric:
        return self.metric if self._own(model, name, _blocks(model)) else Plain()

    def plan(self, job: Job) -> Plan:
        if job.trial is None:
            raise ValueError("mixed forms are judged on calibration data: give at least two batches")
        if self.form != everything():
            return super().plan(job)
        lost = {grid: self._lost(job, grid) for grid in (SEARCHED, WHOLE)}
        return super(Mixed, replace(self, form=everything(min(lost, key=lost.__getitem__)))).plan(job)

    def _lost(self, job: Job, grid: str) -> float:
        """What codes on a grid are measured to cost, of as many bits as the budget has room for, from 2 to 5."""
        assert job.trial is not None
        bits = min(5, max(2, int(8 * job.dtype.itemsize * _share(job) - SCALES)))
        form = f"quantized(bits={bits}, grid={grid}, rounding=gptq())"
        own = [(n, part) for part, names in self.sites(job.model, job.blocks).items() for n in names
               if self._own(job.model, n, job.blocks)]  # fmt: skip
        layers = [replace(self._layer(job, name, part, None), form=str(parse(form))) for name, part in own]
        lost = job.trial(self, Plan(layers, 0, 0, 0), measure="divergence", keep=True)
        return lost if math.isfinite(lost) else math.inf

    def judged(self, job: Job, layers: Mapping[str, Layer], curves: Mapping[str, Curve]) -> Mapping[str, Curve]:
        """The curves in nats, every kind of form corrected by what plans made of it alone are measured to cost."""
        owners = {name: self._owner(job, layer) for name, layer in layers.items()}
        some = {(owners[n], _variety(f)) for n, c in curves.items() for f in c.forms if not isinstance(f, Dense)}
        found = {kind: self._corrected(job, layers, curves, owners, kind) for kind in sorted(some)}

        def damage(name: str, i: int) -> float:
            curve = curves[name]
            if isinstance(curve.forms[i], Dense):
                return curve.errors[i]
            correction = found[owners[name], _variety(curve.forms[i])]
            if correction is None:
                return curve.errors[i] / curve.energy / 2 if curve.energy > 0 else 0.0
            return curve.errors[i] / 2 * correction.at(curve.nbytes[i] / layers[name].dense_bytes)

        return {n: replace(c, errors=[damage(n, i) for i in range(len(c))]) for n, c in curves.items()}

    def _owner(self, job: Job, layer: Layer) -> str:
        """Whose predictions are corrected together: those of all layers of the recipe, of a table, of a branch."""
        if self._own(job.model, layer.name, job.blocks):
            return LAYERS
        return layer.name if layer.kind == "embedding" else _branch(layer.name, job.blocks)

    def _corrected(
        self, job: Job, layers: Mapping[str, Layer], curves: Mapping[str, Curve], owners: Mapping[str, str], kind: Kind
    ) -> Correction | None:
        """What plans of one kind of form are measured to cost, against what they were predicted to.

        None where the answers do not depend on it, as on a pooler that they are not made from: each such layer is
        taken for an answer of its own, whose divergence is half its relative squared error.
        """
        assert job.trial is not None
        shares: list[float] = []
        factors: list[float] = []
        tried: list[dict[str, int]] = []
        moved = False
        for multiple in SHARES:
            choice = _of_one_kind(layers, curves, owners, kind, multiple * _share(job))
            choice = bearable(choice, curves) if kind[0] == LAYERS else choice  # the others' errors are no nats
            treated = [n for n, i in choice.items() if not isinstance(curves[n].forms[i], Dense)]
            predicted = sum(curves[n].errors[choice[n]] for n in treated) / 2
            if choice in tried or not predicted > 0:
                continue
            tried.append(choice)
            plan = Plan([self._planned(layers[n], curves[n], i) for n, i in choice.items()], 0, 0, 0)
            measured = job.trial(self, plan, measure="divergence", keep=True)
            moved = moved or not abs(measured) <= NOTHING
            spent = sum(curves[n].nbytes[choice[n]] for n in treated)
            shares.append(spent / sum(layers[n].dense_bytes for n in treated))
            factors.append(_factor(measured, predicted, bounded=kind[0] == LAYERS))
        return None if tried and not moved else Correction(tuple(shares), tuple(factors))


@dataclass(frozen=True)
class Correction:
    """What predicted losses are multiplied by, where that was measured: at shares of the dense bytes, ascending."""

    shares: tuple[float, ...]
    factors: tuple[float, ...]

    def at(self, share: float) -> float:
        """Between measurements on a straight line in logarithms; beyond them as at the nearest one; 1 without any."""
        if not self.shares:
            return 1.0
        return math.exp(float(np.interp(math.log(share), np.log(self.shares), np.log(self.factors))))


def _blocks(model: nn.Module) -> list[str]:
    if model not in KNOWN:
        KNOWN[model] = block_names(model)
    return KNOWN[model]


def _branch(name: str, blocks: list[str]) -> str:
    """The beginning of a name up to where it leaves the way to the blocks."""
    parts = name.split(".")
    heads = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return next(head for head in heads if head == name or not any(b.startswith(f"{head}.") for b in blocks))


def _share(job: Job) -> float:
    """What the budget leaves of the input."""
    total = job.budget.total(input_bytes=job.input_bytes, weights=count_weights(job), target_bytes=job.input_bytes)
    return total / job.input_bytes


def _factor(measured: float, predicted: float, bounded: bool) -> float:
    """What predictions are multiplied by. What is measured next to nothing says little, and is not taken for zero."""
    if not math.isfinite(measured):
        return TRUST
    factor = max(measured, 1e-6) / predicted
    return min(TRUST, max(1 / TRUST, factor)) if bounded else factor


def _variety(form: Form) -> str:
    """What forms have in common that are corrected together: their word, and the grid of codes."""
    return f"{getattr(form, 'word', '')} {getattr(form, 'grid', '')}"


def _of_one_kind(
    layers: Mapping[str, Layer], curves: Mapping[str, Curve], owners: Mapping[str, str], kind: Kind, share: float
) -> dict[str, int]:
    """For every weight the dearest setting of that kind within its share of the budget; the others stay dense."""
    choice = {}
    for name, curve in curves.items():
        own = [i for i, form in enumerate(curve.forms) if (owners[name], _variety(form)) == kind]
        if own:
            choice[name] = own[largest_within(curve.only(own), share * layers[name].dense_bytes)]
        else:
            choice[name] = len(curve) - 1
    return choice


def bearable(choice: dict[str, int], curves: Mapping[str, Curve]) -> dict[str, int]:
    """The choice with as many weights left dense, the worst first, as keeps its predicted loss below `BEARABLE`.

    A model that is destroyed says nothing of its weights: its loss is the same whatever was done to them, and forms
    that ruin every one would look cheap for each.
    """
    kept, total = {n: len(curves[n]) - 1 for n in choice}, 0.0
    for name in sorted(choice, key=lambda n: curves[n].errors[choice[n]]):
        total += curves[name].errors[choice[name]] / 2
        if total > BEARABLE and any(kept[n] < len(curves[n]) - 1 for n in kept):
            break
        kept[name] = choice[name]
    return kept
