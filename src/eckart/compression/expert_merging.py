"""Several experts of a mixture made one: a mean by routing frequency, in the directions that they span together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from eckart.forms import Form, LowRank
from eckart.forms.base import Factored
from eckart.forms.experts import PARTS
from eckart.linalg.union import matched_rows, union_basis, weighted_mean
from eckart.linalg.weighting import Weighting
from eckart.linalg.whitening import psd_root
from eckart.metrics import Statistics


class Merged(NamedTuple):
    """The matrices of one merged expert as stored; the squared error of its members' matrices and their energy."""

    matrices: dict[str, Factored]
    error: float
    energy: float


def merge(
    matrices: Mapping[str, Float[Tensor, "experts out in"]], members: Sequence[int], statistics: Statistics,
    form: Form, dtype: torch.dtype, *, align: bool = True,
) -> Merged:  # fmt: skip
    """One expert of several (Sub-MoE, arXiv 2506.23266), its matrices stored in a form.

    A low rank is that of the left basis that the members share, of [W_1 S_1 ... W_n S_n] where the inputs S_i S_iᵀ of
    each were summed. The error is the sum over members of f_i ||W_i - W||², under those inputs where there are any,
    f_i being the share of tokens sent to i. Where none was sent to any, all count as equal in the mean.
    """
    members = list(members)
    f = statistics.sums["routed"][members].double()
    f = f / max(1.0, float(statistics.sums["tokens"]))
    orders = unit_orders(matrices, members, members[int(f.argmax())]) if align and len(members) > 1 else None
    found: dict[str, Factored] = {}
    error = energy = 0.0
    for part in PARTS:
        stack, C = matrices[part][members], _grams(statistics, members, part)
        if orders is not None:
            stack = torch.stack([M[:, o] if part == "down" else M[o] for M, o in zip(stack, orders, strict=True)])
            C = [G[o][:, o] for G, o in zip(C, orders, strict=True)] if C and part == "down" else C
        target, weighting = weighted_mean(stack, f), Weighting()
        if isinstance(form, LowRank):
            U = union_basis(stack, form.rank or 1, C)
            target = U @ (U.T @ target)
        elif C is not None:
            weighting = Weighting(right=psd_root(torch.stack(C).sum(0), 1e-6))
        found[part] = form.fit(target.float(), weighting, dtype=dtype).requires_grad_(False)
        stored = found[part].dense().detach().double()
        for i, M in enumerate(stack):
            error += _squared(M.double() - stored, f[i], C, i)
            energy += _squared(M.double(), f[i], C, i)
    return Merged(found, error, energy)


def unit_orders(
    matrices: Mapping[str, Float[Tensor, "experts out in"]], members: Sequence[int], leader: int
) -> list[Int[Tensor, " inner"]]:
    """For every member the order of its hidden units in which they match the leader's: gates, ups and downs together.

    An expert's function does not depend on that order.
    """

    def units(e: int) -> Float[Tensor, "inner numbers"]:
        return torch.cat([matrices["gate"][e], matrices["up"][e], matrices["down"][e].T], dim=1)

    like = units(leader)
    return [matched_rows(units(e), like) for e in members]


def _grams(statistics: Statistics, members: list[int], part: str) -> list[Tensor] | None:
    """Of the inputs of these experts' matrices, per token that was seen; None where there are none."""
    found = statistics.sums.get("inner_outer" if part == "down" else "expert_outer")
    silent = not bool(statistics.sums["routed"][members].any())
    return None if found is None or silent else [found[e].double() / float(statistics.sums["tokens"]) for e in members]


def _squared(M: Float[Tensor, "out in"], share: Tensor, grams: list[Tensor] | None, i: int) -> float:
    """||M||² by the share of tokens, or under the inputs, which count each by itself."""
    return float(share) * float(M.square().sum()) if grams is None else float(((M @ grams[i].to(M)) * M).sum())
