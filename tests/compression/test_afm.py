"""Atomic feature mimicking: error identities, frequency weighting of tables, fusion, whole recommenders, messages."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float, Int
from safetensors.torch import save
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import eckart
import tiny
from eckart.allocation import BudgetError
from eckart.calibration.collect import Collector
from eckart.calibration.subject import block_names
from eckart.checkpoint.layout import METADATA
from eckart.compression.afm import AFM, activate
from eckart.compression.fusion import fuse
from eckart.compression.lord import LoRD
from eckart.forms import LowRank
from eckart.forms.layers import FactoredEmbedding, FactoredLinear
from eckart.linalg.whitening import Damped
from eckart.metrics import Statistics
from eckart.metrics.row_frequencies import RowFrequencies
from eckart.testing.numbers import error_ratio, gaussian

DIM, FIELDS = 16, (500, 300, 200, 100, 50, 8)
PLENTY = "1GB"


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Lookup(nn.Module):
    """One field, and whatever follows."""

    def __init__(self, table: nn.Embedding, after: nn.Module | None = None):
        super().__init__()
        self.table, self.after = table, after or nn.Identity()

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        return self.after(self.table(ids))


class Recommender(nn.Module):
    """Tables in a list, of which an MLP reads the vectors side by side."""

    def __init__(self, sizes: tuple[int, ...] = FIELDS, dense: int = 3):
        super().__init__()
        torch.manual_seed(0)
        self.tables = nn.ModuleList(nn.Embedding(n, DIM) for n in sizes)
        self.mlp = nn.Sequential(
            nn.Linear(len(sizes) * DIM + dense, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 1)
        )
        for table in self.tables:
            table.weight.data = correlated(*table.weight.shape, seed=len(table.weight))

    def vectors(self, ids: Int[Tensor, "batch fields"]) -> Float[Tensor, "batch fields dim"]:
        return torch.stack([table(ids[:, i]) for i, table in enumerate(self.tables)], dim=1)

    def forward(
        self, ids: Int[Tensor, "batch fields"], numbers: Float[Tensor, "batch dense"]
    ) -> Float[Tensor, " batch"]:
        return self.mlp(torch.cat([self.vectors(ids).flatten(1), numbers], dim=1))[:, 0]


class DeepFM(Recommender):
    """A factorisation machine over the same vectors, first-order terms and a bias of the model's own beside the MLP."""

    def __init__(self, sizes: tuple[int, ...] = FIELDS):
        super().__init__(sizes)
        self.first = nn.ModuleList(nn.Embedding(n, 1) for n in sizes)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(
        self, ids: Int[Tensor, "batch fields"], numbers: Float[Tensor, "batch dense"]
    ) -> Float[Tensor, " batch"]:
        e = self.vectors(ids)
        pairs = 0.5 * (e.sum(1).square() - e.square().sum(1)).sum(-1)
        single = torch.cat([table(ids[:, i]) for i, table in enumerate(self.first)], dim=1).sum(1)
        deep = self.mlp(torch.cat([e.flatten(1), numbers], dim=1))[:, 0]
        return deep + pairs + single + self.bias


class BiInteraction(Recommender):
    """The MLP reads sums of pairwise products (NFM)."""

    def __init__(self, sizes: tuple[int, ...] = FIELDS):
        super().__init__(sizes)
        self.mlp[0] = nn.Linear(DIM + 3, 48)

    def forward(
        self, ids: Int[Tensor, "batch fields"], numbers: Float[Tensor, "batch dense"]
    ) -> Float[Tensor, " batch"]:
        e = self.vectors(ids)
        return self.mlp(torch.cat([e.sum(1).square() - e.square().sum(1), numbers], dim=1))[:, 0]


def correlated(rows: int, width: int, seed: int) -> Float[Tensor, "rows width"]:
    """Vectors about a mean that is not zero, with a spectrum that falls."""
    return 0.3 * gaussian(rows, width, seed=seed) @ torch.diag(0.8 ** torch.arange(width)) + gaussian(
        width, seed=seed + 1
    )


def zipf(rows: int, count: int, seed: int, power: float = 1.0) -> Int[Tensor, " count"]:
    """Ids of which the lower ones are more frequent, as rank to a negative power."""
    weights = torch.arange(1, rows + 1, dtype=torch.float64) ** -power
    return torch.multinomial(weights, count, replacement=True, generator=torch.Generator().manual_seed(seed))


def clicks(sizes: tuple[int, ...] = FIELDS, batches: int = 4, rows: int = 128) -> list[dict[str, Tensor]]:
    """Batches of ids and numbers."""
    made = []
    for b in range(batches):
        ids = [zipf(n, rows, seed=100 * b + i) for i, n in enumerate(sizes)]
        made.append({"ids": torch.stack(ids, dim=1), "numbers": gaussian(rows, 3, seed=b)})
    return made


def lookup_error(before: Float[Tensor, "rows dim"], after: Any, ids: Int[Tensor, " n"]) -> float:
    """Summed squared error of the vectors looked up, computed as anybody would."""
    return float((before[ids].double() - after.weight.as_subclass(Tensor)[ids].double()).square().sum())


def discarded(outputs: Float[Tensor, "n dim"], rank: int) -> float:
    """n times the sum of the smallest eigenvalues of the covariance."""
    centred = outputs.double() - outputs.double().mean(0)
    values = torch.linalg.eigvalsh(centred.T @ centred)
    return float(values[: len(values) - rank].sum())


def fitted_table(
    weight: Tensor, ids: Int[Tensor, " n"], rank: int = 4, chunks: int = 1, **settings: Any
) -> tuple[Any, Any]:
    """A table compressed alone, and the line of the result that is about it."""
    model = Lookup(nn.Embedding.from_pretrained(weight.clone()))
    data = [{"ids": part} for part in ids.chunk(chunks)]
    result = eckart.compress(model, "afm", budget=0.95, data=data, table=LowRank(rank), **settings).result
    assert result.layers[0].form == f"low_rank(rank={rank})"
    return model.table, result.layers[0]


# -- errors are what the papers say


def test_table_error_is_the_discarded_variance_of_what_is_looked_up() -> None:
    weight, ids = correlated(300, DIM, seed=1).double(), zipf(300, 4000, seed=2)
    table, layer = fitted_table(weight, ids)
    wanted = discarded(weight[ids], 4)
    assert lookup_error(weight, table, ids) == pytest.approx(wanted, rel=1e-6)
    assert len(ids) * layer.measured_error == pytest.approx(wanted, rel=1e-6)
    assert len(ids) * layer.predicted_error == pytest.approx(wanted, rel=1e-6)


def test_table_is_centred_codes_a_decoder_and_the_mean() -> None:
    weight, ids = correlated(300, DIM, seed=1).double(), zipf(300, 4000, seed=2)
    table, _ = fitted_table(weight, ids)
    seen = weight[ids]
    U = torch.linalg.eigh(torch.cov(seen.T)).eigenvectors[:, -4:]
    assert error_ratio(table.bias, seen.mean(0)) < 1e-7
    assert error_ratio(table.weight.as_subclass(Tensor), (weight - seen.mean(0)) @ U @ U.T + seen.mean(0)) < 1e-6
    assert torch.equal(table(ids[:7]), table.matrix.left.weight[ids[:7]] @ table.matrix.right.weight + table.bias)


def test_layer_error_is_the_discarded_variance_of_its_output() -> None:
    x = torch.randint(-4, 5, (512, 24), generator=torch.Generator().manual_seed(0)).double()  # sums of these are exact
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 20).double())
    wanted = discarded(model(x).detach(), 5)
    before = model(x)
    layer = eckart.compress(model, "afm", budget=PLENTY, data=[{"input": x}], form=LowRank(5)).result.layers[0]
    assert layer.form == "dense()"  # nothing forces it to be smaller
    layer = eckart.compress(model, "afm", budget=0.75, data=[{"input": x}], form=LowRank(5)).result.layers[0]
    assert layer.form == "low_rank(rank=5)"
    assert float((model(x) - before).square().sum()) == pytest.approx(wanted, rel=1e-6)
    assert len(x) * layer.measured_error == pytest.approx(wanted, rel=1e-6)
    assert error_ratio(model(x).mean(0), before.mean(0)) < 1e-7


def test_frequent_rows_count_as_often_as_they_are_used() -> None:
    rows, rank = 5000, 4
    axes = torch.linalg.qr(gaussian(DIM, DIM, seed=1)).Q
    weight = 0.3 * gaussian(rows, DIM, seed=2)
    weight[:100] += 2 * gaussian(100, rank, seed=3) @ axes[:rank]
    weight[100:] += 2 * gaussian(rows - 100, rank, seed=4) @ axes[rank : 2 * rank]
    ids, fresh = zipf(rows, 20_000, seed=5, power=1.5), zipf(rows, 5_000, seed=6, power=1.5)
    ours, _ = fitted_table(weight, ids)
    plain, _ = fitted_table(weight, ids, metric="plain")
    error = {
        name: lookup_error(weight, table, fresh) / len(fresh) for name, table in (("ours", ours), ("plain", plain))
    }
    assert error["ours"] < 0.3 * error["plain"]
    assert float((weight - plain.weight).norm()) < float((weight - ours.weight).norm())


def test_permuting_ids_changes_nothing() -> None:
    weight, ids = correlated(300, DIM, seed=1), zipf(300, 2000, seed=2)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3))
    table, layer = fitted_table(weight, ids)
    moved, permuted = fitted_table(weight[order], order.argsort()[ids])
    assert permuted.measured_error == pytest.approx(layer.measured_error, rel=1e-6)
    assert error_ratio(moved.weight, table.weight[order]) < 1e-5


def test_more_epochs_change_nothing() -> None:
    weight, ids = correlated(300, DIM, seed=1), zipf(300, 2000, seed=2)
    once, _ = fitted_table(weight, ids)
    thrice, _ = fitted_table(weight, ids.repeat(3))
    assert torch.equal(once.matrix.right.weight, thrice.matrix.right.weight)
    assert torch.equal(once.bias, thrice.bias)


def test_chunks_add_up_to_one_pass() -> None:
    data = clicks(batches=10)
    whole = [{k: torch.cat([b[k] for b in data]) for k in data[0]}]
    models = []
    for batches in (data, whole):
        model = DeepFM()
        eckart.compress(model, "afm", budget=0.6, data=batches)
        models.append(model)
    for one, other in zip(models[0].tables, models[1].tables, strict=True):
        assert error_ratio(one.weight, other.weight) < 1e-6
    assert error_ratio(models[0](**data[0]), models[1](**data[0])) < 1e-6


def test_rows_never_seen_are_said() -> None:
    statistics = Statistics()
    statistics.add_ids(torch.tensor([0, 2, 2]), 5)
    with pytest.warns(Damped, match="3 of 5 rows of tables.0 are never looked up"):
        weighting = RowFrequencies().weighting(statistics, "tables.0")
    assert weighting.left.gram(5).diagonal().tolist() == pytest.approx(
        [1 / 3, 6e-10 / 3, 2 / 3, 6e-10 / 3, 6e-10 / 3], rel=1e-6
    )


def test_rows_never_seen_are_kept_as_the_others_are() -> None:
    weight, ids = correlated(300, DIM, seed=1), zipf(100, 2000, seed=2)
    table, _ = fitted_table(weight, ids, rank=12)
    rest = weight[100:] - weight[ids].mean(0)
    assert float((weight - table.weight)[100:].square().sum() / rest.square().sum()) < 0.1


# -- statistics


def test_counts_are_those_of_ids_that_are_not_padding() -> None:
    table, ids = nn.Embedding(9, 4), torch.tensor([[1, 1, 5, 0], [8, 1, 0, 0]])
    model, mask = Lookup(table), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    collector = Collector({"x", "outer"})
    with collector.hooked(model, ["table"]):
        collector.next_batch(mask)
        model(ids)
        model(ids=ids)
    assert collector.of("table").sums["counts"].tolist() == [0, 6, 0, 0, 0, 2, 0, 0, 2]
    assert collector.of("table").tokens == 10


def test_a_table_looked_up_twice_counts_both() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.other, self.items = nn.Embedding(40, 2), nn.Embedding(40, DIM)

        def forward(self, item: Tensor, history: Tensor) -> Tensor:
            return self.items(item) + self.items(history).mean(1) + self.other(item).sum()

    model, collector = Pair(), Collector({"outer"})
    item, history = zipf(40, 30, seed=1), zipf(40, 90, seed=2).view(30, 3)
    with collector.hooked(model, ["other", "items"]):
        collector.next_batch(None)
        model(item, history)
    wanted = torch.bincount(torch.cat([item, history.flatten()]), minlength=40)
    assert torch.equal(collector.of("items").sums["counts"], wanted.double())
    assert torch.equal(collector.of("other").sums["counts"], torch.bincount(item, minlength=40).double())


def test_ids_beyond_the_table_are_named() -> None:
    model = Lookup(nn.Embedding(30, 4))
    with pytest.raises(ValueError, match=r"table has rows 0 to 29 and is asked for 3 to 30"):
        eckart.compress(model, "afm", budget=0.7, data=[{"ids": torch.tensor([3, 30])}])


def test_counts_of_shards_add_up() -> None:
    ids, merged = zipf(50, 500, seed=1), Statistics()
    for part in ids.chunk(3):
        shard = Statistics()
        shard.add_ids(part, 50)
        merged.merge(shard)
    assert torch.equal(merged.sums["counts"], torch.bincount(ids, minlength=50).double())
    assert merged.tokens == 500


# -- whole models


@pytest.mark.parametrize("budget", [0.8, 0.5, "60KB"])
def test_recommender_end_to_end(budget: float | str) -> None:
    model, data = DeepFM(), clicks()
    dense = {name: copy.deepcopy(m) for name, m in model.named_modules() if isinstance(m, nn.Embedding | nn.Linear)}
    assert block_names(model) == []  # the list of tables is no chain of blocks
    before = len(save(model.state_dict(), metadata=METADATA))
    wanted = model(**data[0])
    same, result = eckart.compress(model, "afm", budget=budget, data=data)
    assert same is model
    assert result.bytes_before == before
    assert result.bytes_after == len(save(model.state_dict(), metadata=METADATA)) <= result.budget
    forms = {layer.name: layer for layer in result.layers}
    assert forms.keys() == dense.keys()
    for name in ("tables.0", "tables.4", "mlp.0", "mlp.2"):
        assert forms[name].form.startswith("low_rank")
        assert forms[name].measured_error == pytest.approx(forms[name].predicted_error, rel=1e-4)
    assert isinstance(model.tables[0], FactoredEmbedding)
    assert type(model.tables[5]) is nn.Embedding
    assert "8 rows of 16 numbers" in (forms["tables.5"].note or "")
    assert "left dense" in (forms["first.0"].note or "")
    assert 0 < error_ratio(model(**data[0]), wanted) < 0.5


def test_half_precision_is_kept() -> None:
    model, data = Recommender().half(), clicks()
    result = eckart.compress(model, "afm", budget=0.6, data=data).result
    assert {t.dtype for t in model.state_dict().values()} == {torch.float16}
    assert result.bytes_after == len(save(model.state_dict(), metadata=METADATA)) <= result.budget
    assert all(layer.measured_error <= 1.01 * layer.predicted_error for layer in result.layers if layer.energy)


def test_a_larger_budget_is_a_smaller_error() -> None:
    data, errors = clicks(), []
    for budget in (0.4, 0.6, 0.8):
        model = DeepFM()
        wanted = model(**data[0])
        eckart.compress(model, "afm", budget=budget, data=data)
        errors.append(error_ratio(model(**data[0]), wanted))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.5 * errors[-1]


def test_layers_without_tables_are_treated_as_by_lord() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 30))]
    models.append(copy.deepcopy(models[0]))
    data = [{"input": gaussian(200, 30, seed=b)} for b in range(3)]
    for model, method in zip(models, (AFM(), LoRD()), strict=True):
        eckart.compress(model, method, budget=0.6, data=data)
    assert all(torch.equal(a, b) for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True))  # fmt: skip # noqa: E501
    assert isinstance(models[0][0], FactoredLinear)


def test_any_recipe_can_target_tables() -> None:
    weight, ids = correlated(300, DIM, seed=1), zipf(300, 2000, seed=2)
    errors = {}
    for key in ("lord", "svd_llm", "svd"):
        model = Lookup(nn.Embedding.from_pretrained(weight.clone()))
        eckart.compress(model, key, budget=0.4, data=[{"ids": ids}], targets="table")
        assert (model.table.bias is None) == (key != "lord")
        errors[key] = lookup_error(weight, model.table, ids)
    assert errors["lord"] < errors["svd_llm"] < errors["svd"]


def test_compressing_twice_keeps_the_mean_once() -> None:
    weight, ids = correlated(300, DIM, seed=1), zipf(300, 2000, seed=2)
    model = Lookup(nn.Embedding.from_pretrained(weight))
    for rank in (8, 4):
        eckart.compress(model, "afm", budget=0.9, data=[{"ids": ids}], table=LowRank(rank))
    once, _ = fitted_table(weight, ids)
    assert error_ratio(model.table.weight, once.weight) < 1e-5


@pytest.mark.parametrize("padded", [False, True])
def test_token_embedding_of_a_transformer(tmp_path: Path, padded: bool) -> None:
    model, data = tiny.build("llama"), tiny.batches((4, 4), length=20, padded=padded)
    _, result = eckart.compress(model, "afm", budget=0.75, data=data)
    layer = next(layer for layer in result.layers if layer.name == "model.embed_tokens")
    assert layer.form.startswith("low_rank")
    assert isinstance(model.model.embed_tokens, FactoredEmbedding)
    assert type(model.lm_head) is nn.Linear
    assert sum(layer.form != "dense()" for layer in result.layers) > 10
    model.save_pretrained(tmp_path)
    assert result.bytes_after <= result.budget
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(loaded(**data[0]).logits, model(**data[0]).logits, atol=1e-5)


@pytest.mark.parametrize(("name", "table", "why"), [
    ("llama-tied", "model.embed_tokens", "shared with another layer"),
    ("opt", "model.decoder.embed_positions", "something of its own"),
])  # fmt: skip
def test_tables_that_stay(name: str, table: str, why: str) -> None:
    model = tiny.build(name)
    _, result = eckart.compress(model, "afm", budget=0.9, data=tiny.batches())
    layer = next(layer for layer in result.layers if layer.name == table)
    assert (layer.form, layer.bytes) == ("dense()", layer.dense_bytes)
    assert why in (layer.note or "")
    assert isinstance(model.get_submodule(table), nn.Embedding)
    assert not isinstance(model.get_submodule(table), FactoredEmbedding)


def test_shared_and_renormalised_tables_stay() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Embedding(40, 8), nn.Embedding(40, 8), nn.Embedding(40, 8, max_norm=1.0)
            self.b.weight = self.a.weight
            self.mlp = nn.Linear(8, 30)

        def forward(self, ids: Tensor) -> Tensor:
            return self.mlp(self.a(ids) + self.b(ids) + self.c(ids))

    model = Shared()
    result = eckart.compress(model, "afm", budget=0.95, data=[{"ids": zipf(40, 300, seed=1)}]).result
    notes = {layer.name: layer.note or "" for layer in result.layers}
    assert model.b.weight is model.a.weight
    assert "shared" in notes["a"]
    assert "shared" in notes["b"]
    assert "renormalises" in notes["c"]
    assert isinstance(model.mlp, FactoredLinear)


# -- fusion and activations


@pytest.mark.parametrize("targets", ["tables.*", ""])
def test_fused_and_unfused_models_agree(targets: str) -> None:
    model, data = Recommender(FIELDS[:5]), clicks(FIELDS[:5])
    eckart.compress(model, "afm", budget=0.7, data=data, table=LowRank(4), targets=targets)
    other = clicks(FIELDS[:5], batches=6)[-1]
    wanted, bytes_before = model(**other), len(save(model.state_dict()))
    fuse(model, [f"tables.{i}" for i in range(5)], "mlp.0", data[0])
    assert model.tables[0](torch.tensor([3])).shape == (1, 4)
    assert model.mlp[0].in_features == 5 * 4 + 3
    assert error_ratio(model(**other), wanted) < 1e-5
    assert len(save(model.state_dict())) < bytes_before


def test_one_table_for_all_fields_fuses() -> None:
    torch.manual_seed(0)
    model = Lookup(nn.Embedding(400, DIM), nn.Sequential(nn.Flatten(), nn.Linear(3 * DIM, 20, bias=False)))
    model.table.weight.data = correlated(400, DIM, seed=1)
    ids = zipf(400, 900, seed=2).view(300, 3)
    eckart.compress(model, "afm", budget=0.6, data=[{"ids": ids}], targets="table")
    wanted = model(ids)
    fuse(model, "table", "after.1", {"ids": ids[:50]})
    assert model.after[1].in_features == 3 * model.table.embedding_dim < 3 * DIM
    assert error_ratio(model(ids), wanted) < 1e-5


def refused(model: nn.Module, tables: Any, linear: str, batch: Any, match: str) -> None:
    """Fusion is refused, and the model is as it was."""
    wanted, before = model(**batch), list(model.named_modules())
    with pytest.raises(ValueError, match=match):
        fuse(model, tables, linear, batch)
    assert [(n, id(m)) for n, m in model.named_modules()] == [(n, id(m)) for n, m in before]
    assert torch.equal(model(**batch), wanted)


@pytest.mark.parametrize("kind", [DeepFM, BiInteraction])
def test_fusion_through_an_interaction_is_refused(kind: type[Recommender]) -> None:
    model, data = kind(FIELDS[:3]), clicks(FIELDS[:3])
    eckart.compress(model, "afm", budget=0.7, data=data, table=LowRank(4), targets="tables.*")
    tables = [f"tables.{i}" for i in range(3)]
    reason = (
        "something else reads their vectors" if kind is DeepFM else r"mlp\.0 does not read the vectors of tables\.0"
    )
    refused(model, tables, "mlp.0", data[0], reason)
    refused(model, tables, "mlp.2", data[0], r"mlp\.2 does not read the vectors of tables\.0 as they are")


def test_fusion_that_cannot_be_is_refused() -> None:
    model, data = Recommender(FIELDS[:3]), clicks(FIELDS[:3])
    eckart.compress(model, "afm", budget=0.7, data=data, table=LowRank(4), targets="tables.*")
    refused(model, "tables.0", "mlp.0", data[0], "fold all tables that belong together at once")
    refused(model, "mlp.2", "mlp.0", data[0], r"mlp\.2 has no decoder to fold: it is Linear")
    refused(model, "tables.0", "mlp.1", data[0], r"mlp\.1 is ReLU")
    same = {"ids": torch.zeros(2, 3, dtype=torch.long), "numbers": torch.zeros(2, 3)}
    model.tables[1] = model.tables[0]
    refused(model, "tables.0", "mlp.0", same, "called 2 times")
    model.tables[1] = copy.deepcopy(model.tables[0])
    refused(model, "tables.0", "mlp.0", same, "in 2 places")


def test_activations_between_the_factors() -> None:
    model, data = Recommender(), clicks()
    eckart.compress(model, "afm", budget=0.95, data=data, targets=r"mlp\.2")
    without = copy.deepcopy(model)
    activate(model, ["mlp.2"], nn.ReLU)
    assert [type(m) for m in model.mlp[2]] == [nn.Linear, nn.ReLU, nn.Linear]
    x = gaussian(10, 48)
    assert torch.allclose(model.mlp[2][2](model.mlp[2][0](x)), without.mlp[2](x), atol=1e-5)
    assert not torch.allclose(model(**data[0]), without(**data[0]), atol=1e-3)
    assert all(parameter.requires_grad for parameter in model.mlp[2].parameters())
    with pytest.raises(ValueError, match=r"mlp\.0 is Linear, not a low-rank linear layer"):
        activate(model, ["mlp.0"], nn.ReLU)
    with pytest.raises(TypeError, match="LlamaForCausalLM is one of transformers' models"):
        activate(tiny.build("llama"), [], nn.ReLU)


# -- bad input


def test_a_field_that_is_never_looked_up_is_named() -> None:
    class Half(Recommender):
        def vectors(self, ids: Tensor) -> Tensor:
            return torch.stack([self.tables[0](ids[:, 0])] * 2, dim=1)

    with pytest.raises(ValueError, match=r"tables\.1 is never looked up by the calibration data"):
        eckart.compress(Half(FIELDS[:2]), "afm", budget=0.7, data=clicks(FIELDS[:2]))


def test_a_rank_above_the_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tables\.0 has 500 rows of 16 numbers: low_rank\(rank=17\)"):
        eckart.compress(Recommender(), "afm", budget=0.7, data=clicks(), table=LowRank(17))


def test_pooled_tables_are_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(50, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 40))
    data = [{"input": zipf(50, 60, seed=1).view(20, 3)}]
    with pytest.raises(ValueError, match=r"0 is an EmbeddingBag: .* `targets`"):
        eckart.compress(model, "afm", budget=0.9, data=data)
    result = eckart.compress(model, "afm", budget=0.95, data=data, targets="[13]").result
    assert {layer.name for layer in result.layers} == {"1", "3"}
    assert type(model[0]) is nn.EmbeddingBag


def test_budget_and_data_that_cannot_be() -> None:
    with pytest.raises(BudgetError, match="the smallest possible is"):
        eckart.compress(Recommender(), "afm", budget=0.01, data=clicks())
    with pytest.raises(ValueError, match="afm needs calibration data"):
        eckart.compress(Recommender(), "afm", budget=0.5)


def test_nan_in_a_table_names_it() -> None:
    model = Recommender()
    model.tables[2].weight.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"the weight of tables\.2 holds NaN or infinity"):
        eckart.compress(model, "afm", budget=0.5, data=clicks(), targets="tables.*")
