"""Layers that stay what they are while their weight is computed from a trained one: torch's parametrisations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.utils import parametrize

from eckart.forms.layers import matrix_of
from eckart.forms.sparse import SparseForm
from eckart.training.base import StructuredSchedule, dtype_of, like, put

P = TypeVar("P", bound=nn.Module)


class ParametrisedTraining(StructuredSchedule, Generic[P]):
    """A schedule over layers with a parametrised weight.

    Args:
        parametrisations: by name of the layer; each maps the trained tensor to the weight.
    """

    def __init__(self, model: nn.Module, parametrisations: dict[str, P]):
        super().__init__(model, list(parametrisations))
        for name, parametrisation in parametrisations.items():
            module = model.get_submodule(name)
            parametrize.register_parametrization(module, "weight", parametrisation.train(module.training))

    @property
    def layers(self) -> Iterator[tuple[str, Any, P]]:
        """Name, layer and parametrisation of each."""
        for name in self.names:
            module: Any = self.model.get_submodule(name)
            yield name, module, module.parametrizations.weight[0]

    def plain(self, name: str) -> nn.Module:
        """The layer as it was, its weight the one that was computed last."""
        module = self.model.get_submodule(name)
        trains = original(module).requires_grad
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        weight: Any = module.weight
        weight.requires_grad_(trains)
        return module


def original(module: Any) -> nn.Parameter:
    """The trained tensor of a parametrised layer."""
    found: nn.Parameter = module.parametrizations.weight.original
    return found


def store_sparse(model: nn.Module, name: str, mask: Bool[Tensor, "out in"], form: SparseForm) -> bool:
    """Put a sparse stand-in where an ordinary layer is, if it takes fewer bytes; returns whether it does."""
    module = model.get_submodule(name)
    W = matrix_of(module).detach()
    dtype = dtype_of(module)
    if form.nbytes((W.shape[0], W.shape[1]), dtype) >= W.numel() * dtype.itemsize:
        return False
    wide = W.to(torch.promote_types(dtype, torch.float32))
    put(model, name, like(module, form.holding(mask, wide, dtype)))
    return True
