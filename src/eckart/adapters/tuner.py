"""The PEFT tuner of all adapters: puts their layers into a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn, TypeVar

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from eckart.adapters.base import Adapter
from eckart.adapters.host import Shared, Site, seeded
from eckart.adapters.layer import AdapterLayer, layer_for
from eckart.adapters.registration import register
from eckart.registry import method, suggest

T = TypeVar("T", bound=type[Adapter])


class Tuner(BaseTuner):
    """Wraps the targeted layers of a model; each method of the wing has a subclass."""

    prefix = "updates"  # PEFT and transformers look for it in the names of tensors
    tuner_layer_cls = AdapterLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; target modules that match nothing are answered with the nearest names."""
        config = self.peft_config[adapter_name]
        wanted = config.target_modules
        if isinstance(wanted, set) and not any(self._check_target_module_exists(config, n) for n, _ in model.named_modules()):  # fmt: skip # noqa: E501
            refuse(model, config)
        if "of_all_layers" not in self._modules:
            self.of_all_layers = nn.ModuleDict()
        self.of_all_layers[adapter_name] = shared = Shared()
        config.prepare(model)
        config.shared_of(shared)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, **_: Any,
    ) -> None:  # fmt: skip
        layer = target if isinstance(target, AdapterLayer) else None
        if layer is None:
            if isinstance(target, BaseTunerLayer):
                raise ValueError(f"{current_key} carries a {type(target).__name__} of PEFT: an adapter of eckart sits on the layer itself; unload the other one first")  # fmt: skip # noqa: E501
            layer = layer_for(target, current_key)
        update = peft_config.update(self._site(layer, peft_config, adapter_name))
        layer.update_layer(adapter_name, update, peft_config.dropout, peft_config.inference_mode)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _site(self, layer: AdapterLayer, config: Adapter, adapter_name: str) -> Site:
        name = layer.host.name
        rank = next((r for n, r in config.rank_pattern.items() if name == n), getattr(config, "rank", 0))
        shared: Any = self.of_all_layers[adapter_name]
        return Site(layer.host, seeded(config.seed, name), shared, rank, config.statistics.get(name))

    def _replace_module(self, parent: Any, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # the layer looks after devices itself

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode)
        active = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for name, shared in self.of_all_layers.items():
            shared.requires_grad_(name in active and not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        del self.of_all_layers[adapter_name]

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        for container in ("updates", "of_all_layers"):
            key = key.replace(f".{container}.{adapter_name}.", f".{container}.")
        return key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As PEFT's; a saved adapter that does not fit is refused with the layer's name."""
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = model.state_dict()
        for key, value in found.items():
            owner, _, name = key.rpartition(".")
            if key in own and own[key].shape != value.shape and name not in getattr(model.get_submodule(owner), "elastic", ()):  # fmt: skip # noqa: E501
                raise ValueError(f"the adapter was saved for another model: {key} has shape {tuple(value.shape)} there and {tuple(own[key].shape)} here; load the base that its adapter_config.json names ({config.base_model_name_or_path})")  # fmt: skip # noqa: E501
        return found


def refuse(model: nn.Module, config: Adapter) -> NoReturn:
    """Raises `ValueError` for targets that match nothing, with the nearest names."""
    wanted = config.target_modules
    last = {n.rpartition(".")[2] for n, m in model.named_modules() if n and not list(m.children())}
    first = wanted if isinstance(wanted, str) else min(wanted, default="")
    said = wanted if isinstance(wanted, str) else sorted(wanted)
    raise ValueError(f"target_modules={said!r} match no layer of {type(model).__name__}{suggest(first, sorted(last))}")


def adapter(key: str, *, family: str, paper: str) -> Callable[[T], T]:
    """Class decorator that enters an adapter in the catalogue, and makes it a type of PEFT."""

    def enter(cls: T) -> T:
        cls = method(key, family=family, paper=paper, wing="adapters")(cls)
        words = {"uses_shared_state": cls.shares, "__doc__": f"The tuner of {key}."}
        register(key, cls, type(f"{cls.__name__}Tuner", (Tuner,), {**words, "__module__": cls.__module__}))
        return cls

    return enter
