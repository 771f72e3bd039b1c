"""What the benchmarks share: the machine they ran on, tables, and JSON that is written row by row."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

CPUINFO = Path("/proc/cpuinfo")


def machine() -> dict[str, Any]:
    """Processor, cores, threads of torch, its version, and how busy the machine is (load average of one minute)."""
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": load(),
    }


def processor() -> str:
    """The processor's name, as the kernel tells it where it does."""
    lines = CPUINFO.read_text(encoding="utf-8").splitlines() if CPUINFO.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def load() -> float:
    """Processes that wanted to run over the last minute; this benchmark's own threads are among them."""
    return round(os.getloadavg()[0], 2)


def table(title: str, text: Sequence[str], numbers: Sequence[str]) -> Table:
    """An empty table: columns of text, then columns of numbers."""
    made = Table(title=title, title_justify="left")
    for heading in text:
        made.add_column(heading)
    for heading in numbers:
        made.add_column(heading, justify="right")
    return made


def write_json(data: Any, path: Path) -> None:
    """Replace the file by `data`, all at once."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
