"""Weights of a folder, one tensor at a time: plain reads of safetensors files, every promise of which is checked first.

The files are read, not mapped, so that a model larger than the address space that a process is allowed can be walked.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes; the limit that the safetensors library sets
MAX_DIMENSIONS = 64

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `nbytes` at `start` (from the beginning of `file`)."""

    file: Path
    shape: torch.Size
    dtype: torch.dtype
    start: int
    nbytes: int


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder, sorted by name.

    Raises:
        ValueError: there are none (and what there is instead), or the index names a file that is missing.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return sorted({folder / shard for shard in _weight_map(folder).values()})
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise ValueError(
            f"{folder} holds its weights as pickle files (.bin, .pt), which can run code when they are opened, and no "
            "safetensors. Open it with transformers where you trust it and call save_pretrained, which writes them."
        )
    if any(folder.glob("*.gguf")):
        raise ValueError(f"{folder} holds GGUF weights and no safetensors. Name the .gguf file itself.")
    raise ValueError(f"{folder} holds no weights: neither {SINGLE} nor {INDEX} is there.")


class WeightReader:
    """The tensors of a folder by name. Only headers are held; each `load` reads the bytes of one tensor.

    Raises:
        ValueError: a file is cut short or contradicts itself, a shard is missing, or the index names a tensor that its
            shard does not hold. The message names the file.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        files = weight_files(folder)
        headers = {file.name: read_header(file) for file in files}
        if files == [folder / SINGLE]:
            self._entries: Mapping[str, Entry] = headers[SINGLE]
            return
        entries = {}
        for name, shard in _weight_map(folder).items():
            if name not in headers[shard]:
                raise ValueError(f"{folder / INDEX} says that {name!r} is in {shard}, which does not hold it.")
            entries[name] = headers[shard][name]
        self._entries = entries

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> torch.Size:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def nbytes(self, name: str) -> int:
        return self._entry(name).nbytes

    def load(self, name: str) -> Tensor:
        """The tensor, of any shape, in memory of its own."""
        entry = self._entry(name)
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        if entry.nbytes:
            with entry.file.open("rb") as file:
                file.seek(entry.start)
                got = file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data)
            if got != entry.nbytes:
                raise ValueError(f"{entry.file} ended {entry.nbytes - got} bytes short in tensor {name!r}.")
        return tensor

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise KeyError(f"{self.folder} has no tensor {name!r}.")
        return self._entries[name]


def read_header(file: Path) -> dict[str, Entry]:
    """The table of contents of one safetensors file, checked against the file's size.

    Raises:
        ValueError: it is not a whole and consistent safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        head = handle.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if length == 0 or length > min(size - 8, MAX_HEADER):
            raise ValueError(f"{file} is not a safetensors file, or is cut short: {size} bytes, header of {length}.")
        header = _json_object(handle.read(length), file)
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, value, 8 + length) for name, value in header.items()}
    end = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.nbytes)):
        if entry.start != end:
            raise ValueError(f"{file} is damaged: its tensors overlap or leave a gap at byte {min(entry.start, end)}.")
        end += entry.nbytes
    if end != size:
        raise ValueError(f"{file} is damaged or cut short: its tensors end at byte {end}, the file at {size}.")
    return entries


def _entry(file: Path, name: str, value: Any, data: int) -> Entry:
    def wrong(what: str) -> ValueError:
        return ValueError(f"{file}: the entry of tensor {name!r} {what}.")

    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise wrong("lacks dtype, shape or data_offsets")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise wrong(f"has the dtype {value['dtype']!r}, which is not one of {', '.join(DTYPES)}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise wrong("has a shape that is not a list of sizes")
    if not _naturals(offsets) or len(offsets) != 2:
        raise wrong("has data_offsets that are not a begin and an end")
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes != offsets[1] - offsets[0] or math.prod(max(n, 1) for n in shape) >= 2**60:
        raise wrong(f"has a shape that does not fit its {offsets[1] - offsets[0]} bytes")
    return Entry(file, torch.Size(shape), dtype, data + offsets[0], nbytes)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _weight_map(folder: Path) -> dict[str, str]:
    index = folder / INDEX
    shards = _json_object(index.read_bytes(), index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index} has no weight_map.")
    for name, shard in shards.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{index} puts {name!r} into {shard!r}, which is not a file name.")
        if not (folder / shard).is_file():
            raise ValueError(f"{index} names {shard}, which is missing. Fetch or copy the whole folder again.")
    return shards


def _json_object(text: bytes, file: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} holds broken JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} should hold a JSON object and holds a {type(value).__name__}.")
    return value
