"""ONNX graphs: run by onnxruntime, they compute what the model does, at sizes other than those of the export."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import made
import pytest
import torch

import tiny
from eckart.export import export
from eckart.export import onnx as exporter

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

FORMS = {
    "q_proj": "quantized(bits=4, group=16) + low_rank(rank=4)",
    "v_proj": "quantized(bits=3, group=16, grid=normal_float())",
    "k_proj": "rotated(quantized(bits=4, group=16))",
    "up_proj": "rotated(pyramid(pulses=12))",
    "gate_proj": "low_rank(rank=4)",
    "down_proj": "sparse(density=0.3)",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model `m` of one block with several forms, one of which torch cannot export, and its export `out`."""
    at = tmp_path_factory.mktemp("onnx")
    model = tiny.build("llama", num_hidden_layers=1)
    for layer, form in FORMS.items():
        made.factor(model, form, (layer,))
    export(made.save(model, at / "m"), "onnx", at / "out")
    return at


def run(file: Path, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0])


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (2, 3), (3, 11)])
def test_the_graph_computes_the_logits(folder: Path, rows: int, length: int) -> None:
    model = load(folder / "m")
    ids = made.ids(rows, length)
    mask = torch.ones_like(ids)
    mask[0, length // 2 + 1 :] = 0
    found = run(folder / "out/model.onnx", ids, mask)
    wanted = made.logits(model, ids, attention_mask=mask)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=0, atol=1e-4)


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def test_codes_stay_packed_and_factors_stay_factors(folder: Path) -> None:
    stored = {i.name: i for i in onnx.load(folder / "out/model.onnx").graph.initializer}
    for name, tensor in load(folder / "m").state_dict().items():
        if "down_proj" in name or "lm_head" in name or "up_proj.matrix.matrix" in name:
            continue
        assert tuple(stored[f"model.{name}"].dims) == tuple(tensor.shape), name
        assert (stored[f"model.{name}"].data_type == onnx.TensorProto.UINT8) == (tensor.dtype == torch.uint8)
    codes = stored["model.model.layers.0.mlp.up_proj.matrix.matrix.codes"]  # of the points
    assert (tuple(codes.dims), codes.data_type) == ((48, 16), onnx.TensorProto.UINT8)
    assert (folder / "out/tokenizer.json").is_file()


def test_a_form_that_torch_cannot_export_is_stored_dense_or_refused(folder: Path) -> None:
    stored = {i.name: tuple(i.dims) for i in onnx.load(folder / "out/model.onnx").graph.initializer}
    assert stored["model.model.layers.0.mlp.down_proj.weight"] == (32, 48)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj cannot be written as ONNX in its form sparse"):
        export(folder / "m", "onnx", folder / "strict", strict=True)


def test_models_of_other_inputs_are_refused(tmp_path: Path) -> None:
    tiny.build("vit").save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="takes pixel_values"):
        export(tmp_path / "m", "onnx", tmp_path / "out")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ImportError, match=r"the package onnxscript: pip install 'eckart\[onnx\]'"):
        exporter.write(tiny.build("llama"), tmp_path, tmp_path)
