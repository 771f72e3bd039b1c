"""How many bytes a safetensors file takes, before it is written; and writing one so that no half is ever left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from eckart.files import whole

NAMES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""safetensors' names of dtypes, in the order in which it lays out tensors."""

METADATA = {"format": "pt"}
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def tensor_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of one tensor's data."""
    return dtype.itemsize * torch.Size(shape).numel()


def header_bytes(layout: Layout, data: int | None = None) -> int:
    """Bytes of the length word and the JSON header, padded to eight, of a file that holds these tensors.

    Args:
        data: the most bytes that the tensors may take: what is counted then are the longest offsets within them.
    """
    header: dict[str, object] = {"__metadata__": METADATA}
    order = {dtype: i for i, dtype in enumerate(NAMES)}
    offset = 0
    for name, (dtype, shape) in sorted(layout.items(), key=lambda item: (order[item[1][0]], item[0])):
        size = tensor_bytes(dtype, shape)
        offsets = [offset, offset + size] if data is None else [data, data]
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        offset += size
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + (length + 7) // 8 * 8


def file_bytes(layout: Layout) -> int:
    """Bytes of a safetensors file that holds tensors of these dtypes and shapes, to the byte."""
    return header_bytes(layout) + sum(tensor_bytes(dtype, shape) for dtype, shape in layout.values())


def layout_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The layout of tensors that exist (on the meta device, too)."""
    return {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file, whole or not at all."""
    with whole(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata=METADATA)


def save_json(data: object, path: Path) -> None:
    """Write JSON, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
