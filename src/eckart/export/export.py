"""The verb `export`: from a folder of ours to one that another program reads, whole or not at all."""

from __future__ import annotations

import importlib
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import transformers

from eckart.checkpoint.folder import model_class
from eckart.checkpoint.source import no_bars, resolve
from eckart.downloads import Progress, silent
from eckart.registry import suggest

TARGETS = {"peft": "eckart.export.peft", "gguf": "eckart.export.gguf", "onnx": "eckart.export.onnx"}
"""What can be written -> the module whose `write` does it."""


@dataclass
class Written:
    """What an exporter says of what it wrote.

    Attributes:
        layers: layer or tensor -> how it is held.
        notes: what a user should know, one sentence each.
    """

    layers: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Exported(Written):
    """An export that was carried out.

    Attributes:
        target: one of `TARGETS`.
        folder: where it is.
        files: name below the folder -> bytes.
    """

    target: str = ""
    folder: Path = Path()
    files: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            "target": self.target,
            "folder": str(self.folder),
            "files": self.files,
            "layers": self.layers,
            "notes": self.notes,
        }


class Writer(Protocol):
    """What a target's module has under the name `write`. It may change the model, which is a copy of its own."""

    def __call__(self, model: Any, source: Path, out: Path, strict: bool) -> Written: ...


def export(
    folder: str | Path, to: str, out: str | Path, *, strict: bool = False, progress: Progress = silent
) -> Exported:
    """Write a compressed model, or any other, in the format of another program.

    Args:
        folder: what `compress_to` or `save_pretrained` wrote, or any other name of a model.
        to: `peft` (a base and a LoRA adapter), `gguf` (llama.cpp) or `onnx`.
        out: the new folder; it appears at the end, whole.
        strict: refuse whatever the format cannot hold exactly.

    Raises:
        FileExistsError: `out` is there already.
        ImportError: the target needs a package that is not installed.
        ValueError: the target is unknown, or cannot hold this model: the message names the layer.
    """
    if to not in TARGETS:
        raise ValueError(f"unknown target {to!r}{suggest(to, list(TARGETS))}")
    target = Path(out).expanduser().resolve()
    if target.exists():
        raise FileExistsError(f"{out} exists already: choose another folder, or remove it")
    write: Writer = importlib.import_module(TARGETS[to]).write
    source = resolve(folder, progress=progress)
    model = load(source.folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        made = work / "made"
        made.mkdir()
        written = write(model, source.folder, made, strict)
        made.rename(target)
    finally:
        shutil.rmtree(work)
    files = {str(p.relative_to(target)): p.stat().st_size for p in sorted(target.rglob("*")) if p.is_file()}
    return Exported(written.layers, written.notes, to, Path(out), files)


def load(folder: Path) -> Any:
    """The model of a folder, in memory, in the dtype in which it is stored."""
    config = transformers.AutoConfig.from_pretrained(folder)
    with no_bars():
        return model_class(config).from_pretrained(folder, dtype="auto").eval()
