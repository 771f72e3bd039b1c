"""D-Pruner: the general score against Schur complements, the penalised gradient written out, equal blocks, a model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import eckart
import tiny
from eckart.calibration.calibrate import Request
from eckart.compression.d_pruner import DPruner, FisherOfInputs
from eckart.forms import Sparse, parse
from eckart.forms.dual import Dual
from eckart.forms.layers import DropIn
from eckart.forms.selections import OBS
from eckart.linalg.weighting import Weighting
from eckart.linalg.whitening import psd_root
from eckart.metrics import Statistics
from eckart.testing import error_ratio, gaussian

OUT, IN = 6, 16
W = gaussian(OUT, IN, seed=1, dtype=torch.float64)
X = torch.logspace(0, -1, IN, dtype=torch.float64)[:, None] * gaussian(IN, 3 * IN, dtype=torch.float64)
C = X @ X.T
F = gaussian(OUT, IN, seed=3, dtype=torch.float64).square() + 0.01
NORM = Weighting(right=psd_root(C, 0.0), each=F)


def test_general_importance_is_that_of_the_schur_complement() -> None:
    """One block of columns, whose weights nothing has changed yet."""
    H = C + 0.01 * C.diagonal().mean() * torch.eye(IN, dtype=torch.float64)
    found = Dual().general(W, NORM)
    for j in range(IN):
        assert error_ratio(found[:, j], W[:, j].square() / torch.linalg.inv(H[j:, j:])[0, 0]) <= 1e-6
    first = W[:, 0].square() / torch.linalg.inv(H)[0, 0]
    assert error_ratio(found[:, 0], first) <= 1e-9


def test_later_blocks_are_scored_by_weights_that_have_been_repaired() -> None:
    keep, rest, scores = OBS(block=4).surgeon(W, Weighting(right=NORM.right))(Sparse(0.48).pattern((OUT, IN)))
    H = C + 0.01 * C.diagonal().mean() * torch.eye(IN, dtype=torch.float64)
    last = torch.linalg.inv(H[-1:, -1:])[0, 0]
    assert error_ratio(scores[:, -1], rest[:, -1].square() / last) > 0  # the last block has moved on within itself
    assert error_ratio(scores[:, 4], W[:, 4].square() / torch.linalg.inv(H[4:, 4:])[0, 0]) > 1e-3
    assert int(keep.sum()) == round(0.48 * OUT * IN)


def test_the_gradient_is_penalised_element_by_element() -> None:
    dual = Dual(generality=0.1, rate=0.5, scale=2.0)
    g = F.sqrt()
    wanted = g + 2 * 0.1 * 0.5**2 * dual.general(W, NORM) * g.square() / 2.0
    torch.testing.assert_close(dual.gradient(W, NORM), wanted)
    torch.testing.assert_close(Dual(generality=0.0).gradient(W, NORM), g)


def test_the_score_is_the_three_terms() -> None:
    only_first = Dual(generality=0.0, second=0.0, third=0.0).scores(W, NORM)
    torch.testing.assert_close(only_first, (F.sqrt() * W).abs())
    step = (F.sqrt() * W).abs()
    found = Dual(generality=0.0, first=2.0, second=3.0, third=4.0).scores(W, NORM)
    torch.testing.assert_close(found, 2 * step + 3 * step.square() + 4 * W.abs() ** 3)


def test_a_high_price_of_generality_changes_what_is_kept() -> None:
    cheap, dear = (Sparse(0.5, Dual(generality=g, rate=1.0, scale=1.0, third=0.0)) for g in (0.0, 1e4))
    kept = [form.fit(W, NORM).dense() != 0 for form in (cheap, dear)]
    general = Dual().general(W, NORM)
    assert not torch.equal(*kept)
    assert float(general[kept[1]].sum()) > float(general[kept[0]].sum())


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_blocks_of_columns_keep_their_share(blocks: int) -> None:
    dense = Sparse(0.48, Dual(blocks=blocks)).fit(W, NORM).dense()
    kept = (dense != 0).unflatten(1, (blocks, IN // blocks)).sum((0, 2))
    total = round(0.48 * OUT * IN)
    assert int(kept.sum()) == total
    assert kept.tolist() == [total * (i + 1) // blocks - total * i // blocks for i in range(blocks)]


def test_the_metric_has_both() -> None:
    statistics = Statistics()
    x, g = gaussian(4, 5, IN, seed=5), gaussian(4, 5, OUT, seed=6)
    statistics.add_inputs(x, FisherOfInputs().needs)
    for a, b in zip(x, g, strict=True):
        statistics.add_gradients(a, b, FisherOfInputs().needs)
    weighting = FisherOfInputs(damping=0.0).weighting(statistics)
    squared = torch.stack([(b.T @ a).square() for a, b in zip(x, g, strict=True)]).mean(0)
    assert weighting.each is not None
    assert error_ratio(weighting.each, squared) <= 1e-6
    assert error_ratio(weighting.right.gram(IN), x.flatten(0, 1).T @ x.flatten(0, 1) / 20) <= 1e-6


def test_a_model() -> None:
    model, result = eckart.compress(
        tiny.build("llama", num_hidden_layers=1), "d_pruner", budget=0.85,
        data=[{**b, "labels": b["input_ids"]} for b in tiny.batches()],
    )  # fmt: skip
    assert result.bytes_after <= 0.85 * result.bytes_before
    assert any(isinstance(m, DropIn) for m in model.modules())


def test_asks_for_gradients_and_covariances() -> None:
    request = DPruner().request(tiny.build("llama", num_hidden_layers=1), ["model.layers.0"])
    assert isinstance(request, Request)
    assert request.needs == {"fisher", "outer"}
    assert request.labels == "data"


def test_without_data_it_says_so() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    with pytest.raises(ValueError, match=r"data|calibrat"):
        eckart.compress(One(), "d_pruner", budget=0.6)


@pytest.mark.parametrize("text", ["dual(first=-1)", "dual(blocks=0)", "dual(scale=0)", "dual(sparsity=1)"])
def test_refusals(text: str) -> None:
    with pytest.raises(ValueError, match="dual"):
        parse(f"sparse(selection={text})")
