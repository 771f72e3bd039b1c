"""Tensors that are the same in every call, made once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
MOST = 64


def constant(make: Callable[P, R]) -> Callable[P, R]:
    """Keeps what `make` made of the same arguments, the last 64. All callers share its tensors: do not write into them.

    What is made in inference serves learning, too. Nothing is kept of what is made while a graph is traced, whose
    tensors have no values; an exported graph takes what an earlier call has made.
    """
    kept: dict[Hashable, R] = {}

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> R:
        key = (*args, *kwargs.items())
        if torch.compiler.is_compiling():
            return kept[key] if torch.compiler.is_exporting() and key in kept else make(*args, **kwargs)
        if key not in kept:
            with torch.inference_mode(False):
                kept[key] = make(*args, **kwargs)
            if len(kept) > MOST:
                del kept[next(iter(kept))]
        return kept[key]

    return made
