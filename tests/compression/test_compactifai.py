"""CompactifAI: chains under a budget, spared blocks, reloading, and what a chain is that low rank is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import eckart
import tiny
from eckart.forms import parse
from eckart.forms.tensor_train import TensorTrainMatrix

IDS = tiny.batches((3,), length=12)[0]


def test_layers_become_chains_within_the_budget(tmp_path: Path) -> None:
    source = tiny.save_model(tmp_path / "m")
    result = eckart.compress_to(tmp_path / "out", source, "compactifai", budget="0.7 linears", data=None)
    assert tiny.weight_bytes(tmp_path / "out") == result.bytes_after <= result.budget
    assert all(layer.form.startswith("tensor_train(bond=") for layer in result.layers)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for layer in result.layers:
        matrix: Any = model.get_submodule(layer.name).matrix
        assert isinstance(matrix, TensorTrainMatrix)
        assert layer.bytes == matrix.nbytes < layer.dense_bytes
        assert layer.measured_error == pytest.approx(layer.predicted_error, rel=1e-2)
    with torch.no_grad():
        dense = eckart.densify(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
        assert torch.allclose(model(**IDS).logits.float(), dense(**IDS).logits.float(), atol=0.1)


def test_weights_keep_their_rank() -> None:
    model = tiny.build("llama")
    result = eckart.compress(model, "compactifai", budget="0.5 linears").result
    layer = next(x for x in result.layers if x.name.endswith("o_proj"))
    assert parse(layer.form).bond < 32
    found = model.get_submodule(layer.name).matrix.dense().detach()
    assert torch.linalg.matrix_rank(found) == 32


def test_more_bytes_are_less_error() -> None:
    totals = [
        eckart.compress(tiny.build("llama"), "compactifai", budget=f"{share} linears").result.totals()["measured_error"]
        for share in (0.3, 0.6, 0.9)
    ]
    assert totals[0] > totals[1] > totals[2]


def test_the_first_blocks_are_spared() -> None:
    model = tiny.build("llama")
    result = eckart.compress(model, "compactifai", budget="0.9 linears", spare=2).result
    for layer in result.layers:
        spared = not layer.name.startswith("model.layers.2.")
        assert (layer.form == "dense()") == spared
        assert ("spared" in (layer.note or "")) == spared


def test_three_cores_and_a_metric_of_the_users_own() -> None:
    model = tiny.build("gpt2")
    result = eckart.compress(
        model, "compactifai", budget="0.6 linears", form="tensor_train(cores=3)", metric="input_covariance()",
        data=tiny.batches(), targets=r".*\.0\.mlp\..*",
    ).result  # fmt: skip
    assert {x.form.partition("bond=")[0] for x in result.layers} == {"tensor_train("}
    assert len(model.get_submodule(result.layers[0].name).matrix.cores) == 3


def test_cores_can_be_healed() -> None:
    """Gradients reach every core, and a few steps on the lost function win some of it back."""
    model, original = tiny.build("llama"), tiny.build("llama")
    eckart.compress(model, "compactifai", budget="0.4 linears")
    cores = [p for name, p in model.named_parameters() if ".cores." in name]
    for core in cores:
        core.requires_grad_(True)
    with torch.no_grad():
        wanted = original(**IDS).logits
    optimizer, losses = torch.optim.Adam(cores, lr=3e-3), []
    for _ in range(15):
        loss = (model(**IDS).logits - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(core.grad is not None and bool(core.grad.any()) for core in cores)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_nonsense_is_refused() -> None:
    for settings, match in (({"spare": -1}, "not negative"), ({"budget": 0.01}, "smallest possible")):
        given: dict[str, Any] = {"budget": 0.9, **settings}
        with pytest.raises(ValueError, match=match):
            eckart.compress(tiny.build("llama"), "compactifai", **given)
