"""Where parameters are in the groups of an optimiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where a parameter is: its group, its number among all and among the projected ones (-1 if it is not)."""

    group: int
    index: int
    projected: int
    name: str


def places(groups: list[dict[str, Any]]) -> dict[Tensor, Place]:
    """Where every parameter is."""
    found: dict[Tensor, Place] = {}
    projected = 0
    for number, group in enumerate(groups):
        for p, name in zip(group["params"], names_of(group, number), strict=True):
            found[p] = Place(number, len(found), projected if is_projected(group) else -1, name)
            projected += is_projected(group)
    return found


def is_projected(group: dict[str, Any]) -> bool:
    """Whether the parameters of a group are projected."""
    return group["rank"] is not None or group["density"] is not None


def names_of(group: dict[str, Any], number: int) -> list[str]:
    """The names of a group's parameters, made up where they have none."""
    return group.get("param_names") or [f"parameter {i} of group {number}" for i in range(len(group["params"]))]
