"""What travels between a server and its clients: the adapter's tensors, by layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eckart.adapters.adapt import updates
from eckart.adapters.federation.factors import Federated, Pair

State = dict[str, Tensor]
"""Tensors by name; those of a layer's factors end in .B, .A, .kept_B and .kept_A."""


def state_of(model: nn.Module) -> State:
    """A copy of all that a federation may change: factors, and what else is trained."""
    found = {f"{layer}.{n}": t for layer, u in _federated(model).items() for n, t in u.state_dict().items()}
    found |= _others(model)
    return {name: t.detach().clone() for name, t in found.items()}


def trained_names(model: nn.Module) -> list[str]:
    """Names of what clients train. Raises `ValueError` where that is nothing."""
    found = [f"{layer}.{n}" for layer, u in _federated(model).items() for n, p in u.named_parameters() if p.requires_grad]  # fmt: skip # noqa: E501
    found += _others(model)
    if not found:
        raise ValueError("the model trains nothing: put an adapter on it with eckart.adapters.adapt(model, 'fedsvd', ...)")  # fmt: skip # noqa: E501
    return found


def put_state(model: nn.Module, state: State) -> None:
    """Put tensors into the model. Raises `ValueError` where it has no such one, or of another shape."""
    left, others = dict(state), _others(model)
    for layer, update in _federated(model).items():
        own = {n: left.pop(f"{layer}.{n}") for n in update.state_dict() if f"{layer}.{n}" in left}
        for name, tensor in own.items():
            _check(f"{layer}.{name}", tensor, update.state_dict()[name], free=name in update.elastic)
        update.put(own)
    for name, tensor in left.items():
        if name not in others:
            raise ValueError(f"{name} was sent, and this model has no such tensor: server and clients need the same adapter on the same model")  # fmt: skip # noqa: E501
        _check(name, tensor, others[name])
        with torch.no_grad():
            others[name].copy_(tensor)


def layers_of(state: State) -> list[str]:
    """Names of the layers whose factors a state holds."""
    return [name.removesuffix(".kept_B") for name in state if name.endswith(".kept_B")]


def pair_of(state: State, layer: str, instead: State | None = None) -> Pair:
    """The factors of a layer, of `instead` where they are there."""
    both = {**state, **(instead or {})}
    return Pair(*(both[f"{layer}.{n}"] for n in Pair._fields))


def nbytes(state: State) -> int:
    """Of the tensors."""
    return sum(t.numel() * t.element_size() for t in state.values())


def _federated(model: nn.Module) -> dict[str, Federated]:
    return {layer: u for layer, u in updates(model).items() if isinstance(u, Federated)}


def _others(model: nn.Module) -> dict[str, Any]:
    inside = {id(p) for u in _federated(model).values() for p in u.parameters()}
    return {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in inside}


def _check(name: str, tensor: Tensor, here: Tensor, free: bool = False) -> None:
    if not free and tensor.shape != here.shape:
        raise ValueError(f"{name} was sent with shape {tuple(tensor.shape)}, and is {tuple(here.shape)} here: server and clients need the same adapter, of the same rank, on the same model")  # fmt: skip # noqa: E501
