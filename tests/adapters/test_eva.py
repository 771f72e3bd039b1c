"""EVA: PEFT's own, started for the user; its directions and ranks on planted inputs; inputs it cannot start from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lone import gaussian
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from torch import Tensor, nn

from eckart import adapters
from eckart.testing.adapters import answers, batches, near, small_model


class Two(nn.Module):
    """Two layers beside each other, each with inputs of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 10), nn.Linear(24, 10)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        out: Tensor = self.first(a) + self.second(b)
        return out


def decaying(tokens: int, width: int, rank: int, seed: int) -> Tensor:
    """Inputs around a mean that is not zero, in so many directions, each with half the size of the one before."""
    directions, _ = torch.linalg.qr(gaussian(width, width, seed=100))
    sizes = 0.5 ** torch.arange(rank)
    return 3.0 + (gaussian(tokens, rank, seed=seed) * sizes) @ directions[:, :rank].T


def two_inputs(count: int = 4, tokens: int = 64, rank: int = 2) -> list[dict[str, Tensor]]:
    return [{"a": decaying(tokens, 16, rank, s), "b": decaying(tokens, 24, 24, s + 50)} for s in range(count)]


def loras(model: Any) -> dict[str, Any]:
    return {n.rpartition(".")[2]: m for n, m in model.named_modules() if hasattr(m, "lora_A")}


def rows_of(layer: Any) -> Tensor:
    found: Tensor = layer.lora_A["default"].weight.detach()
    return found


def padded() -> list[dict[str, Tensor]]:
    """Batches with padding, and labels for some of the tokens."""
    made = []
    for batch in batches(4):
        mask = torch.ones_like(batch["input_ids"])
        mask[0, 7:] = 0
        labels = batch["input_ids"].masked_fill(torch.arange(9) < 3, -100)
        made.append({**batch, "attention_mask": mask, "labels": labels})
    return made


@pytest.mark.filterwarnings("ignore:lora with eva initialization")
@pytest.mark.parametrize("spread", [1.0, 1.5, 2.0])
def test_it_is_peft_s_own_and_starts_at_the_model(spread: float) -> None:
    ours = adapters.adapt(small_model(), "eva", data=padded(), rank=2, spread=spread).eval()
    config = LoraConfig(r=2, lora_alpha=1, init_lora_weights="eva", eva_config=EvaConfig(rho=spread), target_modules="all-linear")  # fmt: skip # noqa: E501
    theirs = get_peft_model(small_model(), config).eval()
    initialize_lora_eva_weights(theirs, padded(), show_progress_bar=False)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[n], other[n]) for n in mine)
    assert ours.peft_config["default"].rank_pattern == theirs.peft_config["default"].rank_pattern
    assert near(answers(ours), answers(small_model()))
    found = {n: m for n, m in ours.named_modules() if hasattr(m, "lora_A")}
    assert sum(m.r["default"] for m in found.values()) == 2 * 14
    for layer in found.values():
        A = rows_of(layer)
        assert torch.allclose(A @ A.T, torch.eye(len(A)), atol=1e-5)
        assert layer.scaling["default"] == 1 / 2


def test_directions_are_those_of_the_centred_inputs() -> None:
    data = two_inputs(rank=16)
    words: dict[str, Any] = {"rank": 4, "spread": 1.0, "similarity": 0.99999, "target_modules": ["first", "second"]}
    model = adapters.adapt(Two(), "eva", data=data, **words)
    for name, key in (("first", "a"), ("second", "b")):
        X = torch.cat([batch[key] for batch in data])
        _, _, Vh = torch.linalg.svd(X - X.mean(0), full_matrices=False)
        assert ((rows_of(loras(model)[name]) * Vh[:4]).sum(1).abs() > 0.9999).all()


def test_ranks_go_to_directions_that_are_there() -> None:
    model = adapters.adapt(Two(), "eva", data=two_inputs(), rank=4, target_modules=["first", "second"])
    found = loras(model)
    assert {n: m.r["default"] for n, m in found.items()} == {"first": 2, "second": 6}
    config = model.peft_config["default"]
    assert config.alpha_pattern == {"first": 0.5, "second": 1.5}
    assert all(m.scaling["default"] == 1 / 4 for m in found.values())


def test_whitened_rows_are_divided_by_the_root_of_their_size() -> None:
    words: dict[str, Any] = {"data": two_inputs(), "rank": 2, "spread": 1.0, "target_modules": ["second"]}
    plain, white = (rows_of(loras(adapters.adapt(Two(), "eva", whiten=w, **words))["second"]) for w in (False, True))
    sizes = white.norm(dim=1)
    assert torch.allclose(white, plain * sizes[:, None], atol=1e-5)
    assert sizes[0] < sizes[1] < 1


def test_the_first_gradient_is_larger_and_the_loss_falls_faster_than_from_a_random_start() -> None:
    gradients, losses = torch.zeros(2), torch.zeros(2)
    data = two_inputs(rank=3)
    for seed in range(5):
        teacher = nn.Linear(16, 10)
        teacher.weight.data = gaussian(10, 16, seed=seed)
        for at, key in enumerate(("eva", "plain")):
            model = adapters.adapt(Two(), "eva", data=data, rank=2, spread=1.0, target_modules=["first"])
            layer = loras(model)["first"]
            if key == "plain":
                layer.lora_A["default"].weight.data = torch.linalg.qr(gaussian(16, 2, seed=seed + 20))[0].T.contiguous()
            optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-2)
            for step in range(50):
                a = data[step % 4]["a"] - 3.0
                loss = (layer(a) - teacher(a)).square().mean()
                loss.backward()
                if step == 0:
                    gradients[at] += layer.lora_B["default"].weight.grad.norm()
                optimizer.step()
                optimizer.zero_grad()
            losses[at] += loss.detach()
    assert gradients[0] > 1.5 * gradients[1]
    assert losses[0] < losses[1]


def failing(words: str, data: Any, model: Any = None, kind: type[Exception] = ValueError, **settings: Any) -> None:
    """Adapting ends with these words, and leaves nothing on the model."""
    model = Two().train() if model is None else model
    before = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(kind, match=words):
        adapters.adapt(model, "eva", data=data, **{"target_modules": ["first", "second"], **settings})
    assert {n: type(m) for n, m in model.named_modules()} == before
    assert not any(m._forward_hooks for m in model.modules())
    assert model.training


def test_inputs_it_cannot_start_from_are_named() -> None:
    good = two_inputs()
    failing("eva starts from data", None)
    failing("starts from data", [])
    failing("what enters first is the same for all tokens", [{**b, "a": torch.ones(64, 16)} for b in good], rank=2)
    failing("what enters second has NaN", [{**b, "b": b["b"] / 0} for b in good], rank=2)
    failing("still moved after 1 passes over 2 batches", good[:2], rank=2, passes=1, similarity=1.0, kind=RuntimeError)
    failing("looks for 24 directions, and the layer has 16 inputs", good, rank=12 // 2, spread=4.0)
    failing(r"first: rank 11 is more than a matrix of shape \(10, 16\)", good, rank=11)
    failing("spread=0.5", good, rank=2, spread=0.5)
    short = [{"input_ids": b["input_ids"][:1, :3]} for b in batches(2)]
    failing("looks for 4 directions .* the largest has 3", short, small_model().train(), rank=2, target_modules=None)
    model = adapters.adapt(Two(), "eva", data=good, rank=2, target_modules=["first"])
    with pytest.raises(ValueError, match="a model without adapters, and this one carries default"):
        adapters.adapt(model, "eva", data=good, rank=2, target_modules=["second"], adapter_name="two")


def test_batches_that_are_too_small_are_left_out_and_said() -> None:
    short = {"input_ids": batches(1)[0]["input_ids"][:1, :3]}
    with pytest.warns(UserWarning, match="leaves out 1 of 5 batches, which have fewer tokens than the 4 directions"):
        model = adapters.adapt(small_model(), "eva", data=[*batches(4), short], rank=2)
    other = adapters.adapt(small_model(), "eva", data=batches(4), rank=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


class Pooled(nn.Module):
    """As an encoder with a head: one layer sees all tokens, the other the first one of each row."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.all, self.first = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 6)

    def forward(self, input_ids: Tensor, **_: Tensor) -> Tensor:
        out: Tensor = self.first(self.all(self.table(input_ids))[:, 0])
        return out


def test_labels_of_whole_rows_mask_no_tokens_and_a_layer_may_see_one_of_them() -> None:
    torch.manual_seed(0)
    data = [
        {"input_ids": torch.randint(50, (64, 5)), "attention_mask": torch.ones(64, 5), "labels": torch.arange(64) % 2}
        for _ in range(8)
    ]
    model = Pooled()
    wanted = model(**data[0])
    adapted = adapters.adapt(model, "eva", data=data, target_modules=["all", "first"], rank=2, similarity=0.9)
    assert {*loras(adapted)} == {"all", "first"}
    torch.testing.assert_close(adapted(**data[0]), wanted)
