"""Tensors that are the same in every call, made once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def constant(make: Callable[P, R]) -> Callable[P, R]:
    """Keeps what `make` made of the same arguments. All callers share its tensors: do not write into them.

    Nothing is kept of what is made while a graph is traced, whose tensors have no values; and what is made in inference
    serves learning, too.
    """
    kept = functools.lru_cache(maxsize=64)(make)

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return make(*args, **kwargs)
        with torch.inference_mode(False):
            return kept(*args, **kwargs)  # type: ignore[arg-type]

    return made
