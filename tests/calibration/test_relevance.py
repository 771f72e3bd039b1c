"""Relevance is conserved, agrees with the rules written out, and ranks units better than sizes do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny
from eckart.calibration.relevance import RelevanceRules, unit_relevance
from eckart.testing import error_ratio, gaussian


class Net(nn.Module):
    """Convolutions, a maximum, two branches, a mean and linear layers."""

    def __init__(self, bias: bool = False):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, stride=2, bias=bias)
        self.left = nn.Conv2d(4, 5, 3, padding=1, bias=bias)
        self.right = nn.Conv2d(4, 5, 1, bias=bias)
        self.hidden = nn.Linear(5, 7, bias=bias)
        self.last = nn.Linear(7, 3, bias=bias)
        self.relu = nn.ReLU(inplace=True)
        generator = torch.Generator().manual_seed(0)
        for p in self.double().parameters():
            nn.init.normal_(p, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.relu(self.first(x)), 2)
        x = self.relu(self.left(x)) + self.relu(self.right(x))
        return self.last(self.relu(self.hidden(F.relu(x).mean((2, 3)))))


def images(count: int = 6) -> Tensor:
    return gaussian(count, 2, 12, 12, dtype=torch.float64).abs()


LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def test_relevance_is_conserved_from_layer_to_layer() -> None:
    scores = unit_relevance(Net(), {"x": images()}, LABELS, ["first", "left", "right", "hidden", "last"])
    for name in ("first", "hidden", "last"):
        assert float(scores[name].sum()) == pytest.approx(6, rel=1e-5)
    assert float(scores["left"].sum() + scores["right"].sum()) == pytest.approx(6, rel=1e-5)
    assert all(float(s.min()) >= -1e-9 for s in scores.values())
    assert scores["first"].shape == (4,)
    assert scores["hidden"].shape == (7,)


def test_biases_take_their_share_under_the_epsilon_rule() -> None:
    kept = unit_relevance(Net(True), {"x": images()}, LABELS, ["first"], rule="epsilon")["first"].sum()
    none = unit_relevance(Net(False), {"x": images()}, LABELS, ["first"], rule="epsilon")["first"].sum()
    assert float(none) == pytest.approx(6, rel=1e-5)
    assert abs(float(kept) - 6) > 0.01


def test_the_epsilon_rule_without_biases_is_input_times_gradient() -> None:
    net, x = Net(), images(1)
    seen: dict[str, Tensor] = {}

    def see(module: nn.Module, args: object, output: Tensor) -> Tensor:
        seen["y"] = output
        return output.clone()  # the next step works in place

    handle = net.left.register_forward_hook(see)
    logit = net(x)[0, 1]
    handle.remove()
    (gradient,) = torch.autograd.grad(logit, seen["y"])
    wanted = (gradient * seen["y"]).sum((0, 2, 3)) / logit
    found = unit_relevance(net, {"x": x}, torch.tensor([1]), ["left"], rule="epsilon")["left"]
    assert error_ratio(found, wanted) <= 1e-6


def test_zplus_is_its_equation() -> None:
    layer = nn.Linear(4, 3, bias=True).double()
    layer.weight.data[:, 1] = 0.5  # every output has a positive contribution
    a, R = gaussian(1, 4, dtype=torch.float64).abs().requires_grad_(), torch.tensor([0.2, 0.5, 0.3])
    with RelevanceRules("zplus"):
        y = layer(a)
    (g,) = torch.autograd.grad(y, a, grad_outputs=(R / y.detach()).double())
    z = a[0] * layer.weight.clamp_min(0)
    assert error_ratio((a * g)[0], (z / z.sum(1, keepdim=True) * R[:, None]).sum(0)) <= 1e-6


def test_nothing_that_is_computed_changes() -> None:
    for rule in ("zplus", "epsilon"):
        with RelevanceRules(rule):
            found = Net(True)(images())
        assert error_ratio(found, Net(True)(images())) <= 1e-5
        model = tiny.build("llama", num_hidden_layers=1)
        with RelevanceRules(rule):
            logits = model(**tiny.batches()[0]).logits
        assert error_ratio(logits, model(**tiny.batches()[0]).logits) <= 1e-4


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_transformers_conserve_it_through_attention_norms_and_gates(attention: str) -> None:
    model = tiny.build("llama", num_hidden_layers=2, dtype=torch.float64)
    model.set_attn_implementation(attention)
    batch = tiny.batches((2,))[0]
    found = unit_relevance(model, batch, batch["input_ids"], ["model.embed_tokens"], rule="epsilon", epsilon=1e-12)
    assert float(found["model.embed_tokens"].sum()) == pytest.approx(batch["input_ids"].numel(), rel=1e-4)


def test_dead_units_get_nothing() -> None:
    net = Net()
    net.hidden.weight.data[2] = -net.hidden.weight.data[2].abs()
    scores = unit_relevance(net, {"x": images()}, LABELS, ["hidden"])["hidden"]
    assert scores[2] == 0
    assert float(scores.sum()) == pytest.approx(6, rel=1e-5)


def test_another_class_is_another_explanation() -> None:
    scores = [unit_relevance(Net(), {"x": images()}, at, ["hidden"])["hidden"] for at in (LABELS, (LABELS + 1) % 3)]
    assert error_ratio(scores[1], scores[0]) > 0.02


def test_without_training_again_relevance_prunes_better_than_size() -> None:
    """The paper's toy: rings in the plane, an MLP, a third of its units removed, five samples a class to judge by."""
    generator = torch.Generator().manual_seed(0)

    def rings(count: int) -> tuple[Tensor, Tensor]:
        label = torch.arange(count) % 2
        angle = 6.283 * torch.rand(count, generator=generator)
        radius = 0.5 + label + 0.1 * torch.randn(count, generator=generator)
        return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), label

    accuracy = {"relevance": 0.0, "size": 0.0}
    for seed in range(4):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(2, 60), nn.ReLU(), nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 2))
        x, y = rings(200)
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        few, of = rings(10)
        relevance = unit_relevance(net, {"input": few}, of, ["0", "2"])
        linears = {name: net.get_submodule(name) for name in ("0", "2")}
        scores = {
            "relevance": relevance,
            "size": {name: layer.weight.detach().abs().sum(1) for name, layer in linears.items()},
        }
        test, wanted = rings(400)
        for name, score in scores.items():
            least = torch.cat([score["0"], score["2"]]).argsort()[:40]
            mask = torch.ones(120).index_fill(0, least, 0.0)
            h = F.relu(net[0](test)) * mask[:60]
            h = F.relu(net[2](h)) * mask[60:]
            accuracy[name] += float((net[4](h).argmax(1) == wanted).float().mean()) / 4
    assert accuracy["relevance"] > accuracy["size"] + 0.05


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no rule says how relevance passes through BatchNorm1d: fuse it"):
        unit_relevance(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), {}, LABELS, ["0"])
    with pytest.raises(ValueError, match="no rule says how relevance passes through GRU"):
        unit_relevance(nn.Sequential(nn.GRU(2, 2)), {}, LABELS, [])
    with pytest.raises(ValueError, match=r"up to 3 do not fit logits of shape \(6, 3\)"):
        unit_relevance(Net(), {"x": images()}, LABELS + 1, ["hidden"])
    with pytest.raises(ValueError, match="no layer called 'middle'"):
        unit_relevance(Net(), {"x": images()}, LABELS, ["middle"])
    with pytest.raises(ValueError, match="one of zplus, epsilon"):
        RelevanceRules("gamma")
