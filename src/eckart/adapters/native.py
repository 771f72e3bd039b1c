"""Methods that PEFT has itself: our keys set them up, and add what a user of PEFT has to remember."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.conv import _ConvNd

from eckart.adapters.kinds import carries, described, is_convolution, matrix_shape
from eckart.adapters.matching import inner, targets
from eckart.registry import entries
from eckart.schedules import Schedule

BESIDE: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
"""Of convolutions and embeddings, what PEFT's LoRA stands beside."""


@dataclass(frozen=True)
class Native:
    """Settings of a method of PEFT's own, under the names that this library uses.

    Attributes:
        target_modules: as in PEFT; `all-linear` if not given.
        exclude_modules, modules_to_save: as in PEFT.
        dropout: of the adapter's input, in training.
        seed: of what PEFT draws; torch's global generator is left as it was.
    """

    target_modules: Any = None
    exclude_modules: Any = None
    modules_to_save: Any = None
    dropout: float = 0.0
    seed: int = 0

    key: ClassVar[str] = ""
    needs_data: ClassVar[bool] = False
    of: ClassVar[type[PeftConfig]] = PeftConfig
    """PEFT's settings of the method; those whose steps `schedule` follows have a class of their own."""
    sits_on: ClassVar[tuple[type[nn.Module], ...]] = ()
    """Convolutions and embeddings that PEFT's layers of the method stand beside."""
    follows: ClassVar[tuple[str, ...]] = ()
    """Of `groups`, `dilation` and `padding_mode`, what these layers take over from a convolution."""

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"{self.key}(dropout={self.dropout!r}): it is a share from 0, below 1")
        self.check()

    def check(self) -> None:
        """Raises `ValueError` where a setting does not do."""

    def fits(self, name: str, module: nn.Module, shape: tuple[int, int]) -> None:
        """Raises `ValueError` where a layer, whose matrix has the shape (out, in), cannot carry the adapter."""

    def stands(self, name: str, module: nn.Module) -> None:
        """Raises `ValueError` where PEFT's layers fail on a convolution or embedding, or merge into something else."""
        if isinstance(module, _ConvNd | nn.Embedding) and not isinstance(module, self.sits_on):
            raise ValueError(f"{name} is {described(module)}, on which {self.key}, which is PEFT's, cannot sit: leave it out with exclude_modules, or take an adapter that can ('lora_c' for any convolution, 'lora' for embeddings)")  # fmt: skip # noqa: E501
        if not is_convolution(module):
            return
        usual = {"groups": module.groups == 1, "dilation": {*module.dilation} == {1}, "padding_mode": module.padding_mode == "zeros"}  # fmt: skip # noqa: E501
        for word, is_usual in usual.items():
            if not is_usual and word not in self.follows:
                raise ValueError(f"{name} is a convolution with {word}={getattr(module, word)!r}, which PEFT's layers of {self.key} do not follow, so that they fail or merge into something else: leave it out with exclude_modules, or take 'lora_c', which sits on convolutions of all kinds")  # fmt: skip # noqa: E501

    def config(self) -> PeftConfig:
        """PEFT's settings."""
        raise NotImplementedError(f"{type(self).__name__} sets up nothing")

    def put(self, model: nn.Module, data: list[Any] | None, adapter_name: str) -> Any:
        """The model with the adapter, started from data where the method does that.

        Raises `ValueError` where a layer does not fit, before the model is changed.
        """
        config = self.config()
        for name, module in named(model, self.targets(model)).items():
            self.stands(name, module)
            if carries(module):
                self.fits(name, module, matrix_shape(module))
        with drawn_from(self.seed):
            return self.start(model, config, data, adapter_name)

    def start(self, model: nn.Module, config: PeftConfig, data: list[Any] | None, adapter_name: str) -> Any:
        """The model with an adapter of these settings; a method that starts from data overrides it."""
        return put(model, config, adapter_name)

    @classmethod
    def schedule(cls, model: Any, adapter_name: str) -> Schedule:
        """What must follow the optimiser's steps."""
        return Schedule()

    def targets(self, model: nn.Module) -> list[str]:
        """Names of the layers that get an adapter. Raises `ValueError` where there are none."""
        return targets(model, LoraConfig(**self.targeting()))

    def targeting(self) -> dict[str, Any]:
        """The fields that all settings of PEFT have."""
        return {
            "target_modules": self.target_modules or "all-linear",
            "exclude_modules": self.exclude_modules,
            "modules_to_save": self.modules_to_save,
        }

    def alone(self, model: nn.Module) -> None:
        """Raises `ValueError` where the model carries adapters already."""
        if isinstance(model, PeftModel):
            raise ValueError(f"{self.key} starts from a model without adapters, and this one carries {', '.join(model.peft_config)}: merge or unload what is there first")  # fmt: skip # noqa: E501


def named(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """name -> the frozen layer, also where adapters are on it."""
    found: dict[str, Any] = {name: inner(model).get_submodule(name) for name in names}
    return {n: m.get_base_layer() if isinstance(m, BaseTunerLayer) else m for n, m in found.items()}


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Within the context, torch's generator of the CPU, on which PEFT draws, begins at a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def tidied(modules: Sequence[nn.Module], model: nn.Module) -> Iterator[None]:
    """Runs the model for PEFT to look at: the mode is kept, and where that fails, its hooks and notes are removed."""
    hooks = [set(m._forward_hooks) for m in modules]
    notes = [set(vars(m)) for m in modules]
    training = model.training
    model.eval()
    try:
        yield
    except BaseException:
        for module, before, known in zip(modules, hooks, notes, strict=True):
            for hook in set(module._forward_hooks) - before:
                del module._forward_hooks[hook]
            for note in set(vars(module)) - known:
                delattr(module, note)
        raise
    finally:
        model.train(training)


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
