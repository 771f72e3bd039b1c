"""Products with sparse matrices that are trained, forms times a number, and nested factors, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eckart.forms import parse
from eckart.forms.nested import NestedProduct
from eckart.forms.scaled import Scaled, ScaledMatrix
from eckart.forms.scattered import placed, scattered_product
from eckart.forms.sparse import SparseMatrix
from eckart.testing import gaussian

FORMS = ["sparse(density=0.2)", "semi_sparse()", "column_sparse(nonzeros=3)", "row_sparse(nonzeros=2)", "group_sparse(density=0.4, group=4)"]  # fmt: skip # noqa: E501


@pytest.mark.parametrize("text", FORMS)
@pytest.mark.parametrize("batch", [(6,), (2, 3), ()])
def test_values_gradients_and_second_gradients_are_those_of_the_dense_matrix(text: str, batch: tuple[int, ...]) -> None:
    module = parse(text).fit(gaussian(12, 10, dtype=torch.float64))
    assert isinstance(module, SparseMatrix)
    values, flat, pattern = module.values.detach().requires_grad_(), module.flat(), module.pattern
    x = gaussian(*batch, 10, seed=1, dtype=torch.float64).requires_grad_()
    bias = gaussian(12, seed=2, dtype=torch.float64)

    def gradients(y: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(y.square().sum(), [x, values], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, values])
        return [y, *first, *second]

    found = gradients(scattered_product(x, values, flat, pattern, bias))
    wanted = gradients(x @ placed(values, flat, pattern).T + bias)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("text", FORMS)
def test_a_sparse_form_that_is_trained_keeps_nothing_of_its_size(text: str) -> None:
    module, kept = parse(text).fit(gaussian(32, 40)), []
    x = gaussian(2, 40, seed=1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        module(x)
    assert kept
    assert max(kept) < 32 * 40


def test_scaled() -> None:
    W, x = gaussian(9, 7, dtype=torch.float64), gaussian(3, 7, seed=1, dtype=torch.float64)
    module = parse("scaled(form=low_rank(rank=2), by=-0.25)").fit(W)
    assert isinstance(module, ScaledMatrix)
    torch.testing.assert_close(module.dense(), parse("low_rank(rank=2)").fit(W).dense())
    torch.testing.assert_close(module.inner.dense() * -0.25, module.dense())
    torch.testing.assert_close(module(x), x @ module.dense().T)
    first = parse("scaled(form=low_rank(), by=2.0)").ladder((8, 8))[0]
    assert str(first) == "scaled(form=low_rank(rank=1), by=2.0)"
    for by in (0.0, float("nan"), True):
        with pytest.raises(ValueError, match="a number other than 0"):
            Scaled(parse("dense()"), by)


def test_nested_computes_its_first_components_and_is_a_low_rank_in_the_file() -> None:
    left, right = gaussian(9, 4, dtype=torch.float64), gaussian(4, 7, seed=1, dtype=torch.float64)
    module, x = NestedProduct(left, right), gaussian(3, 7, seed=2, dtype=torch.float64)
    for width in (4, 2, 0):
        module.width = width
        wanted = left[:, :width] @ right[:width]
        torch.testing.assert_close(module.dense(), wanted)
        torch.testing.assert_close(module(x), x @ wanted.T)
        torch.testing.assert_close(module.rows(torch.tensor([1, 5])), wanted[[1, 5]])
        assert module.flops(3) == 2 * 3 * width * 16
    named = {k for k, _ in module.named_parameters()}
    assert named == {k for k, _ in module.form.build((9, 7)).named_parameters()}
