"""Perplexity on windows of text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from eckart.calibration.tokens import Tokens
from eckart.downloads import Progress, silent
from eckart.evaluation.logits import (
    evaluating,
    next_token_logits,
    predicted,
    rows_per_chunk,
    targets,
    vocabulary_size,
)


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood.

    Attributes:
        value: the perplexity.
        nll: mean negative log-likelihood of a predicted token, in nats.
        tokens: how many tokens were predicted.
        stderr: standard error of `value`, with windows as the independent draws (tokens of one window are not); None
            where there is only one window.
    """

    value: float
    nll: float
    tokens: int
    stderr: float | None

    @classmethod
    def of_windows(cls, sums: Float[Tensor, " n"], counts: Int[Tensor, " n"]) -> Perplexity:
        """From each window's summed loss and number of predicted tokens.

        Raises:
            RuntimeError: a loss is not finite.
        """
        if not bool(sums.isfinite().all()):
            window = int((~sums.isfinite()).nonzero()[0])
            raise RuntimeError(
                f"the model's logits in window {window} are not finite: its weights or activations overflow"
            )
        windows, tokens = int((counts > 0).sum()), int(counts.sum())
        nll = float(sums.sum()) / tokens
        value = math.exp(nll) if nll < 700 else math.inf
        stderr = None
        if windows > 1:
            spread = float((sums - counts * nll).square().sum()) * windows / (windows - 1)
            stderr = value * math.sqrt(spread) / tokens
        return cls(value, nll, tokens, stderr)


class Losses:
    """Losses of predicted tokens, summed window by window in float64."""

    def __init__(self, tokens: Tokens):
        self.counts = predicted(tokens.mask).sum(1)
        if int(self.counts.sum()) == 0:
            raise ValueError("there is no token to predict: windows need at least two tokens that are not padding")
        self._sums = torch.zeros(len(tokens), dtype=torch.float64)
        self._windows = torch.repeat_interleave(torch.arange(len(tokens)), self.counts)
        self._at = 0

    def add(self, nll: Float[Tensor, " rows"]) -> None:
        """The losses of the next predicted tokens, in the order of `targets`."""
        self._sums.index_add_(0, self._windows[self._at : self._at + len(nll)], nll.double().cpu())
        self._at += len(nll)

    def perplexity(self) -> Perplexity:
        return Perplexity.of_windows(self._sums, self.counts)


def perplexity(
    model: PreTrainedModel, tokens: Tokens, batch_size: int = 4, *, progress: Progress = silent
) -> Perplexity:
    """Perplexity of a causal language model: every token of a window but the first is predicted from those before it.

    Args:
        model: a transformers model with a language-modelling head.
        tokens: windows; padding is neither predicted nor predicted from.
        batch_size: windows that run together.

    Raises:
        ValueError: there is nothing to predict.
        RuntimeError: a loss is not finite.
    """
    losses, rows = Losses(tokens), rows_per_chunk(vocabulary_size(model))
    with evaluating(model):
        for index, batch in enumerate(parts := tokens.split(batch_size)):
            for logits, target in zip(next_token_logits(model, batch, rows), targets(batch).split(rows), strict=True):
                losses.add(F.cross_entropy(logits, target.to(logits.device), reduction="none"))
            progress("perplexity", index + 1, len(parts))
    return losses.perplexity()
