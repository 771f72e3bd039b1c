"""Sub-MoE against its card: what merging keeps exactly, which experts meet, how many stay, and what is stored."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForCausalLM

import eckart
import mixtures
import tiny
from eckart.allocation import BudgetError
from eckart.anatomy import experts
from eckart.compression.expert_clusters import Clustering, cluster_all, split
from eckart.compression.expert_merging import merge
from eckart.compression.submoe import SubMoE
from eckart.forms import Dense, LowRank, parse
from eckart.forms.experts import PARTS, MergedExperts, expert_matrices
from eckart.linalg.kmeans import kmeans
from eckart.metrics import Statistics
from eckart.testing import error_ratio, gaussian
from mixtures import EXPERTS, INNER, TOP_K, WIDTH

GROUPS = [0, 1, 2, 3, 1, 0, 3, 2]
NAMES = ["mixtral", "qwen2_moe"]
DATA = tiny.batches((2, 2, 2))


def compressed(model: Any, budget: str | float, **settings: Any) -> tuple[Any, Any]:
    return eckart.compress(copy.deepcopy(model), "submoe", budget=budget, data=DATA, **settings)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=DATA[0]["input_ids"]).logits


def budget_for(model: Any, count: int) -> str:
    """Bytes that hold so many experts in all, headers and all else included, but not one more."""
    whole = sum(4 * p.numel() for p in model.parameters())
    return f"{whole - (2 * EXPERTS - count) * 3 * INNER * WIDTH * 4 + 9000}B"


def kept(model: Any) -> list[int]:
    return [len(m.merged) for m in model.modules() if isinstance(m, MergedExperts)]


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("mixtral", "dense()"), ("mixtral", "low_rank()"), ("mixtral", "quantized(bits=4, group=16)"),
        ("qwen2_moe", "dense()"), ("qwen2_moe", "low_rank()"), ("qwen3_moe", "dense()"),
    ],
)  # fmt: skip
def test_through_a_model(name: str, form: str, tmp_path: Path) -> None:
    model = mixtures.build(name)
    changed, result = compressed(model, 0.6, form=form)
    assert result.bytes_after <= result.budget
    assert all(isinstance(changed.get_submodule(layer.name), MergedExperts) for layer in result.layers)
    assert 0 < error_ratio(logits(changed), logits(model)) < 2
    changed.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "whole")
    assert tiny.weight_bytes(tmp_path / "one") == result.bytes_after < tiny.weight_bytes(tmp_path / "whole") * 0.65
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one").eval()
    assert torch.equal(logits(loaded), logits(changed))
    loaded.save_pretrained(tmp_path / "two")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize(("name", "count"), [("mixtral", 12), ("mixtral", 7), ("qwen2_moe", 12)])
def test_a_folder_becomes_what_the_model_in_memory_does(name: str, count: int, tmp_path: Path) -> None:
    """With 12 experts one layer, of which all are different, stays as it is."""
    model = mixtures.build(name)
    mixtures.plant(model, 0, GROUPS, 0.01)
    model.save_pretrained(tmp_path / "model")
    budget = budget_for(model, count)
    result = eckart.compress_to(tmp_path / "out", tmp_path / "model", "submoe", budget=budget, data=DATA)
    assert tiny.weight_bytes(tmp_path / "out") == result.bytes_after <= result.budget
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    changed, _ = compressed(model, budget)
    assert kept(loaded) == kept(changed) == ([4] if count == 12 else [4, 3])
    assert error_ratio(logits(loaded), logits(changed)) < 1e-6


def test_a_job_that_was_cut_off_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    mixtures.build("mixtral").save_pretrained(tmp_path / "model")

    def run(out: str, **settings: Any) -> None:
        eckart.compress_to(tmp_path / out, tmp_path / "model", "submoe", budget=0.6, data=DATA, **settings)

    def cut(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("fit", 1):
            raise RuntimeError("cut off")

    run("whole")
    with pytest.raises(RuntimeError, match="cut off"):
        run("cut", progress=cut)
    run("cut", resume=True)
    assert tiny.hashes(tmp_path / "cut") == tiny.hashes(tmp_path / "whole")


def stack(count: int = 3, seed: int = 0, inner: int = INNER) -> dict[str, Float[Tensor, "n out in"]]:
    shapes = {"gate": (inner, WIDTH), "up": (inner, WIDTH), "down": (WIDTH, inner)}
    return {part: gaussian(count, *shapes[part], seed=seed + i) for i, part in enumerate(PARTS)}


def routed(*counts: int, outer: bool = False) -> Statistics:
    sums = {"tokens": torch.tensor(float(sum(counts))), "routed": torch.tensor(counts, dtype=torch.float64)}
    if outer:
        x, h = gaussian(len(counts), 20, WIDTH, seed=7), gaussian(len(counts), 20, INNER, seed=8)
        sums |= {"expert_outer": x.mT @ x, "inner_outer": h.mT @ h}  # rank-deficient for the inputs
    return Statistics(sums)


def joint_svd(W: Float[Tensor, "n out in"], f: Tensor, S: Tensor | None, rank: int) -> Float[Tensor, "out in"]:
    """The merge as the paper writes it: one basis for all, right factors averaged by frequency."""
    roots = torch.stack([torch.eye(W.shape[2], dtype=torch.float64)] * len(W)) if S is None else S
    U, s, Vh = torch.linalg.svd(torch.cat([w.double() @ r for w, r in zip(W, roots, strict=True)], dim=1))
    parts = Vh[: len(s)].split(W.shape[2], dim=1)
    V = sum(fi * v @ torch.linalg.inv(r) for fi, v, r in zip(f / f.sum(), parts, roots, strict=True))
    return (U[:, :rank] * s[:rank]) @ V[:rank]  # type: ignore[index]


def test_a_full_rank_merge_is_the_mean_by_frequency() -> None:
    W, f = stack(), torch.tensor([5.0, 1.0, 2.0], dtype=torch.float64)
    found = merge(W, [0, 1, 2], routed(5, 1, 2), Dense(), torch.float32, align=False)
    for part in PARTS:
        mean = torch.einsum("n,noi->oi", f / f.sum(), W[part].double())
        assert error_ratio(found.matrices[part].dense(), mean) < 1e-6
        assert error_ratio(joint_svd(W[part], f, None, W[part].shape[1]), mean) < 1e-6


@pytest.mark.parametrize("rank", [1, 7, 24])
def test_a_truncated_merge_is_the_papers_and_the_projected_mean(rank: int) -> None:
    W, f = stack(), torch.tensor([50.0, 10.0, 20.0], dtype=torch.float64)
    statistics = routed(50, 10, 20, outer=True)
    for name in ("expert_outer", "inner_outer"):
        G = statistics.sums[name].double()
        statistics.sums[name] = G + 0.1 * torch.eye(G.shape[-1], dtype=torch.float64)
    found = merge(W, [0, 1, 2], statistics, LowRank(rank), torch.float32, align=False)
    for part in PARTS:
        S = torch.linalg.cholesky(statistics.sums["inner_outer" if part == "down" else "expert_outer"])
        dense = found.matrices[part].dense()
        assert error_ratio(dense, joint_svd(W[part], f, S, rank)) < 1e-5
        U = torch.linalg.svd(torch.cat([w.double() @ s for w, s in zip(W[part], S, strict=True)], dim=1)).U[:, :rank]
        mean = torch.einsum("n,noi->oi", f / f.sum(), W[part].double())
        assert error_ratio(dense, U @ U.T @ mean) < 1e-6


def test_truncation_at_full_rank_is_the_plain_merge_and_loses_more_below() -> None:
    """Of experts that are alike: what the mean of unlike ones loses does not fall with its rank."""
    base, other = stack(1, inner=WIDTH), stack(3, seed=10, inner=WIDTH)
    W, statistics = {part: base[part] + 0.1 * other[part] for part in PARTS}, routed(5, 1, 2, outer=True)
    statistics.sums["inner_outer"] = statistics.sums["expert_outer"]
    plain = merge(W, [0, 1, 2], statistics, Dense(), torch.float32)
    found = {r: merge(W, [0, 1, 2], statistics, LowRank(r), torch.float32) for r in (4, 8, 16, WIDTH)}
    for part in PARTS:
        assert error_ratio(found[WIDTH].matrices[part].dense(), plain.matrices[part].dense()) < 1e-5
    errors = [found[r].error for r in sorted(found)]
    assert errors == sorted(errors, reverse=True)
    assert found[WIDTH].error == pytest.approx(plain.error, rel=1e-4)


def outputs(matrices: dict[str, Tensor], x: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
    return (torch.nn.functional.silu(x @ matrices["gate"].T) * (x @ matrices["up"].T)) @ matrices["down"].T


def of(W: dict[str, Tensor], e: int) -> dict[str, Tensor]:
    return {part: W[part][e] for part in PARTS}


def test_frequencies_pay_where_they_differ() -> None:
    base, other = stack(1), stack(2, seed=10)
    W = {part: base[part] + 0.3 * other[part] for part in PARTS}
    x = gaussian(400, WIDTH, seed=3)
    error = {}
    for name, statistics in (("weighted", routed(10, 1)), ("plain", routed(1, 1))):
        found = merge(W, [0, 1], statistics, Dense(), torch.float32)
        y = outputs({part: found.matrices[part].dense() for part in PARTS}, x)
        error[name] = sum(f * float((outputs(of(W, e), x) - y).square().mean()) for e, f in ((0, 10), (1, 1)))
    assert error["weighted"] < 0.8 * error["plain"]


def test_experts_that_got_no_token() -> None:
    W = stack()
    found = merge(W, [0, 1], routed(0, 0, 3), Dense(), torch.float32, align=False)
    assert error_ratio(found.matrices["up"].dense(), W["up"][:2].mean(0)) < 1e-6  # none counts more than another
    found = merge(W, [0, 2], routed(0, 0, 3), Dense(), torch.float32)
    assert error_ratio(found.matrices["up"].dense(), W["up"][2]) < 1e-6
    silent = routed(0, 0, 3, outer=True)
    for name in ("expert_outer", "inner_outer"):
        silent.sums[name][:2] = 0.0
    found = merge(W, [0, 1], silent, LowRank(6), torch.float32, align=False)
    U = torch.linalg.svd(torch.cat([W["up"][0], W["up"][1]], dim=1).double()).U[:, :6]
    assert error_ratio(found.matrices["up"].dense(), U @ U.T @ W["up"][:2].double().mean(0)) < 1e-5


def statistics_of(model: Any) -> dict[str, Statistics]:
    from eckart.calibration.collect import Collector

    names = [site.name for site in experts(model)]
    collector = Collector({"similarity", "routed"})
    with collector.hooked(model, names), torch.no_grad():
        for batch in DATA:
            collector.next_batch(None)
            model(**batch)
    return {name: collector.of(name) for name in names}


def same_groups(labels: list[int], wanted: list[int]) -> bool:
    pairs = itertools.combinations(range(len(labels)), 2)
    return all((labels[i] == labels[j]) == (wanted[i] == wanted[j]) for i, j in pairs)


@pytest.mark.parametrize("permute", [False, True])
def test_planted_groups_are_found_by_outputs_and_not_always_by_weights(permute: bool) -> None:
    model = mixtures.build("mixtral")
    mixtures.plant(model, 0, GROUPS, 0.02, permute)
    site = experts(model)[0]
    S = statistics_of(model)[site.name].mean("similarity")
    assert same_groups(cluster_all(S, TOP_K, 0)[4].labels, GROUPS)
    flat = torch.cat([M.flatten(1) for M in expert_matrices(model.get_submodule(site.name)).values()], dim=1)
    by_weights = [kmeans(flat, 4, seed=seed) for seed in range(8)]
    best = min(by_weights, key=lambda run: run.error).labels.tolist()
    assert same_groups(best, GROUPS) != permute


@pytest.mark.parametrize("name", NAMES)
def test_merging_equal_experts_loses_nothing(name: str) -> None:
    """The whole model: router, the shares of experts that meet, hidden units in another order, shared experts."""
    model = mixtures.build(name)
    for layer in (0, 1):
        mixtures.plant(model, layer, GROUPS, 0.0, seed=layer)
    changed, result = compressed(model, budget_for(model, 8))
    assert kept(changed) == [4, 4]
    assert error_ratio(logits(changed), logits(model)) < 1e-5
    assert all((layer.measured_error or 0) < 1e-10 * (layer.energy or 0) for layer in result.layers)
    unaligned, _ = compressed(model, budget_for(model, 8), align=False)
    assert error_ratio(logits(unaligned), logits(model)) > 0.05


def test_the_share_of_a_token_that_is_routed_stays() -> None:
    """All experts are one, so that the layer puts out what it does once, times the sum of all shares."""
    model = mixtures.build("qwen2_moe")
    mixtures.plant(model, 0, [0] * EXPERTS, 0.0)
    changed, _ = compressed(model, budget_for(model, 2 * TOP_K))
    stands: Any = changed.get_submodule(experts(model)[0].name)
    x, shares = gaussian(7, WIDTH), gaussian(7, 3, seed=1).abs()
    index = torch.tensor([[0, 1, 2], [0, 0, 0], [7, 3, 5], [1, 6, 2], [4, 4, 1], [5, 6, 7], [2, 3, 4]])
    once = outputs(of(expert_matrices(model.get_submodule(experts(model)[0].name)), 0), x)
    assert error_ratio(stands(x, index, shares), once * shares.sum(1, keepdim=True)) < 1e-5


def test_shared_experts_and_routers_are_left_alone() -> None:
    model = mixtures.build("qwen2_moe")
    changed, _ = compressed(model, 0.6)
    before, after = model.state_dict(), changed.state_dict()
    others = [key for key in before if ".mlp.experts." not in key]
    assert any("shared_expert." in key for key in others)
    assert all(torch.equal(before[key], after[key]) for key in others)


@pytest.mark.parametrize("count", [5, 13])
def test_as_many_experts_as_the_budget_holds(count: int) -> None:
    model = mixtures.build("mixtral")
    changed, result = compressed(model, budget_for(model, count))
    assert sum(kept(changed)) == count
    assert min(kept(changed)) >= TOP_K
    dense = 3 * INNER * WIDTH
    assert sum(p.numel() for n, p in changed.named_parameters() if ".merged." in n) == count * dense
    _, larger = compressed(model, f"{result.bytes_after + 4 * dense + 400}B")
    assert sum(int(layer.note.split(", ")[1].split()[0]) for layer in larger.layers) == count + 1


def test_a_truncated_expert_has_the_numbers_that_are_left() -> None:
    changed, _ = compressed(mixtures.build("mixtral"), 0.6, form="low_rank()", inside=0.3)
    rank = int(0.7 * INNER * WIDTH / (INNER + WIDTH))
    for module in changed.modules():
        if isinstance(module, MergedExperts):
            assert module.form == LowRank(rank)
            assert {p.numel() for p in module.parameters()} == {rank * INNER, rank * WIDTH}


def test_too_small_a_budget_is_refused_with_the_least_there_is() -> None:
    model = mixtures.build("mixtral")
    with pytest.raises(BudgetError, match="as many experts left in each layer as a token is sent to") as refused:
        compressed(model, 0.2)
    least = int(str(refused.value).split("possible is ")[1].split()[0])
    changed, result = compressed(model, f"{least}B")
    assert (kept(changed), result.bytes_after) == ([TOP_K] * 2, least)


def test_layers_of_a_window_share_where_it_costs_least() -> None:
    model = mixtures.build("mixtral")
    mixtures.plant(model, 1, GROUPS, 0.01)
    assert kept(compressed(model, budget_for(model, 12))[0]) == [4]  # the other layer keeps all of its own
    assert kept(compressed(model, budget_for(model, 12), window=1)[0]) == [6, 6]


@pytest.mark.parametrize("window", [1, 2, 3])
def test_the_split_is_the_best_of_all(window: int) -> None:
    draw = gaussian(4, 5, dtype=torch.float64).abs().cumsum(1).flip(1)
    curves = [{k + 2: Clustering([], float(row[k])) for k in range(5)} for row in draw]
    for total in range(8, 25):
        counts = split(curves, total, window)
        assert sum(counts) <= total
        for start in range(0, 4, window):
            own, some = counts[start : start + window], curves[start : start + window]
            every = (c for c in itertools.product(*some) if sum(c) <= sum(own))
            best = min(sum(curve[k].error for curve, k in zip(some, c, strict=True)) for c in every)
            assert sum(curve[k].error for curve, k in zip(some, own, strict=True)) == pytest.approx(best)
        assert sum(counts) == total or window > 1
    with pytest.raises(ValueError, match="cannot have 30 clusters"):
        split(curves, 30, window)


def test_more_clusters_never_cost_more() -> None:
    Y = gaussian(12, 6, dtype=torch.float64)
    Y = Y / Y.norm(dim=1, keepdim=True)
    found = cluster_all(Y @ Y.T, 1, 0)
    errors = [found[k].error for k in range(1, 13)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12
    for k, clustering in found.items():
        labels = torch.tensor(clustering.labels)
        assert set(clustering.labels) <= set(range(k))
        centroids = torch.stack([Y[labels == c].mean(0) for c in range(max(clustering.labels) + 1)])
        assert clustering.error == pytest.approx(float((Y - centroids[labels]).square().sum()), abs=1e-9)


def divergence(model: Any, other: Any) -> float:
    p, q = (logits(m).double().log_softmax(-1) for m in (model, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_where_experts_are_alike_it_beats_pruning_by_frequency_and_merging_at_random() -> None:
    model = mixtures.build("mixtral", seed=3)
    for layer in (0, 1):
        mixtures.plant(model, layer, GROUPS, 0.05, permute=False, seed=layer)
    ours, _ = compressed(model, budget_for(model, 8))
    pruned, at_random = copy.deepcopy(model), copy.deepcopy(model)
    for site, statistics in zip(experts(model), statistics_of(model).values(), strict=True):
        busy = statistics.sums["routed"].topk(4).indices
        module: Any = pruned.get_submodule(site.name)
        router: Any = pruned.get_submodule(site.router)
        for parameter in (module.gate_up_proj, module.down_proj, router.weight):
            parameter.data = parameter.data[busy].clone()
        module.num_experts = router.num_experts = 4
        module = at_random.get_submodule(site.name)
        labels = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(1)) % 4
        for parameter in (module.gate_up_proj, module.down_proj):
            means = torch.stack([parameter.data[labels == c].mean(0) for c in range(4)])
            parameter.data = means[labels]
    assert divergence(model, ours) < 0.5 * divergence(model, pruned)
    assert divergence(model, ours) < 0.5 * divergence(model, at_random)


def test_the_same_seed_gives_the_same_bits() -> None:
    model = mixtures.build("mixtral")
    one, two = (compressed(model, 0.6, seed=4)[0].state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_refused() -> None:
    with pytest.raises(ValueError, match="no layers of experts that could be merged"):
        eckart.compress(tiny.build("llama"), "submoe", budget=0.8, data=DATA)
    merged, _ = compressed(mixtures.build("mixtral"), 0.6)
    with pytest.raises(ValueError, match="no layers of experts that could be merged"):
        compressed(merged, 0.5)
    odd = mixtures.build("mixtral")
    odd.model.layers[1].mlp.experts.has_bias = True
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts: .*has_bias"):
        compressed(odd, 0.6)
    broken = mixtures.build("mixtral")
    broken.model.layers[1].mlp.experts.down_proj.data[0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"the outputs of model\.layers\.1\.mlp\.experts holds NaN"):
        compressed(broken, 0.6)
    for settings, message in (
        ({"window": 0}, "window"), ({"inside": 1.0}, "inside"), ({"form": parse("quantized()")}, "all its settings"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            SubMoE(**settings)
