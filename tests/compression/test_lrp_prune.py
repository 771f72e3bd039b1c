"""LRP pruning: what its card says, on tiny transformers, a net with branches, and the paper's points in the plane."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

import eckart
import tiny
from eckart.allocation import Budget, BudgetError
from eckart.anatomy import anatomy
from eckart.calibration.relevance import Probes, unit_relevance
from eckart.calibration.relevance_rules import RelevanceRules, explained
from eckart.calibration.store import OUTSIDE
from eckart.calibration.stream import Stream, single_rows
from eckart.calibration.subject import InMemory
from eckart.calibration.unit_scores import passing_scores
from eckart.checkpoint.layout import file_bytes, layout_of
from eckart.compression.lrp_prune import LRPPrune
from eckart.compression.plain_units import all_kept, measured, prune, smaller, smaller_layout
from eckart.compression.unit_ranking import SCORES, Kept, ranked, remove_least, scorer, true_classes
from eckart.compression.unit_tracing import Units, find_units
from eckart.jobs.engine import Engine
from eckart.jobs.plan import Plan
from eckart.testing import error_ratio, gaussian

NAMES = ["llama", "qwen3", "gemma2", "gpt2", "opt", "gpt_neox", "bert", "mpnet"]


def loader(name: str) -> Any:
    return tiny.HEADS.get(name, tf.AutoModelForCausalLM)


def masked_logits(model: Any, kept: Kept) -> Tensor:
    """Of the whole model, with zeros where removed units enter their layer."""
    masks = {}
    for block in anatomy(model).blocks:
        for p in (block.mlp.down, block.attention.o):
            masks[p.module] = kept[p.module].repeat_interleave(p.shape[1] // len(kept[p.module]))
    with Probes(model, list(masks), "input", masks), torch.no_grad():
        return model(**tiny.batches()[0]).logits


def kept_of(model: Any, extra: dict[str, Any]) -> Kept:
    found: Kept = {}
    for block in anatomy(model).blocks:
        for name, count in ((block.mlp.down.module, block.mlp.down.shape[1]), (block.attention.o.module, block.attention.kv_heads)):  # fmt: skip # noqa: E501
            bits = int(extra["kept"][name], 16)
            found[name] = torch.tensor([bool(bits >> i & 1) for i in range(count)])
    return found


@pytest.mark.parametrize("name", NAMES)
def test_removal_is_masking_and_what_is_saved_loads(name: str, tmp_path: Path) -> None:
    model = tiny.build(name)
    original = copy.deepcopy(model)
    result = eckart.compress(model, "lrp_prune", budget=0.625, data=tiny.batches(), step=0.2).result
    kept = kept_of(original, result.extra)
    heads = [kept[block.attention.o.module] for block in anatomy(original).blocks]
    neurons = [kept[block.mlp.down.module] for block in anatomy(original).blocks]
    assert any(not bool(k.all()) for k in neurons)
    assert any(not bool(k.all()) for k in heads) or len(heads[0]) == 1  # a group that is alone in its layer stays
    with torch.no_grad():
        found = model(**tiny.batches()[0]).logits
    assert error_ratio(found, masked_logits(original, kept)) <= 1e-5
    model.save_pretrained(tmp_path)
    loaded = loader(name).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**tiny.batches()[0]).logits, found)
    assert result.bytes_after <= result.budget
    stored = sum(p.numel() for p in loaded.parameters())
    assert stored < 0.8 * sum(p.numel() for p in original.parameters())


@pytest.mark.parametrize("score", SCORES)
def test_bytes_are_those_of_the_files(score: str, tmp_path: Path) -> None:
    source = tiny.save_model(tmp_path / "source", dtype=torch.float32)
    settings: dict[str, Any] = {"budget": 0.8, "data": tiny.batches((2, 2)), "score": score, "step": 0.2}
    planned = eckart.compress_to(tmp_path / "planned", source, "lrp_prune", dry_run=True, **settings)
    result = eckart.compress_to(tmp_path / "out", source, "lrp_prune", **settings)
    assert tiny.weight_bytes(tmp_path / "out") == planned.bytes_after == result.bytes_after <= result.budget
    assert result.bytes_after > 0.97 * result.budget
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model = tf.AutoModelForCausalLM.from_pretrained(source).eval()
    eckart.compress(model, "lrp_prune", **settings)
    with torch.no_grad():
        assert error_ratio(loaded(**tiny.batches()[0]).logits, model(**tiny.batches()[0]).logits) <= 1e-6
    for layer in result.layers:
        own = [p for n, p in loaded.state_dict().items() if n.startswith(layer.name + ".")]
        assert layer.bytes == sum(p.numel() * p.element_size() for p in own)


def test_removed_neurons_are_no_longer_computed(tmp_path: Path) -> None:
    model = tiny.build("llama")
    eckart.compress(model, "lrp_prune", budget=0.7, data=tiny.batches(), heads=False, step=0.2)
    narrow = [block.mlp for block in model.model.layers if block.mlp.up_proj.out_features < 48]
    assert narrow
    for mlp in narrow:
        assert mlp.up_proj.weight.shape[0] == mlp.gate_proj.weight.shape[0] == mlp.down_proj.weight.shape[1]
    assert all(type(block.self_attn.q_proj) is nn.Linear for block in model.model.layers)


def whole_scores(model: Any, batch: dict[str, Tensor], rules: RelevanceRules | None, taylor: bool) -> dict[str, Tensor]:
    """The same scores from one run of the whole model on one row."""
    units = {p.module: n for b in anatomy(model).blocks for p, n in ((b.mlp.down, 48), (b.attention.o, b.attention.kv_heads))}  # fmt: skip # noqa: E501
    labels = true_classes(batch, anatomy(model).kind == "decoder")
    with Probes(model, list(units), "input") as probes:
        with explained(model, rules):
            logits = model(**batch).logits
        with torch.enable_grad():
            chosen = logits[labels >= 0].gather(-1, labels[labels >= 0][:, None])
            loss = F.cross_entropy(logits[labels >= 0], labels[labels >= 0], reduction="sum")
            gradients = probes.gradients((chosen / chosen.detach()).sum() if rules else loss)
    found = {}
    for (name, x), g in zip(probes.seen, gradients, strict=True):
        each = (x.detach() * g if rules or taylor else g)[0].unflatten(-1, (units[name], -1)).sum(-1).double()
        found[name] = each.abs().sum(0) / int((labels >= 0).sum()) if rules else each.mean(0).abs() / each.mean(0).norm()  # fmt: skip # noqa: E501
    return found


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("score", ["relevance", "taylor", "gradient"])
def test_block_by_block_is_the_whole_model_at_once(name: str, score: str, tmp_path: Path) -> None:
    model = tiny.build(name)
    batch = tiny.batches((1,), padded=True)[0]
    wanted = whole_scores(model, batch, RelevanceRules() if score == "relevance" else None, score == "taylor")
    blocks = anatomy(model).blocks
    places = {i: {b.mlp.down.module: 48, b.attention.o.module: b.attention.kv_heads} for i, b in enumerate(blocks)}
    labels = [true_classes(batch, name == "llama")]
    run = scorer(InMemory(model), [batch], labels, tmp_path, [b.name for b in blocks], places, "input", score, "zplus")
    found = run({n: torch.ones(units, dtype=torch.bool) for p in places.values() for n, units in p.items()})
    assert found.keys() == wanted.keys()
    for layer, values in wanted.items():
        assert error_ratio(found[layer], values) <= 1e-4


def test_scores_are_those_of_the_smaller_model(tmp_path: Path) -> None:
    model = tiny.build("llama", num_hidden_layers=2)
    batches = single_rows(tiny.batches((2,)))
    places = {i: {b.mlp.down.module: 48} for i, b in enumerate(anatomy(model).blocks)}
    kept = {n: torch.arange(48) % 3 > 0 for p in places.values() for n in p}
    labels = [true_classes(batch, True) for batch in batches]
    names = [b.name for b in anatomy(model).blocks]
    found = scorer(InMemory(model), batches, labels, tmp_path / "a", names, places, "input", "relevance", "zplus")(kept)
    for mlp in (block.mlp for block in model.model.layers):
        k = torch.arange(48) % 3 > 0
        for p, weight in ((mlp.gate_proj, mlp.gate_proj.weight[k]), (mlp.up_proj, mlp.up_proj.weight[k]), (mlp.down_proj, mlp.down_proj.weight[:, k])):  # fmt: skip # noqa: E501
            p.weight = nn.Parameter(weight.detach().clone())
            p.out_features, p.in_features = weight.shape
    places = {i: dict.fromkeys(p, 32) for i, p in places.items()}
    everything = {n: torch.ones(32, dtype=torch.bool) for n in kept}
    again = scorer(InMemory(model), batches, labels, tmp_path / "b", names, places, "input", "relevance", "zplus")(everything)  # fmt: skip # noqa: E501
    for name, mask in kept.items():
        assert error_ratio(found[name][mask], again[name]) <= 1e-4
        assert float(found[name][~mask].abs().sum()) == 0


def test_true_classes() -> None:
    batch = tiny.batches((2,), padded=True)[0]
    real, ids = batch["attention_mask"].bool(), batch["input_ids"]
    own, following = true_classes(batch, False), true_classes(batch, True)
    assert torch.equal(own >= 0, real)
    assert torch.equal(own[real], ids[real])
    assert torch.equal(following[:, :-1][real[:, 1:]], ids[:, 1:][real[:, 1:]])
    assert int((following >= 0).sum()) == int(real[:, 1:].sum())
    assert true_classes({"labels": torch.tensor([1, 0])}, True).tolist() == [1, 0]
    with pytest.raises(ValueError, match="with `labels`"):
        true_classes({"pixel_values": torch.zeros(1)}, False)


def test_a_classifier_is_judged_by_its_labels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tf.BertConfig(**tiny.CONFIGS["bert"][1], num_labels=3)
    model = tf.AutoModelForSequenceClassification.from_config(config).eval()
    twin = copy.deepcopy(model)
    data = [{**b, "labels": torch.tensor([0, 2])} for b in tiny.batches((2, 2))]
    eckart.compress(model, "lrp_prune", budget=0.75, data=data, step=0.2)
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(**tiny.batches()[0]).logits, model(**tiny.batches()[0]).logits)
    with pytest.raises(ValueError, match="give the true classes as `labels`"):
        eckart.compress(twin, "lrp_prune", budget=0.75, data=tiny.batches((2, 2)))
    with pytest.raises(ValueError, match="up to 3 do not fit logits"):
        eckart.compress(twin, "lrp_prune", budget=0.75, data=[{**b, "labels": torch.tensor([3, 3])} for b in data])


def test_images_are_judged_by_their_labels(tmp_path: Path) -> None:
    model = tiny.build("vit", num_hidden_layers=2)
    data = [{"pixel_values": gaussian(2, 3, 12, 12, seed=i), "labels": torch.tensor([0, 1])} for i in range(2)]
    result = eckart.compress(model, "lrp_prune", budget=0.7, data=data, step=0.2).result
    assert result.bytes_after <= result.budget
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(data[0]["pixel_values"]).logits, model(data[0]["pixel_values"]).logits)


def test_so_many_rows_are_explained() -> None:
    data = tiny.batches((2, 2, 1))
    kept = {}
    for name, rows, references in (("two", data, 2), ("first", data[:1], 16), ("all", data, 16)):
        result = eckart.compress(tiny.build("llama"), "lrp_prune", budget=0.75, data=rows, references=references, step=0.5).result  # fmt: skip # noqa: E501
        kept[name] = result.extra["kept"]
    assert kept["two"] == kept["first"] != kept["all"]


def test_a_plan_that_went_through_json_gives_the_same_model(tmp_path: Path) -> None:
    model = tiny.build("llama")
    twin = copy.deepcopy(model)
    for m, folder in ((model, tmp_path / "a"), (twin, tmp_path / "b")):
        folder.mkdir()
        engine = Engine(InMemory(m), LRPPrune(step=0.3), Budget.parse(0.75), tiny.batches(), folder)
        plan = engine.plan()
        engine.fit(plan if m is model else Plan.from_json(json.loads(json.dumps(plan.to_json()))))
    assert torch.equal(model(**tiny.batches()[0]).logits, twin(**tiny.batches()[0]).logits)


def test_ranking_is_global_and_empties_nothing() -> None:
    scores = {"a": torch.tensor([0.3, 0.1, 0.2]), "b": torch.tensor([5.0, 4.0]), "c": torch.tensor([0.0])}
    kept = {name: torch.ones(len(s), dtype=torch.bool) for name, s in scores.items()}
    assert ranked(scores, kept) == [("a", 1), ("a", 2), ("b", 1)]
    assert ranked(scores, kept, {"a": 1.0, "b": 100.0, "c": 1.0}) == [("b", 1), ("a", 1), ("a", 2)]
    left = remove_least(kept, lambda k: scores, lambda k: sum(int(v.sum()) for v in k.values()), 3, 1.0)
    assert {n: v.tolist() for n, v in left.items()} == {"a": [True, False, False], "b": [True, False], "c": [True]}
    with pytest.raises(BudgetError, match="one unit in every group"):
        remove_least(kept, lambda k: scores, lambda k: sum(int(v.sum()) for v in k.values()), 2, 1.0)


def test_units_are_ranked_anew_after_every_step() -> None:
    calls: list[int] = []

    def scores(kept: Kept) -> dict[str, Tensor]:
        calls.append(int(kept["a"].sum()))
        order = torch.arange(20.0)
        return {"a": order if calls[-1] > 15 else -order}  # the second half of the removal sees another order

    left = remove_least({"a": torch.ones(20, dtype=torch.bool)}, scores, lambda k: int(k["a"].sum()), 10, 0.25)
    assert calls == [20, 15]
    assert left["a"].nonzero()[:, 0].tolist() == list(range(5, 15))


def test_what_a_large_unit_makes_needless_stays() -> None:
    """Where the last unit to go is a large one, the best of those before it are put back."""
    kept = {"small": torch.ones(10, dtype=torch.bool), "large": torch.ones(2, dtype=torch.bool)}
    scores = {"small": torch.arange(10.0), "large": torch.tensor([4.5, 100.0])}
    cost = lambda k: int(k["small"].sum()) + 10 * int(k["large"].sum())  # noqa: E731
    left = remove_least(kept, lambda k: scores, cost, 18, 1.0)
    assert left["large"].tolist() == [False, True]
    assert left["small"].nonzero()[:, 0].tolist() == list(range(2, 10))


class Branches(nn.Module):
    """Convolutions with a sum over a shortcut, a maximum, and linear layers."""

    UNITS = (
        Units(("stem", "second"), ("first", "hidden")),
        Units(("first",), ("second",)),
        Units(("hidden",), ("last",)),
    )

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1, stride=2)
        self.first = nn.Conv2d(6, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 1, bias=False)
        self.hidden = nn.Linear(6 * 9, 10)
        self.last = nn.Linear(10, 3)
        self.relu = nn.ReLU(inplace=True)
        generator = torch.Generator().manual_seed(3)
        for p in self.double().parameters():
            nn.init.normal_(p, std=0.3, generator=generator)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(self.second(self.relu(self.first(x))) + x)
        return self.last(self.relu(self.hidden(F.max_pool2d(x, 2).flatten(1))))


def images(count: int = 6) -> list[dict[str, Tensor]]:
    return [{"x": gaussian(count, 2, 12, 12, dtype=torch.float64).abs(), "labels": torch.arange(count) % 3}]


def groups(model: nn.Module, *shape: int) -> dict[str, tuple[str, ...]]:
    """Producers of each group -> its consumers."""
    return {g.name: g.consumers for g in find_units(model, {"input" if isinstance(model, nn.Sequential) else "x": torch.ones(shape, dtype=next(model.parameters()).dtype)})}  # fmt: skip # noqa: E501


def test_units_are_found_by_running_the_model() -> None:
    found = {frozenset(g.producers): set(g.consumers) for g in find_units(Branches(), images()[0])}
    assert found == {frozenset(g.producers): set(g.consumers) for g in Branches.UNITS}
    mlp = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2))
    assert groups(mlp, 7, 3) == {"0": ("2",), "2": ("4",)}
    assert groups(mlp, 7, 6, 3) == {"0": ("2",), "2": ("4",)}
    flat = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(16, 2))
    assert groups(flat, 3, 2, 10) == {"0": ("4",)}


class Odd(nn.Module):
    """Two linear layers, and between them what cannot be pruned through."""

    def __init__(self, between: Any):
        super().__init__()
        self.first, self.last, self.between = nn.Linear(4, 4), nn.Linear(4, 4), between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x), x, self))


@pytest.mark.parametrize(
    "between",
    [
        lambda y, x, net: y.sigmoid(),  # makes something of nothing
        lambda y, x, net: y + 1,
        lambda y, x, net: y + x,  # no layer made x
        lambda y, x, net: net.first(y),  # one layer, two places
        lambda y, x, net: torch.cat([y[:, :2], y[:, 2:]], 1),
        lambda y, x, net: y.T,
        lambda y, x, net: y.softmax(1),
    ],
)
def test_units_with_anything_else_between_are_left_alone(between: Any) -> None:
    assert groups(Odd(lambda y, x, net: y.relu() * 2), 4, 4) == {"first": ("last",)}
    assert groups(Odd(between), 4, 4) == {}
    with pytest.raises(ValueError, match="no units of Odd can be removed"):
        prune(Odd(between), [{"x": torch.ones(4, 4), "labels": torch.zeros(4).long()}], budget=0.5)


@pytest.mark.parametrize("score", SCORES)
def test_a_net_with_shortcuts(score: str) -> None:
    net = Branches()
    original = copy.deepcopy(net)
    before = file_bytes(layout_of(net.state_dict()))
    kept = prune(net, images(), budget=0.6, score=score)
    assert all(bool(k.any()) for k in kept.values())
    masks = {p: kept[group.name] for group in Branches.UNITS for p in group.producers}
    with Probes(original, list(masks), "output", masks), torch.no_grad():
        wanted = original(images()[0]["x"])
    assert error_ratio(net(images()[0]["x"]), wanted) <= 1e-5
    assert file_bytes(layout_of(net.state_dict())) <= 0.6 * before
    assert (
        net.stem.out_channels == net.second.weight.shape[0] == net.first.in_channels == int(kept["stem+second"].sum())
    )
    assert net.hidden.in_features == 9 * net.stem.out_channels
    assert type(net.stem) is nn.Conv2d
    assert net.stem.stride == (2, 2)


def test_relevance_is_conserved_in_what_is_left(tmp_path: Path) -> None:
    """Without biases, at every layer it is the number of samples, before and after units are removed."""
    net = nn.Sequential(nn.Linear(4, 9, bias=False), nn.ReLU(), nn.Linear(9, 7, bias=False), nn.ReLU(),
                        nn.Linear(7, 3, bias=False)).double().eval()  # fmt: skip
    for p in net.parameters():
        p.data = gaussian(*p.shape, seed=p.shape[0], dtype=torch.float64)
        p.data[:, 0].abs_()
    x, y = gaussian(6, 4, dtype=torch.float64).abs(), torch.arange(6) % 3
    stream = Stream(InMemory(net), [{"input": x}], tmp_path, [])
    stream.start()
    for alive in (torch.ones(9, dtype=torch.bool), torch.arange(9) % 2 == 0):
        kept = {"0": alive, "2": torch.ones(7, dtype=torch.bool)}
        found = passing_scores(stream, [y], {OUTSIDE: {"0": 9, "2": 7}}, kept, rules=RelevanceRules(), at="output")
        assert float(found["0"].sum()) == pytest.approx(1, rel=1e-5)
        assert float(found["2"].sum()) == pytest.approx(1, rel=1e-5)


def test_dead_units_have_no_relevance_and_go_first() -> None:
    net = Branches()
    net.last.weight.data.abs_()  # whatever is active speaks for some class
    for layer, dead in ((net.first, [1, 5]), (net.hidden, [7])):
        layer.weight.data[dead] = -layer.weight.data[dead].abs()
        layer.bias.data[dead] = -1.0
    x, labels = images()[0]["x"], images()[0]["labels"]
    with Probes(net, ["first", "hidden"]) as probes:
        before = net(x)
    alive = {name: (y > 0).transpose(0, 1).flatten(1).any(1) for name, y in probes.seen}
    assert not bool(alive["first"][[1, 5]].any())
    assert not bool(alive["hidden"][7])
    for name, found in unit_relevance(net, {"x": x}, labels, ["first", "hidden"]).items():
        assert torch.equal(found == 0, ~alive[name])
    units = [Units(("first",), ("second",)), Units(("hidden",), ("last",))]
    kept = prune(net, images(), units=units, budget=f"{file_bytes(smaller_layout(net, units, alive))}B")
    assert {n: k.tolist() for n, k in kept.items()} == {n: k.tolist() for n, k in alive.items()}
    assert error_ratio(net(x), before) <= 1e-9


def test_an_earlier_step_changes_a_later_one() -> None:
    at_once, in_steps = (prune(Branches(), images(), budget=0.2, step=s) for s in (1.0, 0.04))
    assert any(not torch.equal(at_once[n], in_steps[n]) for n in at_once)


def points(kind: str, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two classes in the plane: moons that reach into each other, or circles one within the other."""
    label = torch.arange(count) % 2
    angle = torch.rand(count, generator=generator) * torch.pi
    noise = 0.1 * torch.randn(count, 2, generator=generator)
    if kind == "circle":
        radius = 1.0 - 0.5 * label
        return torch.stack([radius * (2 * angle).cos(), radius * (2 * angle).sin()], 1) + noise, label
    x = torch.where(label == 0, angle.cos(), 1 - angle.cos())
    y = torch.where(label == 0, angle.sin(), 0.5 - angle.sin())
    return torch.stack([x, y], 1) + noise, label


def trained(kind: str, seed: int, width: int = 96) -> tuple[nn.Sequential, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    x, y = points(kind, 256, generator)
    for _ in range(120):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval(), generator


def toy_accuracy(kinds: tuple[str, ...], seeds: int) -> dict[str, float]:
    """Mean accuracy when a third of all neurons is removed, judged by five samples a class, without training again."""
    accuracy = dict.fromkeys([*SCORES, "random", "whole"], 0.0)
    for kind in kinds:
        for seed in range(seeds):
            net, generator = trained(kind, seed)
            few, test = points(kind, 10, generator), points(kind, 1000, generator)
            for score in accuracy:
                smaller_net = net if score == "whole" else without_a_third(net, score, *few, generator)
                hit = float((smaller_net(test[0]).argmax(1) == test[1]).float().mean())
                accuracy[score] += hit / seeds / len(kinds)
    return accuracy


def without_a_third(net: nn.Sequential, score: str, x: Tensor, y: Tensor, generator: torch.Generator) -> nn.Sequential:
    units = find_units(net, {"input": x})
    kept = all_kept(net, units)
    random = {name: torch.rand(len(alive), generator=generator) for name, alive in kept.items()}
    count = sum(len(alive) for alive in kept.values())
    with tempfile.TemporaryDirectory() as work:
        data = [{"input": x, "labels": y}]
        scores = (lambda kept: random) if score == "random" else measured(net, units, data, Path(work), score, "zplus")
        kept = remove_least(kept, scores, lambda k: sum(int(alive.sum()) for alive in k.values()), count * 2 // 3, 0.1)
    net = copy.deepcopy(net)
    for name, layer in smaller(net, units, kept).items():
        net.set_submodule(name, layer)
    return net


def test_points_in_the_plane_without_training_again() -> None:
    """The order of the paper's figures 3 and 4, on smaller nets: 3 x 96 neurons, of which a third is removed."""
    found = toy_accuracy(("moon", "circle"), 3)
    assert found["whole"] > 0.98
    assert found["relevance"] > 0.97
    assert found["relevance"] >= found["taylor"]
    assert found["relevance"] >= found["gradient"]
    assert min(found["taylor"], found["gradient"]) > max(found["weight"], found["random"])


def test_another_class_to_start_from_ranks_otherwise() -> None:
    net, generator = trained("circle", 0)
    x, y = points("circle", 40, generator)
    x = x + 0.5 * torch.randn(x.shape, generator=generator)  # some are now taken for the other class
    predicted = net(x).argmax(1)
    assert not torch.equal(predicted, y)
    starts = {"true": y, "predicted": predicted, "wrong": 1 - y, "all": torch.ones(40, 2)}
    found = {n: unit_relevance(net, {"input": x}, start, ["0", "2", "4"]) for n, start in starts.items()}
    least = {n: torch.cat(list(scores.values())).argsort()[:96].sort().values.tolist() for n, scores in found.items()}
    assert len({tuple(units) for units in least.values()}) == 4


def test_better_than_small_weights_on_a_trained_decoder() -> None:
    """At equal bytes, on text of a Markov chain that a small Llama has learnt."""
    generator = torch.Generator().manual_seed(0)
    chain = (3 * torch.randn(40, 40, generator=generator)).softmax(-1)

    def text(rows: int, length: int = 24) -> Tensor:
        ids = [torch.randint(40, (rows,), generator=generator)]
        while len(ids) < length:
            ids.append(torch.multinomial(chain[ids[-1]], 1, generator=generator)[:, 0])
        return torch.stack(ids, 1)

    torch.manual_seed(0)
    config = tf.LlamaConfig(**{**tiny.GQA, "vocab_size": 40, "num_hidden_layers": 2})
    model = tf.AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        ids = text(16)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    held_out = text(64)
    lost = {"none": float(model(input_ids=held_out, labels=held_out).loss)}
    for score in ("relevance", "weight"):
        data = [{"input_ids": text(4)} for _ in range(2)]
        pruned = eckart.compress(copy.deepcopy(model), "lrp_prune", budget="0.6 linears", data=data, score=score).model
        lost[score] = float(pruned(input_ids=held_out, labels=held_out).loss)
    assert lost["relevance"] < lost["weight"]


def test_refusals() -> None:
    for settings, words in (
        ({"score": "size"}, "one of relevance, taylor, gradient, weight"),
        ({"rule": "gamma"}, "one of zplus, epsilon"),
        ({"step": 0.0}, "above 0 and at most 1"),
        ({"per": "kilo"}, "per byte or per unit"),
        ({"references": 0}, "at least one row"),
    ):
        with pytest.raises(ValueError, match=words):
            LRPPrune(**settings)
    with pytest.raises(ValueError, match="lrp_prune needs calibration data"):
        eckart.compress(tiny.build("llama"), "lrp_prune", budget=0.8)
    with pytest.raises(ValueError, match="Sequential has no config"):
        eckart.compress(nn.Sequential(nn.Linear(3, 3)), "lrp_prune", budget=0.8, data=tiny.batches())
    with pytest.raises(ValueError, match="no logits, from which relevance starts"):
        eckart.compress(tf.BertModel(tf.BertConfig(**tiny.CONFIGS["bert"][1])), "lrp_prune", budget=0.8, data=tiny.batches())  # fmt: skip # noqa: E501
    model = tiny.build("llama")
    eckart.compress(model, "svd", budget=0.8)
    with pytest.raises(ValueError, match=r"q_proj \(FactoredLinear\) is compressed or quantised already"):
        eckart.compress(model, "lrp_prune", budget=0.8, data=tiny.batches())


def test_impossible_budget_states_the_smallest() -> None:
    model = tiny.build("llama")
    with pytest.raises(BudgetError, match=r"the smallest possible is (\d+) bytes \(0\.\d+ of the input\)") as error:
        eckart.compress(model, "lrp_prune", budget=0.1, data=tiny.batches())
    smallest = int(str(error.value).split("possible is ")[1].split()[0])
    result = eckart.compress(model, "lrp_prune", budget=f"{smallest}B", data=tiny.batches(), step=0.5).result
    assert result.bytes_after == smallest
    with pytest.raises(BudgetError, match="one unit left in every layer"):
        prune(Branches(), images(), budget=0.01)


def test_a_budget_for_everything_changes_nothing() -> None:
    model = tiny.build("llama")
    before = model(**tiny.batches()[0]).logits
    result = eckart.compress(model, "lrp_prune", budget=1.0, data=tiny.batches()).result
    assert {layer.form for layer in result.layers} == {"dense()"}
    assert torch.equal(model(**tiny.batches()[0]).logits, before)


def test_bad_units_and_samples_of_other_nets() -> None:
    net = Branches()
    with pytest.raises(ValueError, match="no reference samples"):
        prune(net, [], budget=0.6)
    with pytest.raises(ValueError, match="hold its true classes as `labels`"):
        prune(net, [{"x": images()[0]["x"]}], budget=0.6)
    with pytest.raises(ValueError, match="labels of shape"):
        prune(net, [{**images()[0], "labels": torch.full((6,), 3)}], budget=0.6)
    with pytest.raises(ValueError, match="equally many channels"):
        all_kept(net, [Units(("stem", "first"), ("second",))])
    with pytest.raises(ValueError, match="no multiple of the 8 units of first"):
        all_kept(net, [Units(("first",), ("last",))])
    with pytest.raises(ValueError, match="units of one group"):
        all_kept(net, [Units(("first",), ("second",)), Units(("first",), ("second",))])
    with pytest.raises(ValueError, match="neither a linear layer nor a convolution"):
        all_kept(net, [Units(("relu",), ("second",))])
