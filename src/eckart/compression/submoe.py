"""Experts of a mixture that put out alike are made one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from eckart.allocation import BudgetError
from eckart.anatomy import Experts, experts
from eckart.calibration.calibrate import Request
from eckart.calibration.store import OUTSIDE
from eckart.calibration.subject import InMemory
from eckart.checkpoint.converted import saved_layout
from eckart.checkpoint.layout import Layout, file_bytes, layout_of
from eckart.compression.expert_clusters import Clustering, cluster_all, split
from eckart.compression.expert_merging import Merged, merge
from eckart.forms import Dense, Form, LowRank
from eckart.forms.experts import Expert, MergedExperts, Stack, expert_matrices
from eckart.jobs.method import Job, Method, count_weights, output_bytes
from eckart.jobs.plan import Layer, Plan, join_notes
from eckart.linalg.whitening import check_finite
from eckart.registry import method
from eckart.remarks import noting


@method("submoe", family="experts", paper="Sub-MoE: Efficient Mixture-of-Expert LLMs Compression via Subspace Expert Merging, Li et al., AAAI 2026, arXiv 2506.23266")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class SubMoE(Method):
    """Cluster the experts of a layer by the cosine of their outputs, and merge each cluster by routing frequency.

    All experts see the same tokens; k-means clusters their outputs, and neighbouring layers share a number of clusters,
    which dynamic programming splits where it costs least. A joint SVD with averaged right factors is the mean of the
    weights by frequency, U S (sum f_i V_i) / sum f_i, and stored as such. With `form="low_rank()"`
    the shared left basis, of [W_1 S_1 ... W_n S_n] under the inputs of each expert, is truncated too (Sub-MoE†).

    The router stays as it is: its experts are redirected to the merged ones, and shares of a token that meet are added.
    Shared experts are left alone.

    Departs from the paper: hidden units of the members are put into the order of the most frequent one's first, so that
    experts that are equal but for that order merge without loss (experts copied from one MLP are in order already).

    Args:
        form: of every matrix of a merged expert. An open `low_rank()` gets its rank from `inside`; the budget decides
            how many experts there are.
        window: consecutive mixture layers that share a number of clusters; 1 gives each layer its own.
        inside: share of a merged expert's numbers that an open `low_rank()` cuts away.
        align: put hidden units in order before they are merged.
    """

    form: Form = field(default_factory=Dense)
    window: int = 2
    inside: float = 0.2
    align: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or isinstance(self.window, bool) or self.window < 1:
            raise ValueError(f"submoe(window={self.window!r}): the window is a positive number of layers")
        if not 0 <= self.inside < 1:
            raise ValueError(f"submoe(inside={self.inside!r}): the share cut away is from 0 up to, not including, 1")
        if not isinstance(self.form, Form) or (self.form.open and not isinstance(self.form, LowRank)):
            raise ValueError(f"submoe(form={self.form}): give the form all its settings; the budget decides how many experts there are")  # fmt: skip # noqa: E501

    def request(self, model: nn.Module, blocks: list[str]) -> Request:
        probes: dict[int, list[str]] = {}
        for site in self._sites(model):
            probes.setdefault(_part(site, blocks), []).append(site.name)
        weighted = frozenset() if self.form == Dense() else frozenset({"expert_outer", "inner_outer"})
        return Request(probes=probes, needs=frozenset({"similarity", "routed"}) | weighted)

    def _sites(self, model: nn.Module) -> list[Experts]:
        found = experts(model)
        if not found:
            raise ValueError(f"{type(model).__name__} has no layers of experts that could be merged: submoe is for mixtures of experts, of which each layer keeps its experts stacked")  # fmt: skip # noqa: E501
        return found

    def closed(self, stack: Stack) -> Form:
        """The form of every matrix of these experts."""
        if not isinstance(self.form, LowRank) or not self.form.open:
            return self.form
        rank = int((1 - self.inside) * stack.inner * stack.width / (stack.inner + stack.width))
        return self.form.at(max(1, rank // self.form.multiple * self.form.multiple))

    def plan(self, job: Job) -> Plan:
        started = time.perf_counter()
        sites = self._sites(job.model)
        clusterings: list[dict[int, Clustering]] = []
        for done, site in enumerate(sites):
            S = job.statistics(site.name, _part(site, job.blocks)).mean("similarity", site.name)
            clusterings.append(cluster_all(S, site.top_k, job.seed, site.name))
            job.progress("plan", done + 1, 2 * len(sites))
        total = job.budget.total(
            input_bytes=job.input_bytes, weights=count_weights(job),
            target_bytes=sum(s.stack.count * s.stack.numbers * job.dtype.itemsize for s in sites),
        )  # fmt: skip
        counts = self._counts(job, sites, clusterings, total)
        chosen = {site.name: c[k].labels for site, c, k in zip(sites, clusterings, counts, strict=True)}
        layers = []
        for done, site in enumerate(sites):
            with job.subject.loaded(site.name):
                merged, note = self._merge(job, site, chosen[site.name])
            layers.append(self._layer(job, site, chosen[site.name], merged, note))
            job.progress("plan", len(sites) + done + 1, 2 * len(sites))
        seconds = time.perf_counter() - started
        after = _bytes(job, self._replaced(job, sites, chosen))
        return Plan(layers, job.input_bytes, after, total, seconds, extra={"clusters": chosen})

    def _counts(
        self, job: Job, sites: Sequence[Experts], clusterings: Sequence[Mapping[int, Clustering]], total: int
    ) -> list[int]:
        """How many experts each layer keeps: as many in all as the budget allows."""

        def cost(count: int) -> tuple[int, list[int]]:
            counts = split(clusterings, count, self.window)
            labels = {s.name: c[k].labels for s, c, k in zip(sites, clusterings, counts, strict=True)}
            return _bytes(job, self._replaced(job, sites, labels)), counts

        low, high = sum(s.top_k for s in sites), sum(s.stack.count for s in sites)
        smallest, best = cost(low)
        if smallest > total:
            raise BudgetError(f"the budget {job.budget} is {total} bytes; with as many experts left in each layer as a token is sent to the smallest possible is {smallest} bytes ({smallest / job.input_bytes:.3f} of the input)")  # fmt: skip # noqa: E501
        while low < high:
            middle = (low + high + 1) // 2
            nbytes, counts = cost(middle)
            if nbytes <= total:
                low, best = middle, counts
            else:
                high = middle - 1
        return best

    def _replaced(self, job: Job, sites: Sequence[Experts], labels: Mapping[str, list[int]]) -> dict[str, nn.Module]:
        """What will stand in for experts, without values, by name; layers that stay as they are are left out."""
        return {
            s.name: MergedExperts.empty(
                job.model.get_submodule(s.name), s.stack, labels[s.name], self.closed(s.stack), job.dtype
            )
            for s in sites
            if self._changes(s, labels[s.name])
        }

    def _changes(self, site: Experts, labels: list[int]) -> bool:
        return len(set(labels)) < site.stack.count or self.form != Dense()

    def _merge(self, job: Job, site: Experts, labels: list[int]) -> tuple[list[Merged], str | None]:
        """The merged experts of a layer, which is loaded; and a note."""
        statistics = job.statistics(site.name, _part(site, job.blocks))
        matrices = expert_matrices(job.model.get_submodule(site.name))
        for part, stack in matrices.items():
            check_finite(stack, f"the {part} matrix of {site.name}")
        form = self.closed(site.stack)
        members = [[e for e, label in enumerate(labels) if label == c] for c in range(max(labels) + 1)]
        with noting() as notes:
            merged = [merge(matrices, m, statistics, form, job.dtype, align=self.align) for m in members]
        return merged, notes.text

    def _layer(self, job: Job, site: Experts, labels: list[int], merged: list[Merged], note: str | None) -> Layer:
        stack, form, changes = site.stack, self.closed(site.stack), self._changes(site, labels)
        rows = 2 * stack.inner + stack.width
        closed = (Dense(len(merged) * rows) if form == Dense() else form) if changes else Dense()
        dense = stack.count * stack.numbers * job.dtype.itemsize
        stored = sum(matrix.nbytes for one in merged for matrix in one.matrices.values())
        routed = job.statistics(site.name, _part(site, job.blocks)).sums["routed"]
        silent = int((routed == 0).sum())
        return Layer(
            site.name, "experts", _part(site, job.blocks), (stack.count * rows, stack.width), str(closed), dense,
            stored if changes else dense,
            predicted_error=sum(one.error for one in merged) if changes else 0.0,
            energy=sum(one.energy for one in merged),
            note=join_notes(
                f"{stack.count} experts, {len(merged)} of them kept",
                f"{silent} of the {stack.count} got no token" if silent else None,
                note,
            ),
        )  # fmt: skip

    def rewrite(self, job: Job, plan: Plan, part: int) -> list[Layer]:
        layers = {layer.name: layer for layer in plan.of(part)}
        for site in experts(job.model):
            if site.name not in layers:
                continue
            labels = plan.extra["clusters"][site.name]
            merged = self._merge(job, site, labels)[0] if self._changes(site, labels) else []
            layers[site.name] = layers[site.name].measured(sum(one.error for one in merged))
            if merged:
                act: Any = job.model.get_submodule(site.name).act_fn
                made = [Expert(one.matrices, act) for one in merged]
                new = MergedExperts(made, labels, self.closed(site.stack), act)
                job.model.set_submodule(site.name, new.requires_grad_(False))
        return list(layers.values())


def _part(site: Experts, blocks: Sequence[str]) -> int:
    return next((i for i, block in enumerate(blocks) if site.name.startswith(f"{block}.")), OUTSIDE)


def _bytes(job: Job, replaced: Mapping[str, nn.Module]) -> int:
    """Of all weight files. Of a model in memory it is transformers that writes them, under names of its own."""
    layouts: dict[str, Layout] = {name: layout_of(module.state_dict()) for name, module in replaced.items()}
    if not isinstance(job.subject, InMemory) or not isinstance(job.model, PreTrainedModel):
        return output_bytes(job, layouts)
    kept = {k: v for layout in job.layouts.values() for k, v in layout.items() if k.rpartition(".")[0] not in layouts}
    new = {f"{name}.{k}": v for name, layout in layouts.items() for k, v in layout.items()}
    return file_bytes(saved_layout(job.model, kept | new))
