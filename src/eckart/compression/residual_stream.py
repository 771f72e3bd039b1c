"""A decoder's residual stream as a chain of points, and the modules that meet it there: what a new basis must change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from eckart.anatomy import Anatomy, Block, Norm, anatomy
from eckart.calibration.store import OUTSIDE
from eckart.forms.layers import StandIn, kind_of


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
        norm: itself, for a norm; the one that a reader reads through; of a writer, the one at the head of its sub-layer.
        since: of the writer before a sum where the basis changes, the point before the sum; else None.
    """

    name: str
    part: int
    role: Literal["source", "norm", "reader", "writer"]
    point: int
    norm: Norm | None = None
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
        return [site for site in self.sites if site.part == part]


def residual_stream(model: nn.Module) -> ResidualStream:
    """The stream of a decoder. Raises `ValueError` where its basis cannot be changed, naming the module and why."""
    found = anatomy(model)
    _check(found, model)
    points: list[Point] = []
    inside = [site for part, block in enumerate(found.blocks) for site in _block(block, part, points)]
    final = found.final_norm
    assert final is not None  # seen to by _check
    last = len(points)
    sites = [Site(name, OUTSIDE, "source", 0) for name in found.writers()]
    sites += [*inside, Site(final.name, OUTSIDE, "norm", last, final)]
    sites += [Site(name, OUTSIDE, "reader", last, final) for name in found.readers()]
    for site in sites:
        _check_site(site, model)
    return ResidualStream(found.width, final.kind == "layer", (*points, Point(final.name, OUTSIDE)), tuple(sites))


def _block(block: Block, part: int, points: list[Point]) -> list[Site]:
    """The sites of a block, whose points are added to `points`. A parallel block has one sum, the others two."""
    first, second = block.attention_norm, block.mlp_norm
    start = middle = len(points)
    points.append(Point(first.name, part))
    if not block.parallel:
        middle = len(points)
        points.append(Point(second.name, part))
    end = len(points)
    sites = [Site(norm.name, part, "norm", at, norm) for norm, at in {second: middle, first: start}.items()]
    sites += [Site(name, part, "reader", start, first) for name in block.attention.readers()]
    sites += [Site(name, part, "reader", middle, second) for name in block.mlp.readers()]
    attention = ("writer", end, first, None) if block.parallel else ("writer", middle, first, start)
    sites += [Site(name, part, *attention) for name in block.attention.writers()]
    sites += [Site(name, part, "writer", end, second, middle) for name in block.mlp.writers()]
    return sites


def _check(found: Anatomy, model: nn.Module) -> None:
    """Refuse models whose stream is more than sums between norms that commute with a rotation."""
    first = found.blocks[0]
    sandwich = first.post_attention_norm or first.post_mlp_norm
    obstacle = None
    if not first.pre_norm or found.final_norm is None:
        obstacle = f"it norms the stream after each sum ({first.attention_norm.name}) and not where it is read"
    elif sandwich is not None:
        obstacle = f"the norm {sandwich.name} stands between a layer's output and the stream, and has a gain there"
    elif found.embedding_projection is not None:
        obstacle = f"{found.embedding_projection} stands between the token table and the stream"
    elif found.embedding_norm is not None:
        obstacle = f"the norm {found.embedding_norm.name} stands between the embeddings and the stream"
    elif found.kind != "decoder":
        obstacle = f"it is a {found.kind} model, and only decoders are supported"
    elif found.unplaced:
        obstacle = f"it is not known how {', '.join(found.unplaced[:3])} meet the stream"
    elif not found.readers():
        obstacle = "it has no head, so whatever takes its output expects the whole stream: give the model with its head"
    if obstacle:
        raise ValueError(f"the residual stream of {type(model).__name__} ({found.model_type}) cannot be rotated: {obstacle}")  # fmt: skip # noqa: E501


def _check_site(site: Site, model: nn.Module) -> None:
    module = model.get_submodule(site.name)
    if isinstance(module, StandIn):
        raise ValueError(f"{site.name} is compressed already ({type(module).__name__}): change the stream's basis first, and compress the rest after it")  # fmt: skip # noqa: E501
    wanted = "embedding" if site.role == "source" else site.role
    kinds = {"embedding": ("embedding",), "reader": ("linear", "conv1d"), "writer": ("linear", "conv1d")}
    if site.role != "norm" and kind_of(module) not in kinds[wanted]:
        raise ValueError(f"{site.name} is a {type(module).__name__}, which cannot be given another basis as {wanted}")
    if site.role == "norm" and (site.norm is None or set(dict(module.named_parameters())) - {"weight", "bias"}):
        raise ValueError(f"the norm {site.name} ({type(module).__name__}) has more than a gain and a bias")
