"""Running a model block by block, with one block's weights and one batch's activations in memory at a time.

All blocks are first replaced by recorders that pass their input on; one run of that hollow model yields what enters
the first block and the other arguments (masks, rotary angles, per-layer settings) of every block. After that, each
block is run by itself over hidden states that lie on disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eckart.calibration.subject import Subject, block_names, outside

Batch = dict[str, Any]


class HiddenStates:
    """Rows of one float32 array (samples, length, width) in a file, read and written batch by batch."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, batches: Iterator[Tensor]) -> None:
        """Write all batches; the file appears under its name only when it is whole."""
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "wb") as f:
            for batch in batches:
                batch.detach().float().cpu().contiguous().numpy().tofile(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, self.path)

    def read(self, shapes: Sequence[tuple[int, ...]], index: int) -> Tensor:
        """The batch at `index`; `shapes` are those of all batches, in order."""
        start = sum(int(np.prod(s)) for s in shapes[:index])
        count = int(np.prod(shapes[index]))
        data = np.fromfile(self.path, dtype=np.float32, count=count, offset=4 * start)
        if data.size != count:
            raise ValueError(
                f"{self.path} is shorter than the calibration data it should hold: delete it and run again"
            )
        return torch.from_numpy(data).view(shapes[index])


class _Stop(Exception):
    """Raised by a recorder where the run has told all that is wanted."""


class _Recorder(nn.Module):
    """Stands for a block: keeps its other arguments and passes the hidden states on."""

    def __init__(self, block: nn.Module, returns_tuple: bool):
        super().__init__()
        self.returns_tuple = returns_tuple
        self.calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []
        self.output: Tensor | None = None  # what to return in place of the input
        self.keep = self.stop = False
        for name in ("attention_type", "layer_type", "layer_idx"):
            if hasattr(block, name):
                setattr(self, name, getattr(block, name))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states")
        if self.keep:
            self.calls.append((hidden, args, kwargs))
        if self.stop:
            raise _Stop
        out = hidden if self.output is None else self.output
        return (out,) if self.returns_tuple else out


class Stream:
    """A model as a chain of blocks over fixed calibration batches.

    Args:
        subject: the model.
        batches: keyword arguments of its forward pass, such as `input_ids` and `attention_mask`.
        folder: where hidden states are kept.
        blocks: names of the blocks; found by `block_names` where not given.
    """

    def __init__(self, subject: Subject, batches: Sequence[Batch], folder: Path, blocks: list[str] | None = None):
        if not batches:
            raise ValueError("the calibration data is empty: give at least one batch")
        self.subject, self.batches, self.folder = subject, list(batches), folder
        self.model = subject.model
        self.blocks = block_names(self.model) if blocks is None else blocks
        self.outside = outside(self.model, self.blocks)
        self.arguments: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self.shapes: list[tuple[int, ...]] = []
        self._returns_tuple = False

    def hidden(self, index: int) -> HiddenStates:
        """What enters block `index`; the number of blocks stands for what leaves the last one."""
        return HiddenStates(self.folder / f"hidden-{index:04d}.bin")

    @contextmanager
    def hollow(self, **settings: Any) -> Iterator[list[_Recorder]]:
        """Within the context, every block is a recorder."""
        own = [self.model.get_submodule(name) for name in self.blocks]
        recorders = [_Recorder(block, self._returns_tuple) for block in own]
        for recorder in recorders:
            for name, value in settings.items():
                setattr(recorder, name, value)
        try:
            for name, recorder in zip(self.blocks, recorders, strict=True):
                self.model.set_submodule(name, recorder)
            yield recorders
        finally:
            for name, block in zip(self.blocks, own, strict=True):
                self.model.set_submodule(name, block)

    @torch.no_grad()
    def start(self) -> None:
        """Find what enters the first block and what else is given to each one."""
        try:
            first = list(self._record())
        except (TypeError, IndexError, ValueError, RuntimeError, AttributeError):
            self._returns_tuple = True  # blocks of this model return tuples
            first = list(self._record())
        if not self.hidden(0).path.exists():
            self.hidden(0).write(iter(first))

    def _record(self) -> Iterator[Tensor]:
        self.arguments, self.shapes = [[] for _ in self.blocks], []
        firsts = []
        with self.subject.loaded(*self.outside), self.hollow(keep=True) as recorders:
            recorders[-1].stop = True
            for batch in self.batches:
                with suppress(_Stop):
                    self.model(**self._inputs(batch))
                hiddens = {r.calls[-1][0].shape for r in recorders}
                if len(hiddens) != 1:
                    raise IndexError("blocks return tuples")
                firsts.append(recorders[0].calls[-1][0])
                self.shapes.append(tuple(firsts[-1].shape))
            for i, recorder in enumerate(recorders):
                self.arguments[i] = [(args, _uncached(kwargs)) for _, args, kwargs in recorder.calls]
        yield from firsts

    def _inputs(self, batch: Batch) -> Batch:
        takes_cache = getattr(getattr(self.model, "config", None), "use_cache", None) is not None
        return {**batch, "use_cache": False} if takes_cache else batch

    def run(self, index: int, hidden: Tensor, batch: int) -> Tensor:
        """Block `index`, which must be loaded, on the hidden states (b, length, width) of one batch."""
        args, kwargs = self.arguments[index][batch]
        out = self.model.get_submodule(self.blocks[index])(hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def advance(
        self,
        index: int,
        before: Callable[[int], None] | None = None,
        after: Callable[[int, Tensor, Tensor], None] | None = None,
        write: bool = True,
    ) -> None:
        """Run block `index` over all batches, and write what leaves it where `write`.

        `before` is called with the number of each batch, `after` with that, the block's input and its output.
        """

        def outputs() -> Iterator[Tensor]:
            for b in range(len(self.batches)):
                if before is not None:
                    before(b)
                hidden = self.hidden(index).read(self.shapes, b)
                out = self.run(index, hidden, b)
                if after is not None:
                    after(b, hidden, out)
                yield out

        if write:
            self.hidden(index + 1).write(outputs())
        else:
            for _ in outputs():
                pass

    def finish(self, hidden: Tensor, batch: int, **extra: Any) -> Any:
        """The model's output for one batch, given what leaves its last block. The parts outside must be loaded."""
        with self.hollow() as recorders:
            recorders[-1].output = hidden
            return self.model(**self._inputs({**self.batches[batch], **extra}))

    def mask(self, batch: int) -> Tensor | None:
        """(b, length) True where a token is real; None where all are."""
        mask = self.batches[batch].get("attention_mask")
        if mask is None or mask.dim() != 2 or bool(mask.all()):
            return None
        return mask.bool()


def _uncached(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: (None if k in ("past_key_values", "past_key_value") else v) for k, v in kwargs.items()}
