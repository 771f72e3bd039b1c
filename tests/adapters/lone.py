"""One linear layer with an adapter on it, and the gradient of its matrix."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart import adapters
from eckart.adapters.layer import AdapterLayer


def layer_of(W: Float[Tensor, "out in"], dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A linear layer without bias that multiplies by W."""
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False).to(dtype)
    layer.weight.data.copy_(W)
    return layer


def lone(key: str, base: nn.Module | Float[Tensor, "out in"], data: Any = None, **settings: Any) -> Any:
    """The adapted layer, alone in a PEFT model."""
    base = layer_of(base) if isinstance(base, Tensor) else base
    model = adapters.adapt(nn.Sequential(base), key, data=data, target_modules=["0"], **settings)
    found = [m for m in model.modules() if isinstance(m, AdapterLayer)]
    assert len(found) == 1
    return found[0]


def update_of(layer: Any) -> Any:
    return layer.updates["default"]


def learning(layer: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by the last part of its name."""
    return {n.rpartition(".")[2]: p for n, p in layer.named_parameters() if p.requires_grad}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fitted(layer: Any, target: Float[Tensor, "out in"], steps: int = 400, lr: float = 0.05) -> float:
    """||target - W||² beside what it was, after training on it: the loss of white inputs."""
    W = layer.host.weight()
    parameters = [p for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss = first = (target - W - update_of(layer).delta(layer.host)).square().sum()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (target - W - update_of(layer).delta(layer.host)).square().sum()
        loss.backward()
        optimizer.step()
        decay.step()
    return float(loss.detach() / first.detach())
