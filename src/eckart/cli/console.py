"""What all commands share: progress bars, tables, JSON, and errors that a person can act on."""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from eckart.allocation import BudgetError

out = Console() if sys.stdout.isatty() else Console(width=180)  # a file or a pipe has room for whole names
err = Console(stderr=True)

EXIT_ERROR, EXIT_USAGE, EXIT_BUDGET, EXIT_EXISTS, EXIT_INTERRUPTED = 1, 2, 3, 4, 130

LABELS = {
    "download": "Downloading",
    "convert": "Converting",
    "tokenise": "Reading text",
    "calibrate": "Calibrating",
    "gradients": "Backward pass",
    "plan": "Planning",
    "trial": "Trying plans",
    "fit": "Fitting",
    "train": "Training",
    "evaluate": "Evaluating",
    "agreement": "Comparing",
    "perplexity": "Evaluating",
    "speed": "Timing",
}


class Bars:
    """One progress bar a stage, on standard error."""

    def __init__(self, prefix: str = ""):
        self.prefix = prefix
        self._tasks: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=32), MofNCompleteColumn(), TimeElapsedColumn(),
            console=err, disable=not err.is_terminal,
        )  # fmt: skip

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            label = LABELS.get(stage, stage.capitalize())
            self._tasks[stage] = self._progress.add_task(f"{self.prefix}{label}", total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total)


def show_json(data: dict[str, Any]) -> None:
    """One JSON object on standard output."""
    sys.stdout.write(json.dumps(data, ensure_ascii=False) + "\n")


@contextmanager
def acting(as_json: bool = False) -> Iterator[None]:
    """Within the context, what goes wrong for a known reason ends the program with one sentence and an exit code."""
    quiet()
    try:
        yield
    except BudgetError as e:
        fail(str(e), EXIT_BUDGET, as_json)
    except FileExistsError as e:
        fail(str(e), EXIT_EXISTS, as_json)
    except OSError as e:
        where = f" ({e.filename})" if e.filename else ""
        fail(_noted(f"{e.strerror or e}{where}", e), EXIT_ERROR, as_json)
    except (ValueError, TypeError, RuntimeError, ImportError, KeyError) as e:
        if os.environ.get("ECKART_TRACEBACK"):
            raise
        fail(str(e), EXIT_ERROR, as_json)
    except KeyboardInterrupt as e:
        fail(_noted("interrupted", e), EXIT_INTERRUPTED, as_json)
    except typer.Exit:
        raise
    except Exception as e:  # nobody foresaw it, so the place where it happened is told, too
        if not as_json:
            raise
        traceback.print_exc()
        fail(f"{type(e).__name__}: {e}", EXIT_ERROR, as_json)


def _noted(message: str, error: BaseException) -> str:
    return "; ".join([message, *getattr(error, "__notes__", [])])


def fail(message: str, code: int, as_json: bool) -> NoReturn:
    """Say what went wrong and leave."""
    if as_json:
        show_json({"error": message, "exit_code": code})
    else:
        err.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(code)


def quiet() -> None:
    """Keep other libraries' bars and notices off the screen."""
    import transformers

    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def table(title: str, columns: list[str], rows: list[list[str]], left: int = 1) -> Table:
    """A table whose first `left` columns are text and whose others are numbers."""
    made = Table(title=title, title_justify="left", header_style="bold")
    for i, name in enumerate(columns):
        made.add_column(name, justify="left" if i < left else "right", no_wrap=i == 0)
    for row in rows:
        made.add_row(*(escape(cell) for cell in row))
    return made


def megabytes(n: float | None) -> str:
    return "-" if n is None else f"{n / 1e6:.1f} MB"


def number(x: float | None, digits: int = 4) -> str:
    return "-" if x is None else f"{x:.{digits}g}"
