"""Runs optimisers on given gradients, and naive loops to compare them with."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

SHAPES = {"tall": (14, 6), "wide": (6, 14), "square": (9, 9)}


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def gradients(shape: tuple[int, ...], steps: int, seed: int = 1) -> list[Tensor]:
    """Noisy gradients around one direction, whose spectrum decays."""
    generator = torch.Generator().manual_seed(seed)
    main = torch.randn(shape, generator=generator)
    return [main + 0.5 * torch.randn(shape, generator=generator) for _ in range(steps)]


def drive(optimizer: torch.optim.Optimizer, p: nn.Parameter, grads: Iterable[Tensor]) -> list[Tensor]:
    """The parameter after each step."""
    path = []
    for grad in grads:
        p.grad = grad.clone().to(p.dtype)
        optimizer.step()
        path.append(p.detach().clone())
    return path


def reloaded(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict through a file that may hold tensors and numbers only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def naive_galore(
    W: Tensor, grads: list[Tensor], *, rank: int, interval: int, lr: float, scale: float, decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6, agreeing: bool = False,
) -> list[Tensor]:  # fmt: skip
    """The textbook's GaLore AdamW, with torch's own SVD and explicit projectors.

    `agreeing` flips new singular vectors that point away from their predecessors.
    """
    W, path = W.clone(), []
    right = W.shape[0] >= W.shape[1]
    M = V = P = None
    for t, G in enumerate(grads):
        if t % interval == 0:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            new = Vh[:rank] if right else U[:, :rank]
            if agreeing and P is not None:
                new = new * (P * new).sum(int(right), keepdim=True).sign()
            P = new
        R = G @ P.T if right else P.T @ G
        M = (1 - betas[0]) * R if M is None else betas[0] * M + (1 - betas[0]) * R
        V = (1 - betas[1]) * R**2 if V is None else betas[1] * V + (1 - betas[1]) * R**2
        step = lr * math.sqrt(1 - betas[1] ** (t + 1)) / (1 - betas[0] ** (t + 1))
        N = M / (V.sqrt() + eps)
        W = W - step * scale * (N @ P if right else P @ N)
        W = W - lr * decay * W
        path.append(W)
    return path


class CharacterLM(nn.Module):
    """Two layers that predict the next of 12 characters from the last three."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.embedding = nn.Embedding(12, width)
        self.blocks = nn.ModuleList([nn.Linear(3 * width, 3 * width), nn.Linear(3 * width, width)])
        self.head = nn.Linear(width, 12)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x).flatten(1)
        for layer in self.blocks:
            h = torch.tanh(layer(h))
        return self.head(h)


def text(n: int = 3000) -> Tensor:
    """Characters of which each depends on the two before it."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(12, (12, 12), generator=generator)
    noise, found = torch.randint(12, (n,), generator=generator), [1, 2]
    for i in range(n):
        found.append(int(table[found[-1], found[-2]]) if noise[i] > 1 else int(noise[i]))
    return torch.tensor(found)


def trained(make: Callable[[CharacterLM, float], torch.optim.Optimizer], lr: float = 0.01, steps: int = 150) -> float:
    """The mean loss of the last steps of a short training.

    Of 0.001, 0.003 and 0.01 the last learning rate is the best one for each optimiser that is compared here.
    """
    torch.manual_seed(0)
    model, windows = CharacterLM(), text().unfold(0, 4, 1)
    optimizer = make(model, lr)
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        batch = windows[torch.randint(len(windows), (64,), generator=generator)]
        loss = nn.functional.cross_entropy(model(batch[:, :3]), batch[:, 3])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-30:]) / 30


def groups(model: CharacterLM, **settings: Any) -> list[dict[str, Any]]:
    """The two inner layers' weights with these settings, and the rest."""
    inside = [layer.weight for layer in model.blocks]
    own = {id(p) for p in inside}
    return [{"params": inside, **settings}, {"params": [p for p in model.parameters() if id(p) not in own]}]
