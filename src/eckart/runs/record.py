"""What a run writes down as it goes on: one JSON object a step, TensorBoard's events, and its last checkpoint."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from eckart.files import whole
from eckart.runs.loop import Loop, Measured

METRICS, STATE, TENSORBOARD = "metrics.jsonl", "state.pt", "tensorboard"


class Metrics:
    """Appends what each step cost to `metrics.jsonl`, and to TensorBoard where that is installed.

    Lines beyond the step at which a run goes on are removed: they will be written again.

    Args:
        folder: where both lie.
        steps: that are done.
    """

    def __init__(self, folder: Path, steps: int):
        path = folder / METRICS
        kept = [line for line in _lines(path) if line["step"] <= steps]
        with whole(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self.file = path.open("a", encoding="utf-8")
        self.board = board(folder / TENSORBOARD, steps)

    def add(self, measured: Measured) -> None:
        """One more line."""
        self.file.write(json.dumps(asdict(measured)) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in asdict(measured).items():
                if name != "step":
                    self.board.add_scalar(name, value, measured.step)

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def board(folder: Path, steps: int) -> Any:
    """TensorBoard's writer, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=steps + 1)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` in a folder, in order."""
    return list(_lines(folder / METRICS))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file; a killed run may leave half of one at the end."""
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)


def save(loop: Loop, folder: Path) -> None:
    """Replace the checkpoint, whole or not at all."""
    with whole(folder / STATE) as temporary:
        torch.save(loop.state(), temporary)


def restore(loop: Loop, folder: Path) -> None:
    """Go on from the checkpoint of a folder, if it has one; nothing in it is executed."""
    if (folder / STATE).exists():
        loop.load(torch.load(folder / STATE, weights_only=True, map_location=loop.device.type))


@contextmanager
def patient() -> Iterator[threading.Event]:
    """Within the context, Ctrl-C sets the event and stops nothing; a second one interrupts as ever."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(*_: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
