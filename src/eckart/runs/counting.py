"""What training holds in memory, counted tensor by tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eckart.evaluation.memory import model_bytes as weight_bytes
from eckart.evaluation.memory import peak_so_far, storages

__all__ = ["SavedBytes", "gradient_bytes", "peak_memory", "state_bytes", "weight_bytes"]


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the gradients that are there."""
    return sum(p.grad.numel() * p.grad.itemsize for p in model.parameters() if p.grad is not None)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in an optimiser's state."""
    return sum(x.numel() * x.itemsize for s in optimizer.state.values() for x in s.values() if isinstance(x, Tensor))


def peak_memory(device: torch.device) -> int:
    """Most bytes that were allocated on a GPU, or resident of this process on a CPU, so far."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_so_far()


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts, within a `with` block, the bytes that autograd keeps for the backward pass.

    Storage that several tensors share is counted once, and that of the model's weights and buffers not at all; casts of
    weights, as autocast makes them, are counted.

    Attributes:
        total: bytes so far.
    """

    def __init__(self, model: nn.Module):
        self._seen: set[int] = set(storages(model))
        self.total = 0
        super().__init__(self._keep, _same)

    def __enter__(self) -> SavedBytes:  # type: ignore[override]
        super().__enter__()
        return self

    def _keep(self, tensor: Tensor) -> Tensor:
        storage: Any = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor
