"""Models whose best change of weights is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eckart.schedules import Schedule


class Rows(nn.Module):
    """Linear layers side by side, `layers.0`, `layers.1`, ...: each answers its own share of the input."""

    def __init__(self, count: int, width: int = 8):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(part) for layer, part in zip(self.layers, x.unbind(1), strict=True)], 1)


def change(rank: int, width: int = 8, seed: int = 0) -> Tensor:
    """A matrix of this rank with singular values 1."""
    generator = torch.Generator().manual_seed(seed)
    U, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
    V, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
    return U[:, :rank] @ V[:, :rank].T


def teach(changes: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """What `Rows` answer once their weights are changed so."""
    plain = Rows(len(changes), changes[0].shape[1])
    for layer, matrix in zip(plain.layers, changes, strict=True):
        layer.weight.data += matrix  # type: ignore[operator]
    return torch.no_grad()(plain)


def inputs(steps: int, count: int, width: int = 8, batch: int = 32) -> Iterator[Tensor]:
    """Gaussian inputs of `Rows`."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        yield torch.randn(batch, count, width, generator=generator)


def fit(
    model: Any, teacher: Callable[[Tensor], Tensor], steps: int, schedule: Schedule, optimizer: Any, count: int,
    width: int = 8,
) -> None:  # fmt: skip
    """Follow the teacher for some steps, without finishing the schedule."""
    model.train()
    schedule.begin(optimizer, steps)
    for x in inputs(steps, count, width):
        (model(x) - teacher(x)).square().mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    schedule.release()
    model.eval()


def loss(model: Any, teacher: Callable[[Tensor], Tensor], count: int, width: int = 8) -> float:
    """Mean squared error on inputs of another seed."""
    x = torch.randn(256, count, width, generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        return float((model(x) - teacher(x)).square().mean())
