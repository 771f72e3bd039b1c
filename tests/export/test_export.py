"""What all exports share: targets, folders that appear whole or not at all, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import made
import pytest
from typer.testing import CliRunner

import tiny
from eckart.cli import app
from eckart.export import export


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, quantised and corrected."""
    model = made.factor(tiny.build("llama"), "quantized(bits=4, group=16) + low_rank(rank=2)", ("q_proj", "up_proj"))
    return made.save(model, tmp_path_factory.mktemp("export") / "m")


def invoke(*words: Any) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(w) for w in words])


def test_an_unknown_target_is_answered_with_the_nearest(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown target 'ggufs'; did you mean 'gguf'"):
        export(folder, "ggufs", tmp_path / "out")
    with pytest.raises(ValueError, match="unknown target 'coreml'; known: gguf, onnx, peft"):
        export(folder, "coreml", tmp_path / "out")


def test_nothing_is_written_over(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out exists already"):
        export(folder, "peft", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_write_that_fails_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eckart.export import peft

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft, "save_json", full)
    with pytest.raises(OSError, match="No space left"):
        export(folder, "peft", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_it_wrote(folder: Path, tmp_path: Path) -> None:
    shown = invoke("export", folder, "--to", "peft", "-o", tmp_path / "shown")
    assert shown.exit_code == 0, shown.output
    assert "with a LoRA of rank 2" in shown.stdout
    assert "adapter/adapter_model.safetensors" in shown.stdout
    told = invoke("export", folder, "--to", "gguf", "-o", tmp_path / "told", "--json")
    found = json.loads(told.stdout)
    assert found["target"] == "gguf"
    assert found["files"] == {"model.gguf": (tmp_path / "told/model.gguf").stat().st_size}
    assert found["layers"]["model.layers.0.self_attn.q_proj"].startswith("F16, dequantised")
    assert any("takes token ids only" in note for note in found["notes"])


def test_the_command_fails_in_one_sentence(folder: Path, tmp_path: Path) -> None:
    refused = invoke("export", folder, "--to", "gguf", "-o", tmp_path / "out", "--strict", "--json")
    assert refused.exit_code == 1
    assert "self_attn.q_proj: no type of GGUF holds" in json.loads(refused.stdout)["error"]
    (tmp_path / "out").mkdir()
    assert invoke("export", folder, "--to", "onnx", "-o", tmp_path / "out").exit_code == 4
