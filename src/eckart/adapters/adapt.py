"""The verb of the wing: put an adapter on a model, with what it needs to know of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from eckart.adapters.base import Adapter, Update
from eckart.adapters.layer import AdapterLayer
from eckart.adapters.matching import inner, targets
from eckart.adapters.native import Native, put, schedule_of
from eckart.calibration.stream import Batch
from eckart.registry import find
from eckart.schedules import Schedule
from eckart.settings import with_settings


def adapt(
    model: nn.Module, method: str | Adapter | Native, *, data: Sequence[Batch] | None = None,
    adapter_name: str = "default", **settings: Any,
) -> Any:  # fmt: skip
    """Put an adapter on a model: what `get_peft_model` does, with the data that some methods start from.

    Args:
        model: any torch model, or a `PeftModel` that gets one more adapter. It is changed in place.
        method: key of a method of the wing `adapters` (`eckart methods` lists them), or its settings.
        data: batches of calibration data, as keyword arguments of the model; for methods that start from them.
        adapter_name: what PEFT calls it.
        settings: fields of the method, such as `rank=8, target_modules=["q_proj"]`.

    Returns:
        The `PeftModel`. What must follow the optimiser's steps is `schedule(model)`.

    Raises `ValueError` on unknown words, layers that do not fit, and on missing data.
    """
    chosen = with_settings(find(method, "adapters").cls() if isinstance(method, str) else method, settings)
    batches = None if data is None else list(data)
    if chosen.needs_data and not batches:
        raise ValueError(f"{chosen.key} starts from data: give batches of it, adapt(model, {chosen.key!r}, data=...)")
    if isinstance(chosen, Native):
        return chosen.put(model, batches, adapter_name)
    if chosen.needs_data:
        names = targets(model, chosen)
        chosen.statistics = chosen.collect(inner(model), names, batches or [])
    return put(model, chosen, adapter_name)


def updates(model: nn.Module, adapter_name: str | None = None) -> dict[str, Update]:
    """layer -> what an adapter puts on it; of the active adapter where none is named."""
    name = adapter_name or _active(model)
    layers = [m for m in model.modules() if isinstance(m, AdapterLayer) and name in m.updates]
    found: dict[str, Any] = {layer.host.name: layer.updates[name] for layer in layers}
    return found


def schedule(model: nn.Module, adapter_name: str | None = None) -> Schedule:
    """What must follow the optimiser's steps while an adapter is trained, in a bare loop or in Trainer.

    Raises `ValueError` where the model carries no adapter of that name.
    """
    name = adapter_name or _active(model)
    config: Any = getattr(model, "peft_config", {}).get(name)
    if config is None:
        raise ValueError(f"this model carries no adapter {name!r}: put one on it with eckart.adapters.adapt")
    if isinstance(config, Adapter):
        return config.schedule(model, updates(model, name))
    return schedule_of(model, name)


def _active(model: nn.Module) -> str:
    active: Any = getattr(model, "active_adapter", "default")
    active = active() if callable(active) else active
    return active if isinstance(active, str) else active[0]
