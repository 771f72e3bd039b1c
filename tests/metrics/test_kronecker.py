"""Half the squared norm is the rise of the loss, to second order, on a model small enough to measure it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eckart.metrics import Kronecker, Statistics
from eckart.metrics.kronecker import shrunk
from eckart.testing import gaussian

CLASSES, IN, TOKENS = 6, 8, 20_000
W = 0.15 * gaussian(CLASSES, IN, seed=1)


def data() -> Tensor:
    """Correlated inputs about a mean that is not zero."""
    return gaussian(TOKENS, IN, seed=2) @ gaussian(IN, IN, seed=3) / IN**0.5 + gaussian(IN, seed=4)


def statistics_of(x: Tensor) -> Statistics:
    """Gradients of the summed loss on labels drawn from the model's own predictions, as the metric asks for."""
    probabilities = torch.softmax(x @ W.T, -1)
    labels = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(5))[:, 0]
    gradients = probabilities - torch.nn.functional.one_hot(labels, CLASSES)
    statistics = Statistics()
    statistics.add_inputs(x, Kronecker.needs)
    for rows, slopes in zip(x.split(20), gradients.split(20), strict=True):
        statistics.add_gradients(rows, slopes, Kronecker.needs)
    return statistics


def rise_of_the_loss(x: Tensor, delta: Tensor, bias: Tensor) -> float:
    """Mean KL divergence per token, which is the mean rise of the loss on labels of the model's own, in nats."""
    before = torch.log_softmax(x.double() @ W.double().T, -1)
    after = torch.log_softmax(x.double() @ (W + delta).double().T + bias, -1)
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_half_the_square_predicts_the_rise_of_the_loss(centred: bool, seed: int) -> None:
    x, delta = data(), 0.01 * gaussian(CLASSES, IN, seed=10 + seed)
    weighting = Kronecker(centred=centred).weighting(statistics_of(x))
    bias = torch.zeros(CLASSES, dtype=torch.float64)
    if centred:
        assert weighting.mean is not None
        bias = -delta.double() @ weighting.mean
    else:
        assert weighting.mean is None
    assert weighting.norm2(delta) / 2 == pytest.approx(rise_of_the_loss(x, delta, bias), rel=0.1)


def test_moving_the_mean_into_the_bias_costs_less() -> None:
    x, delta = data(), 0.01 * gaussian(CLASSES, IN, seed=10)
    statistics = statistics_of(x)
    centred, about_zero = Kronecker().weighting(statistics), Kronecker(centred=False).weighting(statistics)
    assert centred.norm2(delta) < about_zero.norm2(delta)


def test_targets_are_drawn_from_the_model() -> None:
    assert Kronecker.labels == "model"
    assert Kronecker.needs == {"outer", "x", "grad_outer", "whole_gradients"}


@pytest.mark.parametrize("rows", [1, 9])
def test_errors_of_rows_that_are_pooled_add_up(rows: int) -> None:
    """Rows of one example share most of what they are; its answer is made of their mean."""
    examples, per = 3000, (rows, IN)
    shared = gaussian(examples, 1, IN, seed=2)
    x = shared + 0.3 * gaussian(examples, *per, seed=3)
    pooled = x.mean(1)
    probabilities = torch.softmax(pooled @ W.T, -1)
    labels = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(5))[:, 0]
    slopes = (probabilities - torch.nn.functional.one_hot(labels, CLASSES)) / rows
    statistics = Statistics()
    for inputs, slope in zip(x, slopes, strict=True):
        statistics.add_inputs(inputs, Kronecker.needs)
        statistics.add_gradients(inputs, slope.expand(rows, CLASSES), Kronecker.needs, terms=1)
    delta = 0.01 * gaussian(CLASSES, IN, seed=10)
    rise = rise_of_the_loss(pooled, delta, torch.zeros(CLASSES, dtype=torch.float64))
    assert Kronecker(centred=False).weighting(statistics).norm2(delta) / 2 == pytest.approx(rise, rel=0.15)


def test_directions_that_no_row_shows_are_not_free() -> None:
    x, matrix = gaussian(5, 40, seed=1), gaussian(6, 40, seed=4)
    C = x.T.double() @ x.double() / 5
    found = shrunk(C, 5)
    assert torch.allclose(found.trace(), C.trace())
    assert torch.linalg.eigvalsh(found)[0] == pytest.approx(float(7 / 8 * C.diagonal().mean()), rel=1e-6)
    assert shrunk(C, 40) is C
    statistics = Statistics()
    statistics.add_inputs(x, Kronecker.needs)
    statistics.add_gradients(x, gaussian(5, 6, seed=3), Kronecker.needs)
    weighting = Kronecker().weighting(statistics)
    seen = matrix @ torch.linalg.pinv(x) @ x  # the same on every row that was seen
    assert weighting.norm2(matrix - seen) > 0.3 * weighting.norm2(matrix)


def test_outputs_that_no_loss_reached_are_not_free() -> None:
    x, g = gaussian(5, 8, seed=1), gaussian(5, 40, seed=3)
    statistics = Statistics()
    statistics.add_inputs(gaussian(100, 8, seed=2), Kronecker.needs)
    for row, gradient in zip(x, g, strict=True):
        statistics.add_gradients(row[None], gradient[None], Kronecker.needs)
    weighting, matrix = Kronecker().weighting(statistics), gaussian(40, 8, seed=4)
    unreached = matrix - g.T @ torch.linalg.pinv(g.T) @ matrix
    assert weighting.norm2(unreached) > 0.3 * weighting.norm2(matrix)
