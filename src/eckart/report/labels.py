"""Where text fits: widths of labels, and labels beside points moved apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

CHARACTER = 7.2  # px: a generous mean width of one character at 12 px
LABEL_HEIGHT = 15.0
PHONE = 274.0  # px: what the narrowest phone leaves for a drawing and the text to its left
NARROW = 225.0  # px: what it leaves for a plot beside its ticks; there labels must not collide, wider only spreads them


def text_width(text: str) -> float:
    return CHARACTER * len(text)


def shorten(text: str, most: int = 24) -> str:
    """At most so many characters; the start goes, since the ends of layer names tell them apart."""
    return text if len(text) <= most else "…" + text[1 - most :]


@dataclass(frozen=True)
class Label:
    """Text beside a point: x as a fraction of the width, y in pixels, to the right of it or to the left."""

    x: float
    y: float
    text: str
    left: bool = False

    def span(self) -> tuple[float, float]:
        start, width = NARROW * self.x, text_width(self.text) + 10
        return (start - width, start) if self.left else (start, start + width)


def spread(labels: Sequence[Label], height: float) -> list[Label]:
    """The same labels, moved up or down until none covers another, in the order of their points.

    Labels that may meet sideways on a narrow screen form a column; in it, neighbours that are too near become one
    cluster, which settles at the mean of the places its labels want.
    """
    placed = list(labels)
    for column in _columns(labels):
        clusters: list[list[int]] = []
        for index in sorted(column, key=lambda i: labels[i].y):
            clusters.append([index])
            while len(clusters) > 1 and _top(labels, clusters[-1], height) < _bottom(labels, clusters[-2], height):
                clusters[-2:] = [clusters[-2] + clusters[-1]]
        for cluster in clusters:
            top = _top(labels, cluster, height)
            for place, index in enumerate(cluster):
                placed[index] = replace(labels[index], y=top + place * LABEL_HEIGHT)
    return placed


def _top(labels: Sequence[Label], cluster: Sequence[int], height: float) -> float:
    """Where a cluster's first label goes: its mean wish, inside the plot if it fits."""
    wish = sum(labels[index].y - place * LABEL_HEIGHT for place, index in enumerate(cluster)) / len(cluster)
    return max(0.0, min(wish, height - (len(cluster) - 0.5) * LABEL_HEIGHT))


def _bottom(labels: Sequence[Label], cluster: Sequence[int], height: float) -> float:
    return _top(labels, cluster, height) + len(cluster) * LABEL_HEIGHT


def _columns(labels: Sequence[Label]) -> list[list[int]]:
    """Labels grouped so that those of different groups cannot meet sideways."""
    columns: list[list[int]] = []
    end = float("-inf")
    for index in sorted(range(len(labels)), key=lambda i: labels[i].span()):
        low, high = labels[index].span()
        if low >= end:
            columns.append([])
        columns[-1].append(index)
        end = max(end, high)
    return columns
