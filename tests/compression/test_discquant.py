"""DiscQuant against its card: what it may choose, what it descends, what it gains, and that it can be interrupted."""

from __future__ import annotations

import copy
import json
import shutil
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quantised import check_method
from torch import Tensor, nn
from torch.func import functional_call

import eckart
import tiny
from eckart.calibration.stream import single_rows
from eckart.compression.discquant import DiscQuant
from eckart.compression.relaxed import Descent, Relaxed, RelaxedModel, answer
from eckart.forms import as_form
from eckart.forms.layers import matrix_of
from eckart.jobs.solve import Task
from eckart.metrics import Plain, Statistics
from eckart.testing import error_ratio, gaussian

BITS, GROUP = 3, 16
FORM = f"quantized(bits={BITS}, group={GROUP})"
EXACT = f"quantized(bits={BITS}, group={GROUP}, grid=uniform(zero='real'))"
QUICK: dict[str, Any] = {"form": FORM, "steps": 12, "batch": 2, "budget": "0.99"}
LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")
SMALL = {"num_hidden_layers": 1}


def relaxed(model: nn.Module, form: str = FORM, names: Sequence[str] = LAYERS) -> RelaxedModel:
    """Some layers of a model, at their own weights."""
    with torch.no_grad():
        matrices = {name: matrix_of(model.get_submodule(name)).detach() for name in names}
        tasks = [Task(name, W, form, Plain(), Statistics(), torch.float32) for name, W in matrices.items()]
        return RelaxedModel(model, [Relaxed.of(task) for task in tasks])


def descent(**settings: Any) -> Descent:
    return Descent(**{"rho": 200.0, "clamp": 0.5, "lr": 0.1, "steps": 60, "batch": 4, "every": 16, **settings})


def codes(model: RelaxedModel) -> list[Tensor]:
    """Of all layers, as they are rounded."""
    return [torch.where(layer.up, layer.bracket.upper, layer.bracket.lower) for layer in model.layers]


def share(found: Sequence[Tensor]) -> float:
    """Of the entries that are true."""
    return sum(int(t.sum()) for t in found) / sum(t.numel() for t in found)


def test_through_a_model(tmp_path: Path) -> None:
    result = check_method("discquant", tmp_path, form=FORM, steps=8)
    layer = next(x for x in result.layers if x.form == FORM)
    assert layer.bytes == as_form(FORM).nbytes(layer.shape, torch.float32)
    assert layer.measured_error > layer.predicted_error, "the nearest numbers have the least error, weights alone"


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_are_neighbours_of_the_original_ones_on_its_grid(name: str, dtype: torch.dtype) -> None:
    model = tiny.build(name, dtype=dtype, **(SMALL if name != "gpt2" else {"n_layer": 1}))
    original = copy.deepcopy(model)
    result = eckart.compress(model, "discquant", data=tiny.batches(), **QUICK).result
    assert len(result.layers) >= 4
    moved = 0
    for layer in result.layers:
        W = matrix_of(original.get_submodule(layer.name)).detach().float()
        kept = Relaxed.of(Task(layer.name, W, FORM, Plain(), Statistics(), dtype))
        low, high = kept.low.to(dtype), (kept.low + kept.step).to(dtype)
        found = model.get_submodule(layer.name).matrix.dense()
        either = (found - low).abs().minimum((found - high).abs()) <= 2 * torch.finfo(dtype).eps * found.abs()
        assert bool(either.all()), layer.name
        moved += int(((found.float() - W).abs() > 1.01 * (kept.step / 2)).sum())
        assert all(len(group.unique()) <= 2**BITS for group in found.reshape(-1, GROUP))
    assert moved > 0, "some go to the farther neighbour"


def test_weights_on_the_grid_never_move() -> None:
    model = tiny.build("llama", **SMALL)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.data = (torch.arange(layer.weight.numel()) % 2**BITS - 2.0).view(layer.weight.shape) / 8
    before = layer.weight.detach().clone()
    result = eckart.compress(model, "discquant", data=tiny.batches(), clamp=9.0, **QUICK).result
    assert torch.equal(model.model.layers[0].mlp.up_proj.matrix.dense(), before)
    noted = {x.name: x.note for x in result.layers}
    assert noted["model.layers.0.mlp.up_proj"] == "0.0% of its weights are not rounded to nearest"
    assert noted["model.layers.0.mlp.down_proj"] != "0.0% of its weights are not rounded to nearest"


def test_where_all_weights_lie_on_the_grid_nothing_is_done() -> None:
    model = tiny.build("llama", **SMALL)
    for name in ("up_proj", "gate_proj"):
        weight = getattr(model.model.layers[0].mlp, name).weight
        weight.data = (torch.arange(weight.numel()) % 2**BITS - 2.0).view(weight.shape) / 8
    stages = Counter[str]()
    eckart.compress(
        model, "discquant", data=tiny.batches(), targets=r".*(up|gate)_proj", **QUICK,
        progress=lambda stage, done, total: stages.update([stage]),
    )  # fmt: skip
    assert stages["fit"]
    assert not stages["distil"]


def test_at_the_original_weights_it_is_the_original_model_and_no_mode_changes_its_parameters() -> None:
    model, batches = tiny.build("llama", **SMALL), tiny.batches(padded=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ours = relaxed(model, EXACT)
    ours.start("weights", 0)
    found = {mode: ours.divergence(batches, mode) for mode in ("relaxed", "rounded", "nearest")}
    assert abs(found["relaxed"]) < 1e-7
    assert found["rounded"] == found["nearest"] > 1e-4
    ours.start("random", 0)
    assert ours.divergence(batches) > 1e-4
    ours.gradients(batches)
    descent(steps=3).run(ours, batches, seed=0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert type(model.get_submodule(LAYERS[0])) is nn.Linear


@pytest.mark.parametrize("start", ["random", "weights"])
def test_without_distillation_it_is_rounding_to_nearest(start: str) -> None:
    model = tiny.build("llama", **SMALL)
    wanted = copy.deepcopy(model)
    eckart.compress(wanted, "rtn", form=FORM, budget="0.99")
    eckart.compress(model, "discquant", data=tiny.batches(), rho=0.0, start=start, **{**QUICK, "steps": 40, "batch": 1})
    for name, matrix in ((n, m.matrix) for n, m in wanted.named_modules() if hasattr(m, "matrix")):
        assert torch.equal(model.get_submodule(name).matrix.codes, matrix.codes), name


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_are_those_of_the_divergence(name: str) -> None:
    """Against a graph through the interpolation, windows of different lengths counting by their answers."""
    small = SMALL if name == "llama" else {"n_layer": 1}
    model, batches = tiny.build(name, **small), tiny.batches((2, 1), padded=True)
    names = LAYERS if name == "llama" else ("transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_proj")
    ours = relaxed(model, names=names)
    ours.start("random", 1)
    value, found = ours.gradients(single_rows(batches))
    places = [layer.x.clone().requires_grad_() for layer in ours.layers]
    weights = {}
    for x, layer in zip(places, ours.layers, strict=True):
        W = layer.low + x * layer.step
        weights[f"{layer.name}.weight"] = W.t() if name == "gpt2" else W
    total, count = torch.zeros(()), 0
    for batch in batches:
        real = batch["attention_mask"].bool()
        p = model(**batch).logits.log_softmax(-1).detach()
        q = functional_call(model, weights, kwargs=batch).logits.log_softmax(-1)
        total, count = total + (p.exp() * (p - q)).sum(-1)[real].sum(), count + int(real.sum())
    mean = total / count
    errors = []
    for layer in ours.layers:
        W = matrix_of(model.get_submodule(layer.name)).detach()
        nearest = torch.minimum((W - layer.low).abs(), (W - layer.low - layer.step).abs())
        errors.append(12 * float(nearest.square().mean()))
    wanted = torch.autograd.grad(mean / (sum(errors) / len(errors)), places)
    assert value == pytest.approx(float(mean.detach()), rel=1e-5)
    assert ours.divergence(batches) == pytest.approx(value, rel=1e-5)
    assert all(error_ratio(f, w) <= 1e-4 for f, w in zip(found, wanted, strict=True))


def test_the_gradient_is_clamped_after_it_is_weighted() -> None:
    """However much distillation counts, a pull that is stronger than the clamp wins."""
    model = tiny.build("llama", **SMALL)
    ours = relaxed(model)
    ours.start("random", 0)
    descent(rho=1e8, clamp=0.3, steps=40, batch=2).run(ours, tiny.batches(), seed=0)
    for layer in ours.layers:
        assert bool(layer.moved.any())
        assert bool(((2 * layer.bracket.way[layer.moved] - 1).abs() <= 0.3).all())


class Softmax(nn.Module):
    """A network over tokens whose vectors are correlated."""

    def __init__(self, tokens: int = 6144, width: int = 64, hidden: int = 96, classes: int = 4):
        super().__init__()
        self.table = nn.Embedding(tokens, width)
        spectrum = torch.diag(0.95 ** torch.arange(width))
        self.table.weight.data = gaussian(tokens, width, seed=1) @ spectrum @ torch.linalg.qr(gaussian(width, width))[0]
        self.first, self.middle, self.last = nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, classes)  # fmt: skip # noqa: E501
        for i, layer in enumerate((self.first, self.middle, self.last)):
            layer.weight.data = 2 * gaussian(*layer.weight.shape, seed=20 + i) / layer.in_features**0.5
            layer.bias.data.zero_()

    def forward(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.last(self.middle(self.first(self.table(input_ids)).relu()).relu()))


@pytest.fixture(scope="module")
def softmax() -> SimpleNamespace:
    """The network, tokens to learn from in windows, and others."""
    model = Softmax().eval()
    ids = torch.randperm(6144, generator=torch.Generator().manual_seed(0))
    train, held = ([{"input_ids": i[None]} for i in part.split(256)] for part in (ids[:4096], ids[4096:]))
    return SimpleNamespace(model=model, train=train, held=held)


def lost(original: nn.Module, model: nn.Module, batches: Sequence[dict[str, Any]]) -> float:
    """Mean KL from the original's answers."""
    with torch.no_grad():
        both = [(answer(model, b), answer(original, b)) for b in batches]
        return float(torch.cat([found.divergence(wanted).flatten() for found, wanted in both]).mean())


def test_less_is_lost_than_by_nearest_rounding_or_gptq_on_the_same_grid(softmax: SimpleNamespace) -> None:
    found, kept = {}, {}
    grid = "quantized(bits=3, group=32{})"
    for key, form, more in (
        ("rtn", grid.format(""), {}),
        ("gptq", grid.format(", rounding=gptq()"), {"one_shot": False}),
        ("discquant", grid.format(""), {"lr": 0.2, "batch": 2}),
    ):
        model, settings = copy.deepcopy(softmax.model), {"targets": "first|middle|last", "budget": "0.99"}
        eckart.compress(model, key, form=form, data=softmax.train, **settings, **more)
        found[key] = lost(softmax.model, model, softmax.held)
        kept[key] = torch.cat([getattr(model, n).matrix.dense().flatten() for n in ("first", "middle", "last")])
    assert found["discquant"] < found["rtn"] / 3
    assert found["discquant"] < 0.9 * found["gptq"]
    assert 0.005 < float((kept["discquant"] - kept["rtn"]).abs().gt(1e-6).float().mean()) < 0.05


def test_most_weights_end_at_a_vertex_and_rounding_the_others_is_what_is_left(softmax: SimpleNamespace) -> None:
    lost = {}
    for rho in (50.0, 1000.0):
        ours = relaxed(softmax.model, "quantized(bits=3, group=32)", ("first", "middle", "last"))
        ours.start("random", 0)
        descent(rho=rho, steps=80, batch=2).run(ours, softmax.train, seed=0)
        vertex = share([(layer.x < 0.01) | (layer.x > 0.99) for layer in ours.layers])
        assert vertex > 0.75
        lost[rho] = ours.divergence(softmax.held), ours.divergence(softmax.held, "rounded")
        assert lost[rho][0] <= lost[rho][1]
    assert lost[1000.0][0] < lost[50.0][0]
    assert lost[1000.0][1] - lost[1000.0][0] > lost[50.0][1] - lost[50.0][0]


MODELS: dict[str, Any] = {
    "features": (lambda: tiny.build("bert", **SMALL).bert, tiny.batches(), ""),
    "pictures": (lambda: tiny.build("vit", **SMALL), [{"pixel_values": gaussian(2, 3, 12, 12)}] * 2, ""),
    "convolution": (lambda: tiny.build("vit", **SMALL), [{"pixel_values": gaussian(8, 3, 12, 12)}] * 2, ".*projection"),
    "tied table": (lambda: tiny.build("llama-tied", **SMALL), tiny.batches(), ".*embed_tokens"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_any_model_whose_answers_can_be_compared(kind: str) -> None:
    build, batches, targets = MODELS[kind]
    original, model = build(), build()
    nearest = copy.deepcopy(model)
    eckart.compress(nearest, "rtn", form=FORM, budget="0.999", targets=targets)
    settings = {**QUICK, "budget": "0.999", "steps": 30, "batch": 4}
    result = eckart.compress(model, "discquant", data=batches, targets=targets, **settings).result
    assert {layer.form for layer in result.layers} == {FORM}
    assert lost(original, model, batches) < 0.8 * lost(original, nearest, batches)


def test_a_seed_decides_every_bit_and_another_one_others() -> None:
    states = []
    for seed in (0, 0, 1):
        model = tiny.build("llama", **SMALL)
        eckart.compress(model, "discquant", data=tiny.batches(), seed=seed, **{**QUICK, "steps": 4})
        states.append({k: v for k, v in model.state_dict().items() if k.endswith("codes")})
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert any(not torch.equal(states[0][k], states[2][k]) for k in states[0])


def test_windows_are_drawn_in_passes() -> None:
    windows = [{"input_ids": torch.tensor([i])} for i in range(6)]
    ours = descent(batch=4)
    seen = [int(w["input_ids"]) for step in range(6) for w in ours.drawn(windows, step, 3)]
    assert len(seen) == 24
    passes = [seen[i : i + 6] for i in range(0, 24, 6)]
    assert all(sorted(p) == list(range(6)) for p in passes)
    assert len({tuple(p) for p in passes}) > 1
    assert len(ours.drawn(windows[:3], 0, 0)) == 3


def test_the_rate_rises_falls_and_never_exceeds_its_setting() -> None:
    ours = descent(steps=50, lr=0.2)
    rates = [ours.rate(i) for i in range(50)]
    assert rates[:5] == pytest.approx([0.04, 0.08, 0.12, 0.16, 0.2])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < 0.001


class Stopped(Exception):
    """What a test raises in the middle of a job."""


@pytest.mark.parametrize("at", [1, 4, 5, 8])
def test_a_run_goes_on_from_the_state_it_saved(at: int, tmp_path: Path) -> None:
    model, windows, kept = tiny.build("llama", **SMALL), tiny.batches(), tmp_path / "state.safetensors"
    ours = descent(steps=9, every=4)
    wanted = relaxed(model)
    wanted.start("random", 0)
    ours.run(wanted, windows, seed=0)

    def stop(stage: str, done: int, total: int) -> None:
        if done == at:
            raise Stopped

    first = relaxed(model)
    first.start("random", 0)
    with pytest.raises(Stopped):
        ours.run(first, windows, seed=0, kept=kept, progress=stop)
    steps: list[int] = []
    again = relaxed(model)
    again.start("random", 0)
    ours.run(again, windows, seed=0, kept=kept, progress=lambda stage, done, total: steps.append(done))
    assert steps == list(range(at // 4 * 4 + 1, 10))
    assert all(torch.equal(a.x, b.x) for a, b in zip(again.layers, wanted.layers, strict=True))


class Watched:
    """Counts a job's progress, and interrupts it at a stage's number."""

    def __init__(self, stage: str = "", at: int = 0):
        self.stop, self.seen = (stage, at), Counter[str]()

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.seen[stage] += 1
        if (stage, done) == self.stop:
            raise KeyboardInterrupt


def test_an_interrupted_job_on_disk_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """In the middle of the descent, after it, and once some parts are written, which stay as they are."""
    tiny.save_model(tmp_path / "m", num_hidden_layers=2)
    words: dict[str, Any] = {"model": tmp_path / "m", "method": "discquant", "data": tiny.batches(), **QUICK}
    words |= {"steps": 6, "every": 4}
    eckart.compress_to(tmp_path / "one", **words)
    for stage, at, distilled in (("distil", 5, 5), ("distil", 6, 2), ("fit", 2, 0)):
        watched = Watched(stage, at)
        with pytest.raises(KeyboardInterrupt):
            eckart.compress_to(tmp_path / "two", progress=watched, resume=at != 5, **words)
        assert watched.seen["distil"] == distilled
    written = {p.name: p.read_bytes() for p in (tmp_path / "two.partial" / "model").glob("*.safetensors")}
    assert len(written) == 2
    watched = Watched()
    eckart.compress_to(tmp_path / "two", progress=watched, resume=True, **words)
    assert not watched.seen["distil"]
    assert tiny.hashes(tmp_path / "one") == tiny.hashes(tmp_path / "two")
    assert all((tmp_path / "two" / name).read_bytes() == data for name, data in written.items())


@pytest.mark.slow
def test_a_killed_job_on_disk_ends_with_the_same_bytes(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "m")
    tiny.save_text(tmp_path / "t.txt")
    words: list[Any] = ["compress", tmp_path / "m", "--method", "discquant", "--form", FORM, "--budget", 0.99]
    words += ["--data", tmp_path / "t.txt", "--samples", 4, "--length", 12, "--set", "steps=6", "--set", "every=2"]
    done = tiny.run_forked([*words, "--json", "--output", tmp_path / "one"], tmp_path)
    assert done.code == 0, done.printed
    states = 0
    for at in range(done.steps // 3, done.steps, done.steps // 8):
        killed = tiny.run_forked([*words, "--output", tmp_path / "two"], tmp_path, at)
        assert killed.code == -signal.SIGKILL, killed.printed
        states += len(list((tmp_path / "two.partial").rglob("discquant-*")))
        if not (tmp_path / "two").exists():
            finished = tiny.run_forked([*words, "--resume", "--output", tmp_path / "two"], tmp_path)
            assert finished.code == 0, finished.printed
        assert tiny.hashes(tmp_path / "one") == tiny.hashes(tmp_path / "two")
        for left in tmp_path.glob("*two*"):
            left.unlink() if left.is_file() else shutil.rmtree(left)
    assert states > 1


def test_a_plan_tells_bytes_and_seconds_and_distils_nothing(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "m", **SMALL)
    stages = Counter[str]()
    kinds: dict[str, Any] = {"data": tiny.batches(), "form": FORM, "budget": "0.99", "dry_run": True}
    times = [
        eckart.compress_to(
            tmp_path / "out", tmp_path / "m", "discquant", steps=steps, **kinds,
            progress=lambda stage, done, total: stages.update([stage]),
        ).predicted_seconds
        for steps in (0, 10000)
    ]  # fmt: skip
    assert times[1] > 10 * times[0]
    assert not stages["distil"]
    assert not (tmp_path / "out").exists()


def test_allocations_that_try_plans_do_so_without_distilling() -> None:
    stages = Counter[str]()
    form = "quantized(group=16)"
    allocation = "evolutionary(generations=1, offspring=2, survivors=(1,), tokens=(18,), enough=0.0)"
    model = tiny.build("llama", **SMALL)
    result = eckart.compress(
        model, "discquant", data=tiny.batches((2,) * 4), allocation=allocation, form=form, budget="0.7", steps=3,
        progress=lambda stage, done, total: stages.update([stage]),
    ).result  # fmt: skip
    assert stages["trial"] > 1
    assert stages["distil"] == 3
    assert result.bytes_after <= result.budget


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "clamp": ({"clamp": 0.0}, "clamp=0.0: a positive number"),
    "lr": ({"lr": -1.0}, "lr=-1.0: a positive number"),
    "rho": ({"rho": float("nan")}, "rho=nan: the weight of the divergence is finite"),
    "steps": ({"steps": -1}, "steps=-1: a whole number, at least 0"),
    "every": ({"every": 0}, "every=0: a whole number, at least 1"),
    "start": ({"start": "zero"}, "start='zero': it is 'random' or 'weights'"),
    "form": ({"form": as_form("low_rank()")}, r"codes of quantized\(...\), not of low_rank\(\)"),
    "one_shot": ({"one_shot": False}, "optimises all layers together"),
}


@pytest.mark.parametrize("what", BAD)
def test_nonsense_is_refused(what: str) -> None:
    settings, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        DiscQuant(**settings)


def test_bad_input_is_called_by_its_name() -> None:
    with pytest.raises(ValueError, match="discquant needs calibration data"):
        eckart.compress(tiny.build("llama", **SMALL), "discquant", budget="0.9")
    with pytest.raises(ValueError, match=r"output_covariance.* moves the mean into them"):
        eckart.compress(tiny.build("llama", **SMALL), "discquant", metric="output_covariance()", budget="0.9")
    model = tiny.build("llama", **SMALL)
    model.get_submodule(LAYERS[1]).weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=rf"{LAYERS[1]} holds NaN or infinity"):
        eckart.compress(model, "discquant", data=tiny.batches(), targets=LAYERS[1].replace(".", r"\."), **QUICK)
    with pytest.raises(ValueError, match=f"{LAYERS[1]}: the matrix holds NaN"):
        relaxed(model)
    model = tiny.build("llama", **SMALL)
    model.lm_head.weight.data[3] = torch.inf
    with pytest.raises(RuntimeError, match="answers of the model as it was given are not finite"):
        eckart.compress(model, "discquant", data=tiny.batches(), **QUICK)
    told = (f"{LAYERS[0]}: the gradient at its weights", "answers of the model between its grids' numbers")
    for i, message in enumerate(told):
        ours = relaxed(tiny.build("llama", **SMALL))
        ours.layers[i].x = ours.layers[i].x * torch.inf
        with pytest.raises(RuntimeError, match=f"{message}.* not finite"):
            ours.gradients(tiny.batches())


def test_words_of_the_job_are_kept(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "m", **SMALL)
    eckart.compress_to(tmp_path / "out", tmp_path / "m", "discquant", data=tiny.batches(), **{**QUICK, "steps": 2})
    job = json.loads((tmp_path / "out" / "eckart.json").read_text())["job"]
    assert (job["method"], job["rho"], job["steps"]) == ("discquant", 200.0, 2)
