"""Errors as the loss sees them, to second order (K-FAC, Martens and Grosse, 2015, arXiv 1503.05671)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.linalg.weighting import Weighting
from eckart.linalg.whitening import psd_root
from eckart.metrics.base import METRICS, Metric, covariance
from eckart.metrics.statistics import Statistics


@METRICS.word("kronecker")
@dataclass(frozen=True)
class Kronecker(Metric):
    """|| Lᵀ (W - Ŵ) R ||_F with L Lᵀ ∝ E[g gᵀ] of output gradients and R Rᵀ the covariance of inputs.

    Half its square estimates the rise of the mean loss per token, in nats, so that errors of different layers can be
    added up. Targets are sampled from the model, which makes the expectation the Fisher matrix of its predictions.
    Factors alone take the rows of an example for independent, and where an answer is made of many rows, as by pooling,
    their errors add up to much more: L is scaled so that the metric has the trace of the gradients of whole examples.

    Fewer rows than columns, or fewer terms of the loss than outputs, show some directions only, and the others are not
    free of loss: such a covariance is mixed with a multiple of the identity of equal trace, in the share of columns
    that nothing seen stands for.

    Args:
        damping: of the covariance of gradients, relative to its mean diagonal.
        centred: take the inputs about their mean, and let the bias carry what the mean loses.
    """

    damping: float = 1e-2
    centred: bool = True

    needs: ClassVar[frozenset[str]] = frozenset({"outer", "x", "grad_outer", "whole_gradients"})
    labels: ClassVar[str] = "model"

    def weighting(self, statistics: Statistics, where: str = "") -> Weighting:
        C, mean = covariance(statistics, self.centred, where)
        C = shrunk(C, statistics.tokens)
        G = shrunk(statistics.mean("grad_outer", where), int(statistics.sums["grad_tokens"]))
        apart = float(C.trace() * G.trace())
        if apart > 0:
            G *= statistics.gradient_norm2(mean, where) / apart
        return Weighting(psd_root(G, self.damping, name=where), psd_root(C, 1e-9, name=where), mean)


def shrunk(C: Float[Tensor, "n n"], seen: int) -> Float[Tensor, "n n"]:
    """(1 - s) C + s tr(C) / n I with s = 1 - seen / n; C itself where that is not positive."""
    share = max(0.0, 1 - seen / len(C))
    if not share:
        return C
    return (1 - share) * C + share * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device)
