"""Scores of units on reference samples, of a model that is run block by block: relevance, gradient, Taylor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from eckart.anatomy import features
from eckart.calibration.relevance import Probes, channel_axis, counted, logits_of, starting
from eckart.calibration.relevance_rules import RelevanceRules, explained
from eckart.calibration.store import OUTSIDE
from eckart.calibration.stream import Stream

Labels = Int[Tensor, "*batch"]
Places = Mapping[int, Mapping[str, int]]
"""Block (`OUTSIDE` for none) -> layer -> how many units its channels are, one after the other, all of one size."""


def passing_scores(
    stream: Stream, labels: Sequence[Labels], places: Places, kept: Mapping[str, Tensor], *,
    rules: RelevanceRules | None = None, taylor: bool = True, at: Literal["output", "input"] = "input",
) -> dict[str, Float[Tensor, " units"]]:  # fmt: skip
    """How much the units at some layers matter, as the mean over samples (rows, or labels that count).

    With `rules`, |R| of a unit at a place, summed over places (what is conserved is R; transformers' cancel); without,
    of the cross-entropy's gradient g at activation a, |mean of a g| over the places of a row (Molchanov et al., 2017),
    or |mean of g| where `taylor` is off; these are divided by their norm over each layer.

    Args:
        stream: the model on its reference samples.
        labels: of every batch, in the shape of its logits less their last dimension; negative ones do not count.
        places: which layers, and their units.
        kept: layer -> whether each unit is still there; the others are taken out.
        rules: of relevance.
        at: units enter these layers, or leave them.

    Raises `ValueError` where no rule covers the model, labels are no class, or scores are not finite.
    """
    run = _Run(stream, places, kept, rules, at)
    scores = {name: torch.zeros(units, dtype=torch.float64) for layers in places.values() for name, units in layers.items()}  # fmt: skip # noqa: E501
    for name, a, g in run.backward(labels):
        found = _of_units(run.model.get_submodule(name), a, g, len(scores[name]), rules is not None, taylor)
        scores[name] += found.cpu()
    count = sum(len(row) if rules is None else int((row >= 0).sum()) for row in labels)
    for name, score in scores.items():
        if not bool(torch.isfinite(score).all()):
            raise ValueError(f"the scores of the units at {name} are not finite: check the model and the data")
        score *= kept[name].to(score)
        score /= (float(score.norm()) or 1.0) if rules is None else max(1, count)
    return scores


def _of_units(
    module: nn.Module, a: Tensor, g: Tensor, units: int, relevance: bool, taylor: bool
) -> Float[Tensor, " units"]:
    passing = (a.detach() * g if relevance or taylor else g).double()
    rows = passing.movedim(channel_axis(module, a), -1).unflatten(-1, (units, -1))
    rows = rows.sum(-1).reshape(len(rows), -1, units)  # a unit of several channels is their sum
    return rows.abs().sum((0, 1)) if relevance else rows.mean(1).abs().sum(0)


class _Run:
    """One pass through the blocks and back."""

    def __init__(
        self, stream: Stream, places: Places, kept: Mapping[str, Tensor], rules: RelevanceRules | None,
        at: Literal["output", "input"],
    ):  # fmt: skip
        self.stream, self.places, self.rules, self.at = stream, places, rules, at
        self.model = stream.model
        self.kept = kept

    def _probes(self, part: int) -> Probes:
        layers = self.places.get(part, {})
        masks = {}
        for name, units in layers.items():
            kept = self.kept[name]
            if not bool(kept.all()):
                masks[name] = kept.repeat_interleave(self._channels(name) // units)
        return Probes(self.model, list(layers), self.at, masks)

    def _channels(self, name: str) -> int:
        module = self.model.get_submodule(name)
        if isinstance(module, nn.Conv2d):
            return module.in_channels if self.at == "input" else module.out_channels
        shape = features(module)
        if shape is None:
            raise ValueError(f"{name} ({type(module).__name__}) is no linear map, at which units could be scored")
        return shape[1 if self.at == "input" else 0]

    def _recording(self) -> AbstractContextManager[None]:
        return explained(self.model, self.rules)

    def backward(self, labels: Sequence[Labels]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(layer, what passed there, its gradient) of every batch, from the last block to the first."""
        stream = self.stream
        last = len(stream.blocks)
        for part in range(last):
            with stream.subject.loaded(stream.blocks[part]), self._probes(part):
                stream.advance(part)
        with stream.subject.loaded(*stream.outside):
            gradients = []
            for b in range(len(stream.batches)):
                hidden = stream.hidden(last).read(stream.shapes, b).requires_grad_()
                gradient, found = self._outside(hidden, b, labels[b])
                gradients.append(gradient)
                yield from found
        for part in reversed(range(last)):
            with stream.subject.loaded(stream.blocks[part]):
                for b in range(len(stream.batches)):
                    hidden = stream.hidden(part).read(stream.shapes, b).requires_grad_()
                    with self._probes(part) as probes, self._recording():
                        out = stream.run(part, hidden, b)
                    probes.seen.append(("", hidden))
                    *slopes, gradients[b] = probes.gradients(out, gradients[b])
                    yield from ((n, x, g) for (n, x), g in zip(probes.seen, slopes, strict=False))
            stream.hidden(part + 1).path.unlink(missing_ok=True)

    def _outside(self, hidden: Tensor, batch: int, labels: Labels) -> tuple[Tensor, list[tuple[str, Tensor, Tensor]]]:
        with self._probes(OUTSIDE) as probes, self._recording():
            logits = logits_of(self.stream.finish(hidden, batch), self.model)
        with torch.enable_grad():
            if self.rules is not None:
                start = starting(logits, labels, self.rules.epsilon)
            else:
                start = F.cross_entropy(*counted(logits, labels), reduction="sum")
        probes.seen.append(("", hidden))
        *found, gradient = probes.gradients(start)
        return gradient, [(n, x, g) for (n, x), g in zip(probes.seen, found, strict=False)]
