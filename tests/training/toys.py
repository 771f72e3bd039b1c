"""Small networks and data for structured training, a bare loop, and what autograd keeps."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eckart.schedules import Schedule


def mlp(*widths: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Linear layers with tanh between them, seeded."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def regression(inputs: int, outputs: int, rows: int = 256, seed: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:  # fmt: skip # noqa: E501
    """Inputs, and what a random network of the width 32 says to them."""
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)
    teacher = mlp(inputs, 32, outputs, seed=seed + 100, dtype=dtype)
    with torch.no_grad():
        y = teacher(x)
    return x, y / y.std()


def train(
    model: nn.Module, schedule: Schedule | None, data: tuple[Tensor, Tensor], steps: int, *, lr: float = 3e-3,
    batch: int = 32, make: Callable[..., torch.optim.Optimizer] = torch.optim.Adam, start: int = 0,
    optimizer: torch.optim.Optimizer | None = None, total: int | None = None,
) -> torch.optim.Optimizer:  # fmt: skip
    """A bare loop over batches that depend on the step alone; returns the optimiser."""
    optimizer = optimizer or make(model.parameters(), lr=lr)
    if schedule is not None:
        schedule.begin(optimizer, total or steps)
    for step in range(start, steps):
        rows = torch.randint(len(data[0]), (batch,), generator=torch.Generator().manual_seed(step))
        F.mse_loss(model(data[0][rows]), data[1][rows]).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()
    return optimizer


def loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return F.mse_loss(model(data[0]), data[1]).item()


def saved(run: Callable[[], Any]) -> list[Tensor]:
    """Every tensor that autograd keeps for backward while `run` runs."""
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return kept
