"""A decoder's residual stream as a chain of points, and the modules that meet it: what a new basis must change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from eckart.anatomy import Anatomy, Block, Norm, anatomy
from eckart.calibration.store import OUTSIDE
from eckart.forms.layers import kind_of
from eckart.forms.stand_ins import StandIn

Role = Literal["source", "norm", "reader", "writer"]
KINDS = {"source": ("embedding",), "reader": ("linear", "conv1d"), "writer": ("linear", "conv1d")}


@dataclass(frozen=True)
class Point:
    """A place in the stream where a norm reads it, and a basis of its own may begin."""

    norm: str
    part: int


@dataclass(frozen=True)
class Site:
    """A module that changes with the basis of the stream.

    Attributes:
        name, part: which module, and the index of its block, or -1.
        role: `source` (embeddings, which are summed into the first stream), `norm`, `reader` or `writer`.
        point: where it reads; of what it writes, the point that comes next.
        norm: itself, for a norm; what a reader reads through; of a writer, what is at the head of its sub-layer; the
            first one, for a source.
        since: of the writer before a sum where the basis changes, the point before the sum; else None.
    """

    name: str
    part: int
    role: Role
    point: int
    norm: Norm
    since: int | None = None


@dataclass(frozen=True)
class ResidualStream:
    """Where the stream is read and written.

    Attributes:
        width: of the stream.
        centred: whether its norms subtract the mean, so that the stream's own mean is never seen.
        points: in order; the last is at the norm before the head.
        sites: all modules that change, each once.
    """

    width: int
    centred: bool
    points: tuple[Point, ...]
    sites: tuple[Site, ...]

    def of(self, part: int) -> list[Site]:
        """The sites of one part."""
        return [site for site in self.sites if site.part == part]

    def heads(self) -> list[Site]:
        """The readers after the last block."""
        return [site for site in self.of(OUTSIDE) if site.role == "reader"]


def residual_stream(model: nn.Module) -> ResidualStream:
    """The stream of a decoder. Raises `ValueError` where its basis cannot be changed, naming the module and why."""
    found = anatomy(model)
    final, obstacle = found.final_norm, _obstacle(found)
    if obstacle is not None or final is None:
        raise ValueError(
            f"the residual stream of {type(model).__name__} ({found.model_type}) cannot be rotated: {obstacle}"
        )
    points: list[Point] = []
    inside = [site for part, block in enumerate(found.blocks) for site in _block(block, part, points)]
    last, first = len(points), found.blocks[0].attention_norm
    sites = (
        *(Site(name, OUTSIDE, "source", 0, first) for name in found.writers()),
        *inside,
        Site(final.name, OUTSIDE, "norm", last, final),
        *(Site(name, OUTSIDE, "reader", last, final) for name in found.readers()),
    )
    for site in sites:
        _check(site, model)
    return ResidualStream(found.width, final.kind == "layer", (*points, Point(final.name, OUTSIDE)), sites)


def _block(block: Block, part: int, points: list[Point]) -> list[Site]:
    """The sites of a block, whose points are added to `points`. A parallel block has one sum, the others two."""
    first, second = block.attention_norm, block.mlp_norm
    start = middle = len(points)
    points.append(Point(first.name, part))
    if not block.parallel:
        middle = len(points)
        points.append(Point(second.name, part))
    end = len(points)
    after_attention, since = (end, None) if block.parallel else (middle, start)
    return [
        *(Site(norm.name, part, "norm", at, norm) for norm, at in {second: middle, first: start}.items()),
        *(Site(name, part, "reader", start, first) for name in block.attention.readers()),
        *(Site(name, part, "writer", after_attention, first, since) for name in block.attention.writers()),
        *(Site(name, part, "reader", middle, second) for name in block.mlp.readers()),
        *(Site(name, part, "writer", end, second, middle) for name in block.mlp.writers()),
    ]


def _obstacle(found: Anatomy) -> str | None:
    """Why the stream is more than sums between norms that commute with a rotation."""
    first = found.blocks[0]
    sandwich = first.post_attention_norm or first.post_mlp_norm
    if not first.pre_norm or found.final_norm is None:
        return f"it norms the stream after each sum ({first.attention_norm.name}), not where it is read"
    if sandwich is not None:
        return f"the norm {sandwich.name} stands between a layer's output and the stream, and has a gain there"
    if found.embedding_projection is not None:
        return f"{found.embedding_projection} stands between the token table and the stream"
    if found.embedding_norm is not None:
        return f"the norm {found.embedding_norm.name} stands between the embeddings and the stream"
    if found.kind != "decoder":
        return f"it is a {found.kind} model, and only decoders are supported"
    if found.unplaced:
        return f"it is not known how {', '.join(found.unplaced[:3])} meet the stream"
    if not found.readers():
        return "it has no head, and what takes its output expects the whole stream: give the model with its head"
    return None


def _check(site: Site, model: nn.Module) -> None:
    module = model.get_submodule(site.name)
    if isinstance(module, StandIn):
        raise ValueError(
            f"{site.name} is compressed already ({type(module).__name__}): change the stream's basis first, "
            "and compress the rest after it"
        )
    if site.role == "norm" and set(dict(module.named_parameters())) - {"weight", "bias"}:
        raise ValueError(f"the norm {site.name} ({type(module).__name__}) has more than a gain and a bias")
    if site.role != "norm" and kind_of(module) not in KINDS[site.role]:
        raise ValueError(f"{site.name} is a {type(module).__name__}, which cannot be given another basis")
