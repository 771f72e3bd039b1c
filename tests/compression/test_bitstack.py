"""BitStack: one list of blocks, of which every budget takes a prefix; orders; shrinking in memory and on disk."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import eckart
import tiny
from eckart.allocation import BudgetError, Problem
from eckart.calibration import stream
from eckart.calibration.subject import InMemory
from eckart.checkpoint.layout import file_bytes, layout_of
from eckart.cli import app
from eckart.compression.bitstack import BitStack, by_energy, resize, shrink
from eckart.forms import Curve, Dense, SignStack, parse
from eckart.jobs.engine import Engine
from eckart.jobs.trial import Trial
from eckart.linalg.weighting import Weighting
from eckart.linalg.whitening import DiagonalRoot
from eckart.testing import error_ratio

BATCHES = tiny.batches((2,) * 8, length=16)
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
FORM = "sign_stack(rank=2)"


def compressed(budget: str | float = 1.0, **settings: Any) -> Any:
    """A tiny model as stacks, its result with it."""
    return eckart.compress(tiny.build("llama", dtype=torch.float16, **WIDE), "bitstack", budget=budget, data=BATCHES, form=FORM, **settings)  # fmt: skip # noqa: E501


def stored_bytes(model: nn.Module) -> int:
    return file_bytes(layout_of(model.state_dict()))


def blocks_of(model: Any) -> dict[str, int]:
    return {n: parse(s["form"]).blocks for n, s in model.config.quantization_config.modules.items()}


@pytest.fixture(scope="module")
def whole() -> Any:
    """All blocks that cost less than the model did."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "PRECISION", "highest")  # as for each single test
        return compressed()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bitstack")
    tiny.save_model(made / "m", shard="100KB", **WIDE)
    eckart.compress_to(made / "full", made / "m", "bitstack", budget=1.0, data=BATCHES, form=FORM)
    return made


def test_budgets_take_prefixes_of_one_list(whole: Any) -> None:
    """Each budget is met, to less than one block, by a prefix of the list that the largest budget stores."""
    order = whole.result.extra["load_order"]
    largest = max(SignStack(1, 2).block_bytes((o, i), torch.float16) for o, i in [(64, 64), (96, 64)])
    before = -1
    for budget in (0.5, 0.6, 0.75, 0.9):
        done = compressed(budget)
        found, limit = done.result.extra["load_order"], int(budget * done.result.bytes_before)
        assert order[: len(found)] == found
        assert len(found) > before
        before = len(found)
        assert limit - largest - 2000 < stored_bytes(done.model) <= limit  # 2000: names and shapes, reserved ahead
        counts = {name: 1 + found.count(name) for name in blocks_of(done.model)}
        assert blocks_of(done.model) == counts
        top = max(counts.values())  # a level is complete before the next
        assert all(count >= min(top - 1, 1 + order.count(name)) for name, count in counts.items())


def test_shrinking_is_compressing_with_less(whole: Any) -> None:
    """To the same bits, for nothing depends on the blocks that are dropped; memory falls with every block."""
    done = compressed(0.6)
    model = copy.deepcopy(whole.model)
    target = stored_bytes(done.model)
    shrink(model, f"{target + 100}B")  # numbers in the header of the deeper stacks are longer
    assert model.config.load_order == done.result.extra["load_order"]
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in done.model.state_dict().items())
    sizes = []
    while model.config.load_order:
        kept = len(model.config.load_order)
        shrink(model, f"{stored_bytes(model) - 1}B")
        assert len(model.config.load_order) == kept - 1
        sizes.append(stored_bytes(model))
    assert all(b < a for a, b in pairwise(sizes))
    assert set(blocks_of(model).values()) == {1}
    with pytest.raises(BudgetError, match="can be dropped"):
        shrink(model, f"{sizes[-1] - 1}B")


def test_the_model_nears_the_original_along_the_list(whole: Any) -> None:
    original = tiny.build("llama", dtype=torch.float16, **WIDE).float()
    ids, model = tiny.batches((8,), length=16, seed=7)[0], copy.deepcopy(whole.model)
    size = stored_bytes(model)
    with torch.no_grad():
        wanted = original(**ids).logits
        errors = []
        for share in (1.0, 0.85, 0.7, 0.6):
            shrink(model, f"{int(share * size)}B")
            errors.append(error_ratio(copy.deepcopy(model).float()(**ids).logits, wanted))
    assert all(a < b for a, b in pairwise(errors))
    assert errors[0] < 0.5 * errors[-1]


def curves() -> Problem:
    """Three layers of which the gains cross, one of them shorter."""
    errors = {"a": [0.4, 0.3, 0.1, 0.0], "b": [5.0, 1.0, 0.9, 0.0], "c": [0.4, 0.2, 0.0]}
    energies = {"a": 1.0, "b": 10.0, "c": 1.0}
    made = {}
    for name, e in errors.items():
        forms = [*(SignStack(i) for i in range(1, len(e))), Dense()]
        made[name] = Curve(forms, [10 * (i + 1) for i in range(len(e))], e, energies[name])
    return Problem(made, 1000)


def test_energy_orders_within_levels_by_the_share_that_a_block_removes() -> None:
    assert by_energy(curves()) == [("b", 1), ("c", 1), ("a", 1), ("a", 2), ("b", 2)]


def test_energy_leaves_less_error_on_the_way_than_the_reverse_order(whole: Any) -> None:
    errors, order = whole.result.extra["block_errors"], whole.result.extra["load_order"]
    energy = {layer.name: layer.energy for layer in whole.result.layers}

    def on_the_way(names: list[str]) -> float:
        at, total = dict.fromkeys(errors, 0), 0.0
        for name in names:
            at[name] += 1
            total += sum(errors[n][i] / energy[n] for n, i in at.items())
        return total

    assert on_the_way(order) < 0.995 * on_the_way(order[::-1])


def loss_of(model: Any, batches: list[dict[str, Any]]) -> float:
    with torch.no_grad():
        losses = [F.cross_entropy(model(**b).logits[:, :-1].float().flatten(0, 1), b["input_ids"][:, 1:].flatten()) for b in batches]  # fmt: skip # noqa: E501
    return float(torch.stack(losses).mean())


def test_loss_orders_within_levels_by_the_model_with_that_block_alone() -> None:
    """Against losses of models made one by one, the others held at the level below."""
    targets = r"model\.layers\.1\.mlp\..*"
    order = compressed(sort="loss", targets=targets).result.extra["load_order"]
    names = sorted(set(order))
    assert len(names) == 3
    # the statistics are those of the batches that are not set aside
    own = eckart.compress(tiny.build("llama", dtype=torch.float16, **WIDE), "bitstack", budget=1.0, data=BATCHES[:-1], form=FORM, targets=targets)  # fmt: skip # noqa: E501
    layers = {n: own.model.get_submodule(n).matrix for n in names}
    deepest = min(m.form.blocks for m in layers.values())
    for level in range(1, deepest):
        losses = {}
        for raised in names:
            model = tiny.build("llama", dtype=torch.float16, **WIDE)
            for n in names:
                stack = layers[n].first(level + (n == raised))
                model.set_submodule(n, eckart.forms.drop_in(model.get_submodule(n), stack))
            losses[raised] = loss_of(model.float(), BATCHES[-1:])
        ranked = order[3 * (level - 1) : 3 * level]
        found = [losses[n] for n in ranked]
        assert found == pytest.approx(sorted(losses.values()), abs=1e-5)


def test_a_loss_that_is_no_number_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llama", dtype=torch.float16, **WIDE)
    method = BitStack(form=SignStack(rank=2), targets=r"model\.layers\.0\.mlp\..*", sort="loss")
    engine = Engine(InMemory(model), method, eckart.allocation.Budget.parse(0.9), BATCHES, tmp_path)
    given = iter([float("nan"), 3.0, 2.0])
    monkeypatch.setattr(Trial, "__call__", lambda *_: next(given, 1.0))
    order = engine.plan().extra["load_order"]
    assert [n.rpartition(".")[2] for n in order[:3]] == ["down_proj", "up_proj", "gate_proj"]


def test_columns_are_scaled_by_what_goes_in() -> None:
    """The stack of a layer is that of W diag(root mean square of its inputs), scaled back."""
    torch.manual_seed(0)
    layer = nn.Linear(24, 16, bias=False)
    x = torch.randn(64, 24) * torch.linspace(-3, 2, 24).exp()
    scale = x.square().mean(0).sqrt()
    wanted = SignStack(2, 2).fit(layer.weight.detach(), Weighting(right=DiagonalRoot(scale)))
    model = nn.Sequential(layer)
    eckart.compress(model, "bitstack", budget=0.9, data=[{"input": x}], form="sign_stack(blocks=2, rank=2)")
    found: Any = model[0]
    assert error_ratio(found.matrix.dense(), wanted.dense()) < 1e-4


def test_resize_writes_what_shrink_leaves(folder: Path, tmp_path: Path) -> None:
    result = resize(folder / "full", tmp_path / "small", 0.7)
    assert result.bytes_after == tiny.weight_bytes(tmp_path / "small") <= int(0.7 * tiny.weight_bytes(folder / "full"))
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 1
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    shrunk = AutoModelForCausalLM.from_pretrained(folder / "full")
    shrink(shrunk, f"{result.budget}B")
    state = small.state_dict()
    assert all(torch.equal(state[name], value) for name, value in shrunk.state_dict().items() if name in state)
    # in memory one header is counted, on disk one for each file
    assert 0 <= len(shrunk.config.load_order) - len(small.config.load_order) <= 3
    told = tiny.read_json(tmp_path / "small" / "eckart.json")
    config = tiny.read_json(tmp_path / "small" / "config.json")
    forms = {n: s["form"] for n, s in config["quantization_config"]["modules"].items()}
    assert {x["name"]: x["form"] for x in told["layers"]} == forms
    assert told["extra"]["load_order"] == config["load_order"]
    assert told["totals"]["bytes_after"] == result.bytes_after
    assert str(f"{result.bytes_after:,}") in (tmp_path / "small" / "README.md").read_text()
    for item in told["layers"]:
        module: Any = small.get_submodule(item["name"])
        assert item["bytes"] == module.matrix.nbytes
        assert item["measured_error"] is None
        assert item["predicted_error"] == told["extra"]["block_errors"][item["name"]][module.matrix.form.blocks - 1]


def test_resize_again_and_saved_by_transformers(folder: Path, tmp_path: Path) -> None:
    resize(folder / "full", tmp_path / "a", 0.8)
    AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    size = int(0.7 * tiny.weight_bytes(tmp_path / "a"))
    for source in ("a", "b"):
        resize(tmp_path / source, tmp_path / f"{source}2", f"{size}B")
        assert tiny.weight_bytes(tmp_path / f"{source}2") <= size
        AutoModelForCausalLM.from_pretrained(tmp_path / f"{source}2")
    history = tiny.read_json(tmp_path / "a2" / "config.json")["quantization_config"]["history"]
    assert [step.get("resize") for step in history] == [None, "0.8", f"{size}B"]


def test_the_command_line_resizes(folder: Path, tmp_path: Path) -> None:
    words = ["resize", str(folder / "full"), "-o", str(tmp_path / "x"), "-b", "0.8"]
    told = CliRunner().invoke(app, [*words, "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["totals"]["bytes_after"] == tiny.weight_bytes(tmp_path / "x")
    assert CliRunner().invoke(app, words).exit_code != 0  # it is there
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*words, "--overwrite"])
    assert shown.exit_code == 0, shown.output
    assert "sign_stack(blocks=" in shown.stdout


def test_what_cannot_be_resized_is_refused(folder: Path, tmp_path: Path) -> None:
    before = tiny.hashes(folder / "full")
    with pytest.raises(BudgetError, match=r"can be dropped the model takes \d+ bytes \(0\.\d{3} of what it is\)"):
        resize(folder / "full", tmp_path / "x", 0.1)
    with pytest.raises(ValueError, match="no model at"):
        resize(folder / "nowhere", tmp_path / "x", 0.9)
    with pytest.raises(ValueError, match="no stacks"):
        resize(folder / "m", tmp_path / "x", 0.9)
    with pytest.raises(ValueError, match="choose another"):
        resize(folder / "full", folder / "full", 0.9)
    with pytest.raises(ValueError, match="no stacks"):
        shrink(tiny.build("llama"), 0.9)
    assert not list(tmp_path.iterdir())
    assert tiny.hashes(folder / "full") == before


def test_a_load_order_that_is_not_of_these_stacks_is_refused(whole: Any) -> None:
    name = whole.result.layers[0].name
    with pytest.raises(ValueError, match="more than there are"):
        shrink(whole.model, 0.9, [name] * 50)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"sort": "random"}, "energy"),
        ({"form": "low_rank()"}, "sign_stack"),
        ({"allocation": "optimal()"}, "set sort"),
        ({"budget": 0.1}, "smallest possible"),
    ],
)
def test_nonsense_is_refused(settings: dict[str, Any], match: str) -> None:
    model = tiny.build("llama", **WIDE)
    with pytest.raises(ValueError, match=match):
        eckart.compress(model, "bitstack", **{"budget": 0.8, "data": BATCHES, **settings})


def test_damaged_weights_are_named() -> None:
    model = tiny.build("llama", **WIDE)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        eckart.compress(model, "bitstack", budget=0.8, data=BATCHES)
