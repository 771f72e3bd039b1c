"""The PEFT layer of all adapters: a frozen layer, and the updates that are trained beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from eckart.adapters.base import Update
from eckart.adapters.host import Host
from eckart.adapters.kinds import is_convolution, laid_out
from eckart.forms.layers import DropIn


class AdapterLayer(nn.Module, BaseTunerLayer):
    """y = frozen(x) + the sum of the active updates.

    Args:
        base_layer: the frozen layer; it may be a factored one.
        name: of the layer in the model.
    """

    base_layer: nn.Module
    get_base_layer: Any
    set_adapter: Any
    active_adapters: Any
    adapter_layer_names = ("updates",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, name: str):
        super().__init__()
        self.base_layer = base_layer
        self.host = Host(self.get_base_layer(), name)
        self.updates: Any = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.out_features, self.in_features = self.host.shape
        base = self.get_base_layer()
        for word in getattr(base, "__constants__", ()):  # Whisper's forward pass asks its convolutions for their stride
            if hasattr(base, word) and not hasattr(self, word):
                setattr(self, word, getattr(base, word))

    def update_layer(self, adapter_name: str, update: Update, dropout: float, inference_mode: bool) -> None:
        """Put a new update on the layer: on its device, in float32 where the frozen weight is shorter."""
        update.dropout = dropout
        self.updates[adapter_name] = update
        if not any(p.device.type == "meta" for p in update.parameters()):
            update.to(self.host.device)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self._disable_adapters or self.merged_adapters:
            return y
        total, updates = y, self.updates._modules  # ModuleDict itself is slow, and this is every pass of every layer
        for name in self.active_adapters:
            update: Any = updates.get(name)
            if update is not None:
                added = self._added(name, update, x, y)
                total = total + (added if added.dtype == y.dtype else added.to(y.dtype))
        return total

    def _added(self, name: str, update: Update, x: Tensor, y: Tensor) -> Tensor:
        if not update.ready:
            raise RuntimeError(f"{self.host.name}: adapter {name!r} starts from data, which it was not given: make it with eckart.adapters.adapt(model, ..., data=...), or load a saved one")  # fmt: skip # noqa: E501
        dtype = update.dtype
        x = x if x.dtype == dtype else x.to(dtype)
        if update.dropout and self.training:
            x = F.dropout(x, update.dropout)
        added: Tensor = update(x, y, self.host)
        return added

    def _freeze_non_trainable_peft_weights(self, adapter_names: str | Sequence[str] | None = None) -> None:
        for update in self.updates.values():
            for parameter in update.held():
                parameter.requires_grad_(False)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change of the layer's weight, laid out as that is, in the update's dtype."""
        update = self._matrix(adapter)
        return laid_out(self.host.module, update.delta(self.host))

    def get_factors(self, adapter: str) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]] | None:
        """The two factors of an update that has them."""
        return self._matrix(adapter).factors(self.host)

    def _matrix(self, adapter: str) -> Update:
        update: Update = self.updates[adapter]
        if not update.linear:
            raise ValueError(f"{self.host.name}: {type(update).__name__} of adapter {adapter!r} is not a matrix: it can be neither merged nor written as a LoRA")  # fmt: skip # noqa: E501
        return update

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add updates to the frozen weight, of which a copy is kept: `unmerge` is exact to the bit."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.updates]
        if not names:
            return
        if isinstance(self.host.module, DropIn):
            raise ValueError(f"{self.host.name} is factored: no adapter can be merged into it before it is dense; call eckart.densify(model)")  # fmt: skip # noqa: E501
        W, bias = self.host.weight(), self.host.bias()
        for name in [*self.merged_adapters, *names]:
            update = self._matrix(name)
            W += update.delta(self.host).float()
            more = update.bias_delta(self.host)
            if more is not None:
                bias = more.float() if bias is None else bias + more.float()
        if safe_merge and not (W.isfinite().all() and (bias is None or bias.isfinite().all())):
            raise ValueError(f"NaN or infinite numbers in the merged weight of {self.host.name}: the adapter {names[0]!r} seems to be broken")  # fmt: skip # noqa: E501
        self.host.write(W, bias)
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the frozen weight back."""
        self.host.restore()
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return adapter_name not in self.updates or bool(self.updates[adapter_name].linear)

    def extra_repr(self) -> str:
        return f"name={self.host.name!r}"


class AdapterLinear(AdapterLayer):
    """Of a linear layer; PEFT finds `all-linear` among adapted layers by this word in the class's name."""


def layer_for(base_layer: nn.Module, name: str) -> AdapterLayer:
    """The layer that wraps a frozen one."""
    return AdapterLayer(base_layer, name) if is_convolution(base_layer) else AdapterLinear(base_layer, name)
