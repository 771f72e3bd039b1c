"""Gradient sums equal autograd's on the whole model; records of other data and losses are never mixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tiny
from eckart.calibration.calibrate import Request, calibrate
from eckart.calibration.collect import collect_gradients
from eckart.calibration.store import OUTSIDE, StatisticsStore, fingerprint
from eckart.calibration.stream import Stream, single_rows
from eckart.calibration.subject import InMemory
from eckart.downloads import silent
from eckart.jobs import Recipe
from eckart.metrics import Statistics
from eckart.metrics.statistics import GRADIENT_SUMS

CAUSAL = ["llama", "gpt2", "opt", "gemma", "gemma2", "qwen3", "gpt_neox", "phi"]


def gradients(model: nn.Module, batches: list[dict[str, Any]], folder: Path, labels: str = "data", samples: int = 99) -> dict[str, Statistics]:  # fmt: skip # noqa: E501
    """Block by block, as a job does it."""
    folder.mkdir(exist_ok=True)
    stream = Stream(InMemory(model), batches, folder)
    stream.start()
    for index in range(len(stream.blocks)):
        stream.advance(index)
    targets = Recipe().sites(model, stream.blocks)
    found: dict[str, Statistics] = {}
    for _, sums in collect_gradients(stream, targets, GRADIENT_SUMS, labels, 3, samples, silent):
        found |= sums
    return found


def autograd(model: nn.Module, batches: list[dict[str, Any]], names: list[str], labels: str) -> dict[str, Statistics]:
    """The same sums by a backward pass through the whole model for every row."""
    generator = torch.Generator().manual_seed(3)
    found = {name: Statistics() for name in names}
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            output.retain_grad()
            outputs[name] = output

        return keep

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    for batch in single_rows(batches):
        ids = batch["input_ids"]
        real = batch.get("attention_mask", torch.ones_like(ids)).bool()
        model.zero_grad()
        logits, counts, targets = model(**batch).logits[0], real[0].clone(), ids[0].roll(-1)
        if labels == "model":
            targets = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        else:
            counts[:-1] &= real[0, 1:]
            counts[-1] = False
        F.cross_entropy(logits[counts], targets[counts], reduction="sum").backward()
        for name in names:
            weight = model.get_submodule(name).weight.grad
            D = (weight if isinstance(model.get_submodule(name), nn.Linear) else weight.T).double()
            squares = D.square()
            g = outputs[name].grad.reshape(-1, squares.shape[0])[real.reshape(-1)].double()
            d = g.sum(0)
            sums = {"examples": 1.0, "fisher": squares, "fisher_in": squares.sum(0), "fisher_out": squares.sum(1),
                    "grad_tokens": float(counts.sum()), "grad_outer": g.T @ g,
                    "whole_gradients": torch.cat([D.T @ d, squares.sum()[None], d.square().sum()[None]])}  # fmt: skip
            found[name].merge(Statistics({k: torch.as_tensor(v).double() for k, v in sums.items()}))
    for handle in handles:
        handle.remove()
    return found


def assert_same(found: dict[str, Statistics], expected: dict[str, Statistics], rtol: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    for name, statistics in found.items():
        assert statistics.sums.keys() == expected[name].sums.keys()
        for key, value in statistics.sums.items():
            reference = expected[name].sums[key].double()
            scale = float(reference.abs().max())
            assert scale > 0
            torch.testing.assert_close(value.double(), reference, rtol=rtol, atol=rtol * scale, msg=f"{name} {key}")


@pytest.mark.parametrize("labels", ["data", "model"])
@pytest.mark.parametrize("name", CAUSAL)
def test_gradient_sums_are_those_of_the_whole_model(name: str, labels: str, tmp_path: Path) -> None:
    model, batches = tiny.build(name), tiny.batches(padded=True)
    found = gradients(model, batches, tmp_path, labels)
    assert_same(found, autograd(model, batches, list(found), labels))


def test_as_many_rows_as_tokens_are_told_apart(tmp_path: Path) -> None:
    """A batch of 9 windows of 9 tokens, whose masks and positions could be taken for rows."""
    model, batches = tiny.build("llama"), tiny.batches((9,), length=9, padded=True)
    found = gradients(model, batches, tmp_path)
    assert_same(found, autograd(model, batches, list(found), "data"))


def test_padding_adds_nothing_to_gradients(tmp_path: Path) -> None:
    model, padded = tiny.build("llama"), tiny.batches(padded=True)
    cut = [{"input_ids": r["input_ids"][:, r["attention_mask"][0].bool()]} for r in single_rows(padded)]
    assert_same(gradients(model, padded, tmp_path / "a"), gradients(model, cut, tmp_path / "b"))


def test_only_the_first_samples_are_taken(tmp_path: Path) -> None:
    model, batches = tiny.build("llama"), tiny.batches((2, 2))
    found = gradients(model, batches, tmp_path, samples=3)
    first = [batches[0], {"input_ids": batches[1]["input_ids"][:1]}]
    assert_same(found, autograd(model, first, list(found), "data"))


def test_gradients_of_a_broken_model_are_refused(tmp_path: Path) -> None:
    model = tiny.build("llama")
    model.lm_head.weight.data[5] = float("inf")
    for labels in ("data", "model"):
        with pytest.raises(ValueError, match="the predictions for calibration window 0 are not finite"):
            gradients(model, tiny.batches(), tmp_path / labels, labels)


def run(model: nn.Module, batches: list[dict[str, Any]], folder: Path, store: StatisticsStore, request: Request) -> int:
    """Calibrate; returns how many blocks were run for it."""
    folder.mkdir(exist_ok=True)
    stream = Stream(InMemory(model), batches, folder)
    stream.start()
    runs = []
    calibrate(stream, request, store, seed=0, progress=lambda stage, done, total: runs.append(stage))
    return len(runs)


def request_for(model: nn.Module, *needs: str, **settings: Any) -> Request:
    blocks = [f"model.layers.{i}" for i in range(3)]
    return Request(Recipe().sites(model, blocks), frozenset(needs), **settings)


def test_a_shared_record_grows_and_answers_again(tmp_path: Path) -> None:
    model, batches = tiny.build("llama"), tiny.batches()
    store = StatisticsStore(tmp_path / "s")
    first, second = request_for(model, "abs"), request_for(model, "outer", influence=True)
    assert run(model, batches, tmp_path / "h", store, first) == 3
    before = store.of("model.layers.1.mlp.up_proj", 1).sums["abs"]
    assert run(model, batches, tmp_path / "h", store, second) == 3
    assert run(model, batches, tmp_path / "h", store, first) == 0
    assert run(model, batches, tmp_path / "h", store, second) == 0
    both = store.of("model.layers.1.mlp.up_proj", 1).sums
    assert both.keys() == {"tokens", "abs", "outer"}
    assert torch.equal(both["abs"], before)


def test_a_narrower_request_finds_its_layers_under_another_leader(tmp_path: Path) -> None:
    model, batches = tiny.build("llama"), tiny.batches()
    store, alone = StatisticsStore(tmp_path / "s"), StatisticsStore(tmp_path / "t")
    wide = request_for(model, "outer")
    narrow = Request({0: ["model.layers.0.self_attn.v_proj"]}, frozenset({"outer"}))
    run(model, batches, tmp_path / "h", store, narrow)
    assert run(model, batches, tmp_path / "h", store, wide) == 3
    run(model, batches, tmp_path / "h", alone, wide)
    for layer in wide.probes[0]:
        assert torch.equal(store.of(layer, 0).sums["outer"], alone.of(layer, 0).sums["outer"])
    assert run(model, batches, tmp_path / "h", store, narrow) == 0


def test_the_head_is_measured_again_for_what_it_lacks(tmp_path: Path) -> None:
    model, batches, store = tiny.build("llama"), tiny.batches(), StatisticsStore(tmp_path / "s")
    for need in ("abs", "outer"):
        run(model, batches, tmp_path / "h", store, Request({OUTSIDE: ["lm_head"]}, frozenset({need})))
    assert {"tokens", "abs", "outer"} == store.of("lm_head", OUTSIDE).sums.keys()


def test_gradients_of_different_losses_are_kept_apart(tmp_path: Path) -> None:
    model, batches = tiny.build("llama"), tiny.batches()
    text = request_for(model, "fisher_in")
    drawn = request_for(model, "fisher_in", labels="model")
    fewer = request_for(model, "fisher_in", gradient_samples=2)
    assert text.gradient_files(0) == text.gradient_files(1)
    names = {text.gradient_files(0), drawn.gradient_files(0), drawn.gradient_files(1), fewer.gradient_files(0)}
    assert len(names) == 4
    found = {}
    for request in (text, drawn, fewer, text):
        store = StatisticsStore(tmp_path / "s", request.gradient_files(0))
        run(model, batches, tmp_path / "h", store, request)
        found[request.gradient_files(0)] = store.of("model.layers.0.mlp.up_proj", 0).sums
    assert {k: float(v["examples"]) for k, v in found.items()} == {"gradients-data-16": 5.0, "gradients-model-16-0": 5.0, "gradients-data-2": 2.0}  # fmt: skip # noqa: E501
    assert len({float(v["fisher_in"].sum()) for v in found.values()}) == 3


def test_a_gradient_record_grows_too(tmp_path: Path) -> None:
    model, batches, store = tiny.build("llama"), tiny.batches(), StatisticsStore(tmp_path / "s")
    run(model, batches, tmp_path / "h", store, request_for(model, "fisher_in"))
    run(model, batches, tmp_path / "h", store, request_for(model, "grad_outer", "outer"))
    sums = store.of("model.layers.2.self_attn.o_proj", 2).sums
    assert {"fisher_in", "grad_outer", "outer", "examples", "grad_tokens"} <= sums.keys()
    assert run(model, batches, tmp_path / "h", store, request_for(model, "fisher_in", "outer")) == 0


def test_a_damaged_record_is_told(tmp_path: Path) -> None:
    model, batches, store = tiny.build("llama"), tiny.batches(), StatisticsStore(tmp_path / "s")
    run(model, batches, tmp_path / "h", store, request_for(model, "abs"))
    path = store.path(1)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"the statistics in .*inputs-0001\.safetensors are damaged .*: delete"):
        StatisticsStore(tmp_path / "s").of("model.layers.1.mlp.up_proj", 1)


def test_the_fingerprint_tells_data_apart() -> None:
    one, other = tiny.batches((2, 2)), tiny.batches((2, 2), seed=2)
    together = [{"input_ids": torch.cat([b["input_ids"] for b in one])}]
    masked = [{**b, "attention_mask": torch.ones_like(b["input_ids"])} for b in one]
    narrow = [{"pixel_values": torch.ones(1, 2, dtype=torch.bfloat16)}]
    prints = {fingerprint(batches) for batches in (one, other, together, masked, one[:1], narrow)}
    assert len(prints) == 6
    assert fingerprint(tiny.batches((2, 2))) == fingerprint(one)
