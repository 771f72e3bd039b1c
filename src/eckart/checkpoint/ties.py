"""Weights that two modules share: a token table and the head tied to it go on sharing what stands in for them."""

from __future__ import annotations

from typing import Any

from torch import nn

from eckart.forms import drop_in
from eckart.forms.layers import DropIn


def sharers(model: nn.Module, name: str) -> list[str]:
    """Names of the modules whose weight is tied to that of the one called `name`."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return [key.rpartition(".")[0] for key, source in tied.items() if source == f"{name}.weight"]


def share(model: nn.Module, name: str) -> None:
    """Let all that is tied to the stand-in called `name` hold its matrix, too; biases stay their own."""
    owner = model.get_submodule(name)
    assert isinstance(owner, DropIn)
    for other in sharers(model, name):
        module = model.get_submodule(other)
        bias = getattr(module, "bias", None)
        replacement = drop_in(module, owner.matrix, None if bias is None else bias.detach()).requires_grad_(False)
        assert isinstance(replacement, DropIn)
        replacement.borrow(owner)
        model.set_submodule(other, replacement)


def shared(model: nn.Module) -> dict[str, str]:
    """Stand-in -> the one before it whose matrix it holds."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, DropIn):
            known = first.setdefault(id(module.matrix), name)
            if known != name:
                found[name] = known
    return found


def tied_keys(model: Any) -> set[str]:
    """Names of tensors that are stored under another name."""
    return set(getattr(model, "all_tied_weights_keys", None) or {})
