"""The routed experts of any model, known or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from eckart.forms.experts import Stack, stack_of


@dataclass(frozen=True)
class Experts:
    """The routed experts of one layer.

    Attributes:
        name: the module that holds them, stacked.
        router: the module that chooses among them.
        stack: how many there are, and their sizes.
        top_k: how many of them a token is sent to.
        beside: modules next to them that every token goes through: shared experts, and what weighs those.
    """

    name: str
    router: str
    stack: Stack
    top_k: int
    beside: tuple[str, ...]


def experts(model: nn.Module) -> list[Experts]:
    """The routed experts of every mixture layer, in order; nothing is run, so the meta device will do.

    Raises `ValueError` where experts are stored in a way that is not known, or it cannot be told what routes to them.
    """
    found = []
    for name, module in model.named_modules():
        try:
            stack = stack_of(module)
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None
        if stack is not None:
            found.append(_experts(model, name, stack))
    return found


def _experts(model: nn.Module, name: str, stack: Stack) -> Experts:
    around, _, own = name.rpartition(".")
    parent = model.get_submodule(around)
    siblings = {child: module for child, module in parent.named_children() if child != own}
    routers = [child for child, module in siblings.items() if _rows(module) == stack.count]
    config = getattr(model, "config", None)
    top_k = next((k for k in (*_top_ks(*(siblings[r] for r in routers), parent), _configured(config)) if k), None)
    if len(routers) != 1 or not isinstance(top_k, int) or not 1 <= top_k <= stack.count:
        raise ValueError(f"{name} holds {stack.count} experts, but {around or type(model).__name__} does not say which module chooses how many of them")  # fmt: skip # noqa: E501
    beside = [c for c, module in siblings.items() if c not in routers and any(True for _ in module.parameters())]
    join = f"{around}." if around else ""
    return Experts(name, join + routers[0], stack, top_k, tuple(join + child for child in beside))


def _rows(module: nn.Module) -> int | None:
    """Of the matrix that a module itself holds."""
    weight = getattr(module, "weight", None)
    return None if weight is None or weight.dim() != 2 else int(weight.shape[0])


def _top_ks(*modules: nn.Module) -> list[Any]:
    return [getattr(module, "top_k", None) for module in modules]


def _configured(config: Any) -> Any:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "num_experts_per_tok", None)
