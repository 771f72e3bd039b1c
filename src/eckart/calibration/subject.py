"""What is calibrated and compressed: a model of which only some parts need be in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from eckart.anatomy import UnknownModel, anatomy


class Subject(Protocol):
    """A model whose parts are loaded when their turn comes."""

    model: nn.Module

    @contextmanager
    def loaded(self, *names: str) -> Iterator[None]:
        """Within the context, the modules called `names` have their weights, in float32 on CPUs."""
        yield

    @property
    def storage_dtype(self) -> torch.dtype:
        """The dtype in which weights are stored."""


class InMemory:
    """A model that is all there."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.storage_dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    @contextmanager
    def loaded(self, *names: str) -> Iterator[None]:
        """Within the context, what is in half precision is float32; tensors that are still there get theirs back."""
        modules = [module for name in names for module in self.model.get_submodule(name).modules()]
        narrow = {
            tensor: tensor.data
            for module in modules
            for tensor in (*module._parameters.values(), *module._buffers.values())  # as of batch normalisation
            if tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16)
        }
        for tensor, stored in narrow.items():
            tensor.data = stored.float()
        try:
            yield
        finally:
            for tensor, stored in narrow.items():
                tensor.data = stored


def block_names(model: nn.Module) -> list[str]:
    """Names of the blocks that a model runs through one after the other; empty where there is no such list.

    Known families are looked up; in others it is the largest ModuleList of as many modules of one class as the config
    says that there are hidden layers. No other list is taken for one: it may hold tables, experts or a tower's linears.
    A model of an encoder and a decoder is no single chain: it has none, and is run whole.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return []
    try:
        return [block.name for block in anatomy(model).blocks]
    except UnknownModel:
        pass
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    best: tuple[int, list[str]] = (0, [])
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth and len({type(m) for m in module}) == 1:
            size = sum(p.numel() for p in module.parameters())
            if size > best[0]:
                best = (size, [f"{name}.{i}" for i in range(len(module))])
    return best[1]


def outside(model: nn.Module, blocks: list[str]) -> list[str]:
    """Names of the leaf modules that hold weights and lie in no block."""
    prefixes = tuple(f"{b}." for b in blocks)
    return [
        name
        for name, module in model.named_modules()
        if name not in blocks and not name.startswith(prefixes) and module._parameters
    ]
