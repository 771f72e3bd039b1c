"""Soft thresholding after each step of the optimiser: exact zeros where a plain gradient of |x| gives none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from eckart.schedules import Schedule


class Proximal(Schedule):
    """The proximal step of strength * ||x||_1 at the learning rate with which x was just moved.

    Args:
        gates: gives the parameters that are thresholded; asked at every step, as casts replace parameters.
        strength: lambda.
    """

    def __init__(self, gates: Callable[[], Sequence[nn.Parameter]], strength: float):
        super().__init__()
        self.gates, self.strength = gates, strength

    @property
    def needs_optimizer(self) -> bool:
        return True

    @torch.no_grad()
    def after(self, step: int) -> None:
        if step == 0 or not self.strength or self.optimizer is None:
            return
        rates = {id(p): g["lr"] for g in self.optimizer.param_groups for p in g["params"]}
        for gate in self.gates():
            bound = self.strength * float(rates.get(id(gate), 0.0))
            gate.copy_(gate.sign() * (gate.abs() - bound).clamp(min=0))
