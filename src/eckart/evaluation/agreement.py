"""How far a compressed model still says what the original says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from eckart.calibration.tokens import Tokens
from eckart.downloads import Progress, silent
from eckart.evaluation.logits import evaluating, next_token_logits, rows_per_chunk, targets, vocabulary_size
from eckart.evaluation.perplexity import Losses, Perplexity


@dataclass(frozen=True)
class Agreement:
    """Two models on the same tokens.

    Attributes:
        kl: mean of KL(original || compressed) over predicted tokens, in nats.
        top1: share of predicted tokens where both hold the same token most likely.
        tokens: how many tokens were predicted.
        original, compressed: the perplexity of each, which the same pass yields.
    """

    kl: float
    top1: float
    tokens: int
    original: Perplexity
    compressed: Perplexity


def agreement(
    original: PreTrainedModel,
    compressed: PreTrainedModel,
    tokens: Tokens,
    batch_size: int = 4,
    *,
    progress: Progress = silent,
) -> Agreement:
    """Compare two causal language models token by token; of both, one chunk of logits is in memory at a time.

    Raises:
        ValueError: the vocabularies differ, or there is nothing to predict.
        RuntimeError: logits are not finite.
    """
    sizes = vocabulary_size(original), vocabulary_size(compressed)
    if sizes[0] != sizes[1]:
        raise ValueError(f"the models cannot be compared: their vocabularies have {sizes[0]} and {sizes[1]} tokens")
    rows = rows_per_chunk(sizes[0])
    losses = Losses(tokens), Losses(tokens)
    kl, same, seen = 0.0, 0, 0
    with evaluating(original, compressed):
        for index, batch in enumerate(parts := tokens.split(batch_size)):
            chunks = zip(
                next_token_logits(original, batch, rows),
                next_token_logits(compressed, batch, rows),
                targets(batch).split(rows),
                strict=True,
            )
            for logits, others, target in chunks:
                logp, logq = F.log_softmax(logits, -1), F.log_softmax(others.to(logits.device), -1)
                kl += float(divergence(logp, logq).double().sum())
                same += int((logp.argmax(-1) == logq.argmax(-1)).sum())
                for own, loss in zip((logp, logq), losses, strict=True):
                    loss.add(-own.gather(-1, target.to(own.device)[:, None])[:, 0])
                seen += len(target)
            progress("agreement", index + 1, len(parts))
    return Agreement(kl / seen, same / seen, seen, losses[0].perplexity(), losses[1].perplexity())


def divergence(logp: Float[Tensor, "rows vocab"], logq: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
    """KL(p || q) of each row, in nats, from log-probabilities. Where p is zero there is nothing to lose."""
    return torch.where(logp > -torch.inf, logp.exp() * (logp - logq), 0.0).sum(-1)
