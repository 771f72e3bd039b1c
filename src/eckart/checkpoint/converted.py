"""Tensors that transformers stores otherwise than it holds them, such as the stacked experts of a mixture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, dot_natural_key, revert_weight_conversion

from eckart.checkpoint.layout import Layout, layout_of


@dataclass(frozen=True)
class Converted:
    """One tensor of the model: the rule that makes it, and the stored tensors it takes, each with what it matches."""

    name: str
    rule: WeightConverter
    sources: tuple[tuple[str, str], ...]

    def made(self, model: nn.Module, load: Callable[[str], Tensor]) -> Tensor:
        """The tensor. Raises `ValueError` where the stored ones do not make one, as where some are missing."""
        rule: Any = deepcopy(self.rule)
        for pattern, stored in self.sources:
            rule.add_tensor(self.name, stored, pattern, load(stored))
        try:
            found = rule.convert(self.name, model=model, config=getattr(model, "config", None)).get(self.name)
        except (RuntimeError, ValueError, KeyError, IndexError) as e:
            raise ValueError(f"{self.name} cannot be made of {self.sources[0][1]} and the others like it: {e}") from e
        tensor = found[0] if isinstance(found, list) else found
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{self.name} cannot be made of {self.sources[0][1]} and the others like it")
        return tensor


def converted(model: nn.Module, have: Mapping[str, str]) -> dict[str, Converted]:
    """Name in the model -> how it is made, from the names of stored tensors by what transformers renames them to."""
    rules = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightConverter)]
    sources: dict[str, tuple[WeightConverter, list[tuple[str, str]]]] = {}
    for name, stored in sorted(have.items(), key=lambda item: dot_natural_key(item[0])):
        for rule in rules:
            target, pattern = rule.rename_source_key(name)
            if pattern is not None:
                sources.setdefault(target, (rule, []))[1].append((pattern, stored))
                break
    return {target: Converted(target, rule, tuple(found)) for target, (rule, found) in sources.items()}


def saved_layout(model: Any, layout: Layout) -> Layout:
    """The tensors that `save_pretrained` writes for those of a model, which it may split and rename."""
    state = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in layout.items()}
    return layout_of(revert_weight_conversion(model, state))
