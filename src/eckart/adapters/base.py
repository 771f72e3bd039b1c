"""What every adapter is: settings that PEFT saves, and for each layer an update that is trained beside it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from peft.config import PeftConfig
from torch import Tensor, nn

from eckart.adapters.host import Host, Shared, Site
from eckart.adapters.registration import member, peft_name
from eckart.schedules import Schedule


class Update(nn.Module):
    """What one adapter adds to one layer. Parameters are trained, buffers are frozen, and both are saved.

    A subclass overrides `delta`, or, where the forward pass is cheaper than that of a matrix (out, in), `forward`, too.

    Attributes:
        linear: whether the update is a matrix, so that it can be merged and written as a LoRA.
        ready: False where the method needs data that it was not given; loading saved tensors mends that.
        elastic: buffers whose length changes in training; loading takes the saved one.
    """

    linear: ClassVar[bool] = True
    elastic: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self._ready = True
        self.dropout = 0.0

    @property
    def ready(self) -> bool:
        if not self._ready:  # libraries load tensors in ways of their own, so the tensors themselves must tell
            self._ready = not any(bool(t.isnan().any()) for t in self._numbers())
        return self._ready

    @ready.setter
    def ready(self, value: bool) -> None:
        self._ready = value
        if not value:
            for tensor in self._numbers():
                tensor.data.fill_(math.nan)

    def _numbers(self) -> list[Tensor]:
        return [t for t in [*self.parameters(), *self.buffers()] if t.is_floating_point()]

    def delta(self, host: Host) -> Float[Tensor, "out in"]:
        """The change of the layer's matrix."""
        raise NotImplementedError(f"{type(self).__name__} is not a matrix")

    def bias_delta(self, host: Host) -> Float[Tensor, " out"] | None:
        """The change of the layer's bias."""
        return None

    def forward(self, x: Tensor, y0: Tensor, host: Host) -> Tensor:
        """What is added to y0, the frozen layer's output for x (before dropout of x)."""
        return host.apply(x, self.delta(host).to(x.dtype))

    def factors(self, host: Host) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]] | None:
        """Two matrices whose product is `delta`, of a rank that is known; None where there are none."""
        return None

    def held(self) -> tuple[nn.Parameter, ...]:
        """Parameters that do not learn at present."""
        return ()

    @property
    def dtype(self) -> torch.dtype:
        """Of the trained tensors; of products with the input, too."""
        for own in self._parameters.values():  # asked in every pass: walking through submodules is slow
            if own is not None and own.is_floating_point():
                return own.dtype
        return next((t.dtype for t in [*self.parameters(), *self.buffers()] if t.is_floating_point()), torch.float32)

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        for name in self.elastic:
            if prefix + name in state:
                setattr(self, name, getattr(self, name).new_empty(state[prefix + name].shape))
        super()._load_from_state_dict(state, prefix, *rest)


class FactoredUpdate(Update, ABC):
    """A product of two matrices, applied one after the other. A subclass gives `factors`."""

    @abstractmethod
    def factors(self, host: Host) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
        """The two matrices."""

    def delta(self, host: Host) -> Float[Tensor, "out in"]:
        left, right = self.factors(host)
        return left @ right

    def forward(self, x: Tensor, y0: Tensor, host: Host) -> Tensor:
        left, right = self.factors(host)
        return host.up(host.down(x, right.to(x.dtype)), left.to(x.dtype))


@dataclass
class Adapter(PeftConfig, ABC):
    """Settings that all adapters have; a method adds its own and says what it puts on a layer.

    Attributes:
        target_modules: names (or their last parts) of the layers, or a regular expression, or `all-linear`.
        exclude_modules: of these, the ones that get none.
        modules_to_save: other modules that are trained and saved whole, such as a new classifier.
        layers_to_transform, layers_pattern: which blocks get one, as in PEFT.
        rank_pattern: layer -> its own rank, where a method changed it.
        dropout: of the adapter's input, in training.
        bias: `none`, `all`, or `adapter_only`: which frozen biases are trained, too.
        seed: of what is drawn.
    """

    target_modules: Any = None
    exclude_modules: Any = None
    modules_to_save: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    dropout: float = 0.0
    bias: str = "none"
    seed: int = 0

    key: ClassVar[str] = ""
    shares: ClassVar[bool] = False
    """Whether layers have tensors in common, which transformers' `load_adapter` has no place for."""
    needs_data: ClassVar[bool] = False
    """Whether the start is made from data: `adapt(model, ..., data=...)`."""
    exact_start: ClassVar[bool] = True
    """Whether the model answers as before until the first step, to rounding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = member(peft_name(self.key))
        self.target_modules = _set(self.target_modules)
        self.exclude_modules = _set(self.exclude_modules)
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} counts blocks in lists of names; target_modules is a regular expression, which can do that itself")  # fmt: skip # noqa: E501
        if not 0 <= self.dropout < 1:
            raise ValueError(f"{self.key}(dropout={self.dropout!r}): it is a share from 0, below 1")
        if self.bias not in ("none", "all", "adapter_only"):
            raise ValueError(f"{self.key}(bias={self.bias!r}): it is 'none', 'all' or 'adapter_only'")
        self.statistics: dict[str, Any] = {}
        self.check()

    def check(self) -> None:
        """Raises `ValueError` where a setting does not do."""

    @abstractmethod
    def update(self, site: Site) -> Update:
        """What is put on a layer. Raises `ValueError` where it does not fit there."""

    def collect(self, model: nn.Module, names: list[str], data: list[Any]) -> dict[str, Any]:
        """layer -> what `update` needs to know of it, found on data before the adapter is there."""
        raise NotImplementedError(f"{self.key} needs no data")

    def schedule(self, model: nn.Module, updates: dict[str, Update]) -> Schedule:
        """What must follow the optimiser's steps; nothing, if not overridden."""
        return Schedule()

    def prepare(self, model: nn.Module) -> None:
        """Complete settings that depend on the model, such as `modules_to_save`, before any layer is made."""

    def shared_of(self, shared: Shared) -> None:
        """Set up what layers have in common, before the first of them is made."""

    # of settings that several methods have

    def at_least(self, **values: float) -> None:
        """Raises `ValueError` where a setting is below 1."""
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{self.key}({name}={value!r}): it is a whole number, at least 1")

    def positive(self, **values: float) -> None:
        """Raises `ValueError` where a setting is not a finite number above 0."""
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):  # fmt: skip # noqa: E501
                raise ValueError(f"{self.key}({name}={value!r}): it is a number above 0")

    def not_negative(self, **values: float) -> None:
        """Raises `ValueError` where a setting is not a finite number from 0."""
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):  # fmt: skip # noqa: E501
                raise ValueError(f"{self.key}({name}={value!r}): it is a number, 0 or more")

    def fitting(self, site: Site, rank: int | None = None) -> int:
        """The rank of a site. Raises `ValueError` where the layer's matrix has no such rank."""
        rank = site.rank if rank is None else rank
        if rank > min(site.shape):
            raise ValueError(f"{site.name}: rank {rank} is more than a matrix of shape {site.shape} can have: lower it to {min(site.shape)} or leave the layer out")  # fmt: skip # noqa: E501
        return rank


def _set(names: Any) -> Any:
    return set(names) if isinstance(names, list | tuple) else names
