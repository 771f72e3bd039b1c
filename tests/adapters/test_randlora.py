"""RandLoRA: PEFT's own with our names, the card's formula, and what its frozen bases are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, RandLoraConfig, get_peft_model
from torch import Tensor, nn

from eckart import adapters
from eckart.testing.adapters import answers, small_model, trained


def one(out: int = 6, in_: int = 10, **settings: Any) -> Any:
    """A layer with RandLoRA on it."""
    model = adapters.adapt(nn.Sequential(nn.Linear(in_, out)), "randlora", target_modules=["0"], **settings)
    return model.base_model.model[0]


def drawn(layer: Any) -> Any:
    """The layer with diagonals that are drawn."""
    generator = torch.Generator().manual_seed(1)
    for diagonals in (layer.randlora_lambda["default"], layer.randlora_gamma["default"]):
        diagonals.data = torch.randn(diagonals.shape, generator=generator)
    return layer


def formula(layer: Any, rank: int) -> Tensor:
    """Sum over j of B_j diag(lambda_j) A diag(gamma_j), columns of all B paired with rows as PEFT pairs them."""
    A, B = layer.randlora_A["default"][:, 0], layer.randlora_B["default"]
    small, bases = min(layer.in_features, layer.out_features), layer.num_bases
    lambdas, gammas = layer.randlora_lambda["default"].T, layer.randlora_gamma["default"]
    rows = [[(lambdas[j, k] * A[k, :small] * gammas[j]) for j in range(bases)] for k in range(rank)]
    columns = B[: max(layer.in_features, layer.out_features), :bases].flatten(1).T
    pairs = [rows[k][j] for k in range(rank) for j in range(bases)]
    return sum((torch.outer(c, r) for c, r in zip(columns, pairs, strict=True)), torch.zeros(len(B), small))


def test_it_is_peft_s_own() -> None:
    ours = adapters.adapt(small_model(), "randlora", rank=4, alpha=40, seed=7).eval()
    config = RandLoraConfig(r=4, randlora_alpha=40, projection_prng_key=7, target_modules="all-linear")
    theirs = get_peft_model(small_model(), config).eval()
    mine, other = ours.state_dict(), theirs.state_dict()
    shared = [n for n in other if "randlora_gamma" in n or "randlora_A" in n or "randlora_B" in n]
    assert shared
    assert all(torch.equal(mine[n], other[n]) for n in shared)
    theirs.load_state_dict(trained(ours).state_dict())
    assert torch.equal(answers(theirs), answers(ours))


@pytest.mark.parametrize(("out", "in_"), [(6, 10), (10, 6)])
def test_the_change_is_the_formula_with_paired_columns(out: int, in_: int) -> None:
    layer = drawn(one(out, in_, rank=3, alpha=6))
    delta = layer.get_delta_weight("default")
    expected = 6 / 3 * formula(layer, 3)
    assert torch.allclose(delta, expected.T if out < in_ else expected, atol=1e-5)
    x = torch.randn(4, in_)
    assert torch.allclose(layer(x), layer.base_layer(x) + x @ delta.T, atol=1e-5)


def test_the_rank_is_full_once_gamma_is_not_constant() -> None:
    layer = one(24, 24, rank=4)
    layer.randlora_lambda["default"].data.normal_(generator=torch.Generator().manual_seed(0))
    assert int(torch.linalg.matrix_rank(layer.get_delta_weight("default").detach())) == 4
    assert int(torch.linalg.matrix_rank(drawn(layer).get_delta_weight("default").detach())) == 24


def test_counts_and_one_storage_for_all_bases() -> None:
    model = adapters.adapt(small_model(), "randlora", rank=4)
    shapes = [m.weight.shape for m in small_model().modules() if isinstance(m, nn.Linear)][:-1]
    expected = sum(math.ceil(min(s) / 4) * (4 + min(s)) for s in shapes)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    bases = [m.randlora_B["default"] for m in model.modules() if hasattr(m, "randlora_lambda")]
    assert len(bases) == 14
    assert len({b.data_ptr() for b in bases}) == 1


def test_gradients_are_those_of_the_formula() -> None:
    layer = drawn(one(rank=3, alpha=3))
    weights = torch.randn(6, 10)
    found = torch.autograd.grad((layer.get_delta_weight("default") * weights).sum(), [layer.randlora_lambda["default"], layer.randlora_gamma["default"]])  # fmt: skip # noqa: E501
    expected = torch.autograd.grad((formula(layer, 3).T * weights).sum(), [layer.randlora_lambda["default"], layer.randlora_gamma["default"]])  # fmt: skip # noqa: E501
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:Specified to not save")
@pytest.mark.parametrize("settings", [{}, {"save_bases": False}, {"bases": "sparse"}, {"bases": "very_sparse"}])
def test_saved_and_loaded_it_is_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    model = trained(adapters.adapt(small_model(), "randlora", rank=4, seed=5, **settings))
    model.save_pretrained(tmp_path)
    torch.manual_seed(9)
    again = PeftModel.from_pretrained(small_model(), tmp_path).eval()
    assert torch.equal(answers(again), answers(model))
    numbers = next(m.randlora_A["default"] for m in model.modules() if hasattr(m, "randlora_lambda"))
    assert (len(numbers.unique()) <= 3) == ("bases" in settings)


def test_what_does_not_do_is_named() -> None:
    with pytest.raises(ValueError, match=r"k_proj: rank 9 is more than a matrix of shape \(8, 16\) can have"):
        adapters.adapt(small_model(), "randlora", rank=9)
    left = adapters.adapt(small_model(), "randlora", rank=9, exclude_modules=["k_proj", "v_proj"])
    assert not any("k_proj" in n for n, p in left.named_parameters() if p.requires_grad)
    assert sum(p.requires_grad for p in left.parameters()) == 2 * 10
    with pytest.raises(ValueError, match="bases='spars'"):
        adapters.adapt(small_model(), "randlora", bases="spars")
    with pytest.raises(ValueError, match="is a convolution"):
        adapters.adapt(nn.Sequential(nn.Conv2d(4, 4, 3)), "randlora", rank=2, target_modules=["0"])
    with pytest.raises(ValueError, match="PRNG initialisation key must be the same"):
        adapters.adapt(left, "randlora", rank=4, seed=1, adapter_name="second", exclude_modules=["k_proj", "v_proj"])
