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
from eckart.export.adapted import is_adapter, open_adapter
from eckart.registry import suggest

TARGETS = {"peft": "eckart.export.peft", "gguf": "eckart.export.gguf", "onnx": "eckart.export.onnx"}
"""What a model can be written as -> the module whose `write` does it."""
ADAPTERS = {"lora": "eckart.export.lora", "gguf": "eckart.export.lora_gguf"}
"""What an adapter can be written as."""


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
        target: one of `TARGETS` or `ADAPTERS`.
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


class AdapterWriter(Protocol):
    """The same for adapters."""

    def __call__(self, adapted: Any, out: Path, rank: int | None, strict: bool) -> Written: ...


def export(
    folder: str | Path, to: str, out: str | Path, *, strict: bool = False, rank: int | None = None,
    base: str | None = None, progress: Progress = silent,
) -> Exported:  # fmt: skip
    """Write a compressed model, or any other, or an adapter, in the format of another program.

    Args:
        folder: what `compress_to`, `finetune` or `save_pretrained` wrote, or any other name of a model.
        to: of a model `peft` (a base and a LoRA adapter), `gguf` (llama.cpp) or `onnx`; of an adapter `lora` (PEFT's
            plain LoRA, which other servers read) or `gguf` (llama.cpp's adapter).
        out: the new folder; it appears at the end, whole.
        strict: refuse whatever the format cannot hold exactly.
        rank: of an adapter's layers, at most; their own where not given.
        base: the model that an adapter sits on, where it is not the one that its settings name.

    Raises:
        FileExistsError: `out` is there already.
        ImportError: the target needs a package that is not installed.
        ValueError: the target is unknown, or cannot hold this model or adapter: the message names the layer.
    """
    adapter = is_adapter(folder)
    _check(folder, to, adapter, rank, base)
    target = Path(out).expanduser().resolve()
    if target.exists():
        raise FileExistsError(f"{out} exists already: choose another folder, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        made = work / "made"
        made.mkdir()
        if adapter:
            put: AdapterWriter = importlib.import_module(ADAPTERS[to]).write
            written = put(open_adapter(Path(folder).expanduser(), base, progress), made, rank, strict)
        else:
            write: Writer = importlib.import_module(TARGETS[to]).write
            source = resolve(folder, progress=progress)
            written = write(load(source.folder), source.folder, made, strict)
        made.rename(target)
    finally:
        shutil.rmtree(work)
    files = {str(p.relative_to(target)): p.stat().st_size for p in sorted(target.rglob("*")) if p.is_file()}
    return Exported(written.layers, written.notes, to, Path(out), files)


def _check(folder: str | Path, to: str, adapter: bool, rank: int | None, base: str | None) -> None:
    """Raises `ValueError` where a target is not for this kind of folder."""
    known = ADAPTERS if adapter else TARGETS
    if to not in known and to in {*TARGETS, *ADAPTERS}:
        kind, words = ("an adapter", "adapters") if adapter else ("no folder of an adapter", "models")
        merged = "; for the others, merge it into its base first (model.merge_and_unload())" if adapter else ""
        raise ValueError(f"{folder} is {kind}, and {to!r} is not for {words}: write it as {' or '.join(known)}{merged}")
    if to not in known:
        raise ValueError(f"unknown target {to!r}{suggest(to, list(known))}")
    if not adapter and (rank is not None or base is not None):
        raise ValueError(f"{folder} is no folder of an adapter: --rank and --base are for adapters")
    if rank is not None and rank < 1:
        raise ValueError(f"a LoRA of rank {rank} holds nothing: give a rank of at least 1")


def load(folder: Path) -> Any:
    """The model of a folder, in memory, in the dtype in which it is stored."""
    config = transformers.AutoConfig.from_pretrained(folder)
    with no_bars():
        return model_class(config).from_pretrained(folder, dtype="auto").eval()
