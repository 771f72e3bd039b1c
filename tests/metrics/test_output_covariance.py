"""LoRD from the moments of the inputs: the papers' layer, its error in eigenvalues, and its place among the others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eckart.forms import LowRank
from eckart.metrics import ActivationDiagonal, InputCovariance, Metric, OutputCovariance, Plain, Statistics
from eckart.metrics.statistics import INPUT_SUMS
from eckart.testing import error_ratio, gaussian

OUT, IN, RANK, TOKENS = 64, 48, 12, 4000
W, BIAS = gaussian(OUT, IN, seed=1, dtype=torch.float64), gaussian(OUT, seed=2, dtype=torch.float64)
MIX = torch.logspace(0.5, -0.5, IN)[:, None] * torch.linalg.qr(gaussian(IN, IN, seed=3)).Q


def inputs(seed: int, mean: float = 1.0) -> Tensor:
    """Correlated rows (tokens, in) in float32; of exactly zero mean if `mean` is 0."""
    x = gaussian(TOKENS, IN, seed=seed) @ MIX
    shift = mean * gaussian(IN, seed=5) @ MIX
    return x + shift if mean else x - x.double().mean(0).float()


def compressed(metric: Metric, x: Tensor, rank: int = RANK) -> tuple[Tensor, Tensor]:
    """The fitted matrix and the bias that goes with it, as compression computes them."""
    statistics = Statistics()
    statistics.add_inputs(x, INPUT_SUMS)
    weighting = metric.weighting(statistics)
    fitted = LowRank(rank).fit(W, weighting).dense().detach()
    return fitted, BIAS if weighting.mean is None else BIAS + (W - fitted) @ weighting.mean


def output_error(layer: tuple[Tensor, Tensor], x: Tensor) -> float:
    """Sum over all tokens of the squared error of the layer's output."""
    fitted, bias = layer
    x = x.double()
    return float((x @ (W - fitted).T + BIAS - bias).square().sum())


@pytest.mark.parametrize("rank", [1, RANK, 40])
@pytest.mark.parametrize("damping", [0.0, 1e-9])
def test_error_is_the_sum_of_discarded_eigenvalues(rank: int, damping: float) -> None:
    x = inputs(6)
    outputs = x.double() @ W.T + BIAS
    centred = outputs - outputs.mean(0)
    eigenvalues = torch.linalg.eigvalsh(centred.T @ centred / TOKENS).flip(0)
    wanted = TOKENS * float(eigenvalues[rank:].sum())
    assert output_error(compressed(OutputCovariance(damping=damping), x, rank), x) == pytest.approx(wanted, rel=1e-6)


def test_is_the_layer_of_the_papers() -> None:
    """LoRD: W -> V Vᵀ W and b -> (I - V Vᵀ) E[y] + V Vᵀ b, with V the leading eigenvectors of Cov(y)."""
    x = inputs(6)
    outputs = x.double() @ W.T + BIAS
    mean = outputs.mean(0)
    V = torch.linalg.eigh((outputs - mean).T @ (outputs - mean)).eigenvectors[:, -RANK:]
    projection = V @ V.T
    fitted, bias = compressed(OutputCovariance(), x)
    assert error_ratio(fitted, projection @ W) <= 1e-5
    assert error_ratio(bias, (torch.eye(OUT) - projection) @ mean + projection @ BIAS) <= 1e-5


def test_full_rank_is_the_layer_itself() -> None:
    x = inputs(6)
    layer = compressed(OutputCovariance(), x, IN)
    assert output_error(layer, x) <= 1e-10 * float((x.double() @ W.T).square().sum())


LORD, SVD_LLM, ASVD, SVD = OutputCovariance(), InputCovariance(), ActivationDiagonal(), Plain()


@pytest.mark.parametrize("seed", range(3))
def test_order_of_methods(seed: int) -> None:
    """Strict on the calibration data, and on fresh data of the same distribution."""
    x, fresh = inputs(10 + seed), inputs(20 + seed)
    layers = [compressed(metric, x) for metric in (LORD, SVD_LLM, ASVD, SVD)]
    for data in (x, fresh):
        lord, svd_llm, asvd, svd = (output_error(layer, data) for layer in layers)
        assert lord < svd_llm < min(asvd, svd)


def test_without_a_mean_there_is_nothing_to_gain() -> None:
    x = inputs(6, mean=0.0)
    lord, svd_llm = (output_error(compressed(metric, x), x) for metric in (LORD, SVD_LLM))
    assert lord == pytest.approx(svd_llm, rel=1e-5)


def test_constant_inputs_are_carried_by_the_bias() -> None:
    x = gaussian(1, IN, seed=7).expand(100, IN)
    layer = compressed(OutputCovariance(), x)
    assert output_error(layer, x) <= 1e-10 * float((x.double() @ W.T).square().sum())
