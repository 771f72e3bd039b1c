"""SLTrain against its card: products, gradients, what is kept for backward, counts, ranks and saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import eckart
import tiny
from eckart.forms import LowRank
from eckart.forms.algebra import SumMatrix
from eckart.forms.layers import FactoredLinear
from eckart.forms.scaled import ScaledMatrix
from eckart.forms.sparse import SparseMatrix
from eckart.training import NoSaving, structure
from eckart.training.sltrain import SLTrain

OUT, IN, RANK, DENSITY = 24, 20, 3, 0.07
COUNT = int(DENSITY * OUT * IN)


def layer(dtype: torch.dtype = torch.float64, bias: bool = True, **settings: Any) -> FactoredLinear:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT, bias=bias)).to(dtype)
    structure(model, "sltrain", **{"rank": RANK, "density": DENSITY, "alpha": 1.5, **settings})
    made = model[0]
    assert isinstance(made, FactoredLinear)
    return made


def parts(made: FactoredLinear) -> tuple[Tensor, Tensor, SparseMatrix]:
    """B, A and the sparse term."""
    assert isinstance(made.matrix, SumMatrix)
    low, sparse = made.matrix.terms
    assert isinstance(low, ScaledMatrix)
    assert isinstance(sparse, SparseMatrix)
    B, A = low.parameters()
    return B, A, sparse


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(5,), (2, 3), (2, 3, 4), ()])
def test_forward_and_all_gradients_are_those_of_a_dense_construction(bias: bool, batch: tuple[int, ...]) -> None:
    made = layer(bias=bias)
    B, A, sparse = parts(made)
    nn.init.normal_(B)
    x = torch.randn(*batch, IN, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(*batch, OUT, dtype=torch.float64)
    values = next(sparse.parameters())
    inputs = [x, B, A, values, *([made.bias] if bias else [])]

    def dense() -> Tensor:
        S = torch.zeros(OUT * IN, dtype=torch.float64).index_put((sparse.flat(),), values.flatten())
        return F.linear(x, 1.5 / RANK * B @ A + S.view(OUT, IN), made.bias)

    for _ in range(2):
        y, wanted = made(x), dense()
        torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
        found = torch.autograd.grad((y * weight).sum(), inputs)
        for g, h in zip(found, torch.autograd.grad((wanted * weight).sum(), inputs), strict=True):
            torch.testing.assert_close(g, h, rtol=1e-6, atol=1e-9)


def test_half_precision_and_autocast() -> None:
    exact = layer()
    x = torch.randn(7, IN, dtype=torch.float64, requires_grad=True)
    wanted = exact(x)
    truth = wanted.detach()
    narrow = layer(torch.bfloat16)
    narrow.load_state_dict(exact.state_dict())
    y = narrow(x.detach().bfloat16())
    assert y.dtype == torch.bfloat16
    assert float((y.detach().double() - truth).norm() / truth.norm()) < 1e-2
    single = layer(torch.float32)
    single.load_state_dict(exact.state_dict())
    rows = x.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = single(rows)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    (gradient,) = torch.autograd.grad(wanted.square().sum(), x)
    assert rows.grad is not None
    assert float((rows.grad - gradient).norm() / gradient.norm()) < 3e-2
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in single.parameters())


def test_nothing_of_the_weights_size_is_kept_for_backward() -> None:
    made, x = layer(), torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    kept = toys.saved(lambda: made(x))
    assert kept
    assert max(t.numel() for t in kept) < OUT * IN
    assert max(t.untyped_storage().nbytes() for t in kept) < OUT * IN * 8
    dense = toys.saved(lambda: F.linear(x, parts(made)[2].dense()))
    assert max(t.numel() for t in dense) == OUT * IN


def test_counts_of_parameters_and_of_adam() -> None:
    made = layer(bias=False)
    count = (OUT + IN) * RANK + COUNT
    assert sum(p.numel() for p in made.parameters()) == count
    optimizer = torch.optim.Adam(made.parameters())
    made(torch.randn(3, IN, dtype=torch.float64)).sum().backward()
    optimizer.step()
    moments = [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    assert sum(m.numel() for m in moments) == 2 * count


def test_the_support_is_random_in_the_state_and_never_changes() -> None:
    made = layer()
    sparse = parts(made)[2]
    support = sparse.flat().clone()
    places = {k: v for k, v in made.state_dict().items() if not v.is_floating_point()}
    assert places
    assert len(support.unique()) == COUNT
    optimizer = torch.optim.Adam(made.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        made(torch.randn(9, IN, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    assert torch.equal(sparse.flat(), support)
    assert torch.equal(parts(layer(seed=0))[2].flat(), support)
    assert not torch.equal(parts(layer(seed=1))[2].flat(), support)
    made.to(torch.bfloat16)
    for name, tensor in made.state_dict().items():
        assert name not in places or torch.equal(tensor, places[name])


def test_the_rank_is_that_of_the_support_and_then_far_above_the_factors() -> None:
    made = layer(density=0.3)
    B, _, sparse = parts(made)
    assert torch.equal(B, torch.zeros_like(B))
    assert torch.equal(made.matrix.dense(), sparse.dense())
    low = FactoredLinear(LowRank(RANK).fit(torch.randn(OUT, IN, dtype=torch.float64)))
    target, x = torch.randn(OUT, IN, dtype=torch.float64), torch.randn(64, IN, dtype=torch.float64)
    for module in (made, low):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            F.mse_loss(module(x), x @ target.T).backward()
            optimizer.step()
    assert torch.linalg.matrix_rank(made.matrix.dense()) == IN
    assert torch.linalg.matrix_rank(low.matrix.dense()) == RANK


def test_initial_values() -> None:
    B, A, sparse = parts(layer(torch.float32))
    values = next(sparse.parameters())
    bound = IN**-0.5
    assert not B.any()
    for t in (A, values):
        assert float(t.detach().abs().max()) <= bound
        assert float(t.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.25)


def test_starting_from_the_weight_loses_less_than_low_rank_alone() -> None:
    W = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(4))
    model = nn.Sequential(nn.Linear(IN, OUT))
    model[0].weight.data.copy_(W)
    structure(model, "sltrain", rank=RANK, density=DENSITY, start="weight")
    alone = W - LowRank(RANK).fit(W).dense()
    assert float((model[0].weight - W).norm()) < 0.95 * float(alone.detach().norm())


def test_learns_what_low_rank_alone_cannot() -> None:
    """Loss of full <= SLTrain < low rank of as many parameters, on a rotation: its spectrum has no head."""
    x, losses = toys.regression(24, 24)[0], {}
    rotation = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(3))).Q
    data = (x, x @ rotation)
    for name in ("full", "sltrain", "low"):
        model = toys.mlp(24, 24)
        if name == "sltrain":
            structure(model, "sltrain", rank=4, density=0.17, alpha=4.0)
        elif name == "low":
            structure(model, form="low_rank(rank=6)")
        toys.train(model, None, data, 400, lr=1e-2)
        losses[name] = toys.loss(model, data)
    assert losses["full"] <= losses["sltrain"] < 0.95 * losses["low"]


def test_is_saved_and_loaded_by_plain_transformers(tmp_path: Path) -> None:
    model = tiny.build("llama", num_hidden_layers=2)
    structure(model, "sltrain", rank=4, density=0.05).finish()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batch = tiny.batches((2,))[0]
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert isinstance(again.model.layers[0].mlp.up_proj, FactoredLinear)
    assert type(again.lm_head) is nn.Linear
    assert again.config.quantization_config.history[-1]["training"] == "sltrain"
    assert eckart.densify(again)(**batch).logits.shape == model(**batch).logits.shape


def test_refusals() -> None:
    for settings, message in (
        ({"rank": 0}, "the rank is a positive integer"),
        ({"density": 0.0}, "share between 0 and 1"),
        ({"density": 1.0}, "share between 0 and 1"),
        ({"alpha": -1.0}, "positive number"),
        ({"start": "cold"}, "'scratch' or 'weight'"),
    ):
        with pytest.raises(ValueError, match=message):
            SLTrain(**settings)
    with pytest.raises(ValueError, match=r"0: a density of 0\.001 leaves no entry"):
        layer(density=0.001)
    with pytest.raises(ValueError, match=r"0: low_rank.* the rank is at most 20"):
        layer(rank=21)
    with pytest.warns(NoSaving, match=r"0: 9.. parameters take the place of 504"):
        layer(rank=20)


@pytest.mark.parametrize("damage", ["outside", "twice"])
def test_damaged_places_are_refused(damage: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 100))
    structure(model, "sltrain", rank=2, density=0.01)
    made: Any = model[0]
    sparse: Any = parts(made)[2]
    first = int(sparse.starts[int(sparse.starts.diff().argmax())])  # of a row that has more than one
    sparse.index[first + 1] = sparse.index[first] if damage == "twice" else 255
    with pytest.raises(ValueError, match="damaged"):
        made(torch.randn(2, 200))
