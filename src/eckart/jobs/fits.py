"""Fitted layers on disk, for methods that try many plans which share most of their layers."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from eckart.checkpoint.layout import save_tensors
from eckart.forms.densifying import make_portable
from eckart.jobs.plan import Layer
from eckart.jobs.solve import Fitted


class Fits:
    """Modules by layer, form and metric. They come back as new ones, quick to decode, which a trial may convert.

    Args:
        folder: for their tensors; what else belongs to a fit stays in memory, so that a new process starts afresh.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.known: dict[str, Fitted] = {}

    def of(
        self, layers: Sequence[Layer], metric: str, fitted: Callable[[list[Layer]], Iterable[Fitted]]
    ) -> Iterator[Fitted]:
        """The fits of `layers`, in order; those not yet known are made by `fitted`."""
        missing = [layer for layer in layers if self._key(layer, metric) not in self.known]
        self.folder.mkdir(parents=True, exist_ok=True)
        for layer, made in zip(missing, fitted(missing), strict=True):
            key, held = self._key(layer, metric), nn.ModuleDict({"matrix": made.module})
            make_portable(held)  # what is slow to decode would be decoded in every trial
            module: Any = held["matrix"]
            save_tensors(state := module.state_dict(), self.folder / key)
            module.load_state_dict({name: tensor.to("meta") for name, tensor in state.items()}, assign=True)
            self.known[key] = replace(made, module=module)
        for layer in layers:
            made = copy.deepcopy(self.known[key := self._key(layer, metric)])
            made.module.load_state_dict(load_file(self.folder / key), assign=True)
            yield made

    def _key(self, layer: Layer, metric: str) -> str:
        text = "\n".join((layer.name, layer.form, metric))
        return hashlib.sha256(text.encode()).hexdigest()[:32] + ".safetensors"
