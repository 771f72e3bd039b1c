"""Runs on disk: what they write down as they go on (a JSON object a step, TensorBoard's events, the last checkpoint),
and how they are cut off and resumed."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from eckart.downloads import Progress, silent
from eckart.files import whole
from eckart.jobs.place import Place
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
    """Go on from the checkpoint of a folder, if it has one."""
    state = read_state(folder, loop.device)
    if state is not None:
        loop.load(state)


def read_state(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The checkpoint of a folder, if it has one; nothing in it is executed."""
    if not (folder / STATE).exists():
        return None
    found: dict[str, Any] = torch.load(folder / STATE, weights_only=True, map_location=device.type)
    return found


def on_disk(
    out: Path, job: dict[str, Any], make: Callable[[Path], None], resume: bool = False, overwrite: bool = False
) -> None:
    """Let `make` finish the folder `model` within a working folder, and move it to `out`.

    The working folder, `<out>.partial`, stays where another attempt may do better. A run that had moved its result, and
    was killed then, only tidies up.

    Args:
        job: all settings; a run with others is not resumed.

    Raises:
        FileExistsError: `out` is there already, or an unfinished run is, and `overwrite` was not asked for.
        ValueError: the run to be resumed is another; and whatever `make` raises.
    """
    place = Place(out)
    place.enter(job, resume, overwrite)
    try:
        if not place.moved:
            make(place.work)
            place.move()
        place.leave()
    except (OSError, MemoryError, RuntimeError, KeyboardInterrupt) as e:
        e.add_note(f"what is done is kept in {place.work}, and --resume goes on from there")
        raise
    except Exception:
        if not (place.work / STATE).exists():
            place.leave()
        raise


def run_steps(loop: Loop, work: Path, progress: Progress = silent) -> None:
    """All steps that are left, with checkpoints. Raises `KeyboardInterrupt` after the step that Ctrl-C fell into."""
    total, every = loop.settings.steps, loop.settings.save_every
    metrics = Metrics(work, loop.steps)
    try:
        with patient() as asked:
            progress("train", loop.steps, total)
            while loop.steps < total:
                metrics.add(loop.step())
                progress("train", loop.steps, total)
                if loop.steps % every == 0 or loop.steps == total or asked.is_set():
                    save(loop, work)
                if asked.is_set():
                    raise KeyboardInterrupt(f"after step {loop.steps} of {total}")
    finally:
        metrics.close()


def last_loss(lines: Sequence[dict[str, Any]]) -> float:
    """Mean loss of the last twentieth of the steps."""
    last = [float(line["loss"]) for line in lines[-max(1, len(lines) // 20) :]]
    return sum(last) / len(last)


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
