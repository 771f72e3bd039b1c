"""QLLM against its card: thresholds, merged channels, what teaching a block gains, and models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import eckart
import tiny
from eckart.allocation import Budget, BudgetError
from eckart.anatomy import UnknownModel, anatomy
from eckart.calibration.subject import InMemory
from eckart.compression.qllm import QLLM, Found, Windows, readers
from eckart.forms import drop_in, parse
from eckart.forms.quantized_inputs import unrounded
from eckart.jobs.engine import Engine
from eckart.testing import error_ratio, gaussian

LONG: dict[str, Any] = {"length": 16}
QUICK: dict[str, Any] = {
    "budget": 1.0, "data": tiny.batches((4, 4), **LONG), "tokens": 64, "epochs": 1, "channel_ratio": 0.1
}  # fmt: skip
SIZES: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96}
HELD = tiny.batches((16,), seed=77, **LONG)[0]


def outlying(times: float = 10.0, channels: tuple[int, ...] = (4, 31), **settings: Any) -> Any:
    """A model some channels of whose norms are large, and the columns that read them as much smaller."""
    model = tiny.build("llama", **(SIZES | settings))
    at = list(channels)
    for block in model.model.layers:
        a, mlp = block.self_attn, block.mlp
        for norm, layers in (
            (block.input_layernorm, (a.q_proj, a.k_proj, a.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            norm.weight.data[at] *= times
            for layer in layers:
                layer.weight.data[:, at] /= times
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**HELD).logits


def after_blocks(model: Any) -> list[Tensor]:
    """What leaves each block on text that nothing was fitted on."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in model.model.layers]
    logits(model)
    for handle in handles:
        handle.remove()
    return found


def searches(model: Any, folder: Path, **settings: Any) -> list[tuple[tuple[str, ...], Found]]:
    """What is found for the layers of the first block."""
    method = QLLM(tokens=128, channel_ratio=0.15, **settings)
    engine = Engine(InMemory(model), method, Budget.parse(1.0), tiny.batches((4, 4), **LONG), folder)
    windows = Windows(engine._stream("hidden"), method.tokens)
    with torch.no_grad():
        groups = readers(anatomy(model).blocks[0])
        return [(names, method.search(engine.job, windows, 0, names, out)) for names, out in groups]


@pytest.mark.parametrize("times", [10.0, 30.0])
def test_the_threshold_is_the_best_of_those_tried(times: float, tmp_path: Path) -> None:
    qkv, mlp, _ = searches(outlying(times), tmp_path)
    for names, found in (qkv, mlp):
        errors = [error for *_, error in found.tried]
        assert len(errors) > 3
        assert found.tried[0][1] is None
        assert found.error == min(errors) < 0.7 * errors[0]
        assert found.error <= errors[-1]
        assert found.channels is not None
        assert set(found.channels.split) == {4, 31}, names


def test_errors_are_those_of_what_the_sub_layer_puts_out(tmp_path: Path) -> None:
    model = outlying()
    (names, found), *_ = searches(model, tmp_path)
    method, seen = QLLM(tokens=128), []
    a = model.model.layers[0].self_attn
    handle = a.o_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().flatten(0, 1)))
    for rounds in (False, True):
        for name in names if rounds else ():
            layer = model.get_submodule(name)
            matrix = method.rounding(layer.weight, found.channels, torch.float32).matrix(torch.float32)
            model.set_submodule(name, drop_in(layer, matrix))
        for batch in tiny.batches((4, 4), **LONG):
            model(**batch)
    handle.remove()
    whole, rounded = torch.cat(seen[:2]), torch.cat(seen[2:])
    assert float((whole - rounded).square().sum()) / 128 == pytest.approx(found.error, rel=1e-3)


def test_without_outliers_nothing_is_split(tmp_path: Path) -> None:
    model = tiny.build("llama", **SIZES)
    (names, found), (_, second), _ = searches(model, tmp_path)
    assert found.channels is second.channels is None
    changed, result = eckart.compress(model, "qllm", **{**QUICK, "epochs": 0})
    layer = next(one for one in result.layers if one.name == names[0])
    assert (layer.form, layer.note) == (str(QLLM().form), "no channel is worth splitting")
    plain = QLLM().form.fit(tiny.build("llama", **SIZES).get_submodule(names[0]).weight.detach())
    assert torch.equal(changed.get_submodule(names[0]).matrix.dense(), plain.dense())


def test_a_ratio_of_zero_is_rounding_alone_and_reassembly_beats_it() -> None:
    whole, off = logits(outlying()), []
    for ratio in (0.0, 0.2):
        changed, _ = eckart.compress(outlying(), "qllm", **{**QUICK, "epochs": 0, "channel_ratio": ratio})
        off.append(error_ratio(logits(changed), whole))
    assert off[1] < 0.9 * off[0]


@pytest.fixture(scope="module")
def taught() -> dict[int, Any]:
    """By epochs, the model and result."""
    data = tiny.batches((8,) * 6, **LONG)
    return {
        epochs: eckart.compress(
            outlying(num_hidden_layers=2),
            "qllm",
            budget=1.0,
            data=data,
            tokens=128,
            channel_ratio=0.1,
            epochs=epochs,
            lr=3e-3,
        )
        for epochs in (0, 4)
    }


def test_taught_blocks_are_nearer_on_held_out_text_and_store_no_more(taught: dict[int, Any]) -> None:
    wanted = after_blocks(outlying(num_hidden_layers=2))
    before, after = ([error_ratio(a, b) for a, b in zip(after_blocks(taught[e].model), wanted, strict=True)] for e in (0, 4))  # fmt: skip # noqa: E501
    assert all(b < 0.97 * a for a, b in zip(before, after, strict=True)), (before, after)
    states = [taught[e].model.state_dict() for e in (0, 4)]
    shapes = [{k: (v.shape, v.dtype) for k, v in state.items()} for state in states]
    assert shapes[0] == shapes[1]
    assert taught[0].result.bytes_after == taught[4].result.bytes_after
    moved = {k for k in states[0] if not torch.equal(states[0][k], states[1][k])}
    assert {"model.layers.0.input_layernorm.weight", "model.layers.1.post_attention_layernorm.weight"} <= moved
    assert not any("low" in layer.form for layer in taught[4].result.layers)
    assert all("teaching changes the block's squared error" in layer.note for layer in taught[4].result.layers)
    assert all(p.grad is None for p in taught[4].model.parameters())


def test_layers_that_read_one_tensor_share_their_channels(taught: dict[int, Any]) -> None:
    model, result = taught[4]
    for block in anatomy(model).blocks:
        for names in (block.attention.readers(), block.mlp.readers()):
            first, *others = (model.get_submodule(name).matrix.right.state_dict() for name in names)
            assert all(torch.equal(first[k], other[k]) for other in others for k in first)
        assert "reassembly" not in str(model.get_submodule(block.attention.o.module).matrix.form)
    for layer in result.layers:
        assert layer.bytes == parse(layer.form).nbytes(layer.shape, torch.float32)
        assert layer.energy > layer.measured_error > 0
        assert layer.predicted_error > 0


def test_saved_and_loaded_it_is_the_same(taught: dict[int, Any], tmp_path: Path) -> None:
    model = taught[4].model
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    with unrounded(loaded):
        assert not torch.equal(logits(loaded), logits(model))


def test_teaching_that_gains_nothing_is_left_out() -> None:
    results = [eckart.compress(outlying(), "qllm", **{**QUICK, **s}) for s in ({"lr": 1e-30}, {"epochs": 0})]
    assert torch.equal(logits(results[0].model), logits(results[1].model))
    assert all(layer.note.endswith("is left out") for layer in results[0].result.layers)
    with pytest.raises(RuntimeError, match=r"layers.0: the loss of batch \d is .* lower lr"):
        eckart.compress(outlying(), "qllm", **{**QUICK, "lr": 1e30, "epochs": 2})


@pytest.mark.parametrize("name", ["gpt2", "phi", "gpt_neox", "gemma2", "bert", "opt"])
def test_other_families(name: str) -> None:
    model = tiny.build(name, **({"num_hidden_layers": 1} if name != "gpt2" else {"n_layer": 1}))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    data = tiny.batches((2, 2), padded=True)
    changed, result = eckart.compress(model, "qllm", **{**QUICK, "data": data}, thresholds=5)
    assert all("quantized_inputs" in layer.form for layer in result.layers)
    with torch.no_grad():
        found = changed(**data[0]).logits
    fresh = tiny.build(name, **({"num_hidden_layers": 1} if name != "gpt2" else {"n_layer": 1}))
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())
    with torch.no_grad():
        real = data[0]["attention_mask"].bool()
        assert 0 < error_ratio(found[real], fresh(**data[0]).logits[real]) < 1


def test_a_job_cut_off_ends_with_the_same_bytes(tmp_path: Path) -> None:
    model = outlying(num_hidden_layers=2)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "m")
    whole = tiny.compressed_twice(tmp_path, "qllm", **QUICK)
    assert tiny.hashes(tmp_path / "whole") == tiny.hashes(tmp_path / "cut")
    assert tiny.weight_bytes(tmp_path / "whole") == whole.bytes_after
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    assert loaded.dtype == torch.bfloat16
    assert error_ratio(logits(loaded), logits(model)) < 1


def test_the_budget_is_enough_or_refused() -> None:
    settings = {**QUICK, "epochs": 0}
    with pytest.raises(BudgetError, match="qllm leaves nothing to choose") as error:
        eckart.compress(outlying(), "qllm", **{**settings, "budget": 0.2})
    needed = int(str(error.value).split(" bytes (")[0].split()[-1])
    assert eckart.compress(outlying(), "qllm", **{**settings, "budget": f"{needed}B"}).result.bytes_after == needed


def test_bad_input_is_named() -> None:
    for settings, message in (
        ({"channel_ratio": 0.5}, "only every second channel"), ({"channel_ratio": -0.1}, "share from 0 up"),
        ({"lr": 0.0}, "positive number"), ({"thresholds": 1}, "from 2 up"), ({"epochs": -1}, "from 0 up"),
        ({"rank": 0}, "from 1 up"), ({"form": parse("quantized(bits=4)")}, "it is quantized_inputs"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            QLLM(**settings)
    with pytest.raises(ValueError, match="qllm needs calibration data"):
        eckart.compress(outlying(), "qllm", budget=1.0)
    with pytest.raises(UnknownModel, match="Sequential has no config"):
        eckart.compress(nn.Sequential(nn.Linear(3, 3)), "qllm", budget=1.0, data=[{"input": gaussian(2, 3)}])
    broken = outlying()
    broken.model.layers[0].post_attention_layernorm.weight.data[3] = torch.inf
    with pytest.raises(ValueError, match=r"layers.0.mlp.gate_proj receives NaN or infinite"):
        eckart.compress(broken, "qllm", **QUICK)
    model = outlying()
    eckart.compress(model, "svd", budget=0.9)
    with pytest.raises(ValueError, match=r"_proj \(FactoredLinear\) is compressed or quantised already"):
        eckart.compress(model, "qllm", **QUICK)
