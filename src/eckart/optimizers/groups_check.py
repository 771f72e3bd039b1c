"""Checks of parameter groups."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from eckart.optimizers.checks import check_not_negative, is_whole
from eckart.optimizers.places import is_projected, names_of
from eckart.optimizers.projectors import Draw, Projector
from eckart.optimizers.residual import Residual


def check_group(group: dict[str, Any], number: int, projector: Projector, residual: Residual) -> None:
    """Raise ValueError or TypeError that names the group or the parameter where a setting does not suit it."""
    for setting in ("lr", "weight_decay", "scale"):
        check_not_negative(f"{setting} of group {number}", group[setting])
    if not is_whole(group["interval"]) or group["interval"] < 1:
        raise ValueError(f"the interval of group {number} is a number of updates, 1 or more, not {group['interval']!r}")
    rank, density = group["rank"], group["density"]
    if rank is not None and density is not None:
        raise ValueError(f"group {number} has both a rank ({rank}) and a density ({density}): give one of them")
    if rank is not None and (not is_whole(rank) or rank < 1):
        raise ValueError(f"the rank of group {number} is a whole number of at least 1, not {rank!r}")
    if density is not None and not 0 <= density <= 1:
        raise ValueError(f"the density of group {number} is from 0 to 1, not {density!r}")
    if density == 0 and not residual.updates_rest:
        raise ValueError(
            f"at density 0 group {number} would never be updated: give the residual a rule, such as Sign()"
        )
    for p, name in zip(group["params"], names_of(group, number), strict=True):
        if not p.is_floating_point():
            raise TypeError(f"{name} holds {p.dtype}: only floating point parameters can be optimised")
        if is_projected(group):
            _check_projected(p, name, group, projector)


def _check_projected(p: Tensor, name: str, group: dict[str, Any], projector: Projector) -> None:
    shape = tuple(p.shape)
    if len(shape) < 2:
        raise ValueError(f"{name} has shape {shape}, and only matrices can be projected: put it into a group without rank")  # fmt: skip # noqa: E501
    if len(shape) > 2 and not projector.tensors:
        raise ValueError(f"{name} has shape {shape}, and {type(projector).__name__} projects matrices only: put it into a group without rank")  # fmt: skip # noqa: E501
    if group["rank"] is None:
        return
    # what blocks refuse here, they refuse with their own words
    projector.ranks(shape, group, Draw())
    limits = {mode: projector.limit(shape, mode) for mode in projector.modes(shape)}
    if len(shape) == 2 and any(group["rank"] > most for most in limits.values()):
        warnings.warn(f"rank {group['rank']} is more than {name} of shape {shape} has: {min(limits.values())} is used", UserWarning, stacklevel=5)  # fmt: skip # noqa: E501
