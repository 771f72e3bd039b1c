"""CorDA: PEFT's own, prepared for the user; the card's identities on toys; conversion; inputs it cannot start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lone import gaussian, layer_of
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor, nn

import eckart
from eckart import adapters
from eckart.testing.adapters import answers, batches, near, small_model, trained

WARNED = pytest.mark.filterwarnings("ignore:.corda_config. specified", "ignore:CorDA changes the base")


def correlated(sequences: int = 6, tokens: int = 20, width: int = 12, seed: int = 0) -> list[dict[str, Tensor]]:
    """Inputs whose directions have sizes from 1 to 0.05."""
    turn, _ = torch.linalg.qr(gaussian(width, width, seed=seed + 50))
    sizes = torch.logspace(0, -1.3, width)
    return [{"input": (gaussian(1, tokens, width, seed=seed + s) * sizes) @ turn.T} for s in range(sequences)]


def covariance(data: list[dict[str, Tensor]]) -> Tensor:
    """Mean of Xᵀ X, each X divided by its largest number, and 0.01 of its mean diagonal; float64."""
    X = [batch["input"][0].double() for batch in data]
    C = torch.stack([x.T @ x / x.max() ** 2 for x in X]).mean(0)
    return C + 0.01 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)


def lone(W: Tensor, data: Any, **settings: Any) -> Any:
    model = adapters.adapt(nn.Sequential(layer_of(W)), "corda", data=data, target_modules=["0"], **settings)
    return model.base_model.model[0]


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_it_is_peft_s_own_with_its_preparation_done(mode: str) -> None:
    theirs = small_model()
    names = {n.rpartition(".")[2] for n, m in theirs.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    config = LoraConfig(r=2, lora_alpha=4, init_lora_weights="corda", corda_config=CordaConfig(corda_method=mode), target_modules=names)  # fmt: skip # noqa: E501
    with pytest.raises(ValueError, match="eigens"):
        get_peft_model(small_model(), config)

    @torch.no_grad()
    def run() -> None:
        for batch in batches(4):
            for row in batch["input_ids"]:
                theirs(input_ids=row[None])

    preprocess_corda(theirs, config, run)
    theirs = get_peft_model(theirs, config).eval()
    ours = adapters.adapt(small_model().train(), "corda", data=batches(4), rank=2, alpha=4.0, mode=mode)
    assert ours.training
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[n], other[n]) for n in mine)
    assert near(answers(ours.eval()), answers(small_model()), 1e-4)
    assert not any(hasattr(m, word) for m in ours.modules() for word in ("eigens", "covariance_matrix"))


@pytest.mark.parametrize("scale", [1, 2])
def test_what_is_left_is_what_the_singular_values_say(scale: int) -> None:
    W, data, r = gaussian(10, 12), correlated(), 3
    C = covariance(data)
    S = torch.linalg.svdvals(W.double() @ C)
    x = gaussian(5, 12, seed=9)
    for mode, left in (("ipm", S[r:]), ("kpm", S[:-r])):
        layer = lone(W, data, rank=r, alpha=float(scale * r), mode=mode)
        residual = layer.base_layer.weight.detach().double()
        assert float((residual @ C).norm()) == pytest.approx(float(left.norm()), rel=1e-5)
        assert near(layer(x), x @ W.T, 1e-4)
        assert int(torch.linalg.matrix_rank(W - residual.float(), atol=1e-4)) == r
    whole = lone(W, data, rank=10, mode="ipm")
    assert float(whole.base_layer.weight.detach().norm()) < 1e-4 * float(W.norm())


def test_few_tokens_are_damped() -> None:
    data = correlated(sequences=1, tokens=4)
    layer = lone(gaussian(10, 12), data, rank=2)
    assert layer.lora_A["default"].weight.isfinite().all()
    assert near(layer(gaussian(5, 12, seed=9)), gaussian(5, 12, seed=9) @ gaussian(10, 12).T, 1e-4)


def test_dropping_the_smallest_hurts_less_than_without_the_covariance_on_such_inputs_alone() -> None:
    def errors(W: Tensor, seen: list[dict[str, Tensor]], r: int = 6) -> tuple[float, float]:
        x = torch.cat([b["input"][0] for b in seen])
        U, S, Vh = torch.linalg.svd(W)
        plain = W - U[:, -r:] * S[-r:] @ Vh[10 - r : 10]
        ours = lone(W, correlated(), rank=r, mode="kpm").base_layer.weight.detach()
        return float((x @ (W - ours).T).norm()), float((x @ (W - plain).T).norm())

    W = gaussian(10, 12)
    own, plain = errors(W, correlated(seed=0))
    assert own < 0.7 * plain
    own_elsewhere, plain_elsewhere = errors(W, [{"input": gaussian(1, 80, 12, seed=4)}])
    assert own_elsewhere / plain_elsewhere > own / plain


def test_knowledge_is_kept_better_than_by_lora_at_equal_loss() -> None:
    def forgotten(key: str, seed: int) -> float:
        W, known = gaussian(10, 12, seed=seed), correlated(seed=seed)
        x, target = gaussian(128, 12, seed=seed + 1), gaussian(10, 12, seed=seed + 2)
        if key == "corda":
            layer = lone(W, known, rank=3, mode="kpm")
        else:
            torch.manual_seed(seed)
            config = LoraConfig(r=3, lora_alpha=3, target_modules=["0"])
            layer = get_peft_model(nn.Sequential(layer_of(W)), config).base_model.model[0]
        wanted = x @ (W + 0.3 * target).T
        optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], 1e-2)
        first = (x @ W.T - wanted).square().mean()
        for _ in range(2000):
            loss = (layer(x) - wanted).square().mean()
            if loss < 0.75 * first:
                break
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert loss < 0.75 * first
        old = torch.cat([b["input"][0] for b in known])
        return float((layer(old) - old @ W.T).detach().norm())

    assert sum(forgotten("corda", s) for s in range(3)) < 0.7 * sum(forgotten("lora", s) for s in range(3))


def test_padding_does_not_count() -> None:
    rows = [{"input_ids": b["input_ids"][i : i + 1, : 5 + i]} for b in batches(3) for i in range(2)]
    padded = []
    for row in rows:
        length, ids = row["input_ids"].shape[1], torch.zeros(1, 9, dtype=torch.long)
        ids[:, :length] = row["input_ids"]
        padded.append({"input_ids": ids, "attention_mask": (torch.arange(9) < length).long()[None], "labels": ids})
    plain, with_padding = (adapters.adapt(small_model(), "corda", data=d, rank=2) for d in (rows, padded))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), with_padding.parameters(), strict=True))


@WARNED
def test_as_a_plain_lora_it_fits_the_untouched_model(tmp_path: Path) -> None:
    start = str(tmp_path / "start")
    model = adapters.adapt(small_model(), "corda", data=batches(4), rank=2, alpha=4.0, start_folder=start)
    trained(model, lr=3e-3)
    model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=start)
    again = PeftModel.from_pretrained(small_model(), tmp_path / "out").eval()
    assert again.peft_config["default"].r == 4
    assert not near(answers(model), answers(small_model()), 1e-3)
    assert near(answers(again), answers(model), 1e-4)
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="eigens"):
        PeftModel.from_pretrained(small_model(), tmp_path / "plain")


def test_what_it_cannot_start_from_is_named_and_leaves_nothing() -> None:
    good = correlated()
    for words, data, settings in (
        ("what enters 0 has NaN", [{"input": b["input"] / 0} for b in good], {"rank": 2}),
        ("the largest number that enters 0 is 0", [{"input": 0 * b["input"]} for b in good], {"rank": 2}),
        (r"0: rank 11 is more than a matrix of shape \(10, 12\)", good, {"rank": 11}),
        ("starts from data", None, {"rank": 2}),
        ("mode='kpa'", good, {"mode": "kpa"}),
    ):
        model = nn.Sequential(layer_of(gaussian(10, 12)))
        with pytest.raises(ValueError, match=words):
            adapters.adapt(model, "corda", data=data, target_modules=["0"], **settings)
        assert model.training
        assert not model[0]._forward_hooks
        assert not model[0]._forward_pre_hooks
        assert not any(hasattr(model[0], word) for word in ("corda_method", "rank", "sample_count", "eigens"))
    model = adapters.adapt(small_model(), "corda", data=batches(2), rank=2)
    with pytest.raises(ValueError, match="this one carries default"):
        adapters.adapt(model, "corda", data=batches(2), rank=2, adapter_name="two")
    factored = eckart.compress(small_model(), "svd", budget=0.5)[0]
    with pytest.raises(ValueError, match="is factored or quantised"):
        adapters.adapt(factored, "corda", data=batches(2), rank=2)


class Pooled(nn.Module):
    """As an encoder: one layer sees all tokens, the other the first one of each window."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.first = nn.Linear(8, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.first(self.all(x)[:, 0])
        return out


def test_a_layer_that_sees_one_row_of_a_window_starts_as_the_others_do() -> None:
    torch.manual_seed(0)
    model, x = Pooled(), torch.randn(12, 5, 8)
    wanted = model(x)
    adapted = adapters.adapt(model, "corda", data=[{"x": x}], target_modules=["all", "first"], rank=2)
    assert {n for n, _ in adapted.named_modules() if n.endswith("lora_A.default")} == {
        f"base_model.model.{n}.lora_A.default" for n in ("all", "first")
    }
    torch.testing.assert_close(adapted(x=x), wanted, rtol=1e-4, atol=1e-4)
