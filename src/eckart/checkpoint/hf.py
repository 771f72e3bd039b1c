"""The transformers integration: after `import eckart`, `from_pretrained` loads what `compress` saved.

A checkpoint's config.json has a `quantization_config` that lists, by name, the modules which stand where the model's
own code would put others. The quantiser below puts them into the model's skeleton while it is still on the meta
device, so the dense weights are never built; transformers then fills their tensors as any others.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from eckart.forms.densifying import densify
from eckart.forms.layers import DropIn
from eckart.forms.residual import Connected
from eckart.forms.stand_ins import STAND_INS, StandIn
from eckart.registry import suggest

METHOD = "eckart"
FORMAT = 1
MAX_MODULES = 100_000


@register_quantization_config(METHOD)
class EckartConfig(QuantizationConfigMixin):
    """What stands where in a compressed model.

    Args:
        modules: module name -> spec of the stand-in (`kind`, `form`, `shape`, `bias`, ...).
        tied: module name -> name of the module whose stand-in it shares.
        history: what was applied, in order, with every setting and the versions.
        format: version of this layout.
    """

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        tied: dict[str, str] | None = None,
        history: list[dict[str, Any]] | None = None,
        format: int = FORMAT,
        **_: Any,
    ):
        self.quant_method = METHOD
        self.modules, self.tied = modules or {}, tied or {}
        self.history, self.format = history or [], format

    def validate(self) -> None:
        """Raise `ValueError` on anything that is not a list of stand-ins. A checkpoint's word is not trusted."""
        if self.format != FORMAT:
            raise ValueError(f"this checkpoint has format {self.format!r}; this version of eckart reads {FORMAT}")
        if not isinstance(self.modules, dict) or len(self.modules) > MAX_MODULES:
            raise ValueError("quantization_config.modules is not a table of modules")
        for name, spec in self.modules.items():
            if not isinstance(spec, dict) or not re.fullmatch(r"[\w.]+", name):
                raise ValueError(f"quantization_config.modules[{name!r}] is not the description of a module")
            kind = spec.get("kind")
            if not isinstance(kind, str) or kind not in STAND_INS:
                raise ValueError(f"{name}: unknown kind {kind!r}{suggest(str(kind), list(STAND_INS))}")
        names = [*self.tied, *self.tied.values()] if isinstance(self.tied, dict) else [None]
        if not all(isinstance(name, str) and name in self.modules for name in names):
            raise ValueError("quantization_config.tied names a module that is not in quantization_config.modules")
        if not isinstance(self.history, list):
            raise ValueError("quantization_config.history is not a list of what was applied")


@register_quantizer(METHOD)
class EckartQuantizer(HfQuantizer):
    """Builds the stand-ins that an `EckartConfig` lists."""

    requires_calibration = True
    quantization_config: EckartConfig

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True  # the factors are ordinary parameters: Trainer may train them with no adapter on top

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self.quantization_config = fitted(self.quantization_config, model)
        install(model, self.quantization_config, dtype)
        for name in self.quantization_config.modules:
            parent = model.get_submodule(name.rpartition(".")[0])
            if parent is not model and not parent._parameters and not parent._buffers:
                parent._is_hf_initialized = True  # else some models form a child's weight in order to initialise it

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        model.config.quantization_config = self.quantization_config
        check_filled(model, self.quantization_config)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return densify(model)


def fitted(config: EckartConfig, model: Any) -> EckartConfig:
    """The description in the names of a model of another class on the same body: its prefix is put before the names,
    or taken off, and the stand-ins of a head that the model does not have are left out."""
    if type(model).__name__ in (getattr(model.config, "architectures", None) or [type(model).__name__]):
        return config
    config.validate()
    prefix = getattr(model, "base_model_prefix", "")
    body = dict(getattr(model, prefix, model).named_children())
    own = dict(model.named_children())
    names = {}
    for name in config.modules:
        first = name.partition(".")[0]
        if first in own:
            names[name] = name
        elif first in body:
            names[name] = f"{prefix}.{name}"
        elif first == prefix:
            names[name] = name.removeprefix(f"{prefix}.")
    modules = {names[n]: spec for n, spec in config.modules.items() if n in names}
    tied = {names[n]: names[other] for n, other in config.tied.items() if n in names and other in names}
    return EckartConfig(modules, tied, config.history, config.format)


def install(model: Any, config: EckartConfig, dtype: torch.dtype) -> None:
    """Put the stand-ins, without values, into a model's skeleton."""
    config.validate()
    for name, spec in config.modules.items():  # a stand-in comes before those within it
        try:
            model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"the checkpoint describes {name}, which {type(model).__name__} does not have") from None
        model.set_submodule(name, STAND_INS[spec["kind"]].from_spec(model, name, spec, dtype))
    for name, module in model.named_modules():
        if isinstance(module, Connected):
            module.connect(model, name)
    for name, other in config.tied.items():
        tie(model, name, other)


def check_filled(model: Any, config: EckartConfig) -> None:
    """Raise `ValueError` where no file held a tensor of a stand-in, which transformers would leave undefined."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name in config.modules:
        for key, tensor in model.get_submodule(name).state_dict(keep_vars=True).items():
            filled = getattr(tensor, "_is_hf_initialized", False) or tensor.device.type == "meta"  # meta: offloaded
            if not filled and f"{name}.{key}" not in tied:
                raise ValueError(f"the checkpoint lacks {name}.{key}, or holds it in another shape")


def tie(model: Any, name: str, other: str) -> None:
    """Let the stand-in at `name` hold the very matrix of the one at `other`."""
    own, shared = model.get_submodule(name), model.get_submodule(other)
    if not (isinstance(own, DropIn) and isinstance(shared, DropIn) and own.matrix.shape == shared.matrix.shape):
        raise ValueError(f"{name} cannot share the matrix of {other}")
    own.borrow(shared)
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        keys = getattr(model, attribute, None)
        if isinstance(keys, dict):
            setattr(model, attribute, {k: v for k, v in keys.items() if not k.startswith(f"{name}.")})


def reconfigure(model: Any, changes: dict[str, Any]) -> None:
    """Change entries of a transformers model's config, and with them which weights count as tied."""
    for key, value in changes.items():
        setattr(model.config, key, value)
    if "tie_word_embeddings" in changes:
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The specs of all stand-ins in a model, by name: what `EckartConfig.modules` holds."""
    return {name: module.spec() for name, module in model.named_modules() if isinstance(module, StandIn)}
