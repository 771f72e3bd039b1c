"""The text that models are measured on, and what to call it."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from eckart.calibration.data import load_texts, token_batches
from eckart.calibration.tokens import Tokens
from eckart.checkpoint.source import resolve
from eckart.downloads import Progress, silent


def heldout_tokens(
    model: str | Path, data: str = "builtin", *, samples: int = 16, length: int = 512, seed: int = 0,
    progress: Progress = silent,
) -> tuple[Tokens, str]:  # fmt: skip
    """Windows of held-out text in the tokens of a model, and a sentence that says what they are.

    Of the built-in text it is the half that calibration never sees.
    """
    tokenizer = AutoTokenizer.from_pretrained(resolve(model, progress=progress).folder)
    texts = load_texts(data, split="heldout", progress=progress)
    tokens = token_batches(texts, tokenizer, samples=samples, length=length, seed=seed, progress=progress)
    name = "Wikipedia articles held out from calibration" if data == "builtin" else Path(data).name
    return tokens, f"{samples} windows of {length} tokens of {name} (seed {seed})"
