"""`quantized_inputs`: rounding as a loop would do it, in sums and products, and switched off."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.forms import FORMS, densify, drop_in, parse
from eckart.forms.densifying import RoundingLost
from eckart.forms.grids import Uniform
from eckart.forms.quantized import Quantized
from eckart.forms.quantized_inputs import QuantizedInputs, QuantizedInputsMatrix, rounded, unrounded
from eckart.linalg.weighting import PLAIN
from eckart.testing import error_ratio, gaussian

SYMMETRIC = Quantized(bits=4, group=4, grid=Uniform(symmetric=True))
PER_TOKEN = Quantized(bits=4, group=None)


def by_loops(x: Float[Tensor, "rows in"], bits: int, group: int, symmetric: bool) -> Float[Tensor, "rows in"]:
    """Number by number, in double precision."""
    found = torch.zeros_like(x)
    for r, row in enumerate(x.tolist()):
        for start in range(0, len(row), group):
            part = row[start : start + group]
            if symmetric:
                half = 2 ** (bits - 1)
                scale = max(-min(part) / half, max(part) / (half - 1)) or 1.0
                zero, low, high = 0, -half, half - 1
            else:
                least, most = min(0.0, *part), max(0.0, *part)
                scale = (most - least) / (2**bits - 1) or 1.0
                zero = round(-least / scale)
                low, high = -zero, 2**bits - 1 - zero
            for i, value in enumerate(part):
                found[r, start + i] = scale * min(high, max(low, round(value / scale)))
    return found


@pytest.mark.parametrize(("inputs", "group", "symmetric"), [(SYMMETRIC, 4, True), (PER_TOKEN, 10, False)])
def test_rounds_each_group_of_each_row_as_a_loop_does(inputs: Quantized, group: int, symmetric: bool) -> None:
    x = gaussian(7, 10, dtype=torch.float64)
    x[2] = 0
    x[3, 4:8] = x[3, 4:8].abs()
    assert torch.allclose(rounded(x, inputs), by_loops(x, 4, group, symmetric), atol=1e-12)
    assert torch.equal(rounded(x[None, :, :], inputs)[0], rounded(x, inputs))
    assert torch.equal(rounded(x[1], inputs), rounded(x, inputs)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeps_the_dtype_and_uses_so_many_levels(dtype: torch.dtype) -> None:
    for inputs in (SYMMETRIC, PER_TOKEN):
        found = rounded(gaussian(3, 4, dtype=dtype), inputs)
        assert found.dtype == dtype
    many = rounded(gaussian(1, 1000, dtype=dtype), PER_TOKEN)
    assert 10 < len(many.unique()) <= 16


def test_inputs_without_negative_numbers_use_all_codes_of_an_unsigned_grid() -> None:
    x = gaussian(1, 1000).abs()
    assert torch.allclose(rounded(x, PER_TOKEN), (x / (x.max() / 15)).round() * (x.max() / 15), atol=1e-6)


def test_more_bits_and_smaller_groups_are_nearer() -> None:
    x = gaussian(64, 32)
    errors = [error_ratio(rounded(x, Quantized(bits=bits, group=None)), x) for bits in (2, 4, 6, 8)]
    assert all(b < 0.5 * a for a, b in itertools.pairwise(errors))
    assert error_ratio(rounded(x, Quantized(bits=4, group=8)), x) < errors[1]


def test_is_its_matrix_on_rounded_inputs_and_that_alone_where_switched_off() -> None:
    form = QuantizedInputs(Quantized(bits=4, group=None), SYMMETRIC)
    module, x = form.fit(gaussian(6, 10)), gaussian(5, 10, seed=1)
    assert torch.equal(module(x), module.matrix(rounded(x, SYMMETRIC)))
    assert not module.exact
    layer = nn.Sequential(drop_in(nn.Linear(10, 6), module))
    with unrounded(layer):
        assert module.exact
        assert torch.equal(layer(x), module.matrix(x))
    assert not module.exact
    with pytest.raises(KeyError), unrounded(layer):
        raise KeyError
    assert not module.exact
    with pytest.warns(RoundingLost, match="0: quantized_inputs.* rounds its inputs, and the dense layer"):
        dense = densify(layer)
    assert error_ratio(dense(x), x @ module.dense().T) < 1e-6


def test_says_so_within_sums_and_products() -> None:
    W, x = gaussian(12, 10), gaussian(5, 10, seed=1)
    plain = parse("diagonal() + low_rank(rank=2)").fit(W)
    assert plain.exact
    branch = "quantized_inputs(matrix=quantized(bits=4)) @ diagonal() + low_rank(rank=2)"
    module = parse(branch).fit(W)
    assert not module.exact
    before = module(x)
    with unrounded(module):
        assert module.exact
        assert error_ratio(module(x), x @ module.dense().T) < 1e-6
        assert 1e-4 < error_ratio(before, module(x)) < 0.1


def test_gradients_pass_through_and_see_the_rounded_inputs_at_the_weights() -> None:
    form = parse("quantized_inputs(matrix=dense(), inputs=quantized(bits=3, group=None))")
    module = form.fit(gaussian(4, 6, dtype=torch.float64))
    assert isinstance(module, QuantizedInputsMatrix)
    x = gaussian(5, 6, seed=1, dtype=torch.float64).requires_grad_()
    g = gaussian(5, 4, seed=2, dtype=torch.float64)
    dx, dW = torch.autograd.grad((module(x) * g).sum(), [x, *module.parameters()])
    assert error_ratio(dx, g @ module.dense()) < 1e-12
    assert error_ratio(dW, g.T @ rounded(x.detach(), module.form.inputs)) < 1e-12


def test_stores_what_its_matrix_stores_and_has_its_curve() -> None:
    inner, W = parse("quantized(group=5)"), gaussian(12, 10)
    form = QuantizedInputs(inner, SYMMETRIC)
    assert form.open
    assert [f.nbytes((12, 10), torch.float16) for f in form.ladder((12, 10))] == [
        f.nbytes((12, 10), torch.float16) for f in inner.ladder((12, 10))
    ]
    ours, theirs = (f.curve(W, PLAIN, torch.float32) for f in (form, inner))
    assert (list(ours.errors), list(ours.nbytes)) == (list(theirs.errors), list(theirs.nbytes))
    assert all(isinstance(f, QuantizedInputs) and f.inputs == SYMMETRIC for f in ours.forms)


def test_text_round_trips_with_sums_within() -> None:
    for inside in ("quantized(bits=4) + low_rank(rank=2)", "quantized(bits=4) @ diagonal()"):
        form = FORMS.parse(f"quantized_inputs(matrix={inside}, inputs=quantized(bits=4))")
        assert parse(str(form)) == form
        assert isinstance(form, QuantizedInputs)
        assert str(form.matrix) == inside


def test_numbers_that_are_not_finite_come_out() -> None:
    x = gaussian(2, 10)
    x[0, 3] = math.inf
    module = QuantizedInputs(Quantized(bits=4), SYMMETRIC).fit(gaussian(4, 10))
    assert not bool(torch.isfinite(module(x)[0]).any())
    assert bool(torch.isfinite(module(x)[1]).all())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantized_inputs(inputs=quantized())", "with all settings"),
        ("quantized_inputs(inputs=dense())", "with all settings"),
        ("quantized_inputs(inputs=quantized(bits=4, rounding=gptq()))", "leave rounding and scales out"),
        ("quantized_inputs(inputs=quantized(bits=4, scales=low_rank(rank=1)))", "leave rounding and scales out"),
        ("quantized_inputs(matrix=3)", "that is no form"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)
