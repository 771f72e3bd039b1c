"""LQ-LoRA's start: the low rank of the decomposition is what is trained."""

from __future__ import annotations

from dataclasses import dataclass

from eckart.adapters.low_rank_start import LowRankStart
from eckart.registry import method


@method("lq_lora_start", family="start on a compressed base", paper="LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition, Guo et al., ICLR 2024, arXiv 2311.12023")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class LQLoRAStart(LowRankStart):
    """LoRA that starts as L₁L₂ of a model compressed to Q + L₁L₂ by `lq_lora`; Q stays as it is stored.

    On a model that is only quantised, the start is the best rank of W - Q under the plain norm: the first half of an
    alternation whose second half would change the codes.
    """
