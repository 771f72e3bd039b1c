"""Methods that PEFT has itself: our keys set them up, and add what a user of PEFT has to remember."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from eckart.registry import entries
from eckart.schedules import Schedule


@dataclass(frozen=True)
class Native:
    """Settings of a method of PEFT's own, under the names that this library uses.

    Attributes:
        target_modules: as in PEFT; `all-linear` if not given.
        exclude_modules, modules_to_save: as in PEFT.
    """

    target_modules: Any = None
    exclude_modules: Any = None
    modules_to_save: Any = None

    key: ClassVar[str] = ""
    needs_data: ClassVar[bool] = False
    of: ClassVar[type[PeftConfig]] = PeftConfig
    """PEFT's settings of the method; those whose steps `schedule` follows have a class of their own."""

    def config(self) -> PeftConfig:
        """PEFT's settings."""
        raise NotImplementedError(f"{type(self).__name__} sets up nothing")

    def put(self, model: nn.Module, data: list[Any] | None, adapter_name: str) -> Any:
        """The model with the adapter, started from data where the method does that."""
        return put(model, self.config(), adapter_name)

    @classmethod
    def schedule(cls, model: Any, adapter_name: str) -> Schedule:
        """What must follow the optimiser's steps."""
        return Schedule()

    def targeting(self) -> dict[str, Any]:
        """The fields that all settings of PEFT have."""
        return {
            "target_modules": self.target_modules or "all-linear",
            "exclude_modules": self.exclude_modules,
            "modules_to_save": self.modules_to_save,
        }


def schedule_of(model: Any, adapter_name: str) -> Schedule:
    """What must follow the optimiser's steps for an adapter of PEFT's own: nothing, for most."""
    config = model.peft_config[adapter_name]
    for entry in entries("adapters"):
        if issubclass(entry.cls, Native) and type(config) is entry.cls.of:
            found: Schedule = entry.cls.schedule(model, adapter_name)
            return found
    return Schedule()


def put(model: nn.Module, config: PeftConfig, adapter_name: str) -> Any:
    """The model with one more adapter, which is the active one."""
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
        model.set_adapter(adapter_name)
        return model
    return get_peft_model(model, config, adapter_name)
