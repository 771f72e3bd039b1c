"""A model run block by block is the model: hidden states, statistics and padding, for every family."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from eckart.allocation import Budget
from eckart.calibration.calibrate import Request, calibrate
from eckart.calibration.store import OUTSIDE, StatisticsStore
from eckart.calibration.stream import Stream, single_rows
from eckart.calibration.subject import InMemory
from eckart.downloads import silent
from eckart.jobs import Recipe
from eckart.jobs.engine import Engine
from eckart.metrics import InputCovariance, Statistics
from eckart.metrics.statistics import INPUT_SUMS

PADDABLE = [name for name in tiny.CONFIGS if name != "vit"]


def batches_of(name: str, padded: bool = False) -> list[dict[str, Any]]:
    if name == "vit":
        return [{"pixel_values": torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(i))} for i in (0, 1)]
    return tiny.batches(padded=padded)


def streamed(model: nn.Module, batches: list[dict[str, Any]], folder: Path, probes: dict[int, list[str]]) -> StatisticsStore:  # fmt: skip # noqa: E501
    stream = Stream(InMemory(model), batches, folder)
    stream.start()
    store = StatisticsStore(folder / "statistics")
    calibrate(stream, Request(probes, INPUT_SUMS, influence=bool(stream.blocks)), store, seed=0, progress=silent)
    return store


def probes_of(model: nn.Module, tmp_path: Path) -> dict[int, list[str]]:
    """Every linear layer within the blocks, and the head."""
    blocks = Stream(InMemory(model), [{}], tmp_path).blocks
    probes = Recipe().sites(model, blocks)
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    outside = [n for n in linears if not n.startswith(tuple(f"{b}." for b in blocks))]
    return probes | ({OUTSIDE: outside} if outside else {})


def whole(model: nn.Module, batches: list[dict[str, Any]], probes: dict[int, list[str]]) -> dict[str, Statistics]:
    """The same sums by hooks on full forward passes."""
    found = {name: Statistics() for names in probes.values() for name in names}

    def hook(name: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            mask = batch.get("attention_mask")
            real = x if mask is None or mask.numel() != len(x) else x[mask.bool().reshape(-1)]
            real = real.double()
            sums = {"tokens": torch.tensor(float(len(real))).double(), "x": real.sum(0), "abs": real.abs().sum(0),
                    "square": real.square().sum(0), "outer": real.T @ real}  # fmt: skip
            found[name].merge(Statistics(sums))

        return add

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in found]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return found


def assert_same(found: Statistics, expected: Statistics, rtol: float = 1e-5) -> None:
    for key, value in found.sums.items():
        reference = expected.sums[key].double()
        torch.testing.assert_close(value.double(), reference, rtol=rtol, atol=rtol * float(reference.abs().max()))


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_statistics_of_the_stream_are_those_of_full_forward_passes(name: str, tmp_path: Path) -> None:
    model = tiny.build(name)
    batches = batches_of(name, padded=name != "vit")
    probes = probes_of(model, tmp_path)
    store = streamed(model, batches, tmp_path, probes)
    expected = whole(model, batches, probes)
    assert sum(len(names) for names in probes.values()) >= 12
    for part, names in probes.items():
        for layer in names:
            assert store.of(layer, part).sums.keys() > INPUT_SUMS
            assert_same(store.of(layer, part), expected[layer])


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_logits_after_the_stream_are_the_models_own(name: str, tmp_path: Path) -> None:
    model, batches = tiny.build(name), batches_of(name)
    stream = Stream(InMemory(model), batches, tmp_path)
    stream.start()
    for index in range(len(stream.blocks)):
        stream.advance(index)
    last = stream.hidden(len(stream.blocks))
    with torch.no_grad():
        for i, batch in enumerate(batches):
            torch.testing.assert_close(stream.finish(last.read(stream.shapes, i), i).logits, model(**batch).logits)


@pytest.mark.parametrize("name", PADDABLE)
def test_padded_rows_contribute_exactly_nothing(name: str, tmp_path: Path) -> None:
    """Other ids under the padding change no bit, and the sums are those of the same rows without padding."""
    model, padded = tiny.build(name), tiny.batches(padded=True)
    probes = Recipe().sites(model, Stream(InMemory(model), padded, tmp_path).blocks)
    other = [{**b, "input_ids": b["input_ids"].masked_fill(b["attention_mask"] == 0, 77)} for b in padded]
    rows = [row["input_ids"][:, row["attention_mask"][0].bool()] for row in single_rows(padded)]
    cut = [{"input_ids": ids} for ids in rows]
    found, changed, unpadded = (
        streamed(model, batches, _made(tmp_path / str(i)), probes) for i, batches in enumerate((padded, other, cut))
    )
    for part, names in probes.items():
        for layer in names:
            own = found.of(layer, part)
            if name != "mpnet":  # its positions depend on which ids are padding
                for key, value in changed.of(layer, part).sums.items():
                    assert torch.equal(own.sums[key], value), (layer, key)
            assert own.tokens == sum(int(b["attention_mask"].sum()) for b in padded)
            assert_same(own, unpadded.of(layer, part))


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_influence_is_one_minus_the_mean_cosine_across_a_block(name: str, tmp_path: Path) -> None:
    model, batches = tiny.build(name), tiny.batches(padded=True)
    stream = Stream(InMemory(model), batches, tmp_path)
    stream.start()
    request = Request({}, frozenset(), influence=True)
    found = calibrate(stream, request, StatisticsStore(tmp_path / "s"), seed=0, progress=silent)
    cosines: dict[str, list[Tensor]] = {block: [] for block in stream.blocks}

    def hook(block: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...], out: Any) -> None:
            y = out[0] if isinstance(out, tuple) else out
            cosines[block].append(torch.cosine_similarity(args[0], y, dim=-1)[batch["attention_mask"].bool()])

        return add

    for block in stream.blocks:
        model.get_submodule(block).register_forward_hook(hook(block))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    expected = [1 - float(torch.cat(cosines[block]).mean()) for block in stream.blocks]
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mpnet"])
def test_sequential_statistics_are_those_of_the_partly_compressed_model(name: str, tmp_path: Path) -> None:
    """Each block is measured as it was, on what the blocks before it put out after their compression."""
    model, original = tiny.build(name), tiny.build(name)
    batches = tiny.batches(padded=True)
    recipe = Recipe(metric=InputCovariance(), one_shot=False)
    seen: dict[int, dict[str, Statistics]] = {}

    class Watching(Engine):
        def _collect(self, part: int) -> None:
            super()._collect(part)
            seen[part] = {n: self.job.statistics(n, part) for n in self.request.probes[part]}

    engine = Watching(InMemory(model), recipe, Budget.parse("0.8 linears"), batches, tmp_path)
    engine.fit(engine.plan())
    blocks = engine.blocks
    assert sorted(seen) == [0, 1, 2]
    for part, block in enumerate(blocks):
        expected = whole(original, batches, {part: list(seen[part])})
        for layer, statistics in seen[part].items():
            assert statistics.sums.keys() == {"tokens", "outer"}
            assert_same(statistics, expected[layer])
        original.set_submodule(block, model.get_submodule(block))


def test_half_precision_models_run_in_float32_and_stay_as_they_are(tmp_path: Path) -> None:
    model = tiny.build("llama", dtype=torch.float16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batches = tiny.batches()
    probes = probes_of(model, tmp_path)
    store = streamed(model, batches, tmp_path, probes)
    assert all(torch.equal(v, before[k]) and v.dtype == torch.float16 for k, v in model.state_dict().items())
    expected = whole(model.float(), batches, probes)
    for part, names in probes.items():
        for layer in names:
            assert_same(store.of(layer, part), expected[layer])


@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
def test_infinite_activations_name_the_layer_that_receives_them(name: str, tmp_path: Path) -> None:
    model = tiny.build(name)
    probes = Recipe().sites(model, Stream(InMemory(model), [{}], tmp_path).blocks)
    model.get_submodule(probes[0][-1]).weight.data[0, 0] = float("nan")  # the last layer of the first block
    with pytest.raises(ValueError, match=f"^({'|'.join(probes[1][:3])}) receives NaN or infinite activations"):
        streamed(model, tiny.batches(), tmp_path, probes)


def test_a_batch_that_does_not_fit_is_told_with_its_shape(tmp_path: Path) -> None:
    for batch in tiny.batches((1,), length=70), [{"input_ids": torch.tensor([[1, 2, 9999]])}]:
        with pytest.raises(ValueError, match=r"GPT2LMHeadModel cannot run the calibration data.*'input_ids': \(1, "):
            Stream(InMemory(tiny.build("gpt2")), batch, tmp_path).start()


def test_no_batches_and_cut_off_hidden_states_are_told(tmp_path: Path) -> None:
    model = tiny.build("llama")
    with pytest.raises(ValueError, match="the calibration data is empty"):
        Stream(InMemory(model), [], tmp_path)
    stream = Stream(InMemory(model), tiny.batches(), tmp_path)
    stream.start()
    whole_file = stream.hidden(0).path.read_bytes()
    stream.hidden(0).path.write_bytes(whole_file[:-4])
    with pytest.raises(ValueError, match=r"hidden-0000\.bin is shorter than the calibration data"):
        stream.advance(0)
    assert not stream.hidden(1).path.exists()


def test_rows_are_taken_apart_even_where_the_length_is_the_batch_size() -> None:
    (batch,) = tiny.batches((9,), length=9, padded=True)
    rows = single_rows([batch])
    assert torch.equal(torch.cat([row["input_ids"] for row in rows]), batch["input_ids"])
    assert torch.equal(torch.cat([row["attention_mask"] for row in rows]), batch["attention_mask"])


def test_pictures_and_running_means_in_half_precision_are_computed_in_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.stem, model.norm, model.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(pixel_values: Tensor) -> Tensor:
        out: Tensor = model.head(model.norm(model.stem(pixel_values)).mean((2, 3)))
        return out

    model.forward = forward  # type: ignore[method-assign, assignment]
    model.norm.running_mean.normal_()
    model.half().eval()
    pictures = [{"pixel_values": torch.randn(2, 3, 8, 8).half()} for _ in range(2)]
    stored = {key: value.clone() for key, value in model.state_dict().items()}
    store = streamed(model, pictures, tmp_path, {OUTSIDE: ["head"]})
    wanted = copy.deepcopy(model).float()
    x = torch.cat([wanted.norm(wanted.stem(p["pixel_values"].float())).mean((2, 3)) for p in pictures])
    found = store.of("head", OUTSIDE).sums["outer"]
    torch.testing.assert_close(found.float(), (x.T @ x).detach(), rtol=2e-2, atol=1e-3)
    assert all(torch.equal(value, stored[key]) for key, value in model.state_dict().items())
