"""The dense weight that a factored layer shows: it can be read, and not be written to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ReadOnly(Tensor):
    """A formed weight, or a view of one. Writing to it would be lost, so in-place operations are refused."""

    _is_hf_initialized = True  # as for the layer: no code of transformers may initialise it

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*args, *(kwargs or {}).values()]
        if any(isinstance(t, ReadOnly) for t in _written(func, given, kwargs or {})):
            raise TypeError(
                "this weight is factored: it cannot be written to, so nothing (an adapter, say) merges into it; "
                "make the layer dense first with `eckart.densify(model)`"
            )
        out = super().__torch_function__(func, types, args, kwargs or {})
        return _plain_unless_view(out, [t for t in given if isinstance(t, ReadOnly)])


def _written(func: Any, given: list[Any], kwargs: dict[str, Any]) -> list[Any]:
    """What a torch function would write to: its first argument where its name says so, and `out`."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__") and name not in ("requires_grad_", "detach_")
    in_place = in_place or name == "__setitem__" or func == Tensor.data.__set__  # type: ignore[attr-defined]
    targets = [*given[: int(in_place)], kwargs.get("out")]
    return [t for x in targets for t in (x if isinstance(x, list | tuple) else [x])]


def _plain_unless_view(out: Any, sources: list[ReadOnly]) -> Any:
    """What was computed from weights is an ordinary tensor; what shares memory with one is not."""
    if isinstance(out, ReadOnly):
        with torch._C.DisableTorchFunctionSubclass():
            memory = {t.untyped_storage()._cdata for t in sources}
            return out if out.untyped_storage()._cdata in memory else out.as_subclass(Tensor)
    if isinstance(out, list | tuple) and any(isinstance(t, ReadOnly) for t in out):
        return type(out)([_plain_unless_view(t, sources) for t in out])
    return out
