"""RD_PRUNE against its card: curves by measurement, their ends, additivity, and the order against other spreads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils.prune import l1_unstructured

import eckart
import tiny
from eckart.allocation import Budget
from eckart.calibration.subject import InMemory
from eckart.compression import method_for
from eckart.compression.rd_prune import RDPrune
from eckart.jobs.engine import Engine

TEXT = tiny.batches((2,) * 6, length=16, padded=True)


def model_of(seed: int = 0) -> Any:
    return tiny.build("llama", seed=seed, num_hidden_layers=2)


def distortion(model: Any) -> float:
    """Mean squared change of the logits on the text that was set aside."""
    total, count, original = 0.0, 0, model_of()
    with torch.no_grad():
        for batch in TEXT[-1:]:
            real = batch["attention_mask"].bool()
            squared = (model(**batch).logits - original(**batch).logits).square().mean(-1)
            total, count = total + float(squared[real].sum()), count + int(real.sum())
    return total / count


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Any, dict[str, torch.Tensor]]:
    """An engine that has planned, its plan, and the model's tensors before."""
    model = model_of()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    chosen = method_for("rd_prune", amounts=5)
    engine = Engine(InMemory(model), chosen, Budget.parse("0.6 linears"), TEXT, tmp_path_factory.mktemp("rd"))
    return engine, engine.plan(), before


def test_curves_are_measured_and_the_model_is_as_it_was(planned: tuple[Engine, Any, dict[str, torch.Tensor]]) -> None:
    engine, _, before = planned
    after = engine.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    curves = engine.job.scratch[engine.method]
    assert len(curves) == 14
    for name, curve in list(curves.items())[::5]:
        assert curve.errors[-1] == 0.0
        pruned = model_of()
        weight = pruned.get_submodule(name).weight
        weight.data = curve.forms[0].fit(weight.detach()).dense().detach()
        assert curve.errors[0] == pytest.approx(distortion(pruned), rel=1e-2)  # its products are rounded
        assert curve.errors[0] > curve.errors[len(curve) // 2] > 0


def test_masks_are_those_of_l1_pruning(planned: tuple[Engine, Any, dict[str, torch.Tensor]]) -> None:
    curve = next(iter(planned[0].job.scratch[planned[0].method].values()))
    weight = model_of().model.layers[0].self_attn.q_proj.weight.detach()
    kept = curve.forms[3].fit(weight).dense().detach()
    layer = torch.nn.Linear(*weight.T.shape, bias=False)
    layer.weight.data = weight.clone()
    l1_unstructured(layer, "weight", amount=int((kept == 0).sum()))
    assert torch.equal(layer.weight.detach(), kept)


def test_the_joint_distortion_is_reported_and_near_the_sum(planned: tuple[Engine, Any, dict[str, torch.Tensor]]) -> None:  # fmt: skip # noqa: E501
    engine, plan, _ = planned
    found = plan.extra["distortion"]
    assert 0.3 < found["joint"] / found["summed"] < 3
    model = model_of()
    made = Engine(InMemory(model), engine.method, Budget.parse("0.6 linears"), TEXT, engine.work)
    made.fit(plan)
    assert found["joint"] == pytest.approx(distortion(model), rel=1e-2)  # its products are rounded
    assert plan.bytes_after <= plan.budget


def test_distorts_the_output_less_than_other_spreads_of_the_same_bytes(planned: tuple[Engine, Any, dict[str, torch.Tensor]]) -> None:  # fmt: skip # noqa: E501
    ours = planned[1].extra["distortion"]["joint"]
    for allocation in ("uniform()", "optimal()"):
        model = model_of()
        eckart.compress(model, form="sparse(selection=magnitude())", allocation=allocation, budget="0.6 linears")
        assert ours < distortion(model), allocation


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rd_prune\(amounts=0\): a positive whole number"):
        RDPrune(amounts=0)
    with pytest.raises(ValueError, match="give at least two batches"):
        eckart.compress(model_of(), "rd_prune", budget=0.8)
