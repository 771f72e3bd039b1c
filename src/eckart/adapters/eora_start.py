"""EoRA's start: the repair of a compressed model is what is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eckart.adapters.low_rank_start import LowRankStart
from eckart.calibration.collect import Collector
from eckart.linalg.weighting import Weighting
from eckart.metrics import InputCovariance
from eckart.registry import method


@method("eora_start", family="start on a compressed base", paper="EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation, Liu et al., 2024, arXiv 2410.21271")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class EoRAStart(LowRankStart):
    """LoRA that starts as the repair B A of a model compressed by `eora`; the compressed part stays as it is stored.

    On a model without a repair, the start is the rank of W - Ŵ that is nearest in the outputs on `data`, given to
    `adapt`. Inputs are those that the compressed model computes, before any layer is repaired; the paper repairs layer
    by layer, as the compressor `eora` does.
    """

    def weightings(self, model: nn.Module, names: list[str], data: list[Any] | None) -> dict[str, Weighting]:
        if not names:
            return {}
        if not data:
            raise ValueError(f"eora_start repairs {names[0]} for the inputs it gets: give batches of data, adapt(model, 'eora_start', data=...)")  # fmt: skip # noqa: E501
        metric = InputCovariance()
        collector = Collector(metric.needs)
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), collector.hooked(model, names):
                for batch in data:
                    mask = batch.get("attention_mask")
                    collector.next_batch(mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None)
                    model(**batch)
        finally:
            model.train(training)
        return {name: metric.weighting(collector.of(name), name) for name in names}
