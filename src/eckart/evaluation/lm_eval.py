"""Benchmark tasks through EleutherAI's lm-eval, for those who have its data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel


def run_lm_eval(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Results of lm-eval's tasks: task -> metric -> value (on the first of several processes, nothing on the others).

    Args:
        tasks: names that lm-eval knows, such as "arc_easy".
        num_fewshot: examples in the prompt; None for each task's own number.
        limit: at most so many examples of each task; None for all.
        seed: for the choice of examples and whatever else lm-eval draws.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: no task is named.
    """
    if isinstance(tasks, str) or not tasks:
        raise ValueError("tasks must be a list of at least one task's name")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError(f"lm-eval is needed for tasks ({error}). Install it: pip install 'eckart[eval]'") from error
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return {} if results is None else dict(results["results"])
