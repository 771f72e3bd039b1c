"""Which setting every layer gets: the fewest bytes under a bound on the sum of all layers' errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from eckart.allocation.dynamic_programming import within

Numbers = Float[np.ndarray, " settings"]


class NoPlan(UserWarning):
    """Settings could not be chosen anew and stay as they are."""


@dataclass(frozen=True)
class Plan:
    """Settings that were chosen together.

    Attributes:
        step: after which they were chosen.
        dials: parameter -> setting.
        nbytes: that a process sends of these parameters in a step.
        uniform_nbytes: the same with the uniform setting.
        error: sum of the errors of all layers as they were estimated.
        bound: which the sum was not to exceed.
    """

    step: int
    dials: Mapping[str, int]
    nbytes: int
    uniform_nbytes: int
    error: float
    bound: float


def choose(
    errors: Sequence[Numbers], sizes: Sequence[Numbers], default: Sequence[int], alpha: float = 1.0, steps: int = 10_000
) -> list[int] | None:
    """For every layer the index of its setting: the least total size at a total error of at most alpha the default's.

    Dynamic programming, as in L-GreCo, over the error in `steps` steps of the default's, rounded up, so that the
    bound holds. The uniform setting is taken where it is within the bound and not beaten, and the settings of least
    error where nothing is within it. A larger alpha never gives a larger size.

    Args:
        errors, sizes: of every layer and setting; errors are not negative.
        default: index of every layer's uniform setting.

    Returns:
        None where errors tell nothing: some are not finite, or those of the default are all zero.
    """
    uniform = float(sum(e[i] for e, i in zip(errors, default, strict=True)))
    if not uniform > 0 or not all(np.isfinite(e).all() for e in errors):
        return None
    bound = alpha * uniform
    if sum(float(e.min()) for e in errors) > bound:
        return [int(np.lexsort((b, e))[0]) for e, b in zip(errors, sizes, strict=True)]
    found = within(errors, sizes, bound, uniform / steps)
    if alpha >= 1 and total(sizes, default) <= total(sizes, found):
        return list(default)
    return found


def total(values: Sequence[Numbers], choice: Sequence[int]) -> float:
    """Sum over layers at the chosen settings."""
    return float(sum(v[i] for v, i in zip(values, choice, strict=True)))
