"""Random numbers that are the same everywhere, and the one measure by which two results are compared."""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers; the same ones at every dtype, up to its rounding."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error_ratio(found: Tensor, wanted: Tensor) -> float:
    """|| found - wanted || / || wanted ||, in float64; where nothing is wanted, the numerator. NaN is inf."""
    if found.shape != wanted.shape:
        raise ValueError(f"shape {tuple(found.shape)} was found, {tuple(wanted.shape)} is wanted")
    scale = float(wanted.detach().double().norm())
    ratio = float((found.detach().double() - wanted.detach().double()).norm()) / (scale or 1.0)
    return ratio if ratio == ratio else float("inf")
