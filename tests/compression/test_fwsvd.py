"""FWSVD's promise on a task (card, property 4): what the loss hardly sees may be lost.

Where noise is as steadily active as the informative features the promise does not hold: examples near a class boundary
have both the largest gradients and small informative inputs, so that the Fisher weight of informative features is the
smaller one. It holds where noise is of equal variance and seldom active.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from eckart.forms import LowRank
from eckart.linalg.weighting import PLAIN, Weighting
from eckart.metrics import FisherRows, Statistics

FEATURES, INFORMATIVE, CLASSES, HIDDEN, RANK = 24, 6, 8, 32, 6
ACTIVE = 0.02


def task(seed: int) -> tuple[Tensor, Tensor]:
    """Inputs of equal variance, of which the first few decide the class and the others are seldom active."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1024, FEATURES, generator=generator)
    classes = torch.randn(INFORMATIVE, CLASSES, generator=generator)
    x[:, INFORMATIVE:] *= (torch.rand(1024, FEATURES - INFORMATIVE, generator=generator) < ACTIVE) * ACTIVE**-0.5
    return x, (x[:, :INFORMATIVE] @ classes).argmax(1)


def trained(x: Tensor, y: Tensor, seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def fisher(model: nn.Sequential, x: Tensor, y: Tensor) -> Weighting:
    """FWSVD's weight for the first layer, from one gradient an example."""
    statistics = Statistics()
    for row, label in zip(x[:256, None], y[:256, None], strict=True):
        out = model[0](row)
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model[1:](out), label), out)
        statistics.add_gradients(row, gradient, FisherRows.needs)
    return FisherRows().weighting(statistics)


@pytest.mark.parametrize("seed", range(6))
def test_at_equal_rank_the_task_suffers_less_than_under_plain_svd(seed: int) -> None:
    x, y = task(seed)
    model = trained(x, y, seed)
    own, weighting = model[0].weight.detach().clone(), fisher(model, x, y)
    losses = []
    for weight in (own, *(LowRank(RANK).fit(own, w).dense().detach() for w in (weighting, PLAIN))):
        model[0].weight.data = weight
        losses.append(nn.functional.cross_entropy(model(x), y).item())
    dense, fwsvd, svd = losses
    assert dense < fwsvd < 0.95 * svd
