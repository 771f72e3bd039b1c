"""Modules that a checkpoint can hold in place of the model's own, and the kinds there are."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

S = TypeVar("S", bound="StandIn")


class StandIn(nn.Module):
    """A module that stands where the model's own code put another one, and can be rebuilt from a line of JSON.

    A checkpoint lists them by name; loading calls `from_spec` on the model's skeleton, so that no other code knows
    what kinds there are.
    """

    kind: ClassVar[str]
    _is_hf_initialized = True  # transformers must not draw random numbers for a weight that is not there

    def spec(self) -> dict[str, Any]:
        """What `from_spec` needs, JSON-able."""
        raise TypeError(f"{type(self).__name__} cannot be saved")

    @classmethod
    def from_spec(cls, model: nn.Module, name: str, spec: dict[str, Any], dtype: torch.dtype) -> nn.Module:
        """The module, without values, that stands in at `name` of `model`. Raises `ValueError` on a bad spec."""
        raise TypeError(f"{cls.__name__} cannot be loaded")


STAND_INS: dict[str, type[StandIn]] = {}


def stand_in(cls: type[S]) -> type[S]:
    """Class decorator: let checkpoints hold modules of this class, under its `kind`."""
    STAND_INS[cls.kind] = cls
    return cls
