"""A small federation: a network that knows half the classes, and clients with all of them, unevenly spread."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eckart import adapters
from eckart.adapters.federation import InProcess, LocalClient, Server

WIDTH, CLASSES = 24, 6


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def squares(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().sum(-1).mean()


def drawn(count: int, seed: int, classes: int = CLASSES) -> dict[str, Tensor]:
    """Noisy templates, which are the same for all seeds."""
    templates = 0.6 * torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (count,), generator=generator)
    return {"x": templates[y] + torch.randn(count, WIDTH, generator=generator), "y": y}


def network(seed: int = 0) -> nn.Sequential:
    """Trained on the first half of the classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    data, optimizer = drawn(300, seed + 1, CLASSES // 2), torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss(model, data).backward()
        optimizer.step()
    return model


def adapted(key: str, base: nn.Module | None = None, **settings: Any) -> Any:
    words: dict[str, Any] = {"rank": 4, "target_modules": ["0", "2"], **settings}
    if key == "fedsvd":
        words = {"alpha": float(words["rank"]), "dropout": 0.0, **words}
    return adapters.adapt(network() if base is None else base, key, **words)


def spread(data: dict[str, Tensor], clients: int, seed: int = 0, concentration: float = 0.5) -> list[dict[str, Tensor]]:
    """The data dealt out, each class by Dirichlet shares; no client has fewer than eight."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shares = torch.distributions.Dirichlet(torch.full((clients,), concentration)).sample((CLASSES,))
    generator = torch.Generator().manual_seed(seed)
    owner = torch.multinomial(shares[data["y"]], 1, generator=generator)[:, 0]
    for k in range(clients):
        owner[8 * k : 8 * k + 8] = k
    return [{name: t[owner == k] for name, t in data.items()} for k in range(clients)]


def measured(model: nn.Module, data: dict[str, Tensor]) -> float:
    """The loss."""
    with torch.no_grad():
        return float(loss(model.eval(), data))


def accuracy(model: nn.Module, data: dict[str, Tensor]) -> float:
    with torch.no_grad():
        return float((model.eval()(data["x"]).argmax(1) == data["y"]).float().mean())


def federation(
    model: Any, parts: list[dict[str, Tensor]], server: dict[str, Any] | None = None, **client: Any
) -> Server:
    words: dict[str, Any] = {"loss": loss, **client}
    clients = [LocalClient(model, part, seed=100 + k, **words) for k, part in enumerate(parts)]
    return Server(model, InProcess(clients), **(server or {}))
