"""What every compression method owes (`Method`), and what it works with (`Job`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from eckart.allocation import Budget
from eckart.calibration.calibrate import Request
from eckart.calibration.store import OUTSIDE
from eckart.calibration.stream import Stream
from eckart.calibration.subject import Subject, outside
from eckart.checkpoint.layout import Layout, file_bytes, header_bytes
from eckart.jobs.fits import Fits
from eckart.jobs.plan import Layer, Plan
from eckart.jobs.solve import Executor
from eckart.metrics import Statistics


class Tries(Protocol):
    """Measures plans; see `Trial`."""

    folder: Path

    def __call__(
        self, method: Method, plan: Plan, *, tokens: int | None = None, draw: int = 0, measure: str = "loss",
        keep: bool = False,
    ) -> float: ...  # fmt: skip

    def drawn(self, tokens: int | None, draw: int) -> list[int]: ...


@dataclass
class Job:
    """What a method works with.

    Attributes:
        subject: the model, a part of which is loaded at a time.
        blocks: names of its blocks.
        budget: what was asked for.
        statistics: (layer, part) -> statistics of the original model.
        influence: of the blocks, where the method asked for it.
        layouts: for every part (the blocks, then what lies outside) the tensors of the input, as they are stored.
        executor: runs the work on layers.
        progress: told (stage, done, total).
        seed: of every random choice.
        trial: (method, plan) -> mean loss per token, on calibration text that no statistics saw, of the model as it
            would be after that plan; only for methods that ask to try plans.
        scratch: what methods keep in memory between their calls; empty again when a killed job is resumed.
        fits: fitted layers of plans that were tried, while plans are tried that share them.
        stream: the calibration data under way through the blocks, started, one for each name. In that called `hidden`,
            where the method is sequential, what enters a block is what the blocks that were rewritten put out.
    """

    subject: Subject
    blocks: list[str]
    budget: Budget
    statistics: Callable[[str, int], Statistics]
    influence: list[float]
    layouts: Mapping[int, Layout]
    executor: Executor
    progress: Callable[[str, int, int], None]
    seed: int
    trial: Tries | None = None
    scratch: dict[Any, Any] = field(default_factory=dict)
    fits: Fits | None = None
    stream: Callable[[str], Stream] | None = None

    @property
    def model(self) -> nn.Module:
        return self.subject.model

    @property
    def dtype(self) -> torch.dtype:
        return self.subject.storage_dtype

    @property
    def parts(self) -> list[int]:
        """The blocks in order, then what lies outside."""
        return [*range(len(self.blocks)), OUTSIDE]

    @property
    def input_bytes(self) -> int:
        """Of the input's weights, in this layout."""
        return sum(file_bytes(layout) for layout in self.layouts.values())

    def module_names(self, part: int) -> list[str]:
        """The modules that make up a part."""
        if part != OUTSIDE:
            return [self.blocks[part]]
        return outside(self.model, self.blocks)


@dataclass(frozen=True)
class Method(ABC):
    """A way to compress a model. Its dataclass fields are its hyperparameters."""

    key: ClassVar[str] = ""

    @property
    def sequential(self) -> bool:
        """Whether each block is fitted on what the compressed blocks before it put out."""
        return False

    @property
    def tries_plans(self) -> bool:
        """Whether the method needs calibration text set aside, on which it measures plans."""
        return False

    @abstractmethod
    def request(self, model: nn.Module, blocks: list[str]) -> Request:
        """What must be measured first."""

    def at_once(self, job: Job) -> Plan | None:
        """A plan that needs no statistics, where one is good enough: it saves the calibration."""
        return None

    @abstractmethod
    def plan(self, job: Job) -> Plan:
        """What to do with every layer. Nothing is changed."""

    @abstractmethod
    def rewrite(self, job: Job, plan: Plan, part: int) -> list[Layer]:
        """Change one part of the model, which is loaded, as planned; returns its layers with their measured errors.

        Modules are replaced and never written into, so that a plan can be tried and taken back.
        """

    def config_changes(self, plan: Plan) -> dict[str, Any]:
        """Entries of the model's config that are different once the plan is carried out."""
        return {}


def part_of(name: str, blocks: list[str]) -> int:
    """The block in which a module lies, or `OUTSIDE`."""
    return next((i for i, b in enumerate(blocks) if name == b or name.startswith(b + ".")), OUTSIDE)


def output_bytes(job: Job, replaced: Mapping[str, Layout]) -> int:
    """Bytes of all weight files, to the byte, when the modules called `replaced` hold these tensors instead."""
    return sum(file_bytes(_with(layout, replaced)) for layout in job.layouts.values())


def added_header_bytes(job: Job, replaced: Mapping[str, Layout]) -> int:
    """The most bytes that names, shapes and offsets of these tensors add, of modules that take no more than before."""
    files = job.layouts.values()
    most = (header_bytes(_with(layout, replaced), file_bytes(layout)) for layout in files)
    return sum(most) - sum(header_bytes(layout) for layout in files)


def _with(layout: Layout, replaced: Mapping[str, Layout]) -> Layout:
    kept = {k: v for k, v in layout.items() if k.rpartition(".")[0] not in replaced}
    for name in dict.fromkeys(k.rpartition(".")[0] for k in layout):
        kept |= {f"{name}.{k}": v for k, v in replaced.get(name, {}).items()}
    return kept


def count_weights(job: Job) -> int:
    """Numbers in the input, tied ones once."""
    return sum(torch.Size(shape).numel() for layout in job.layouts.values() for _, shape in layout.values())
