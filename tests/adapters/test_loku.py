"""LoKU: the inverted hinge, a start from ratios of Fisher information, and unlearning on invented people."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from lone import gaussian, layer_of, lone, update_of
from torch import Tensor, nn

from eckart import adapters
from eckart.adapters.gradients import weight_gradients
from eckart.adapters.loku import LoKU, Retained, fisher
from eckart.adapters.unlearning import (
    Step,
    gradient_ascent_loss,
    inverted_hinge,
    inverted_hinge_loss,
    next_word_loss,
    pairs,
    row_losses,
    unlearn,
)
from eckart.testing.adapters import batches, near, small_model
from eckart.testing.people import Town, learn
from eckart.testing.people import batches as told


def test_the_hinge_is_the_sum_of_its_cases() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [math.log(2), 0.0, math.log(5)]])
    targets = torch.tensor([0, 0, 0, 0])
    high = math.exp(9) / (math.exp(9) + 2)
    low = 1 / (math.exp(9) + 2)
    expected = torch.tensor([1.0, 1 + high - low, 1 + low - high, 1 + 2 / 8 - 5 / 8])
    torch.testing.assert_close(inverted_hinge(logits, targets), expected)
    wild, any_target = 20 * gaussian(200, 7), torch.randint(0, 7, (200,), generator=torch.Generator().manual_seed(1))
    found = inverted_hinge(wild.to(torch.bfloat16), any_target)
    assert found.dtype == torch.float32
    assert bool(((found >= 0) & (found <= 2)).all())


def test_the_loss_counts_labels_one_position_ahead() -> None:
    logits, labels = gaussian(2, 5, 7), torch.tensor([[-100, 3, -100, -100, 1], [2, -100, 0, -100, -100]])
    terms = [inverted_hinge(logits[i, t - 1][None], labels[i, t][None]) for i, t in ((0, 1), (0, 4), (1, 2))]
    torch.testing.assert_close(inverted_hinge_loss(logits, labels), torch.cat(terms).mean())
    torch.testing.assert_close(gradient_ascent_loss(logits, labels), -next_word_loss(logits, labels))
    with pytest.raises(ValueError, match="all are -100"):
        inverted_hinge_loss(logits, torch.full((2, 5), -100))


def test_its_push_ends_where_that_of_gradient_ascent_goes_on() -> None:
    norms = []
    for loss in (inverted_hinge_loss, gradient_ascent_loss):
        logits = torch.zeros(1, 2, 5)
        logits[0, 0, 3] = 30.0
        logits.requires_grad_()
        loss(logits, torch.tensor([[-100, 1]])).backward()
        assert logits.grad is not None
        norms.append(float(logits.grad.norm()))
    assert norms[0] < 1e-5
    assert norms[1] > 1


def regression(seed: int, scale: float = 1.0) -> list[dict[str, Tensor]]:
    return [{"input": scale * gaussian(6, 8, seed=seed + i)} for i in range(2)]


def test_fisher_information_is_the_mean_of_squared_gradients_of_rows() -> None:
    model, names = small_model(), ["model.layers.0.self_attn.q_proj"]
    rows = [{"input_ids": ids[None]} for batch in batches(2) for ids in batch["input_ids"]]
    each = [weight_gradients(small_model(), names, [row])[names[0]].square() for row in rows]
    torch.testing.assert_close(fisher(model, names, batches(2))[names[0]], torch.stack(each).mean(0))


@pytest.mark.parametrize("alpha", [3.0, None])
def test_the_start_is_the_nearest_of_its_rank_by_weighted_rows(alpha: float | None) -> None:
    W, forget, retain = gaussian(12, 8), regression(1), regression(5, 0.3)
    layer = lone("loku", W, [*forget, *map(Retained, retain)], rank=3, alpha=alpha)
    update, model = update_of(layer), nn.Sequential(layer_of(W))
    F, G = (fisher(model, ["0"], data)["0"].double() for data in (forget, retain))
    d = (F / (G + 1e-5)).sum(1).sqrt()
    d = d / d.square().mean().sqrt()
    start = update.scale * (update.B0 @ update.A0).double()
    assert update.scale == (2.0 if alpha is None else 1.0)
    tail = torch.linalg.svdvals(d[:, None] * W.double())[3:].norm()
    assert float((d[:, None] * (W - start)).norm()) == pytest.approx(float(tail), rel=1e-4)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    assert float((d[:, None] * (W - U[:, :3] * S[:3] @ Vh[:3])).norm()) > 1.002 * float(tail)
    x = gaussian(5, 8, seed=9)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert torch.equal(layer.base_layer.weight, W), "nothing is taken out of the frozen weight"
    assert not update.delta(layer.host).any()


def test_rows_that_nothing_depends_on_and_layers_by_turns() -> None:
    forget = torch.zeros(4, 6)
    forget[1], forget[2] = 1.0, 4.0
    d = LoKU().row_weights("0", forget, None)
    torch.testing.assert_close(d[2] / d[1], torch.tensor(2.0))
    assert float(d[0]) == pytest.approx(1e-4)
    kept = torch.full((4, 6), 2.0)
    for settings, more in (({"damping": 2.0}, 2.0), ({"damping": 0.5, "relative": True}, 1.0)):
        kept[2] = 0.0
        G = kept + (more if "relative" not in settings else 0.5 * float(kept.mean()))
        expected = (forget / G).sum(1).sqrt()
        found = LoKU(**settings).row_weights("0", forget, kept)  # type: ignore[arg-type]
        torch.testing.assert_close(found[2] / found[1], expected[2] / expected[1])
    data = [batches(2)[0], Retained(batches(2)[1])]
    whole, parts = (adapters.adapt(small_model(), "loku", data=data, rank=2, at_once=n) for n in (None, 3))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    other = adapters.adapt(small_model(), "loku", data=data[:1], rank=2)
    assert not all(torch.equal(a, b) for a, b in zip(whole.parameters(), other.parameters(), strict=True))


def test_a_saved_adapter_fits_the_original_model_as_a_lora_of_twice_the_rank() -> None:
    layer = lone("loku", gaussian(12, 8), regression(1), rank=3)
    update_of(layer).A.data += 0.1 * gaussian(3, 8, seed=4)
    B, A = layer.get_factors("default")
    assert B.shape == (12, 6)
    assert A.shape == (6, 8)
    x = gaussian(5, 8, seed=9)
    assert near(layer(x), x @ (gaussian(12, 8) + B @ A).T)


def test_every_batch_to_forget_comes_once_an_epoch_and_all_to_retain_in_turn() -> None:
    forget, retain = ([{"number": i} for i in range(n)] for n in (3, 5))
    drawn = list(pairs(forget, retain, 10, seed=2))
    for epoch in range(10):
        assert sorted(f["number"] for f, _ in drawn[3 * epoch : 3 * epoch + 3]) == [0, 1, 2]
    kept = [r["number"] for _, r in drawn if r is not None]
    assert all(sorted(kept[i : i + 5]) == list(range(5)) for i in range(0, 30, 5))
    assert kept[:5] != kept[5:10] or kept[5:10] != kept[10:15]
    assert all(r is None for _, r in pairs(forget, [], 1))


@dataclass
class Planted:
    """A model that knows all of a town, and what one says that never heard of some of its people."""

    town: Town
    state: dict[str, Tensor]
    forget: list[dict[str, Any]]
    retain: list[dict[str, Any]]
    sentences: list[dict[str, Any]]
    unseen: float

    def likelihood(self, model: Any) -> float:
        """Mean probability of the values that are to be forgotten."""
        return float((-row_losses(model, self.forget)).exp().mean())

    def perplexity(self, model: Any) -> float:
        """Of the others' sentences."""
        return math.exp(float(row_losses(model, self.sentences).mean()))

    def model(self) -> Any:
        model = self.town.model(width=48)
        model.load_state_dict(self.state)
        return model

    def adapted(self) -> Any:
        return adapters.adapt(self.model(), "loku", data=[*self.forget, *map(Retained, self.retain)], rank=4)


@cache
def planted() -> Planted:
    town = Town(people=12, forgotten=2, attributes=3, values=6, words=12)
    wrong, right = town.facts(True), town.facts(False)
    model, reference = town.model(width=48), town.model(width=48)
    learn(model, torch.cat([wrong, right]), 170, size=32, lr=6e-3)
    learn(reference, right, 170, size=32, lr=6e-3)
    made = Planted(town, copy.deepcopy(model.state_dict()), told(wrong, 6, True), told(right, 30, True), told(right, 60), 0)  # fmt: skip # noqa: E501
    made.unseen = made.likelihood(reference)
    return made


def forgotten(loss: str, retain: bool, epochs: int, stop: bool) -> tuple[float, float, int]:
    """Likelihood of what is forgotten, growth of the perplexity of the rest, and steps."""
    p = planted()
    model = p.adapted()
    before = p.perplexity(p.model())

    def after(step: Step) -> bool:
        return stop and step.number % 2 == 0 and p.likelihood(model) <= p.unseen

    steps = unlearn(model, p.forget, p.retain if retain else None, loss=loss, epochs=epochs, learning_rate=3e-3, after=after)  # fmt: skip # noqa: E501
    return p.likelihood(model), p.perplexity(model) / before - 1, len(steps)


def test_people_are_forgotten_as_if_never_seen_and_others_kept_better_than_by_gradient_ascent() -> None:
    p = planted()
    assert p.likelihood(p.model()) > 0.85
    assert p.unseen < 0.3
    likelihood, growth, steps = forgotten("inverted_hinge", True, 60, stop=True)
    assert likelihood <= p.unseen
    assert growth < 0.05
    worse, ruin, few = forgotten("gradient_ascent", False, 60, stop=True)
    assert worse <= p.unseen
    assert ruin > 2 * max(growth, 0.05)
    assert few < 60 * len(p.forget)
    _, longer, _ = forgotten("inverted_hinge", True, max(2, 5 * steps // len(p.forget)), stop=False)
    _, diverged, _ = forgotten("gradient_ascent", False, max(2, 5 * few // len(p.forget)), stop=False)
    assert longer < 0.1
    assert diverged > 5


def test_a_run_repeats_and_leaves_mode_and_generator_alone() -> None:
    def run() -> tuple[list[Step], Any]:
        model = adapters.adapt(small_model(), "loku", data=batches(2), rank=2, dropout=0.3).eval()
        torch.manual_seed(torch.randint(1000, ()).item())
        before = torch.get_rng_state()
        steps = unlearn(model, batches(2), batches(3, seed=8), epochs=2, learning_rate=1e-2, seed=3)
        assert torch.equal(torch.get_rng_state(), before)
        assert not model.training
        return steps, model

    (first, a), (second, b) = run(), run()
    assert first == second
    assert len(first) == 4
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    own = unlearn(a, batches(1), loss=lambda logits, labels: logits.square().mean(), epochs=1)
    assert own[0].retain is None


def test_what_cannot_be_unlearned_is_named() -> None:
    model, data = adapters.adapt(small_model(), "loku", data=batches(1), rank=2), batches(2)
    unlabelled = [{**data[0], "labels": torch.full_like(data[0]["input_ids"], -100)}]
    for words, forget, retain, settings in (
        ("there is nothing to forget", [], data, {}),
        ("2 of 4 rows to forget are among the rows to retain", data, [data[1]], {}),
        ("no token of batch 0 to forget has a label", unlabelled, data[1:], {}),
        ("no token of batch 0 to retain has a label", data[1:], unlabelled, {}),
        (r"unlearn\(loss='hinge'\)", data, None, {"loss": "hinge"}),
        (r"unlearn\(epochs=0", data, None, {"epochs": 0}),
    ):
        with pytest.raises(ValueError, match=words):
            unlearn(model, forget, retain, **settings)
    with pytest.raises(ValueError, match="nothing of this model learns"):
        unlearn(small_model().requires_grad_(False), data)
    with pytest.raises(RuntimeError, match="the loss at step 1 is not finite"):
        unlearn(model.eval(), data, loss=lambda logits, labels: logits.sum() / 0)
    assert not model.training
    for words, given, settings in (
        ("there is nothing to forget", [Retained(data[0])], {}),
        ("2 of 2 rows to forget are among", [data[0], Retained(data[0])], {}),
        ("rank 17 is more than a matrix", data, {"rank": 17}),
        (r"loku\(damping=", data, {"damping": 0.0}),
        (r"loku\(alpha=", data, {"alpha": -1.0}),
        (r"loku\(at_once=", data, {"at_once": 0}),
        ("loku starts from data", None, {}),
    ):
        with pytest.raises(ValueError, match=words):
            adapters.adapt(small_model(), "loku", data=given, **settings)
    with pytest.raises(ValueError, match="0: its gradient on what is to be forgotten is zero everywhere"):
        lone("loku", gaussian(12, 8), [{"input": torch.zeros(3, 8)}], rank=2)
