"""Relevance is conserved, and agrees with the rules written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers.activations import ACT2FN

import tiny
from eckart.calibration.relevance import unit_relevance
from eckart.calibration.relevance_rules import RelevanceRules
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
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.relu(self.first(x)), 2)
        x = self.relu(self.left(x)) + self.relu(self.right(x))
        return self.last(self.relu(self.hidden(F.relu(x).mean((2, 3)))))


class Exponential(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(12, 3).double())

    def forward(self, x: Tensor) -> Tensor:
        return self[0](x).exp()


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
    net, model = Net(True), tiny.build("llama", num_hidden_layers=1)
    for rule in ("zplus", "epsilon"):
        with RelevanceRules(rule):
            found = net(images())
        assert error_ratio(found, net(images())) <= 1e-5
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


def as_matrix(layer: nn.Module, shape: torch.Size) -> Tensor:
    """(out, in) of a linear map of one sample of this shape, column by column."""
    basis = torch.eye(shape.numel(), dtype=torch.float64).view(-1, *shape)
    found = layer(basis).detach()
    zero = layer(torch.zeros(1, *shape, dtype=torch.float64)).detach()
    return (found - zero).flatten(1).T


def explain_by_hand(layers: list[nn.Module], x: Tensor, label: int, rule: str) -> list[Tensor]:
    """Relevance at the output of every linear map of a chain, for one sample, contribution by contribution."""
    steps: list[tuple[Tensor, Tensor]] = []  # what maps relevance back, and whether it is that of a linear map
    outputs: list[Tensor] = []
    for layer in layers:
        if isinstance(layer, nn.ReLU):
            x = x.relu()
        elif isinstance(layer, nn.Flatten):
            x = x.flatten()
        elif isinstance(layer, nn.MaxPool2d):
            at = F.max_pool2d(x[None], 2, return_indices=True)[1][0]
            size = x.shape[1] * x.shape[2]
            places = (torch.arange(len(x))[:, None] * size + at.flatten(1)).flatten()
            steps.append((F.one_hot(places, x.numel()).double(), torch.tensor(False)))
            x = F.max_pool2d(x[None], 2)[0]
        else:
            W = as_matrix(layer, x.shape)
            y = layer(x[None])[0].detach()
            z = W * x.flatten()
            if rule == "zplus":
                share = z.clamp_min(0) / (z.clamp_min(0).sum(1, keepdim=True) + 1e-9)
            else:
                share = z / (y.flatten() + torch.where(y.flatten() >= 0, 1e-6, -1e-6))[:, None]
            steps.append((share, torch.tensor(True)))
            outputs.append(y)
            x = y
    R, found = F.one_hot(torch.tensor(label), x.numel()).double(), []
    for share, linear in reversed(steps):
        if linear:
            found.append(R.view(outputs[len(outputs) - 1 - len(found)].shape))
        R = R @ share
    return found[::-1]


@pytest.mark.parametrize("rule", ["zplus", "epsilon"])
def test_agrees_with_relevance_computed_by_hand(rule: str) -> None:
    layers = [
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3),
    ]  # fmt: skip
    net = nn.Sequential(*layers).double().eval()
    generator = torch.Generator().manual_seed(1)
    for p in net.parameters():
        nn.init.normal_(p, generator=generator)
    x = images(4)
    names = ["0", "3", "6", "8"]
    found = unit_relevance(net, {"input": x}, LABELS[:4], names, rule=rule)
    by_hand = [explain_by_hand(layers, x[i], int(LABELS[i]), rule) for i in range(4)]
    for i, name in enumerate(names):
        wanted = sum(R[i].flatten(1).sum(1) if R[i].dim() == 3 else R[i] for R in by_hand)
        assert isinstance(wanted, Tensor)
        assert error_ratio(found[name], wanted) <= 1e-5


def test_negative_contributions_may_count_against() -> None:
    layer = nn.Linear(4, 3).double().eval()
    layer.weight.data = gaussian(3, 4, dtype=torch.float64)
    layer.weight.data[:, 0], layer.weight.data[:, 1] = 0.5, -0.5  # contributions of both signs everywhere
    a, R = gaussian(1, 4, seed=2, dtype=torch.float64).abs().requires_grad_(), torch.tensor([0.2, 0.5, 0.3]).double()
    with RelevanceRules("zplus", beta=1.0):
        y = layer(a)
    (g,) = torch.autograd.grad(y, a, grad_outputs=R / y.detach())
    z = a[0] * layer.weight
    up, down = z.clamp_min(0), z.clamp_max(0)
    wanted = ((2 * up / up.sum(1, keepdim=True) - down / down.sum(1, keepdim=True)) * R[:, None]).sum(0)
    assert error_ratio((a * g)[0], wanted) <= 1e-6
    assert float((a * g).sum().detach()) == pytest.approx(1.0)


def test_relevance_is_conserved_where_activations_are_negative() -> None:
    net = nn.Sequential(nn.Linear(5, 8, bias=False), nn.GELU(), nn.Linear(8, 6, bias=False), nn.Tanh(),
                        nn.Linear(6, 3, bias=False)).double().eval()  # fmt: skip
    x = gaussian(6, 5, dtype=torch.float64)
    assert float(net[1](net[0](x)).detach().min()) < 0
    for found in unit_relevance(net, {"input": x}, LABELS, ["0", "2"], rule="zplus").values():
        assert float(found.sum()) == pytest.approx(6, rel=1e-5)


@pytest.mark.parametrize("name", ["gelu_new", "quick_gelu", "relu2", "gelu_fast", "silu"])
def test_activations_of_transformers_pass_relevance_unchanged(name: str) -> None:
    layers = nn.Linear(5, 8, bias=False), ACT2FN[name], nn.Linear(8, 3, bias=False)
    net = nn.Sequential(*layers).double().eval()
    x = gaussian(6, 5, dtype=torch.float64)
    found = unit_relevance(net, {"input": x}, LABELS, ["0"])["0"]
    inner = unit_relevance(net, {"input": x}, LABELS, ["2"], at="input")["2"]
    assert error_ratio(found, inner) <= 1e-5
    assert float(found.sum()) == pytest.approx(6, rel=1e-5)


def explained_input(compute: Any, x: Tensor, R: Tensor) -> Tensor:
    """The relevance of x, when that of compute(x) is R."""
    x = x.clone().requires_grad_()
    with RelevanceRules("epsilon", epsilon=1e-12):
        y = compute(x)
    (g,) = torch.autograd.grad(y, x, grad_outputs=R / y.detach())
    return (x * g).detach()


def test_norms_divide_by_a_constant() -> None:
    x, R = gaussian(3, 6, dtype=torch.float64), gaussian(3, 6, seed=1, dtype=torch.float64)
    assert error_ratio(explained_input(nn.RMSNorm(6).double(), x, R), R) <= 1e-6
    norm = nn.LayerNorm(6, bias=False).double()
    centred = x - x.mean(-1, keepdim=True)
    share = x[:, None, :] * (torch.eye(6).double() - 1 / 6) / centred[:, :, None]  # of x_i in each centred x_j
    assert error_ratio(explained_input(norm, x, R), (share * R[:, :, None]).sum(1)) <= 1e-6
    assert float(explained_input(norm, x, R).sum()) == pytest.approx(float(R.sum()))


def test_attention_shares_among_values_by_its_weights() -> None:
    q, k, v, R = (gaussian(1, 1, 4, 3, seed=i, dtype=torch.float64) for i in range(4))
    A = (q @ k.transpose(-1, -2) / 3**0.5).softmax(-1)
    wanted = (A[..., None] * v[:, :, None] / (A @ v)[:, :, :, None] * R[:, :, :, None]).sum(2)
    assert error_ratio(explained_input(lambda v: F.scaled_dot_product_attention(q, k, v), v, R), wanted) <= 1e-6
    eager = explained_input(lambda v: ((q @ k.transpose(-1, -2)) / 3**0.5).softmax(-1) @ v, v, R)
    assert error_ratio(eager, wanted) <= 1e-6
    for other in (q, k):  # what makes the weights gets nothing
        both = torch.cat([v, other], -1)
        found = explained_input(lambda b: F.scaled_dot_product_attention(b[..., 3:], k, b[..., :3]), both, R)
        assert float(found[..., 3:].abs().sum()) == 0


def test_gates_share_by_half_and_sums_by_their_parts() -> None:
    x, R = gaussian(2, 8, dtype=torch.float64), gaussian(2, 4, seed=1, dtype=torch.float64)
    found = explained_input(lambda x: F.silu(x[:, :4]) * x[:, 4:], x, R)
    assert error_ratio(found, torch.cat([R / 2, R / 2], 1)) <= 1e-6
    found = explained_input(lambda x: x[:, :4] + x[:, 4:], x, R)
    total = x[:, :4] + x[:, 4:]
    assert error_ratio(found, torch.cat([x[:, :4] / total * R, x[:, 4:] / total * R], 1)) <= 1e-6


def test_a_gate_keeps_its_half_whatever_layers_are_asked_for() -> None:
    model = tiny.build("llama", num_hidden_layers=1)
    batch = tiny.batches((2,))[0]
    up, gate = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"
    alone = unit_relevance(model, batch, batch["input_ids"], [up])[up]
    beside = unit_relevance(model, batch, batch["input_ids"], ["model.embed_tokens", gate, up])[up]
    assert error_ratio(alone, beside) <= 1e-5


def test_batch_norms_are_fused_first() -> None:
    conv, norm = nn.Conv2d(2, 4, 3).double().eval(), nn.BatchNorm2d(4).double().eval()
    norm.running_mean, norm.running_var = gaussian(4).double(), gaussian(4).double().square() + 0.1
    last = nn.Linear(4, 3).double()
    last.weight.data.abs_()  # no class is without a positive contribution
    rest = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), last]
    whole, fused = nn.Sequential(conv, norm, *rest).eval(), nn.Sequential(fuse_conv_bn_eval(conv, norm), *rest).eval()
    assert error_ratio(fused(images()), whole(images())) <= 1e-9
    assert float(unit_relevance(fused, {"input": images()}, LABELS, ["0"])["0"].sum()) == pytest.approx(6, rel=1e-5)
    with pytest.raises(ValueError, match=r"1: no rule says how relevance passes through BatchNorm2d: fuse it"):
        unit_relevance(whole, {"input": images()}, LABELS, ["0"])


def test_the_model_is_left_as_it_was() -> None:
    net = Net(True)
    net.hidden.bias.requires_grad_(False)
    before = {k: (p.clone(), p.requires_grad) for k, p in net.named_parameters()}
    unit_relevance(net, {"x": images()}, LABELS, ["first"])
    assert all(torch.equal(p, before[k][0]) and p.requires_grad == before[k][1] for k, p in net.named_parameters())
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_all_classes_may_start() -> None:
    start = F.one_hot(LABELS, 3).double()
    true = unit_relevance(Net(), {"x": images()}, LABELS, ["hidden"])["hidden"]
    assert error_ratio(unit_relevance(Net(), {"x": images()}, start, ["hidden"])["hidden"], true) <= 1e-9
    every = unit_relevance(Net(), {"x": images()}, torch.ones_like(start), ["hidden"])["hidden"]
    assert float(every.sum()) == pytest.approx(18, rel=1e-5)
    assert error_ratio(every / 18, true / 6) > 0.01


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no rule says how relevance passes through BatchNorm1d: fuse it"):
        unit_relevance(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval(), {}, LABELS, ["0"])
    with pytest.raises(ValueError, match="no rule says how relevance passes through GRU"):
        unit_relevance(nn.Sequential(nn.GRU(2, 2)).eval(), {}, LABELS, [])
    with pytest.raises(ValueError, match=r"up to 3 do not fit logits of shape \(6, 3\)"):
        unit_relevance(Net(), {"x": images()}, LABELS + 1, ["hidden"])
    batch = tiny.batches()[0]
    with pytest.raises(ValueError, match="passes encoder is a BaseModelOutput"):
        unit_relevance(tiny.build("bert").bert, batch, batch["input_ids"], ["encoder"])
    with pytest.raises(ValueError, match="no layer called 'middle'"):
        unit_relevance(Net(), {"x": images()}, LABELS, ["middle"])
    with pytest.raises(ValueError, match="one of zplus, epsilon"):
        RelevanceRules("gamma")
    with pytest.raises(ValueError, match="epsilon=0: it keeps sums from zero"):
        RelevanceRules("zplus", epsilon=0)
    with pytest.raises(ValueError, match="belongs to the rule 'zplus'"):
        RelevanceRules("epsilon", beta=1.0)
    with pytest.raises(ValueError, match="in training mode"):
        unit_relevance(Net().train(), {"x": images()}, LABELS, ["hidden"])
    with pytest.raises(ValueError, match="logits, not probabilities"):
        unit_relevance(nn.Sequential(Net(), nn.Softmax(-1)).eval(), {"input": images()}, LABELS, ["0.hidden"])
    with pytest.raises(ValueError, match="passes through the function exp"):
        unit_relevance(Exponential().eval(), {"x": images(6)[:, 0, 0]}, LABELS, ["0"])
    with pytest.raises(ValueError, match=r"relevance of shape \(6, 2\) does not fit"):
        unit_relevance(Net(), {"x": images()}, torch.ones(6, 2), ["hidden"])
    with pytest.raises(ValueError, match="in place"):
        unit_relevance(nn.Sequential(nn.Linear(12, 3).double(), nn.SiLU(inplace=True)).eval(),
                       {"input": images()[:, 0, 0]}, LABELS, ["0"])  # fmt: skip
