"""`select`: as a matrix, as a factor, in the language, in a checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from eckart.forms import Select, densify, drop_in, parse
from eckart.linalg.weighting import Weighting
from eckart.linalg.whitening import DiagonalRoot, psd_root

INDEX = torch.tensor([1, 2, 5])


def randn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(7, 3), (3, 7)])
@pytest.mark.parametrize("batch", [(), (4,), (2, 0), (2, 3)])
def test_forward_and_rows_are_those_of_the_dense_matrix(shape: tuple[int, int], batch: tuple[int, ...]) -> None:
    matrix = Select(3).at(INDEX, shape)
    x = randn(*batch, shape[1]).requires_grad_()
    assert matrix.dense().sum() == 3
    assert torch.equal(matrix(x), x @ matrix.dense().T)
    y = randn(*batch, shape[0], seed=1)
    (gradient,) = torch.autograd.grad((matrix(x) * y).sum(), x)
    assert torch.equal(gradient, y @ matrix.dense())
    ids = torch.tensor([[0, 2], [1, 1]])
    assert torch.equal(matrix.rows(ids), matrix.dense()[ids])


def test_square_is_the_identity() -> None:
    assert torch.equal(Select(3).build((3, 3)).dense(), torch.eye(3))


def test_stores_int32_places_and_nothing_else() -> None:
    matrix = Select(3).at(INDEX, (7, 3), torch.bfloat16)
    assert {k: v.dtype for k, v in matrix.state_dict().items()} == {"index": torch.int32}
    assert matrix.nbytes == Select(3).nbytes((7, 3), torch.bfloat16) == 12
    assert matrix.flops(10) == 0


def test_dense_follows_the_models_dtype() -> None:
    matrix = Select(3).at(INDEX, (7, 3), torch.float32)
    assert matrix.dense().dtype == torch.float32
    assert matrix.double().dense().dtype == torch.float64
    assert matrix.index.dtype == torch.int32


@pytest.mark.parametrize("text", ["select()", "select(width=4) @ dense()", "dense() @ select(width=4)"])
def test_language_round_trips(text: str) -> None:
    assert str(parse(text)) == text
    assert parse(str(parse(text))) == parse(text)


def test_product_keeps_the_largest_rows_and_columns() -> None:
    W = randn(20, 12)
    rows = W.norm(dim=1).topk(5).indices.sort().values
    found = parse("select(width=5) @ dense()").fit(W)
    kept = torch.zeros_like(W).index_copy(0, rows, W[rows])
    assert torch.allclose(found.dense(), kept, atol=1e-5)
    columns = W.norm(dim=0).topk(5).indices.sort().values
    found = parse("dense() @ select(width=5)").fit(W)
    kept = torch.zeros_like(W).index_copy(1, columns, W[:, columns])
    assert torch.allclose(found.dense(), kept, atol=1e-5)


def test_fit_weighs_rows_by_what_they_cost() -> None:
    W = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.9, 0.0]])
    assert Select(2).fit(W).index.tolist() == [0, 1]
    inputs = Weighting(right=psd_root(torch.diag(torch.tensor([100.0, 1.0])), 0.0))
    assert Select(2).fit(W, inputs).index.tolist() == [0, 2]
    outputs = Weighting(left=DiagonalRoot(torch.tensor([0.1, 1.0, 1.0])))
    assert Select(2).fit(W, outputs).index.tolist() == [1, 2]


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="the width is a positive integer"):
        Select(0)
    with pytest.raises(ValueError, match=r"select\(width=4\) does not fit a matrix of shape \(7, 3\)"):
        Select(4).build((7, 3))
    for index in ([2, 1, 5], [1, 1, 5], [1, 2, 7], [-1, 2, 5], [1, 2]):
        with pytest.raises(ValueError, match="needs 3 ascending coordinates below 7"):
            Select(3).at(torch.tensor(index), (7, 3))


@pytest.mark.parametrize("shape", [(7, 3), (3, 7)])
def test_places_from_a_hostile_file_are_an_error(shape: tuple[int, int]) -> None:
    matrix = Select(3).build(shape)
    matrix.load_state_dict({"index": torch.tensor([0, 1, 10**6], dtype=torch.int32)})
    with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|DATA bounds)|index 1000000"):
        matrix(randn(2, shape[1]))


def test_drop_in_reads_back_as_a_dense_layer() -> None:
    linear = nn.Linear(6, 20)
    weight = linear.weight.detach()
    model: Any = nn.Sequential(drop_in(linear, parse("select(width=9) @ dense()").fit(weight), linear.bias.detach()))
    x = randn(4, 6)
    before = model(x)
    assert int((model[0].weight.norm(dim=1) > 0).sum()) == 9
    assert torch.allclose(densify(model)(x), before, atol=1e-6)
