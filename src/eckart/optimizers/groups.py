"""Which parameters of a model are projected, and what each optimiser would keep for them."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from eckart.anatomy.linears import features
from eckart.registry import entries

Groups = list[dict[str, Any]]


def param_groups(
    model: nn.Module, rank: int | None = None, *, density: float | None = None, include: str | None = None,
    exclude: str | None = None, verbose: bool = False, **settings: Any,
) -> Groups:  # fmt: skip
    """The parameters of a model in two groups: those that an optimiser of this room projects, and the others.

    Projected are the weights of linear layers within the model's blocks (all of them, where it has no blocks), without
    embeddings and heads, and without those whose shorter side is not above the rank.

    Args:
        rank, density: of the projected group, one of them; see `Projected`.
        include: a regular expression found in the names of the weights that are projected instead, which may be any
            parameters with two modes or more.
        exclude: a regular expression found in the names of weights that are not projected.
        verbose: print what each optimiser keeps for these groups.
        settings: of the projected group, such as `interval` or `lr`.

    Returns:
        Groups of (name, parameter) pairs; those that need no gradient and empty groups are left out.

    Raises ValueError where nothing is left to project.
    """
    if (rank is None) == (density is None):
        raise ValueError("param_groups needs a rank or a density, and not both")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    chosen = linear_weights(model) if include is None else {name for name in trained if re.search(include, name)}
    projected = {
        name: p
        for name, p in trained.items()
        if name in chosen and p.dim() >= 2 and not (exclude and re.search(exclude, name)) and min(p.shape) > (rank or 0)
    }
    if not projected:
        raise ValueError(
            f"no weight of {type(model).__name__} can be projected: {len(trained)} parameters are trained, "
            f"{len(chosen)} of them were looked at; lower rank={rank}, or name the weights with include="
        )
    others = [(name, p) for name, p in trained.items() if name not in projected]
    first = {"params": list(projected.items()), "rank": rank, "density": density, **settings}
    groups = [first, {"params": others}] if others else [first]
    if verbose:
        print(memory_table(groups))
    return groups


def linear_weights(model: nn.Module) -> set[str]:
    """Names of the weights of linear layers in blocks, or of all where there are no blocks; no convolutions."""
    modules = dict(model.named_modules())
    shared = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    found = {
        f"{name}.weight": any(isinstance(modules[parent], nn.ModuleList) for parent in _parents(name))
        for name, module in modules.items()
        if features(module) and not isinstance(module, nn.Embedding | nn.Conv2d)
        # a weight that is tied is an embedding's, too
        and isinstance(weight := getattr(module, "weight", None), nn.Parameter) and shared[id(weight)] == 1
    }  # fmt: skip
    return {name for name, inside in found.items() if inside or not any(found.values())}


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts))]


def memory(groups: Groups) -> dict[str, int]:
    """Bytes of state that each registered optimiser keeps for these groups, and torch's AdamW in the same precision.

    Groups with a rank are given to those that work with densities at the density that it is of each shorter side.
    """
    found = {"adamw": sum(2 * p.numel() * max(p.itemsize, 4) for group in groups for _, p in group["params"])}
    for entry in entries("optimizers"):
        if not issubclass(entry.cls, Optimizer):
            continue
        found[entry.key] = entry.cls([_copy(group, entry.key) for group in groups]).expected_state_bytes()
    return found


def _copy(group: dict[str, Any], key: str) -> dict[str, Any]:
    """The group as that optimiser takes it: Lion projects nothing unless asked to, FRUGAL wants a density."""
    own = {k: v for k, v in group.items() if k not in ("rank", "density")}
    rank, density = group.get("rank"), group.get("density")
    if key == "lion_k" or (rank is None and density is None):
        return own
    shorter = [min(p.shape) for _, p in group["params"]]
    if key == "frugal":
        return own | {"density": density if rank is None else min(1.0, rank / (sum(shorter) / len(shorter)))}
    return own | {"rank": rank, "density": density}


def memory_table(groups: Groups) -> str:
    """`memory` as text, with the parameters that are projected and those that are not."""
    lines = []
    for group in groups:
        dial = next((f"{k} {group[k]}" for k in ("rank", "density") if group.get(k) is not None), "not projected")
        tensors: list[Tensor] = [p for _, p in group["params"]]
        lines.append(f"{dial}: {len(tensors)} tensors, {sum(p.numel() for p in tensors):,} numbers")  # fmt: skip
    found = memory(groups)
    widest = max(map(len, found))
    lines += [f"{key:<{widest}}  {_bytes(size):>10}  {size / found['adamw']:7.1%}" for key, size in found.items()]
    return "\n".join(lines)


def _bytes(count: int) -> str:
    power = min(int(math.log(max(count, 1), 1000)), 3)
    return f"{count / 1000**power:.4g} {('B', 'kB', 'MB', 'GB')[power]}"
