"""Rotate the residual stream by its principal components and delete the last ones."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eckart.allocation import BudgetError
from eckart.anatomy import Norm
from eckart.calibration.calibrate import Request
from eckart.checkpoint.layout import Layout, file_bytes, layout_of, tensor_bytes
from eckart.compression.plan import Layer, Plan, join_notes, sample_spectrum
from eckart.compression.recipe import Job, Method, count_weights
from eckart.compression.residual_stream import ResidualStream, Site, residual_stream
from eckart.forms import Dense, Diagonal
from eckart.forms.layers import STAND_INS, kind_of, matrix_of, matrix_shape
from eckart.forms.residual import Connected, Narrow, ResidualWriter, StreamNorm
from eckart.registry import method

Basis = Float[Tensor, "d k"]
ROWS = 4096
"""Rows of a matrix that are in float64 at a time."""


@method("slicegpt", family="width", paper="SliceGPT: Compress Large Language Models by Deleting Rows and Columns, Ashkboos et al., ICLR 2024, arXiv 2401.15024")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class SliceGPT(Method):
    """Rotate the residual stream by its principal components and delete the last ones (section 3).

    With Q_i the eigenvectors of E[x x^T] at the i-th norm, and its gain and bias folded into the layers that read
    through it, W_in <- W_in Q_i[:, :k], W_out <- Q_{i+1}[:, :k]^T W_out, and the stream passes each sum as
    x Q_i^T Q_{i+1}. The norm goes on dividing by the width before. LayerNorm's mean is taken out of what writes the
    stream; an RMSNorm's stream keeps its mean (the official code takes it out of the embeddings all the same, which
    changes the function).

    Departs from the paper: the output of the last block and the head are sliced like the rest, so that one width serves
    the whole model (the official code's "head slicing"; off by default there). All signals are those of the original
    model; the official code takes each from the sliced model before it.

    The shortcuts add 2 k^2 numbers a block and a tied head is untied, so slicing a quarter of the width saves less than
    a quarter of the bytes, and on small models with large vocabularies much less. A sliced model does not run under
    `DataParallel`, and dropout between a layer and its sum acts on the shortcut too.

    Args:
        multiple: the width kept is a multiple of this.
        orientation: "random" mixes the kept coordinates, so that none is much larger than the others; "pca" leaves them
            in order of energy. In exact arithmetic the model is the same.
        damping: share of the mean of E[x x^T]'s diagonal that is added to it.
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
            raise ValueError(f"multiple={self.multiple!r}: the width is a multiple of a positive integer")
        if not self.damping >= 0:
            raise ValueError(f"damping={self.damping!r} is negative")
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
        most, dense = job.input_bytes, _dense_bytes(job, stream)
        total = job.budget.total(input_bytes=most, weights=count_weights(job), target_bytes=sum(dense.values()))
        width = self._width(job, stream, total)
        specs = {site: _spec(job.model, stream, site, width) for site in stream.sites}
        layers = [self._layer(job, site, spec, dense[site]) for site, spec in specs.items()]
        layers[0] = _noted(layers[0], f"width {width} of {stream.width}; {_overheads(job, stream, width)}")
        planned: dict[int, Layer] = {}
        for point in range(len(stream.points)):
            energies = torch.linalg.eigvalsh(self.signal(job, stream, point)).flip(0).clamp(min=0)
            for i, site in enumerate(stream.sites):
                if site.point == point and site.role != "norm":
                    planned[i] = _with_energies(layers[i], energies, width)
            job.progress("plan", point + 1, len(stream.points))
        layers = [planned.get(i, layer) for i, layer in enumerate(layers)]
        extra = {"width": width, "untied": _untied(job, stream)}
        seconds = 4 * (time.perf_counter() - started)
        return Plan(layers, most, _bytes_at(job, stream, width), total, seconds, extra=extra)

    def _stream(self, job: Job) -> ResidualStream:
        """Kept from before anything is changed."""
        found = job.scratch.setdefault((self, "stream"), None) or residual_stream(job.model)
        job.scratch[self, "stream"] = found
        return found

    def _width(self, job: Job, stream: ResidualStream, total: int) -> int:
        """The largest width whose bytes are within `total`."""
        choices = range(self.multiple, stream.width + 1, self.multiple)
        if self.width is not None and self.width > stream.width:
            raise ValueError(f"width={self.width} is more than the stream's {stream.width}")
        if not choices:
            raise ValueError(f"multiple={self.multiple} is more than the stream's width, {stream.width}")
        low, high = 0, len(choices)  # bytes grow with the width
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if _bytes_at(job, stream, choices[middle]) <= total else (low, middle)
        if self.width is not None and _bytes_at(job, stream, self.width) <= total:
            return self.width
        if low and self.width is None:
            return choices[low - 1]
        asked = self.width or choices[0]
        needed = _bytes_at(job, stream, asked)
        fits = f"the widest that fits is {choices[low - 1]}" if low else "no width fits"
        fits = fits if self.width else f"that is the smallest possible with multiple={self.multiple}"
        raise BudgetError(
            f"the budget {job.budget} is {total} bytes; at width {asked} of {stream.width} slicegpt needs {needed} bytes "
            f"({needed / job.input_bytes:.3f} of the input), because {_overheads(job, stream, asked)}: {fits}"
        )

    def _layer(self, job: Job, site: Site, spec: dict[str, Any], dense: int) -> Layer:
        module, width = job.model.get_submodule(site.name), spec.get("width")
        after = sum(tensor_bytes(*t) for t in _layout(job, site, spec).values())
        if site.role == "norm":
            note = "its gain moves into the layers that read through it"
            return Layer(site.name, "norm", site.part, (width, width), str(Diagonal()), dense, after, note=note)
        note = None if site.since is None else f"with a shortcut of {spec['shape'][0]} x {spec['shape'][0]}"
        if site.role == "reader" and dense == 0:
            note = "untied from the token table"
        shape = matrix_shape(module)
        kept = spec["shape"][0 if site.role == "writer" else 1]
        return Layer(site.name, kind_of(module) or "", site.part, shape, str(Dense(kept)), dense, after, note=note)

    def signal(self, job: Job, stream: ResidualStream, point: int) -> Float[Tensor, "d d"]:
        """E[x x^T] of what the norm at a point of the original model sees, less the mean if the norms subtract it."""
        at = stream.points[point]
        found = job.statistics(at.norm, at.part).mean("outer", at.norm).double()
        return _centred(_centred(found).T).T if stream.centred else found

    def basis(self, job: Job, point: int, width: int) -> Basis:
        """The k leading directions of the stream at a point, as columns."""
        key = (self, point, width)
        if key not in job.scratch:
            signal = self.signal(job, self._stream(job), point)
            signal.diagonal().add_(self.damping * signal.diagonal().mean())
            found = torch.linalg.eigh(signal).eigenvectors.flip(1)[:, :width]
            job.scratch[key] = found @ _rotation(width, job.seed + point) if self.orientation == "random" else found
        return job.scratch[key]

    def rewrite(self, job: Job, plan: Plan, part: int) -> list[Layer]:
        width, stream = plan.extra["width"], self._stream(job)
        sites = stream.of(part)
        used = {p for site in sites for p in (site.point, site.since) if p is not None}
        for old in [k for k in job.scratch if k[0] == self and len(k) == 3 and k[1] not in used]:
            del job.scratch[old]
        bases = {p: self.basis(job, p, width) for p in sorted(used)}
        new = {site.name: _rewritten(job, stream, site, bases) for site in sites}
        for name, module in new.items():
            job.model.set_submodule(name, module.requires_grad_(False))
        for name, module in new.items():
            if isinstance(module, Connected):
                module.connect(job.model, name)
        lost = {p: _lost(self.signal(job, stream, p), basis) for p, basis in bases.items()}
        points = {site.name: site.point for site in sites if site.role != "norm"}
        return [layer.measured(lost[points[layer.name]]) if layer.name in points else layer for layer in plan.of(part)]

    def config_changes(self, plan: Plan) -> dict[str, Any]:
        return {"tie_word_embeddings": False} if plan.extra["untied"] else {}


def _bytes_at(job: Job, stream: ResidualStream, width: int) -> int:
    """Of all weight files, to the byte, when the stream is `width` wide."""
    total = 0
    for part, layout in job.layouts.items():
        sites = stream.of(part)
        changed = {site.name for site in sites}
        after = {k: v for k, v in layout.items() if k.rpartition(".")[0] not in changed}
        for site in sites:
            after |= _layout(job, site, _spec(job.model, stream, site, width))
        total += file_bytes(after)
    return total


def _dense_bytes(job: Job, stream: ResidualStream) -> dict[Site, int]:
    """Bytes of each site's tensors in the input; none of a tied head's."""
    owned: dict[str, int] = {}
    for layout in job.layouts.values():
        for key, stored in layout.items():
            name = key.rpartition(".")[0]
            owned[name] = owned.get(name, 0) + tensor_bytes(*stored)
    return {site: owned.get(site.name, 0) for site in stream.sites}


def _untied(job: Job, stream: ResidualStream) -> bool:
    """Whether a head shares its weight with the token table, and will not any more."""
    dense = _dense_bytes(job, stream)
    return any(dense[site] == 0 for site in stream.of(-1) if site.role == "reader")


def _overheads(job: Job, stream: ResidualStream, width: int) -> str:
    """What slicing adds, in words."""
    count = sum(site.since is not None for site in stream.sites)
    words = f"the {count} shortcuts of {width} x {width} add {count * width * width * job.dtype.itemsize} bytes"
    if not _untied(job, stream):
        return words
    rows = [matrix_shape(job.model.get_submodule(s.name))[0] for s in stream.of(-1) if s.role == "reader"]
    return f"{words} and the head, tied before, {sum(rows) * width * job.dtype.itemsize}"


def _noted(layer: Layer, note: str) -> Layer:
    return Layer(**{**vars(layer), "note": join_notes(layer.note, note)})


def _with_energies(layer: Layer, energies: Float[Tensor, " d"], width: int) -> Layer:
    """The layer with what its point of the stream loses."""
    lost, spectrum = float(energies[width:].sum()), sample_spectrum(energies.sqrt())
    return Layer(**{**vars(layer), "predicted_error": lost, "energy": float(energies.sum()), "spectrum": spectrum})


def _lost(signal: Float[Tensor, "d d"], basis: Basis) -> float:
    """E |x - Q Q^T x|^2."""
    return max(0.0, float(signal.trace() - (basis * (signal @ basis)).sum()))


def _layout(job: Job, site: Site, spec: dict[str, Any]) -> Layout:
    return layout_of({f"{site.name}.{k}": v for k, v in _empty(job, site, spec).state_dict().items()})


def _rotation(size: int, seed: int) -> Float[Tensor, "k k"]:
    """A random orthogonal matrix, uniform over all."""
    draw = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(draw)
    return q * r.diagonal().sign()
