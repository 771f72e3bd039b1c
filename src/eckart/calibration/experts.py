"""Sums over what reaches the experts of a mixture, and over what all of them would put out for it."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from eckart.forms.experts import expert_matrices
from eckart.metrics.statistics import Statistics, as_multiplied

TOKENS = 128
"""Tokens that all experts of a layer are run on at a time."""


@torch.no_grad()
def add_experts(
    sums: Statistics, module: nn.Module, x: Float[Tensor, "tokens width"], index: Int[Tensor, "tokens k"],
    needs: frozenset[str],
) -> None:  # fmt: skip
    """Add tokens that enter stacked experts, and the router's choices for them.

    `similarity` runs every expert on every token, which costs experts / k times the layer's own pass.
    """
    matrices, act = expert_matrices(module), module.act_fn
    count = len(matrices["down"])
    found = {"tokens": torch.tensor(float(len(x)), dtype=torch.float64)}
    if "routed" in needs:
        found["routed"] = torch.bincount(index.flatten(), minlength=count).double()
    if "similarity" in needs:
        total = torch.zeros(count, count, dtype=torch.float64, device=x.device)
        for some in x.split(TOKENS):
            inner = act(some @ matrices["gate"].mT) * (some @ matrices["up"].mT)  # type: ignore[operator]
            out = nn.functional.normalize((inner @ matrices["down"].mT).double(), dim=-1).flatten(1)
            total += out @ out.T
        found["similarity"] = total
    if "expert_outer" in needs or "inner_outer" in needs:
        outer, inner_outer = [], []
        for e in range(count):
            own = x[(index == e).any(-1)]
            inner = act(own @ matrices["gate"][e].T) * (own @ matrices["up"][e].T)  # type: ignore[operator]
            outer.append(_gram(own))
            inner_outer.append(_gram(inner))
        found |= {"expert_outer": torch.stack(outer), "inner_outer": torch.stack(inner_outer)}
    sums.merge(Statistics(found))


def _gram(rows: Float[Tensor, "n width"]) -> Float[Tensor, "width width"]:
    rows = as_multiplied(rows)
    return rows.T @ rows
