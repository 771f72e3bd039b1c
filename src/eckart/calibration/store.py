"""Statistics on disk, one file a block: what makes calibration reusable and a killed run resumable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from eckart.files import whole
from eckart.metrics.statistics import Statistics

OUTSIDE = -1
"""Index under which the statistics of layers in no block are kept."""


class StatisticsStore:
    """Statistics of named layers, in `folder`, by block, all of one model on the same data.

    Layers that read the same tensor share one record: `leaders` says under whose name.

    Args:
        gradients: name of the files with gradient sums; those of different losses are kept apart.
    """

    def __init__(self, folder: Path, gradients: str = "gradients"):
        self.folder, self.gradients = folder, gradients
        folder.mkdir(parents=True, exist_ok=True)
        self._cached: dict[str, tuple[Path, Contents]] = {}

    def path(self, index: int, part: str = "inputs") -> Path:
        return self.folder / (f"{part}-outside.safetensors" if index == OUTSIDE else f"{part}-{index:04d}.safetensors")

    def has(self, index: int, part: str = "inputs") -> bool:
        return self.path(index, part).exists()

    def covers(self, index: int, needs: Iterable[str], names: Iterable[str], part: str = "inputs") -> bool:
        """Whether these sums were collected for these layers of a block, or nothing was there to be collected."""
        if not self.has(index, part):
            return False
        found = self._contents(index, part)
        have = {n: found.sums.get(leader, set()) for n, leader in found.leaders.items()}
        return all(n in have and (not have[n] or "counts" in have[n] or set(needs) <= have[n]) for n in names)

    def joined(self, index: int, needs: Iterable[str], names: Iterable[str], part: str = "inputs") -> tuple[frozenset[str], list[str]]:  # fmt: skip # noqa: E501
        """These sums and layers, and those of the record that a new one will replace."""
        if not self.has(index, part):
            return frozenset(needs), list(names)
        found = self._contents(index, part)
        there = (found.sums.get(leader, set()) for leader in found.leaders.values())
        return frozenset(needs).union(*there), list(dict.fromkeys([*found.leaders, *names]))

    def save(self, index: int, sums: Mapping[str, Statistics], leaders: Mapping[str, str], part: str = "inputs") -> None:  # fmt: skip # noqa: E501
        """Write the record of one block, whole or not at all."""
        tensors = {f"{name}|{key}": value for name, s in sums.items() for key, value in s.sums.items()}
        with whole(self.path(index, part)) as temporary:
            save_file(tensors, temporary, metadata={"leaders": json.dumps(dict(leaders))})
        self._cached.pop(part, None)

    def _contents(self, index: int, part: str) -> Contents:
        path = self.path(index, part)
        if part not in self._cached or self._cached[part][0] != path:
            with _opened(path) as f:
                sums: dict[str, set[str]] = {}
                for key in f.keys():  # noqa: SIM118
                    name, _, what = key.rpartition("|")
                    sums.setdefault(name, set()).add(what)
                self._cached[part] = (path, Contents(sums, json.loads((f.metadata() or {}).get("leaders", "{}"))))
        return self._cached[part][1]

    def of(self, name: str, index: int) -> Statistics:
        """Everything known of one layer, read anew; empty where nothing is."""
        found = Statistics()
        for part in (self.gradients, "inputs"):
            if not self.has(index, part):
                continue
            contents = self._contents(index, part)
            leader = contents.leaders.get(name, name)
            with _opened(self.path(index, part)) as f:
                for what in sorted(contents.sums.get(leader, ())):
                    # a copy is aligned alike wherever it lay in the file, and so are the last bits of its products
                    found.sums[what] = f.get_tensor(f"{leader}|{what}").clone()
        return found


class Contents(NamedTuple):
    """What a file holds: the names of the sums of every leader, and who leads whom."""

    sums: dict[str, set[str]]
    leaders: dict[str, str]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as f:
            yield f
    except (SafetensorError, ValueError) as e:
        raise ValueError(f"the statistics in {path} are damaged ({e}): delete the file") from e


def fingerprint(batches: Sequence[Mapping[str, Any]]) -> str:
    """A hash of calibration data."""
    digest = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            value = batch[key]
            if isinstance(value, torch.Tensor):
                digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
            else:
                digest.update(f"{key} {value!r}".encode())
    return digest.hexdigest()[:16]
