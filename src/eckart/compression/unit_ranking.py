"""Which units go: all are ranked by one score, the least are removed, and those that are left are ranked anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from eckart.allocation import Budget, BudgetError
from eckart.calibration.relevance_rules import RULES, RelevanceRules
from eckart.calibration.stream import Batch, Stream
from eckart.calibration.subject import Subject
from eckart.calibration.unit_scores import Labels, Places, passing_scores

SCORES = ("relevance", "taylor", "gradient", "weight")
PER = ("byte", "unit")

Kept = dict[str, Bool[Tensor, " units"]]
"""Group of units -> whether each is still there."""

Scores = Mapping[str, Float[Tensor, " units"]]


def remove_least(
    kept: Kept, scores: Callable[[Kept], Scores], cost: Callable[[Kept], int], total: int, step: float,
    sizes: Mapping[str, float] | None = None,
) -> Kept:  # fmt: skip
    """What is left when units of the least score are removed until the bytes meet `total`.

    All groups are ranked together, and anew after every `step` of all units (Yeom et al., 2021, algorithm 1); of equal
    scores the earlier go first. No group is emptied.

    Args:
        scores: of the units that are there.
        cost: bytes.
        sizes: of a unit in each group, by which its score is divided; None counts all alike.

    Raises `BudgetError` where one unit in every group is still too much.
    """
    everything = sum(len(k) for k in kept.values())
    while cost(kept) > total:
        order = ranked(scores(kept), kept, sizes)
        if not order:
            raise BudgetError(f"{cost(kept)} bytes are left with one unit in every group, and {total} are allowed")
        count = min(len(order), max(1, round(step * everything)))
        if cost(without(kept, order[:count])) > total:
            kept = without(kept, order[:count])
            continue
        *before, last = order[: _fewest(kept, [], order[:count], cost, total)]
        return without(kept, [last, *before[: _fewest(kept, [last], before, cost, total)]])  # last may be a large one
    return kept


def _fewest(
    kept: Kept, gone: list[tuple[str, int]], order: list[tuple[str, int]], cost: Callable[[Kept], int], total: int
) -> int:
    """How many of `order`, the first ones, must go beside those that are gone."""
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(without(kept, gone + order[:middle])) <= total else (middle + 1, high)
    return high


def ranked(scores: Scores, kept: Kept, sizes: Mapping[str, float] | None = None) -> list[tuple[str, int]]:
    """Units that may go, the least first: all that are there but the best of each group."""
    entries = []
    for name, alive in kept.items():
        score = scores[name][alive] / (1.0 if sizes is None else sizes[name])
        index = alive.nonzero()[:, 0]
        entries += [(float(score[i]), int(index[i]), name) for i in score.sort(stable=True).indices[:-1].tolist()]
    entries.sort(key=lambda entry: entry[0])
    return [(name, i) for _, i, name in entries]


def without(kept: Kept, gone: Iterable[tuple[str, int]]) -> Kept:
    """The same, with some units gone."""
    left = {name: alive.clone() for name, alive in kept.items()}
    for name, i in gone:
        left[name][i] = False
    return left


def fewest(kept: Kept) -> Kept:
    """One unit in every group."""
    return {name: torch.arange(len(alive)) == 0 for name, alive in kept.items()}


def check_settings(score: str, rule: str, step: float, per: str) -> None:
    """Raise `ValueError` on words and numbers that mean nothing."""
    if score not in SCORES:
        raise ValueError(f"score={score!r}: it is one of {', '.join(SCORES)}")
    if rule not in RULES:
        raise ValueError(f"rule={rule!r}: it is one of {', '.join(RULES)}")
    if per not in PER:
        raise ValueError(f"per={per!r}: units are ranked by their scores per {' or per '.join(PER)}")
    if not 0 < step <= 1:
        raise ValueError(f"step={step}: the share of units that go at a time is above 0 and at most 1")


def check_smallest(budget: Budget, total: int, smallest: int, before: int) -> None:
    """Raise `BudgetError` where even one unit in every layer is too much."""
    if smallest > total:
        raise BudgetError(
            f"the budget {budget} is {total} bytes; with one unit left in every layer the smallest possible is "
            f"{smallest} bytes ({smallest / before:.3f} of the input)"
        )


def scorer(
    subject: Subject, batches: Sequence[Batch], labels: Sequence[Labels], folder: Path, blocks: list[str],
    places: Places, at: Literal["output", "input"], score: str, rule: str,
) -> Callable[[Kept], Scores]:  # fmt: skip
    """What runs the samples through the model and back, without the units that are gone."""
    folder.mkdir(parents=True, exist_ok=True)
    given = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]  # losses have no rule
    stream = Stream(subject, given, folder, blocks)
    rules = RelevanceRules(rule) if score == "relevance" else None

    def scores(kept: Kept) -> Scores:
        if not stream.shapes:
            stream.start()
        return passing_scores(stream, labels, places, kept, rules=rules, taylor=score == "taylor", at=at)

    return scores


def true_classes(batch: Batch, shifted: bool) -> Labels:
    """What the logits of a batch should say: classes of rows, or of places, -100 where nothing is asked.

    Args:
        shifted: whether places predict the next token, not their own.
    """
    found = batch.get("labels", batch.get("input_ids"))
    if found is None:
        raise ValueError("lrp_prune must know the true classes: give batches with `labels`")
    if found.dim() < 2:
        return found
    mask = batch.get("attention_mask")
    found = found if mask is None else found.masked_fill(mask == 0, -100)
    return torch.cat([found[:, 1:], torch.full_like(found[:, :1], -100)], 1) if shifted else found
