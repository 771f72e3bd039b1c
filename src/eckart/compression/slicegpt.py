"""Rotate the residual stream by its principal components and delete the last ones."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.allocation import BudgetError
from eckart.calibration.calibrate import Request
from eckart.checkpoint.layout import Layout, file_bytes, layout_of, tensor_bytes
from eckart.compression.basis_change import centred, empty_at, rewritten
from eckart.compression.residual_stream import ResidualStream, Site, residual_stream
from eckart.forms import Dense, Diagonal
from eckart.forms.layers import kind_of, matrix_shape
from eckart.forms.residual import Connected
from eckart.jobs.method import Job, Method, count_weights
from eckart.jobs.plan import Layer, Plan, join_notes, sample_spectrum
from eckart.registry import method


@method("slicegpt", family="width", paper="SliceGPT: Compress Large Language Models by Deleting Rows and Columns, Ashkboos et al., ICLR 2024, arXiv 2401.15024")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class SliceGPT(Method):
    """Rotate the residual stream by its principal components and delete the last ones (section 3).

    With Q_i the eigenvectors of E[x xᵀ] at the i-th norm, and its gain and bias folded into the layers that read
    through it, W_in <- W_in Q_i[:, :k], W_out <- Q_{i+1}[:, :k]ᵀ W_out, and the stream passes each sum as
    x Q_iᵀ Q_{i+1}. The norm goes on dividing by the width before. LayerNorm's mean is taken out of what writes the
    stream; an RMSNorm's stream keeps its mean (the official code takes it out of the embeddings all the same, which
    changes the function).

    Departs from the paper: the output of the last block and the head are sliced like the rest, so that one width serves
    the whole model (the official code's "head slicing", off by default there). All signals are those of the original
    model; the official code takes each from the sliced model before it.

    The shortcuts add 2 k² numbers a block (k² where attention and MLP are parallel) and a tied head is untied, so that
    slicing a quarter of the width saves less than a quarter of the bytes, on small models with large vocabularies much
    less. A sliced model does not run under `DataParallel`, and dropout between a layer and its sum acts on the shortcut
    too.

    Args:
        multiple: the width kept is a multiple of this.
        orientation: "random" mixes the kept coordinates, so that none is much larger than the others; "pca" leaves them
            in order of energy. In exact arithmetic the model is the same.
        damping: share of the mean of E[x xᵀ]'s diagonal that is added to it.
        width: the width kept, in place of the largest that the budget allows.
    """

    multiple: int = 8
    orientation: str = "random"
    damping: float = 0.01
    width: int | None = None

    def __post_init__(self) -> None:
        if self.orientation not in ("random", "pca"):
            raise ValueError(f"orientation={self.orientation!r} is neither 'random' nor 'pca'")
        if not isinstance(self.multiple, int) or self.multiple < 1:
            raise ValueError(f"multiple={self.multiple!r}: the width kept is a multiple of a positive integer")
        if not 0 <= self.damping < float("inf"):
            raise ValueError(f"damping={self.damping!r} is not a share from 0 up")
        if self.width is not None and (not isinstance(self.width, int) or self.width < 1):
            raise ValueError(f"width={self.width!r}: the width kept is a positive integer")

    def request(self, model: nn.Module, blocks: list[str]) -> Request:
        probes: dict[int, list[str]] = {}
        for point in residual_stream(model).points:
            probes.setdefault(point.part, []).append(point.norm)
        return Request(probes=probes, needs=frozenset({"outer"}))

    def plan(self, job: Job) -> Plan:
        started = time.perf_counter()
        stream = self._stream(job)
        before = {site.name: _bytes_before(job, site) for site in stream.sites}
        total = job.budget.total(
            input_bytes=job.input_bytes, weights=count_weights(job), target_bytes=sum(before.values())
        )
        width = self._width(job, stream, total)
        losses = []
        for point in range(len(stream.points)):
            losses.append(torch.linalg.eigvalsh(self.signal(job, point)).flip(0).clamp(min=0))
            job.progress("plan", point + 1, len(stream.points))
        layers = [self._layer(job, site, width, before[site.name], losses[site.point]) for site in stream.sites]
        layers[0] = replace(layers[0], note=f"width {width} of {stream.width}; {_overheads(job, stream, width)}")
        extra = {"width": width, "untied": any(_tied(job, head) for head in stream.heads())}
        seconds = 4 * (time.perf_counter() - started)
        return Plan(layers, job.input_bytes, _bytes_after(job, stream, width), total, seconds, extra=extra)

    def _stream(self, job: Job) -> ResidualStream:
        """Found before anything is changed, and kept."""
        key = (self, "stream")
        if key not in job.scratch:
            job.scratch[key] = residual_stream(job.model)
        return job.scratch[key]

    def _width(self, job: Job, stream: ResidualStream, total: int) -> int:
        """The width asked for, or the largest whose bytes are within `total`."""
        widths = range(self.multiple, stream.width + 1, self.multiple)
        if max(self.width or 0, self.multiple) > stream.width:
            raise ValueError(
                f"width={self.width}, multiple={self.multiple}: the stream of this model is only {stream.width} wide"
            )
        low, high = 0, len(widths)  # bytes grow with the width
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if _bytes_after(job, stream, widths[middle]) <= total else (low, middle)
        chosen = self.width or widths[max(0, low - 1)]
        needed = _bytes_after(job, stream, chosen)
        if needed <= total:
            return chosen
        remedy = f"the widest that fits is {widths[low - 1]}" if low else f"the smallest possible is {_bytes_after(job, stream, widths[0])} bytes, at width {widths[0]}"  # fmt: skip # noqa: E501
        raise BudgetError(
            f"the budget {job.budget} is {total} bytes; at width {chosen} of {stream.width} slicegpt needs {needed} "
            f"({needed / job.input_bytes:.3f} of the input): {_overheads(job, stream, chosen)}; {remedy}"
        )

    def _layer(self, job: Job, site: Site, width: int, before: int, energies: Float[Tensor, " d"]) -> Layer:
        after = sum(tensor_bytes(*t) for t in _layout(job, self._stream(job), site, width).values())
        if site.role == "norm":
            shape, moved = (len(energies), len(energies)), "its gain goes into what reads through it"
            return Layer(site.name, "norm", site.part, shape, str(Diagonal()), before, after, note=moved)
        module = job.model.get_submodule(site.name)
        note = join_notes(
            None if site.since is None else f"with a shortcut of {width} x {width}",
            "untied from the token table" if _tied(job, site) else None,
        )
        return Layer(
            site.name, kind_of(module) or "", site.part, matrix_shape(module), str(Dense(width)), before, after,
            predicted_error=float(energies[width:].sum()), energy=float(energies.sum()), note=note,
            spectrum=sample_spectrum(energies.sqrt()),
        )  # fmt: skip

    def signal(self, job: Job, point: int) -> Float[Tensor, "d d"]:
        """E[x xᵀ] of what the norm at a point of the original model sees, less the mean if the norms subtract it."""
        stream = self._stream(job)
        at = stream.points[point]
        found = job.statistics(at.norm, at.part).mean("outer", at.norm).double()
        return centred(centred(found).T).T if stream.centred else found

    def basis(self, job: Job, point: int, width: int) -> Float[Tensor, "d k"]:
        """The leading directions of the stream at a point, as columns."""
        key = (self, "basis", point, width)
        if key not in job.scratch:
            signal = self.signal(job, point)
            signal = signal + self.damping * signal.diagonal().mean() * torch.eye(len(signal), dtype=signal.dtype)
            found = torch.linalg.eigh(signal).eigenvectors.flip(1)[:, :width]
            job.scratch[key] = found @ _rotation(width, job.seed + point) if self.orientation == "random" else found
        return job.scratch[key]

    def rewrite(self, job: Job, plan: Plan, part: int) -> list[Layer]:
        width, stream = plan.extra["width"], self._stream(job)
        sites = stream.of(part)
        points = {p for site in sites for p in (site.point, site.since) if p is not None}
        for key in [k for k in job.scratch if k[:2] == (self, "basis") and k[2] not in points]:
            del job.scratch[key]
        bases = {p: self.basis(job, p, width) for p in sorted(points)}
        new = {site.name: rewritten(job.model, stream, site, bases, job.dtype) for site in sites}
        for name, module in new.items():
            job.model.set_submodule(name, module)
        for name, module in new.items():
            if isinstance(module, Connected):
                module.connect(job.model, name)
        lost = {p: _lost(self.signal(job, p), basis) for p, basis in bases.items()}
        at = {site.name: site.point for site in sites if site.role != "norm"}
        return [layer.measured(lost[at[layer.name]]) if layer.name in at else layer for layer in plan.of(part)]

    def config_changes(self, plan: Plan) -> dict[str, Any]:
        return {"tie_word_embeddings": False} if plan.extra["untied"] else {}


def _layout(job: Job, stream: ResidualStream, site: Site, width: int) -> Layout:
    """The tensors that will stand at a site."""
    module = empty_at(job.model, stream, site, width, job.dtype)
    return layout_of({f"{site.name}.{k}": v for k, v in module.state_dict().items()})


def _bytes_after(job: Job, stream: ResidualStream, width: int) -> int:
    """Of all weight files, to the byte, when the stream is `width` wide."""
    total = 0
    for part, layout in job.layouts.items():
        sites = stream.of(part)
        changed = {site.name for site in sites}
        after = {k: v for k, v in layout.items() if k.rpartition(".")[0] not in changed}
        for site in sites:
            after |= _layout(job, stream, site, width)
        total += file_bytes(after)
    return total


def _bytes_before(job: Job, site: Site) -> int:
    """Of the tensors at a site; a tied weight counts where it is stored."""
    return sum(tensor_bytes(*t) for k, t in job.layouts[site.part].items() if k.rpartition(".")[0] == site.name)


def _tied(job: Job, site: Site) -> bool:
    return site.role == "reader" and f"{site.name}.weight" not in job.layouts[site.part]


def _overheads(job: Job, stream: ResidualStream, width: int) -> str:
    """What slicing adds, in words."""
    count = sum(site.since is not None for site in stream.sites)
    words = [f"the {count} shortcuts of {width} x {width} add {count * width * width * job.dtype.itemsize} bytes"]
    for head in stream.heads():
        if _tied(job, head):
            rows = matrix_shape(job.model.get_submodule(head.name))[0]
            words.append(f"{head.name}, which can no longer be tied, adds {rows * width * job.dtype.itemsize}")
    return " and ".join(words)


def _lost(signal: Float[Tensor, "d d"], basis: Float[Tensor, "d k"]) -> float:
    """E |x - Q Qᵀ x|²."""
    return max(0.0, float(signal.trace() - (basis * (signal @ basis)).sum()))


def _rotation(size: int, seed: int) -> Float[Tensor, "k k"]:
    """A random orthogonal matrix, uniform over all."""
    draw = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(draw)
    return q * r.diagonal().sign()
