"""SST against its card: exact starts, enhanced gradients, sampling, what stays frozen, state, and saving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import tiny
from eckart.testing import gaussian
from eckart.training import structure
from eckart.training.base import generator_of
from eckart.training.lorentz import Lorentz, LorentzLinear
from eckart.training.sst import SST, SpectralMatrix, spectral_product

OUT, IN, RANK = 9, 7, 2


def matrix(model: nn.Module, name: str = "0") -> SpectralMatrix:
    module: Any = model.get_submodule(name)
    assert isinstance(module.matrix, SpectralMatrix)
    return module.matrix


def layer(dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[nn.Sequential, Any]:
    model = toys.mlp(IN, OUT, dtype=dtype)
    return model, structure(model, "sst", **{"rank": RANK, "every": 3, "warmup": 0, **settings})


def test_start_and_decomposition_leave_the_output() -> None:
    model = toys.mlp(IN, OUT)
    x = gaussian(5, IN, seed=1)
    wanted = model(x).detach()
    structure(model, "sst", rank=RANK)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    m = matrix(model)
    m.activate(torch.tensor([5, 1]))
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        m.u.add_(0.1 * gaussian(OUT, RANK, seed=3))
        m.v.add_(0.1 * gaussian(RANK, IN, seed=4))
    m.retract()
    U, V = m.vectors()
    torch.testing.assert_close(U.norm(dim=0), torch.ones(IN))
    torch.testing.assert_close(V.norm(dim=1), torch.ones(IN))
    assert float((U.T @ U - torch.eye(IN)).detach().abs().max()) > 1e-2
    before = model(x).detach()
    m.decompose_again()
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    U, V = m.vectors()
    for gram in (U.T @ U, V @ V.T):
        torch.testing.assert_close(gram, torch.eye(IN), rtol=0, atol=1e-5)


@pytest.mark.parametrize("small", [1.0, 1e-8])
def test_enhanced_gradients_are_autograds_over_s(small: float) -> None:
    x = gaussian(2, 4, IN, seed=1, dtype=torch.float64).requires_grad_()
    u, v = gaussian(OUT, 3, seed=2, dtype=torch.float64), gaussian(3, IN, seed=3, dtype=torch.float64)
    s = torch.tensor([2.0, 0.5, small], dtype=torch.float64)
    weight = gaussian(2, 4, OUT, seed=4, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (u, s, v)]
    y, wanted = spectral_product(x, u, s, v), F.linear(x, u * s @ v)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    du, ds, dv, dx = torch.autograd.grad((y * weight).sum(), [*inputs, x])
    eu, es, ev, ex = torch.autograd.grad((wanted * weight).sum(), [*inputs, x])
    torch.testing.assert_close(ds, es, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dx, ex, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(du, eu / s, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dv, ev / s[:, None], rtol=1e-6, atol=1e-6)


def test_without_enhancement_gradients_are_autograds() -> None:
    model, _ = layer(torch.float64, enhanced=False)
    m, x = matrix(model), gaussian(4, IN, seed=1, dtype=torch.float64)
    found = torch.autograd.grad(m(x).square().sum(), [m.u, m.s, m.v])
    wanted = torch.autograd.grad((x @ m.dense().T).square().sum(), [m.u, m.s, m.v])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_pairs_are_drawn_by_their_values() -> None:
    model, _ = layer()
    m = matrix(model)
    m.s.data = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5, 0.2, 0.0])
    counts = torch.zeros(IN)
    generator = generator_of(0)
    for _ in range(4000):
        pairs = m.draw(generator)
        assert len(set(pairs.tolist())) == RANK
        counts[pairs] += 1
    assert counts.tolist() == sorted(counts.tolist(), reverse=True)
    assert counts[-1] == 0
    m.s.data = torch.tensor([0.0, 0, 0, 5.0, 0, 0, 0])
    assert 3 in m.draw(generator).tolist()
    m.s.data.zero_()
    assert len(set(m.draw(generator).tolist())) == RANK


def test_frozen_vectors_stay_and_every_value_learns() -> None:
    model, schedule = layer()
    m, data = matrix(model), toys.regression(IN, OUT)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule.begin(optimizer)
    active = sorted(m.order[:RANK].tolist())
    frozen = [i for i in range(IN) if i not in active]
    U, V = (t.detach().clone() for t in m.vectors())
    for _ in range(2):
        values = m.s.detach().clone()
        F.mse_loss(model(data[0]), data[1]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        assert bool((m.s != values).all())
    newU, newV = m.vectors()
    assert torch.equal(newU[:, frozen], U[:, frozen])
    assert torch.equal(newV[frozen], V[frozen])
    assert not bool((newU[:, active] == U[:, active]).any())
    held = {id(p): p for p in (m.u, m.v, m.s)}
    floats = sum(p.numel() for p in held.values()) + sum(s[k].numel() for p, s in optimizer.state.items() if id(p) in held for k in ("exp_avg", "exp_avg_sq"))  # fmt: skip # noqa: E501
    assert floats == 3 * (RANK * (OUT + IN) + IN)


def test_a_swap_makes_the_optimiser_forget_and_a_round_ends_orthogonal() -> None:
    model, schedule = layer(every=2)
    m, data = matrix(model), toys.regression(IN, OUT)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule.begin(optimizer)
    kept: list[bool] = []
    for step in range(1, 9):
        F.mse_loss(model(data[0]), data[1]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        assert (m.u in optimizer.state) == (step % 2 != 0)
        kept.append(m.s in optimizer.state)
    assert kept == [True] * 7 + [False]  # four iterations of two steps are a round
    U = m.vectors()[0]
    torch.testing.assert_close(U.T @ U, torch.eye(IN), rtol=0, atol=1e-5)
    assert bool((m.s[1:] <= m.s[:-1]).all())


def test_a_value_stops_at_zero_and_can_come_back() -> None:
    model, schedule = layer()
    m = matrix(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule.begin(optimizer)
    for sign in (100.0, -0.5):
        m.s.grad = torch.zeros_like(m.s)
        m.s.grad[0] = sign
        optimizer.step()
        schedule.step()
        assert float(m.s.detach().min()) >= 0
        assert float(m.s.detach()[0]) == pytest.approx(0.0 if sign > 0 else 0.5)


def test_the_rate_rises_after_a_swap_and_is_given_back() -> None:
    model, schedule = layer(every=6, warmup=4)
    seen = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.8)
    schedule.begin(optimizer)
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    for _ in range(8):
        optimizer.step()
        schedule.step()
        assert optimizer.param_groups[0]["lr"] == 0.8
    assert seen == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.2, 0.4])


def test_learns_directions_that_few_trained_factors_do_not_reach() -> None:
    """As few vectors at a time as low-rank factors have, but all values and all pairs in turn: a lower loss."""
    data, losses = toys.regression(24, 24), {}
    for name in ("sst", "low"):
        model = toys.mlp(24, 48, 24)
        schedule = structure(model, "sst", rank=4, every=20, warmup=0) if name == "sst" else structure(model, form="low_rank(rank=4)")  # fmt: skip # noqa: E501
        toys.train(model, schedule, data, 250, lr=5e-3)
        losses[name] = toys.loss(model, data)
    assert losses["sst"] < 0.8 * losses["low"]


def test_resumes_bit_for_bit() -> None:
    data = toys.regression(IN, OUT)
    whole, schedule = layer()
    toys.train(whole, schedule, data, 13)
    cut, schedule = layer()
    optimizer = toys.train(cut, schedule, data, 7, total=13)
    again, second = layer(seed=0)
    again.load_state_dict(cut.state_dict())
    second.load_state_dict(schedule.state_dict())
    other = torch.optim.Adam(again.parameters(), lr=3e-3)
    other.load_state_dict(optimizer.state_dict())
    toys.train(again, second, data, 13, optimizer=other, start=7)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_is_saved_and_loaded_by_plain_transformers(keep: float, tmp_path: Path) -> None:
    model = tiny.build("llama", num_hidden_layers=1)
    batch = tiny.batches((2,))[0]
    wanted = model(**batch).logits.detach()
    schedule = structure(model, "sst", rank=4, keep=keep)
    torch.testing.assert_close(model(**batch).logits, wanted, rtol=1e-4, atol=1e-4)
    schedule.finish()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, rtol=1e-6, atol=1e-6)
    if keep == 1.0:
        torch.testing.assert_close(again(**batch).logits, wanted, rtol=1e-4, atol=1e-4)
        assert type(again.model.layers[0].mlp.up_proj) is nn.Linear
    else:
        assert again.config.quantization_config.modules


def test_refusals() -> None:
    for settings, message in (
        ({"rank": 0}, "rank=0.*at least 1"),
        ({"every": 0}, "every=0.*at least 1"),
        ({"warmup": -1}, "warmup=-1.*at least 0"),
        ({"keep": 0.0}, "a share above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            SST(**settings)
    with pytest.raises(ValueError, match=r"0: sst\(rank=8\) does not fit.*at most 7"):
        layer(rank=8)
    model = toys.mlp(IN, OUT)
    model[0].weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="the weight of 0"):
        structure(model, "sst", rank=RANK)
    with pytest.raises(ValueError, match="give it, begin"):
        layer()[1].begin()


K = 0.5


class TreeConfig(PreTrainedConfig):
    model_type = "hyperbolic_tree"

    def __init__(self, scale: float | None = 4.0, width: int = 12, **kwargs: Any):
        super().__init__(**kwargs)
        self.scale, self.width = scale, width


class Tree(PreTrainedModel):
    """Fixed features of the 15 nodes of a binary tree, and two hyperbolic layers that are to lay them out as in it."""

    config_class = TreeConfig

    def __init__(self, config: TreeConfig):
        super().__init__(config)
        self.nodes = nn.Embedding(15, 7).requires_grad_(False)
        options: dict[str, Any] = {"curvature": K, "scale": config.scale}
        self.layers = nn.ModuleList([LorentzLinear(8, config.width, **options), LorentzLinear(config.width, 6, **options)])  # fmt: skip # noqa: E501
        self.post_init()

    def forward(self, ids: Tensor) -> Tensor:
        x = Lorentz(K).exp0(self.nodes(ids))
        for hyperbolic in self.layers:
            x = hyperbolic(x)
        return x


IDS = torch.arange(15)
LAYERS = ["layers.0.linear", "layers.1.linear"]


def tree(scale: float | None = 4.0, seed: int = 0) -> Tree:
    torch.manual_seed(seed)
    model = Tree(TreeConfig(scale))
    with torch.no_grad():
        for hyperbolic in model.layers:
            hyperbolic.linear.reset_parameters()
        model.nodes.weight.normal_(std=0.3)
    return model


def in_the_tree(a: int, b: int) -> int:
    """How many edges apart two nodes are, counted from 1 by rows."""
    return 0 if a == b else 1 + (in_the_tree(a // 2, b) if a > b else in_the_tree(a, b // 2))


WANTED = torch.tensor([[float(in_the_tree(a, b)) for b in range(1, 16)] for a in range(1, 16)])


def strain(x: Tensor) -> Tensor:
    return F.mse_loss(Lorentz(K).distance(x[:, None], x), WANTED)


def embed(
    model: Tree, schedule: Any, steps: int, *, start: int = 0, total: int | None = None,
    optimizer: torch.optim.Optimizer | None = None, watch: Callable[[Tensor], None] = lambda x: None,
) -> torch.optim.Optimizer:  # fmt: skip
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=2e-2)
    if schedule is not None:
        schedule.begin(optimizer, total or steps)
    for _ in range(start, steps):
        x = model(IDS)
        watch(x.detach())
        strain(x).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("scale", [4.0, None])
def test_hyperbolic_layers_start_exact_and_are_taken_by_their_linear_map(scale: float | None) -> None:
    model = tree(scale)
    wanted = model(IDS).detach()
    schedule: Any = structure(model, "sst", rank=RANK)
    assert schedule.names == LAYERS
    assert all(type(h) is LorentzLinear for h in model.layers)
    torch.testing.assert_close(model(IDS), wanted, rtol=1e-5, atol=1e-5)
    for name in LAYERS:
        m = matrix(model, name)
        m.activate(torch.tensor([3, 1]))
        torch.testing.assert_close(model(IDS), wanted, rtol=1e-5, atol=1e-5)
        m.decompose_again()
    torch.testing.assert_close(model(IDS), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [4.0, None])
def test_with_all_pairs_a_hyperbolic_layer_learns_what_its_matrix_would(scale: float | None) -> None:
    """s and the vectors have the gradients that the matrix G has along them, and from all vectors G can be had."""
    full, model, few = tree(scale).double(), tree(scale).double(), tree(scale).double()
    structure(model, "sst", layers="layers.0.linear", rank=8)
    structure(few, "sst", layers="layers.0.linear", rank=3)
    for network in (full, model, few):
        (network(IDS) * gaussian(15, 6, seed=3, dtype=torch.float64)).sum().backward()
    first: Any = full.layers[0]
    G, m, part = first.linear.weight.grad, matrix(model, LAYERS[0]), matrix(few, LAYERS[0])
    U, V = (t.detach() for t in m.vectors())
    close = {"rtol": 1e-8, "atol": 1e-9}
    assert m.frozen_u.numel() == 0
    for found in (m, part):
        pairs = found.order[: found.rank]
        torch.testing.assert_close(found.s.grad, torch.einsum("ok,oi,ki->k", U, G, V), **close)
        torch.testing.assert_close(found.u.grad, (G @ V.T)[:, pairs], **close)
        torch.testing.assert_close(found.v.grad, (U.T @ G)[pairs], **close)
    torch.testing.assert_close(m.u.grad @ V, G, **close)
    own = dict(model.named_parameters())
    others = [n for n, _ in full.named_parameters() if n != "layers.0.linear.weight"]
    assert ("layers.0.log_scale" in others) == (scale is not None)
    for name in others:
        torch.testing.assert_close(own[name].grad, dict(full.named_parameters())[name].grad, **close)


@pytest.mark.parametrize("scale", [4.0, None])
def test_a_tree_is_embedded_and_all_stays_on_the_hyperboloid(scale: float | None) -> None:
    model, frozen = tree(scale), tree(scale)
    start = strain(model(IDS)).item()
    schedule = structure(model, "sst", rank=RANK, every=5, warmup=2)
    embed(model, schedule, 150, watch=on_the_hyperboloid)
    loss = strain(model(IDS)).item()
    for hyperbolic in frozen.layers:
        hyperbolic.linear.weight.requires_grad_(False)
    embed(frozen, None, 150)
    assert loss < 0.2 * start
    assert loss < 0.5 * strain(frozen(IDS)).item()
    schedule.finish()
    assert [type(h.linear) for h in model.layers] == [nn.Linear] * 2
    assert strain(model(IDS)).item() == pytest.approx(loss, rel=1e-3)


def on_the_hyperboloid(x: Tensor) -> None:
    assert bool((x[:, 0] > 0).all())
    torch.testing.assert_close(Lorentz(K).inner(x, x) / x[:, 0] ** 2, -1 / K / x[:, 0] ** 2, rtol=0, atol=1e-6)


def test_swaps_and_decompositions_of_a_hyperbolic_layer() -> None:
    model = tree()
    schedule: Any = structure(model, "sst", layers="layers.0.linear", rank=RANK, every=2, warmup=0)
    m = matrix(model, LAYERS[0])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule.begin(optimizer)
    for step in range(1, 9):
        frozen = m.order[RANK:].tolist()
        before = [t.detach().clone() for t in m.vectors()]
        strain(model(IDS)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        U, V = m.vectors()
        if step < 8:
            assert torch.equal(U[:, frozen], before[0][:, frozen])
            assert torch.equal(V[frozen], before[1][frozen])
        assert (m.u in optimizer.state) == (m.v in optimizer.state) == (step % 2 != 0)
        assert (m.s in optimizer.state) == (step < 8)  # four iterations of two steps are a round
        assert model.layers[0].log_scale in optimizer.state
    U, V = m.vectors()
    for gram in (U.T @ U, V @ V.T):
        torch.testing.assert_close(gram, torch.eye(8), rtol=0, atol=1e-5)


def test_a_hyperbolic_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    options: dict[str, Any] = {"rank": 3, "every": 3, "warmup": 2}
    whole = tree()
    embed(whole, structure(whole, "sst", **options), 14)
    cut = tree()
    schedule = structure(cut, "sst", **options)
    optimizer = embed(cut, schedule, 8, total=14)
    saved = {"model": cut.state_dict(), "schedule": schedule.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    again = tree(seed=7)
    second = structure(again, "sst", **options)
    again.load_state_dict(saved["model"])
    second.load_state_dict(saved["schedule"])
    other = torch.optim.Adam(again.parameters(), lr=1e-4)
    other.load_state_dict(saved["optimizer"])
    embed(again, second, 14, start=8, optimizer=other)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_a_hyperbolic_model_is_saved_and_loaded(keep: float, tmp_path: Path) -> None:
    model = tree()
    schedule = structure(model, "sst", rank=3, every=3, keep=keep)
    embed(model, schedule, 10)
    schedule.finish()
    wanted = model(IDS).detach()
    on_the_hyperboloid(wanted)
    model.save_pretrained(tmp_path)
    again = Tree.from_pretrained(tmp_path)
    assert torch.equal(again(IDS), wanted)
    factored = [type(h.linear) is not nn.Linear for h in again.layers]
    assert any(factored) == (keep < 1)


def test_refusals_of_hyperbolic_layers_name_them() -> None:
    with pytest.raises(ValueError, match=r"layers.1.linear: sst\(rank=7\) does not fit.*at most 6"):
        structure(tree(), "sst", rank=7)
    model = tree()
    model.layers[0].linear.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"the weight of layers\.0\.linear"):
        structure(model, "sst", rank=2)
