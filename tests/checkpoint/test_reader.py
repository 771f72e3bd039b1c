"""The safetensors reader gives what the safetensors library gives, and an error, never more, for anything damaged."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from eckart.checkpoint.reader import DTYPES, WeightReader, read_header, weight_files


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {
        str(dtype): torch.randint(0, 2 if dtype == torch.bool else 100, (3, 5), generator=generator).to(dtype)
        for dtype in DTYPES.values()
    }
    return made | {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "wide": torch.randn(1, 700, generator=generator),
    }


def save_shards(folder: Path) -> dict[str, torch.Tensor]:
    """Two shards and their index."""
    first, second = {"a": torch.randn(4, 3)}, {"b": torch.randn(2), "c": torch.zeros(1, dtype=torch.int8)}
    save_file(first, folder / "model-00001-of-00002.safetensors")
    save_file(second, folder / "model-00002-of-00002.safetensors")
    write_index(folder, dict.fromkeys(first, 1) | dict.fromkeys(second, 2))
    return first | second


def write_index(folder: Path, shards: dict[str, int]) -> None:
    weight_map = {name: f"model-0000{number}-of-00002.safetensors" for name, number in shards.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_raw(file: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def test_every_tensor_is_what_the_library_reads(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    reader, expected = WeightReader(tmp_path), load_file(tmp_path / "model.safetensors")
    assert set(reader.names()) == set(expected)
    for name, tensor in expected.items():
        loaded = reader.load(name)
        assert (reader.shape(name), reader.dtype(name)) == (tensor.shape, tensor.dtype)
        assert reader.nbytes(name) == tensor.nbytes
        assert loaded.dtype == tensor.dtype
        assert loaded.shape == tensor.shape
        assert torch.equal(loaded.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_a_loaded_tensor_is_the_callers_own(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    reader = WeightReader(tmp_path)
    reader.load("a").zero_()
    assert torch.equal(reader.load("a"), torch.ones(3))


def test_shards_are_one_model(tmp_path: Path) -> None:
    expected = save_shards(tmp_path)
    reader = WeightReader(tmp_path)
    assert reader.names() == list(expected)
    assert [file.name[:11] for file in weight_files(tmp_path)] == ["model-00001", "model-00002"]
    assert all(torch.equal(reader.load(name), tensor) for name, tensor in expected.items())


def test_an_unknown_name(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(KeyError, match="no tensor 'b'"):
        WeightReader(tmp_path).load("b")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names model-00002-of-00002.safetensors, which is missing"):
        WeightReader(tmp_path)


def test_an_index_that_names_a_missing_tensor(tmp_path: Path) -> None:
    save_shards(tmp_path)
    write_index(tmp_path, {"a": 1, "b": 1, "c": 2})
    with pytest.raises(ValueError, match=r"'b' is in model-00001-of-00002.safetensors, which does not hold it"):
        WeightReader(tmp_path)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "", 3, None, "a\0b"])
def test_an_index_cannot_point_elsewhere(tmp_path: Path, shard: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ValueError, match="index"):
        WeightReader(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', "{" * 100_000, "[" * 100_000, '{"weight_map": {}}']
)
def test_a_broken_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="index"):
        WeightReader(tmp_path)


def test_pickle_is_never_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"whatever")
    with pytest.raises(ValueError, match="pickle"):
        weight_files(tmp_path)


def test_folders_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no weights"):
        weight_files(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"Name the \.gguf file"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (3, "lacks"),
        ({"dtype": "F32", "shape": [1]}, "lacks"),
        ({"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}, "dtype 'F99'"),
        ({"dtype": [], "shape": [1], "data_offsets": [0, 4]}, "dtype"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "not a list of sizes"),
        ({"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}, "not a list of sizes"),
        ({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, "not a list of sizes"),
        ({"dtype": "F32", "shape": [1] * 65, "data_offsets": [0, 4]}, "not a list of sizes"),
        ({"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}, "not a list of sizes"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}, "does not fit"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0]}, "begin and an end"),
        ({"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4]}, "does not fit"),
        ({"dtype": "F32", "shape": [2**31, 2**31, 4], "data_offsets": [0, 4]}, "does not fit"),
        ({"dtype": "F32", "shape": [0, 10**30], "data_offsets": [0, 0]}, "does not fit"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "cut short"),
        ({"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}, "cut short"),
        ({"dtype": "F32", "shape": [0], "data_offsets": [2, 2]}, "gap"),
    ],
)
def test_hostile_entries(tmp_path: Path, entry: object, message: str) -> None:
    file = write_raw(tmp_path / "model.safetensors", {"a": entry}, bytes(4))
    with pytest.raises(ValueError, match=message) as caught:
        read_header(file)
    assert str(file) in str(caught.value)


def test_overlapping_tensors(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    file = write_raw(tmp_path / "model.safetensors", {"a": entry, "b": entry}, bytes(4))
    with pytest.raises(ValueError, match="overlap"):
        read_header(file)


@pytest.mark.parametrize("header", [b"", b"[]", b"{", b"[" * 50_000, b"\xff\xfe{}", b'{"a": ' + b"9" * 5000 + b"}"])
def test_headers_that_are_no_json_object(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        read_header(write_raw(tmp_path / "model.safetensors", header))


@pytest.mark.parametrize("length", [2**63, 2**40, 10**9])
def test_a_header_longer_than_the_file(tmp_path: Path, length: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_header(tmp_path / "model.safetensors")


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(5), "b": torch.ones(3, dtype=torch.int8)}, file)
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut short"):
            WeightReader(tmp_path)
    file.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match="damaged"):
        WeightReader(tmp_path)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(50)}, file)
    reader = WeightReader(tmp_path)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="10 bytes short in tensor 'a'"):
        reader.load("a")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_files_load_or_raise_value_error(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bool)}, file)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    with suppress(ValueError):
        reader = WeightReader(tmp_path)
        for name in reader.names():
            assert reader.load(name).nbytes <= len(content)
