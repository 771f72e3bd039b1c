"""What was done to a model in memory, kept in its config, so that `save_pretrained` writes what stands where."""

from __future__ import annotations

from typing import Any

from eckart.checkpoint.hf import EckartConfig, describe, tie
from eckart.checkpoint.ties import shared
from eckart.jobs.folder_job import versions


def remember(model: Any, words: dict[str, Any]) -> None:
    """Describe the stand-ins of a transformers model in its config, and add `words` to what was applied before."""
    before = getattr(model.config, "quantization_config", None)
    history = list(before.history) if isinstance(before, EckartConfig) else []
    history.append({**words, "versions": versions()})
    ties = shared(model)
    for name, other in ties.items():
        tie(model, name, other)
    model.config.quantization_config = EckartConfig(describe(model), ties, history)
