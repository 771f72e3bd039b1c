"""Every registered metric passes the battery; those of this package are compared with their definitions written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eckart.metrics import (
    METRICS,
    ActivationDiagonal,
    Fisher,
    FisherRows,
    InputCovariance,
    Kronecker,
    Metric,
    OutputCovariance,
    Plain,
)
from eckart.testing import MetricContract

SETTINGS: list[Metric] = [
    ActivationDiagonal(1.0, "rms"),
    ActivationDiagonal(0.3),
    InputCovariance(root="eigen"),
    OutputCovariance(root="eigen"),
    Kronecker(centred=False),
]


class TestMetrics(MetricContract):
    def metrics(self) -> list[Metric]:
        return [*super().metrics(), *SETTINGS]

    def definition(self, metric: Metric, x: Tensor, g: Tensor, delta: Tensor) -> float | None:
        rows, gradients = x.flatten(0, 1), g.flatten(0, 1)
        centred = rows - rows.mean(0)
        match metric:
            case Plain():
                found = delta.square().sum()
            case ActivationDiagonal():
                size = rows.square().mean(0).sqrt() if metric.statistic == "rms" else rows.abs().mean(0)
                found = (delta * size**metric.power).square().sum()
            case OutputCovariance():
                found = (centred @ delta.T).square().sum(1).mean()
            case InputCovariance():
                found = (rows @ delta.T).square().sum(1).mean()
            case FisherRows():
                per_example = torch.stack([(g[e].T @ x[e]).square().sum(0) for e in range(len(x))])
                found = (delta.square() * per_example.mean(0)).sum()
            case Fisher():
                each = torch.stack([(g[e].T @ x[e]).square() for e in range(len(x))]).mean(0)
                found = (delta.square() * each).sum()
            case Kronecker():
                inputs = centred if metric.centred else rows
                found = (gradients @ delta @ inputs.T).square().mean()
                found += metric.damping * gradients.square().mean() * (delta @ inputs.T).square().sum(0).mean()
                whole = torch.einsum("eto,eti->eoi", g, inputs.view_as(x)).square().sum() / len(rows)
                found *= whole / (gradients.square().sum(1).mean() * inputs.square().sum(1).mean())
            case _:
                return None
        return float(found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("activation_diagonal(statistic='max')", r"activation_diagonal\(statistic='max'\): it is 'abs' or 'rms'"),
        ("input_covariance(root='qr')", r"input_covariance\(root='qr'\): it is 'cholesky' or 'eigen'"),
        ("output_covariance(root='qr')", r"output_covariance\(root='qr'\)"),
        ("input_covarience", "unknown metric 'input_covarience'; did you mean 'input_covariance'"),
        ("plain() + plain()", "metrics cannot be combined with operators"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        METRICS.parse(text)
