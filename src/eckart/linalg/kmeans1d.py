"""Weighted k-means on a line, for many rows at once: exact on short rows, near it on long ones."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

EXACT, RUNS = 128, 64
"""Points up to which the dynamic programme may cut between any two; runs of them that longer rows are divided into."""

MOST_CUT = 32
"""Clusters up to which the dynamic programme is worth its time."""

STEPS = 50
CHUNK = 2**20


@torch.no_grad()
def kmeans1d(
    x: Float[Tensor, "*rows n"], k: int, weight: Float[Tensor, "*#rows n"] | None = None
) -> Float[Tensor, "*rows k"]:
    """Ascending centres of k clusters with a small sum of weight (x - nearest centre)², for every row.

    Clusters on a line are runs of sorted points, and prefix sums give the cost of any run. A dynamic programme chooses
    the runs (Wang and Song 2011, Ckmeans.1d.dp), which makes it exact for rows of up to `EXACT` points; in longer ones
    it cuts at `RUNS` places only, and Lloyd's steps then move the cuts. Above `MOST_CUT` clusters the start is where
    high-resolution theory puts them (density to the power 1/3).

    Args:
        x: points, any float dtype; worked on in float64.
        k: number of clusters. Rows with fewer different points repeat some centres.
        weight: of each point, not negative. Rows without any count all points the same.
    """
    if k < 1:
        raise ValueError(f"k-means needs at least one cluster, not {k}")
    shape, n = x.shape[:-1], x.shape[-1]
    if x.numel() == 0:
        return x.new_zeros(*shape, k)
    w = torch.ones_like(x) if weight is None else weight.to(x.dtype).expand_as(x)
    points, weights = x.reshape(-1, n), w.reshape(-1, n)
    rows = max(1, CHUNK // max(min(n, EXACT) ** 2, n, 8 * k))
    found = [_some(a.double(), b.double(), k) for a, b in zip(points.split(rows), weights.split(rows), strict=True)]
    return torch.cat(found).to(x.dtype).view(*shape, k)


def nearest(x: Float[Tensor, "*rows n"], centres: Float[Tensor, "*rows k"]) -> Int[Tensor, "*rows n"]:
    """Index of the nearest centre of the row; centres come in any order."""
    ordered, order = centres.sort(-1)
    cuts = ((ordered[..., 1:] + ordered[..., :-1]) / 2).contiguous()
    return order.expand(*x.shape[:-1], -1).gather(-1, torch.searchsorted(cuts, x.contiguous()))


def _some(x: Float[Tensor, "rows n"], w: Float[Tensor, "rows n"], k: int) -> Float[Tensor, "rows k"]:
    x, order = x.sort(-1)
    w = w.gather(-1, order)
    w = torch.where(w.sum(-1, keepdim=True) > 0, w, 1.0)
    w = w / w.sum(-1, keepdim=True)
    mean = (w * x).sum(-1, keepdim=True)
    x = x - mean
    sums = torch.stack([_prefix(w), _prefix(w * x), _prefix(w * x.square())])
    places = _places(x, w, k)
    cuts = _best_cuts(sums, places, k) if k <= MOST_CUT else places
    centres, before = _means(sums, x, cuts), torch.full_like(mean[:, 0], torch.inf)
    for _ in range(STEPS):
        cuts = _cuts(x, centres)
        cost = _cost(sums, cuts).sum(-1)
        if bool((cost >= before * (1 - 1e-7)).all()):
            break
        centres, before = _means(sums, x, cuts, centres), cost
    return centres.sort(-1).values + mean


def _prefix(x: Float[Tensor, "rows n"]) -> Float[Tensor, "rows m"]:
    """Sums of the first 0, 1, ..., n entries."""
    return torch.nn.functional.pad(x.cumsum(-1), (1, 0))


def _places(x: Float[Tensor, "rows n"], w: Float[Tensor, "rows n"], k: int) -> Int[Tensor, "rows places"]:
    """Where runs may be cut, from 0 to n: everywhere in short rows, denser where centres will be in long ones.

    With more clusters than the dynamic programme is for, these are k runs themselves.
    """
    rows, n = x.shape
    if n <= EXACT and k <= MOST_CUT:
        return torch.arange(n + 1).expand(rows, -1)
    gaps = torch.diff(x, dim=-1, prepend=x[:, :1], append=x[:, -1:])
    around = (gaps[:, 1:] + gaps[:, :-1]) / 2
    mass = _prefix(w.pow(1 / 3) * (around + 1e-3 * around.mean(-1, keepdim=True)).pow(2 / 3))
    runs = max(RUNS, 2 * k) if k <= MOST_CUT else k
    wanted = torch.linspace(0, 1, runs + 1, dtype=x.dtype) * mass[:, -1:]
    return torch.searchsorted(mass, wanted.contiguous()).clamp_max(n).index_fill(1, torch.tensor([runs]), n)


def _best_cuts(sums: Tensor, places: Int[Tensor, "rows places"], k: int) -> Int[Tensor, "rows cuts"]:
    """The cuts (rows, k + 1), at some of the places, with the least cost."""
    W, S, Q = (s.gather(-1, places) for s in sums)

    def between(a: Tensor) -> Tensor:
        return a[:, :, None] - a[:, None, :]

    weight = between(W)
    cost = between(Q) - between(S).square() / torch.where(weight > 0, weight, 1.0)
    cost = torch.where(weight > 0, cost.clamp_min(0), 0.0)
    cost += torch.full_like(cost[0], torch.inf).triu(1)  # of the run that ends at the row and begins at the column
    least, back = cost[:, :, 0], []
    for _ in range(k - 1):
        least, best = (least[:, None, :] + cost).min(-1)
        back.append(best)
    ends = torch.full_like(places[:, 0], places.shape[1] - 1)
    path = [ends]
    for best in reversed(back):
        ends = best.gather(-1, ends[:, None])[:, 0]
        path.append(ends)
    path.append(torch.zeros_like(ends))
    return places.gather(-1, torch.stack(path[::-1], -1))


def _cuts(x: Float[Tensor, "rows n"], centres: Float[Tensor, "rows k"]) -> Int[Tensor, "rows cuts"]:
    """Where the sorted points go from one centre to the next."""
    middles = ((centres[:, 1:] + centres[:, :-1]) / 2).contiguous()
    inner = torch.searchsorted(x.contiguous(), middles)
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=x.shape[1])


def _means(
    sums: Tensor, x: Float[Tensor, "rows n"], cuts: Int[Tensor, "rows cuts"],
    otherwise: Float[Tensor, "rows k"] | None = None,
) -> Float[Tensor, "rows k"]:  # fmt: skip
    """The weighted mean of each run; that of an empty one is what it was, or its first point."""
    W, S, _ = (s.gather(-1, cuts).diff(dim=-1) for s in sums)
    at = x.gather(-1, cuts[:, :-1].clamp_max(x.shape[1] - 1)) if otherwise is None else otherwise
    return torch.where(W > 0, S / torch.where(W > 0, W, 1.0), at).cummax(-1).values


def _cost(sums: Tensor, cuts: Int[Tensor, "rows cuts"]) -> Float[Tensor, "rows k"]:
    """The weighted squared distance of each run's points from their mean."""
    W, S, Q = (s.gather(-1, cuts).diff(dim=-1) for s in sums)
    return torch.where(W > 0, (Q - S.square() / torch.where(W > 0, W, 1.0)).clamp_min(0), 0.0)
