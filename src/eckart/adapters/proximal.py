"""Soft thresholding after each step of the optimiser: exact zeros where a plain gradient of |x| gives none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.schedules import Schedule


def soft(x: Float[Tensor, "*n"], bound: float) -> Float[Tensor, "*n"]:
    """sign(x) max(|x| - bound, 0)."""
    return x.sign() * (x.abs() - bound).clamp(min=0)


class Proximal(Schedule):
    """The proximal step of strength * ||x||_1 at the learning rate with which x was just moved.

    Args:
        gates: gives the parameters that are thresholded; asked at every step, as casts replace parameters.
        strength: lambda.

    Raises `ValueError` where the optimiser does not hold all of them.
    """

    def __init__(self, gates: Callable[[], Sequence[nn.Parameter]], strength: float):
        super().__init__()
        self.gates, self.strength = gates, strength

    @property
    def needs_optimizer(self) -> bool:
        return True

    def bound(self, step: int, rate: float) -> float:
        """The threshold after this step, for a gate of this learning rate."""
        return self.strength * rate

    @torch.no_grad()
    def after(self, step: int) -> None:
        if self.optimizer is None:
            return
        rates = {id(p): g["lr"] for g in self.optimizer.param_groups for p in g["params"]}
        for gate in self.gates():
            if id(gate) not in rates:
                raise ValueError(f"{type(self).__name__} thresholds gates that the optimiser does not train: give it all parameters of the adapter")  # fmt: skip # noqa: E501
            if step:
                gate.copy_(soft(gate, self.bound(step, float(rates[id(gate)]))))
