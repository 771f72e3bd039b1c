"""The layer records of a checkpoint, read with tolerance for what an older or newer version left out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from eckart.report.numbers import finite, ratio


@dataclass(frozen=True)
class Layer:
    """One matrix: its bytes before and after, and its relative errors (root of squared error over squared norm)."""

    name: str
    block: int | None
    projection: str  # the name without its block: "self_attn.q_proj"; experts of one kind share it
    shape: tuple[int, ...]
    form: str
    rank: int | None
    dense_bytes: float | None
    bytes: float | None
    predicted: float | None
    measured: float | None
    note: str
    spectrum: tuple[float, ...]

    @property
    def full_rank(self) -> int:
        return min(self.shape[0], math.prod(self.shape[1:])) if self.shape else 0

    @property
    def kept_rank(self) -> float | None:
        return ratio(self.rank, self.full_rank)

    @property
    def kept_bytes(self) -> float | None:
        return ratio(self.bytes, self.dense_bytes)


def read_layers(records: object) -> list[Layer]:
    """Layers from JSON records; records that are no objects are an error, missing keys are not."""
    if records is None:
        return []
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError("The layers of a report must be a list of objects, one per layer.")
    return [_read(record, index) for index, record in enumerate(records)]


def _read(record: dict[str, Any], index: int) -> Layer:
    name = str(record.get("name") or f"layer {index}")
    block, rank = finite(record.get("block")), finite(record.get("rank"))
    shape = record.get("shape")
    spectrum = record.get("spectrum")
    return Layer(
        name=name,
        block=None if block is None else int(block),
        projection=name if block is None else projection(name, int(block)),
        shape=tuple(int(n) for n in map(finite, shape) if n is not None) if isinstance(shape, list) else (),
        form=str(record.get("form") or "not recorded"),
        rank=None if rank is None else int(rank),
        dense_bytes=finite(record.get("dense_bytes")),
        bytes=finite(record.get("bytes")),
        predicted=relative(record.get("predicted_error"), record.get("energy")),
        measured=relative(record.get("measured_error"), record.get("energy")),
        note=str(record.get("note") or ""),
        spectrum=tuple(v for v in map(finite, spectrum) if v is not None) if isinstance(spectrum, list) else (),
    )


def relative(error: object, energy: object) -> float | None:
    """The root of squared error over squared norm."""
    fraction = ratio(error, energy)
    return None if fraction is None or fraction < 0 else math.sqrt(fraction)


def projection(name: str, block: int) -> str:
    """What comes after the block's number in a layer's name, with other numbers (experts) as *."""
    parts = name.split(".")
    tail = parts[parts.index(str(block)) + 1 :] if str(block) in parts else parts
    return ".".join("*" if part.isdigit() else part for part in tail) or name


def projections(layers: Iterable[Layer]) -> list[str]:
    """The projection types inside blocks, in order of appearance."""
    return list(dict.fromkeys(layer.projection for layer in layers if layer.block is not None))


def blocks(layers: Iterable[Layer]) -> list[int]:
    return sorted({layer.block for layer in layers if layer.block is not None})


def short_names(names: Sequence[str]) -> dict[str, str]:
    """The fewest trailing parts that still tell the names apart."""
    most = max((name.count(".") for name in names), default=0) + 1
    for parts in range(1, most + 1):
        short = {name: ".".join(name.split(".")[-parts:]) for name in names}
        if len(set(short.values())) == len(set(names)):
            return short
    return {name: name for name in names}
