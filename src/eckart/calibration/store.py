"""Statistics on disk, one file a block: what makes calibration reusable and a killed run resumable."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from eckart.metrics.statistics import Statistics

OUTSIDE = -1
"""Index under which the statistics of layers in no block are kept."""


class StatisticsStore:
    """Statistics of named layers, in `folder`, by block.

    Layers that read the same tensor share one record: `leaders` says under whose name.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._cached: dict[str, tuple[Path, dict[str, Statistics], dict[str, str]]] = {}

    def path(self, index: int, part: str = "inputs") -> Path:
        return self.folder / (f"{part}-outside.safetensors" if index == OUTSIDE else f"{part}-{index:04d}.safetensors")

    def has(self, index: int, part: str = "inputs") -> bool:
        return self.path(index, part).exists()

    def covers(self, index: int, needs: Iterable[str], names: Iterable[str]) -> bool:
        """Whether these sums were collected for these layers of a block."""
        if not self.has(index):
            return False
        sums, leaders = self._load(index)
        return all(n in leaders and set(needs) <= sums[leaders[n]].sums.keys() for n in names)

    def save(self, index: int, sums: Mapping[str, Statistics], leaders: Mapping[str, str], part: str = "inputs") -> None:  # fmt: skip # noqa: E501
        """Write the record of one block; it appears under its name only when it is whole."""
        tensors = {f"{name}|{key}": value for name, s in sums.items() for key, value in s.sums.items()}
        path = self.path(index, part)
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary, metadata={"leaders": json.dumps(dict(leaders))})
        os.replace(temporary, path)
        self._cached.pop(part, None)

    def _load(self, index: int, part: str = "inputs") -> tuple[dict[str, Statistics], dict[str, str]]:
        path = self.path(index, part)
        if part not in self._cached or self._cached[part][0] != path:
            sums: dict[str, Statistics] = {}
            with safe_open(path, framework="pt") as f:
                leaders = json.loads((f.metadata() or {}).get("leaders", "{}"))
                for key in f.keys():  # noqa: SIM118
                    name, _, what = key.rpartition("|")
                    sums.setdefault(name, Statistics()).sums[what] = f.get_tensor(key)
            self._cached[part] = (path, sums, leaders)
        return self._cached[part][1], self._cached[part][2]

    def of(self, name: str, index: int) -> Statistics:
        """Everything known of one layer; empty where nothing is."""
        found = Statistics()
        for part in ("gradients", "inputs"):
            if self.has(index, part):
                sums, leaders = self._load(index, part)
                found.sums.update(sums.get(leaders.get(name, name), Statistics()).sums)
        return found
