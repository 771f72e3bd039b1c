"""The size of a safetensors file is known to the byte before it is written, and a file is whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from eckart.checkpoint.layout import NAMES, Layout, file_bytes, header_bytes, layout_of, save_json, save_tensors
from eckart.checkpoint.reader import DTYPES, read_header
from eckart.testing import gaussian

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["", "a.b.0.weight", 'say "so"', "back\\slash", "tab\tnew\nline", "\x00\x1f\x7f", "é漢😀", "\u2028", "a/b", "__x__"]
)
shapes = st.lists(st.sampled_from([0, 1, 2, 3, 7, 64]), max_size=4).map(tuple)
layouts = st.dictionaries(names, st.tuples(st.sampled_from(list(NAMES)), shapes), max_size=12)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layout") / "x.safetensors"


def zeros(described: Layout) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in described.items()}


@given(described=layouts)
@example(described={})
@example(described={f"t{i}": (dtype, (33, 31)) for i, dtype in enumerate(NAMES)})
@example(described={"b": (torch.float16, (500,)), "a": (torch.bfloat16, (7,)), "c": (torch.int16, (1,))})
@settings(deadline=None, max_examples=150)
def test_the_size_is_exact(file: Path, described: Layout) -> None:
    save_tensors(zeros(described), file)
    assert file.stat().st_size == file_bytes(described)
    assert header_bytes(described) == file_bytes(described) - sum(e.nbytes for e in read_header(file).values())
    assert {name: (e.dtype, tuple(e.shape)) for name, e in read_header(file).items()} == described


def test_every_dtype_that_can_be_read_has_a_size() -> None:
    assert {name: dtype for dtype, name in NAMES.items()} == DTYPES


def test_a_layout_needs_no_memory() -> None:
    big = {"w": torch.empty(10**6, 10**6, dtype=torch.bfloat16, device="meta")}
    assert layout_of(big) == {"w": (torch.bfloat16, (10**6, 10**6))}
    assert file_bytes(layout_of(big)) == 2 * 10**12 + header_bytes(layout_of(big))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    strided, trained = gaussian(4, 6).T, torch.nn.Parameter(gaussian(3))
    save_tensors({"strided": strided, "trained": trained, "empty": torch.zeros(0, 5)}, file)
    found = load_file(file)
    assert torch.equal(found["strided"], strided)
    assert torch.equal(found["trained"], trained.detach())
    assert found["empty"].shape == (0, 5)
    save_json({"b": [1, "é"], "a": None}, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"b": [1, "é"], "a": None}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.json", "x.safetensors"]


@pytest.mark.parametrize("name", ["x.safetensors", "x.json"])
def test_a_failed_write_leaves_the_earlier_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / name

    def save(value: int) -> None:
        if name.endswith(".json"):
            save_json({"a": value}, file)
        else:
            save_tensors({"a": torch.full((3,), value)}, file)

    save(1)
    before = file.read_bytes()

    def full(_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(2)
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_the_same_tensors_make_the_same_bytes(tmp_path: Path) -> None:
    one, other = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    save_tensors({"a": gaussian(3), "b": gaussian(2, 2)}, one)
    save_tensors({"b": gaussian(2, 2), "a": gaussian(3)}, other)
    assert one.read_bytes() == other.read_bytes()
