"""LRP pruning: the units through which the least relevance flows are removed, wherever they are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eckart.anatomy import Block, Projection, anatomy
from eckart.calibration.calibrate import Request
from eckart.calibration.store import OUTSIDE
from eckart.calibration.stream import single_rows
from eckart.calibration.unit_scores import Places
from eckart.checkpoint.layout import file_bytes, tensor_bytes
from eckart.compression.block_units import block_sites, narrow_block
from eckart.compression.narrowing import check_block, narrowed, weight_of
from eckart.compression.unit_ranking import (
    Kept,
    Scores,
    check_settings,
    check_smallest,
    fewest,
    remove_least,
    scorer,
    true_classes,
)  # fmt: skip
from eckart.forms.layers import kind_of, matrix_shape
from eckart.jobs.method import Job, Method, count_weights
from eckart.jobs.plan import Layer, Plan
from eckart.linalg.whitening import check_finite
from eckart.registry import method


@method("lrp_prune", family="width", paper="Pruning by Explaining: A Novel Criterion for Deep Neural Network Pruning, Yeom et al., Pattern Recognition 115, 2021, arXiv 1912.08881")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class LRPPrune(Method):
    """Remove the MLP neurons and attention heads of least relevance, all ranked together, and again after each step.

    The relevance of every token that the model should predict starts as 1 at its logit and is handed back layer by
    layer (section 3.1); a unit's score is what passes it, summed over tokens. No weight that stays is changed. The
    reference samples are the first rows of the calibration data; what they should predict is the next token, for
    encoders the token itself, or what the batches hold as `labels`.

    Departs from the paper, which prunes convolutional networks (for these see `plain_units.prune`): scores are sums of
    absolute values, as signs of relevance differ in transformers; where queries share a key head, they go together; the
    paper prunes to a rate, this to bytes; there is no training after the steps. A removed head's weights are gone, but
    attention still runs at its width, on zeros.

    Args:
        score: `relevance`, or the criteria that the paper compares with: `taylor`, `gradient`, `weight` (which needs
            no data).
        rule: of relevance, for linear maps: `zplus` or `epsilon`.
        step: share of all units that is removed before units are ranked anew.
        per: `byte` ranks units by score over size, as a head takes as many bytes as hundreds of neurons; `unit`, as in
            the paper, by score alone.
        heads: whether attention heads are removed, too.
        references: at most so many rows of the calibration data are explained.
    """

    score: str = "relevance"
    rule: str = "zplus"
    step: float = 0.05
    per: str = "byte"
    heads: bool = True
    references: int = 16

    def __post_init__(self) -> None:
        check_settings(self.score, self.rule, self.step, self.per)
        if self.references < 1:
            raise ValueError(f"references={self.references}: at least one row of the calibration data is explained")

    def request(self, model: nn.Module, blocks: list[str]) -> Request:
        for block in anatomy(model).blocks:
            check_block(model, block)
        return Request(probes={}, needs=frozenset())

    def plan(self, job: Job) -> Plan:
        found = anatomy(job.model).blocks
        names = [name for block in found for name in (*block.readers(), *block.writers())]
        target = sum(tensor_bytes(job.dtype, matrix_shape(job.model.get_submodule(name))) for name in names)
        total = job.budget.total(input_bytes=job.input_bytes, weights=count_weights(job), target_bytes=target)
        everything = {name: torch.ones(n, dtype=torch.bool) for layers in self._places(found).values() for name, n in layers.items()}  # fmt: skip # noqa: E501

        @functools.cache
        def of(part: int, neurons: int | None, heads: int | None) -> int:
            after = block_sites(job.model, found[part], neurons, heads)
            return file_bytes(narrowed(job.layouts[part], after, job.dtype))

        def cost(kept: Kept) -> int:
            parts = (of(i, *_counts(kept, block)) for i, block in enumerate(found))
            return file_bytes(job.layouts[OUTSIDE]) + sum(parts)

        full = cost(everything)
        check_smallest(job.budget, total, cost(fewest(everything)), job.input_bytes)
        first: dict[str, Tensor] = {}
        measure = self._measure(job, found)

        def scores(kept: Kept) -> Scores:
            now = measure(kept)
            first.update({} if first else now)
            job.progress("plan", full - cost(kept), full - total)
            return now

        kept = remove_least(everything, scores, cost, total, self.step, _sizes(found) if self.per == "byte" else None)
        layers = [layer for i, block in enumerate(found) for layer in self._layers(job, i, block, kept, first)]
        words = {name: _packed(alive) for name, alive in kept.items()}
        return Plan(layers, job.input_bytes, cost(kept), total, extra={"kept": words})

    def _places(self, found: Sequence[Block]) -> Places:
        heads = [{b.attention.o.module: b.attention.kv_heads} if self.heads else {} for b in found]
        return {i: {b.mlp.down.module: b.mlp.down.shape[1], **h} for i, (b, h) in enumerate(zip(found, heads, strict=True))}  # fmt: skip # noqa: E501

    def _measure(self, job: Job, found: Sequence[Block]) -> Callable[[Kept], Scores]:
        """What scores the units that are there."""
        places = self._places(found)
        if self.score == "weight":
            sizes: dict[str, Tensor] = {}
            for block in found:
                with job.subject.loaded(block.name):
                    sizes |= {n: s for n, s in _magnitudes(job.model, block).items() if n in places[found.index(block)]}
            return lambda kept: sizes
        if job.stream is None:
            raise ValueError("lrp_prune explains calibration data: run it through an Engine, which has them")
        whole = job.stream("references")
        rows = single_rows(whole.batches)[: self.references]
        labels = [true_classes(row, anatomy(job.model).kind == "decoder") for row in rows]
        return scorer(job.subject, rows, labels, whole.folder, job.blocks, places, "input", self.score, self.rule)

    def _layers(self, job: Job, part: int, block: Block, kept: Kept, first: Scores) -> list[Layer]:
        layers = []
        for site in block_sites(job.model, block, *_counts(kept, block)):
            module = job.model.get_submodule(site.name)
            before = [e for k, e in job.layouts[part].items() if k in (f"{site.name}.weight", f"{site.name}.bias")]
            dense = sum(tensor_bytes(*entry) for entry in before)
            after = sum(tensor_bytes(*e) for e in site.layout(job.dtype).values()) if site.changed else dense
            note = _note(kept[site.name], first.get(site.name), self.score) if site.name in kept else None
            layers.append(Layer(site.name, kind_of(module) or "", part, matrix_shape(module), str(site.form), dense, after, note=note))  # fmt: skip # noqa: E501
        return layers

    def rewrite(self, job: Job, plan: Plan, part: int) -> list[Layer]:
        if part == OUTSIDE:
            return []
        block = anatomy(job.model).blocks[part]
        sizes = self._places([block])[0]
        kept = {name: _unpacked(plan.extra["kept"][name], n) for name, n in sizes.items()}
        for name, module in narrow_block(job.model, block, *_stay(kept, block), job.dtype).items():
            for parameter in module.parameters():
                check_finite(parameter, f"{name}, stored as {job.dtype},")
            job.model.set_submodule(name, module)
        return plan.of(part)


def _stay(kept: Kept, block: Block) -> tuple[Tensor | None, Tensor | None]:
    """The neurons and heads that stay; None where all do."""
    groups = (kept.get(block.mlp.down.module), kept.get(block.attention.o.module))
    neurons, heads = (None if k is None or bool(k.all()) else k.nonzero()[:, 0] for k in groups)
    return neurons, heads


def _counts(kept: Kept, block: Block) -> tuple[int | None, int | None]:
    """How many neurons and heads stay; None where all do."""
    neurons, heads = (None if k is None else len(k) for k in _stay(kept, block))
    return neurons, heads


def _sizes(found: Sequence[Block]) -> dict[str, float]:
    """Weights that go with one unit of each group."""
    sizes: dict[str, float] = {}
    for block in found:
        a, mlp = block.attention, block.mlp
        sizes[mlp.down.module] = mlp.down.shape[0] + sum(p.shape[1] for p in (mlp.gate, mlp.up) if p is not None)
        sizes[a.o.module] = sum(p.shape[0] * p.shape[1] for p in (a.q, a.k, a.v, a.o)) / a.kv_heads
    return sizes


def _magnitudes(model: nn.Module, block: Block) -> dict[str, Tensor]:
    """Sums of absolute weights that make each neuron, and each key head with its queries and values."""
    a, mlp = block.attention, block.mlp

    def rows(projections: Iterable[Projection], units: int) -> Tensor:
        each = [weight_of(model, p.module)[p.index()].abs().sum(1).view(units, -1).sum(1) for p in projections]
        return torch.stack(each).sum(0).cpu()

    neurons = rows([p for p in (mlp.gate, mlp.up) if p is not None], mlp.up.shape[0])
    return {mlp.down.module: neurons, a.o.module: rows((a.q, a.k, a.v), a.kv_heads)}


def _note(alive: Tensor, scores: Tensor | None, score: str) -> str:
    """How many units are left, and what the others carried."""
    text = f"{int(alive.sum())} of {len(alive)} units are left"
    if scores is None or bool(alive.all()):
        return text
    share = float(scores[~alive].sum() / (scores.sum() or 1.0))
    return f"{text}; the others had {100 * share:.2g}% of the {score} at first"


def _packed(alive: Tensor) -> str:
    """A mask as hexadecimal digits, the first unit the lowest bit."""
    return f"{sum(1 << i for i in alive.nonzero()[:, 0].tolist()):x}"


def _unpacked(word: str, count: int) -> Tensor:
    bits = int(word, 16)
    return torch.tensor([bool(bits >> i & 1) for i in range(count)])
