"""Logits a chunk at a time, so that windows x vocabulary never lies in memory as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.calibration.tokens import Tokens

CHUNK = 2**23  # logits held at once, 32 MB in float32


def predicted(mask: Bool[Tensor, "n length"]) -> Bool[Tensor, "n length-1"]:
    """Which tokens, from the second of each window on, are predicted: those that are text and follow text."""
    return mask[:, 1:] & mask[:, :-1]


def targets(tokens: Tokens) -> Int[Tensor, " p"]:
    """The predicted tokens, window by window."""
    return tokens.ids[:, 1:][predicted(tokens.mask)]


def rows_per_chunk(vocabulary: int) -> int:
    """How many predictions' logits are held at once."""
    return max(1, CHUNK // vocabulary)


def vocabulary_size(model: PreTrainedModel) -> int:
    """Width of a model's logits."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return int(getattr(head, "out_features", None) or model.config.get_text_config().vocab_size)


@torch.no_grad()
def next_token_logits(model: PreTrainedModel, tokens: Tokens, rows: int) -> Iterator[Float[Tensor, "rows vocab"]]:
    """What a causal model says before each of `targets(tokens)`, in float32, `rows` predictions at a time.

    The body runs once over all windows; then the model's own forward, with the body replaced by its result, turns
    hidden states into logits chunk by chunk, so that whatever a model does to its logits (scale, cap) is done. A model
    whose body cannot be replaced so gives all logits at once.
    """
    tokens = Tokens(tokens.ids.to(model.device), tokens.mask.to(model.device))
    keep = predicted(tokens.mask)
    body = model.get_decoder() if hasattr(model, "get_decoder") else model
    output: Any = body(**tokens.inputs(), use_cache=False) if body is not model else None
    hidden = None if output is None else output.last_hidden_state[:, :-1][keep]
    for start in range(0, int(keep.sum()), rows):
        if hidden is not None:
            chunk = hidden[None, start : start + rows]
            with _returning(body, type(output)(last_hidden_state=chunk)) as calls:
                logits = model(input_ids=tokens.ids.new_zeros(1, chunk.shape[1]), use_cache=False).logits
            if calls:
                yield logits[0].float()
                continue
        logits = model(**tokens.inputs(), use_cache=False).logits[:, :-1][keep]
        for part in logits[start:].split(rows):
            yield part.float()
        return


@contextmanager
def evaluating(*models: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode (no dropout) within the context, and the modes of before after it."""
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _returning(body: nn.Module, output: Any) -> Iterator[list[None]]:
    """Within the context, calling `body` gives `output`; the list has an entry for every call."""
    calls: list[None] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return output

    own = body.__dict__.get("forward")
    body.forward = forward
    try:
        yield calls
    finally:
        if own is None:
            del body.forward
        else:
            body.forward = own
