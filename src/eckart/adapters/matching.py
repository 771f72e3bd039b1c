"""Which layers of a model an adapter would sit on."""

from __future__ import annotations

from copy import copy
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn

from eckart.adapters.tuner import refuse


def inner(model: nn.Module) -> nn.Module:
    """The model that a `PeftModel` wraps."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def targets(model: nn.Module, config: PeftConfig) -> list[str]:
    """Names, in the model, of the layers that an adapter of these settings would sit on.

    Raises `ValueError` where there are none, with the nearest names.
    """
    probe: Any = copy(config)
    probe.target_modules = probe.target_modules or "all-linear"
    probe = _maybe_include_all_linear_layers(probe, inner(model))
    names = [n for n, _ in inner(model).named_modules() if n and check_target_module_exists(probe, n)]
    if not names:
        refuse(inner(model), probe)
    return names
