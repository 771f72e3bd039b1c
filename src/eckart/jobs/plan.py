"""What a job decides before it changes anything, and what it finds afterwards; both are JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Layer:
    """One layer in a plan, and after the fit in a result.

    Attributes:
        name, kind: which module, and what it was (`linear`, `conv1d`, `embedding`, `conv2d`).
        part: index of its block, or -1.
        shape: (out, in) of its matrix before.
        form: the closed form it gets; `dense()` where it stays.
        dense_bytes, bytes: stored, before and after, bias included.
        predicted_error, measured_error: squared error in the metric; measured on what is stored, None before the fit.
        energy: squared norm of the whole matrix in the metric.
        note: why it stays dense, or what was unusual.
        spectrum: some singular values of the weighted matrix, relative to the largest.
    """

    name: str
    kind: str
    part: int
    shape: tuple[int, int]
    form: str
    dense_bytes: int
    bytes: int
    predicted_error: float | None = None
    energy: float | None = None
    measured_error: float | None = None
    note: str | None = None
    spectrum: list[float] | None = None

    def to_json(self) -> dict[str, Any]:
        from eckart.forms import LowRank, parse

        form = parse(self.form)
        rank = form.rank if isinstance(form, LowRank) else None
        return {**asdict(self), "shape": list(self.shape), "block": None if self.part < 0 else self.part, "rank": rank}

    def measured(self, error: float, note: str | None = None) -> Layer:
        return replace(self, measured_error=error, note=join_notes(self.note, note))


@dataclass
class Plan:
    """Which form every layer gets, and what that is expected to cost.

    Attributes:
        layers: the targeted layers.
        bytes_before, bytes_after: of all weight files.
        budget: bytes that were allowed.
        seconds: expected for the fit that follows.
        peak_memory: expected, in bytes above what the process holds before it starts.
        statistics: whether the fit needs any.
        extra: what a method keeps for itself.
        remarks: what a user should know of how it was found.
    """

    layers: list[Layer]
    bytes_before: int
    bytes_after: int
    budget: int
    seconds: float = 0.0
    peak_memory: int = 0
    statistics: bool = True
    extra: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def of(self, part: int) -> list[Layer]:
        """The layers of one part."""
        return [layer for layer in self.layers if layer.part == part]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        return cls(**{**data, "layers": layers_from_json(data["layers"])})


def layers_from_json(items: Iterable[dict[str, Any]]) -> list[Layer]:
    return [Layer(**{**item, "shape": tuple(item["shape"])}) for item in items]


def join_notes(*notes: str | None) -> str | None:
    """The notes that are there, without repeats."""
    kept = list(dict.fromkeys(n for n in notes if n))
    return "; ".join(kept) or None


def sample_spectrum(values: torch.Tensor, count: int = 32) -> list[float]:
    """At most `count` evenly spaced values, divided by the largest."""
    if len(values) == 0 or float(values[0]) <= 0:
        return []
    at = torch.linspace(0, len(values) - 1, min(count, len(values))).round().long()
    return [round(float(v), 6) for v in (values[at] / values[0])]


def total_error(layers: Iterable[Layer], name: str) -> float | None:
    """Mean over layers of the relative squared error called `name`; None where nothing is known."""
    known = [
        getattr(layer, name) / layer.energy for layer in layers if getattr(layer, name) is not None and layer.energy
    ]
    return sum(known) / len(known) if known else None
