"""Running a model block by block, with one block's weights and one batch's activations in memory at a time.

All blocks are first replaced by recorders that pass their input on; one run of that hollow model yields what enters
the first block and the other arguments (masks, rotary angles, per-layer settings) of every block. After that, each
block is run by itself over hidden states that lie on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eckart.calibration.subject import Subject, block_names, outside
from eckart.files import whole

Batch = dict[str, Any]

PRECISION = "medium"
"""Of float32 products while a model is calibrated; see `torch.set_float32_matmul_precision`."""


class HiddenStates:
    """Rows of one float32 array (samples, length, width) in a file, read and written batch by batch."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, batches: Iterator[Tensor]) -> None:
        """Write all batches, or nothing where one fails."""
        with whole(self.path) as temporary, open(temporary, "wb") as f:
            for batch in batches:
                f.write(batch.detach().float().cpu().contiguous().numpy().data)

    def read(self, shapes: Sequence[tuple[int, ...]], index: int) -> Tensor:
        """The batch at `index`; `shapes` are those of all batches, in order."""
        start = sum(int(np.prod(s)) for s in shapes[:index])
        count = int(np.prod(shapes[index]))
        tensor = torch.empty(shapes[index])  # aligned as torch likes it: the last bits of products depend on that
        with open(self.path, "rb") as f:
            f.seek(4 * start)
            got = f.readinto(tensor.view(-1).numpy().data)
        if got != 4 * count:
            raise ValueError(
                f"{self.path} is shorter than the calibration data it should hold: delete it and run again"
            )
        return tensor


class _Stop(Exception):
    """Raised by a recorder where the run has told all that is wanted."""


class _Recorder(nn.Module):
    """Stands for a block: keeps its other arguments and passes the hidden states on."""

    def __init__(self, block: nn.Module, returns_tuple: bool):
        super().__init__()
        self.returns_tuple = returns_tuple
        self.entered: Any = None  # the hidden states of the last call
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
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
            self.entered = hidden
            self.calls.append((args, _uncached(kwargs)))
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
        blocks: names of the blocks; found by `block_names` where not given. Where a model has none, nothing enters
            them, all layers lie outside, and `finish` runs the model whole.
    """

    def __init__(self, subject: Subject, batches: Sequence[Batch], folder: Path, blocks: list[str] | None = None):
        if not batches:
            raise ValueError("the calibration data is empty: give at least one batch")
        self.subject, self.batches, self.folder = subject, [in_float(batch) for batch in batches], folder
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
        """Find what enters the first block and what else is given to each one.

        Raises `ValueError` where the model cannot run the batches.
        """
        with self.subject.loaded(*self.outside):
            try:
                self._record()
            except (TypeError, IndexError, ValueError, RuntimeError, AttributeError) as first:
                self._returns_tuple = True  # blocks of some models return tuples
                try:
                    self._record()
                except (TypeError, IndexError, ValueError, RuntimeError, AttributeError):
                    shapes = {k: tuple(v.shape) for k, v in self.batches[0].items() if isinstance(v, Tensor)}
                    raise ValueError(
                        f"{type(self.model).__name__} cannot run the calibration data, whose first batch is {shapes}: "
                        f"{first}. Windows may be longer than it has positions, or made with another tokenizer"
                    ) from first

    def _record(self) -> None:
        self.arguments, self.shapes = [], []
        first = self.hidden(0)
        if first.path.exists():
            for _ in self._firsts():
                pass
        else:
            first.write(self._firsts())

    def _firsts(self) -> Iterator[Tensor]:
        """What enters the first block, batch by batch; the other arguments of all blocks are kept."""
        if not self.blocks:
            self.shapes = [(0,)] * len(self.batches)
            yield from (torch.empty(0) for _ in self.batches)
            return
        with self.hollow(keep=True) as recorders:
            recorders[-1].stop = True
            self.arguments = [recorder.calls for recorder in recorders]
            for batch in self.batches:
                with suppress(_Stop):
                    self.model(**self._inputs(batch))
                if len({recorder.entered.shape for recorder in recorders}) != 1:
                    raise IndexError("its blocks do not hand hidden states of one shape on")
                self.shapes.append(tuple(recorders[0].entered.shape))
                yield recorders[0].entered

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
            for last in recorders[-1:]:
                last.output = hidden
            return self.model(**self._inputs({**self.batches[batch], **extra}))

    def mask(self, batch: int) -> Tensor | None:
        """(b, length) True where a token is real; None where all are."""
        mask = self.batches[batch].get("attention_mask")
        if mask is None or mask.dim() != 2 or bool(mask.all()):
            return None
        return mask.bool()


@contextmanager
def fast_products() -> Iterator[None]:
    """Within the context, float32 products may round their factors to bfloat16 where the hardware is faster at it.

    Sums stay in float32, so that a Gram matrix is that of slightly rounded inputs and stays positive semi-definite.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(PRECISION)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _uncached(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: (None if k in ("past_key_values", "past_key_value") else v) for k, v in kwargs.items()}


def in_float(batch: Batch) -> Batch:
    """Pictures and sounds of half precision in the float32 in which loaded parts of a model then compute."""
    half = (torch.float16, torch.bfloat16)
    return {k: v.float() if isinstance(v, Tensor) and v.dtype in half else v for k, v in batch.items()}


def single_rows(batches: Sequence[Batch]) -> list[Batch]:
    """The same rows in batches of one."""

    def row(value: Any, i: int, size: int) -> Any:
        return value[i : i + 1] if isinstance(value, Tensor) and value.dim() and value.shape[0] == size else value

    sizes = [next(v.shape[0] for v in batch.values() if isinstance(v, Tensor)) for batch in batches]
    return [{k: row(v, i, n) for k, v in batch.items()} for batch, n in zip(batches, sizes, strict=True) for i in range(n)]  # fmt: skip # noqa: E501
