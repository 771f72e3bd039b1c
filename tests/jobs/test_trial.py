"""Trying plans: the loss is that of the compressed model, the model is as before, and `auto` takes the best."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import eckart
import tiny
from eckart.allocation import Budget
from eckart.calibration.subject import InMemory
from eckart.checkpoint.folder import Folder
from eckart.checkpoint.source import resolve
from eckart.compression import method_for
from eckart.compression.auto import label, simple
from eckart.compression.mixed import bearable
from eckart.forms import Curve, Dense, Quantized
from eckart.jobs import Method, Plan
from eckart.jobs.engine import Engine


def loss_of(model: Any, batches: list[dict[str, Any]]) -> float:
    """Mean cross-entropy of every next real token."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            logits, ids = model(**batch).logits[:, :-1].float(), batch["input_ids"][:, 1:]
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()[:, 1:]
            total += float(F.cross_entropy(logits[real], ids[real], reduction="sum"))
            count += int(real.sum())
    return total / count


class Trying(Method):
    """Plans as another method does, tries that plan, and keeps the loss."""

    def __init__(self, inner: Method):
        object.__setattr__(self, "inner", inner)
        object.__setattr__(self, "losses", [])

    tries_plans = True  # type: ignore[assignment]

    def request(self, model: Any, blocks: list[str]) -> Any:
        return self.inner.request(model, blocks)  # type: ignore[attr-defined]

    def plan(self, job: Any) -> Plan:
        plan = self.inner.plan(job)  # type: ignore[attr-defined]
        self.losses.append(job.trial(self.inner, plan))  # type: ignore[attr-defined]
        return plan

    def rewrite(self, job: Any, plan: Plan, part: int) -> Any:
        return self.inner.rewrite(job, plan, part)  # type: ignore[attr-defined]

    def config_changes(self, plan: Plan) -> dict[str, Any]:
        return self.inner.config_changes(plan)  # type: ignore[attr-defined]


def engine_over(subject: Any, method: Method, tmp_path: Path, batches: list[dict[str, Any]]) -> Engine:
    return Engine(subject, method, Budget.parse("0.8"), batches, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "opt"])
@pytest.mark.parametrize("method", ["svd_llm", "modegpt", "slicegpt"])
def test_a_trial_measures_the_compressed_model_and_leaves_it_as_it_was(method: str, name: str, dtype: torch.dtype, tmp_path: Path) -> None:  # fmt: skip # noqa: E501
    model, batches = tiny.build(name, dtype=dtype), tiny.batches((2,) * 9, padded=True)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modules = {k: id(m) for k, m in model.named_modules()}
    config = model.config.to_json_string()
    trying = Trying(method_for(method))
    engine = engine_over(InMemory(model), trying, tmp_path, batches)
    plan = engine.plan()
    after = model.state_dict()
    assert after.keys() == state.keys()
    for key, value in state.items():
        assert after[key].dtype == value.dtype
        assert torch.equal(after[key], value), key
    assert {k: id(m) for k, m in model.named_modules()} == modules
    assert model.config.to_json_string() == config
    engine.fit(plan)
    assert trying.losses == pytest.approx([loss_of(model.float(), batches[-1:])], rel=2e-5)


def test_a_trial_over_a_folder_is_the_one_in_memory(tmp_path: Path) -> None:
    folder, batches = tiny.save_model(tmp_path / "m"), tiny.batches((2,) * 8)
    losses = []
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    for i, subject in enumerate((Folder(resolve(folder)), InMemory(loaded))):
        trying = Trying(method_for("svd_llm"))
        (tmp_path / str(i)).mkdir()
        engine_over(subject, trying, tmp_path / str(i), batches).plan()
        losses += trying.losses
        assert i or all(p.device.type == "meta" for p in subject.model.parameters())
    assert losses[0] == losses[1]


def divergence_of(model: Any, original: Any, batches: list[dict[str, Any]]) -> float:
    """Mean KL from the original's answers, over all real tokens."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            p, q = (m(**batch).logits.float().log_softmax(-1) for m in (original, model))
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            total += float((p.exp() * (p - q)).sum(-1)[real].sum())
            count += int(real.sum())
    return total / count


def test_auto_does_the_simple_thing_where_it_loses_nothing(tmp_path: Path) -> None:
    """Eight bits a weight, without any calibration."""
    batches = tiny.batches((2,) * 8, length=16)
    engine = Engine(InMemory(tiny.build("llama")), method_for("auto"), Budget.parse("0.7"), batches, tmp_path)
    plan = engine.plan()
    assert not plan.statistics
    assert plan.extra["chosen"] == label(simple())
    assert {layer.form for layer in plan.layers} == {"quantized(bits=8, grid=uniform(symmetric=True))"}
    assert "model.embed_tokens" in {layer.name for layer in plan.layers}
    assert f"{plan.extra['tried'][label(simple())]:.2g} nats" in plan.remarks[0]
    assert not list(tmp_path.rglob("statistics/*.safetensors"))


def test_auto_takes_the_candidate_with_the_least_loss_on_text_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what it says it found, and by what the model that it makes loses on that text."""
    monkeypatch.setattr("eckart.compression.auto.NEGLIGIBLE", 0.0)  # the first one loses next to nothing here
    batches = tiny.batches((2,) * 8, length=16)
    engine = Engine(InMemory(tiny.build("llama")), method_for("auto"), Budget.parse("0.4"), batches, tmp_path)
    plan = engine.plan()
    tried = plan.extra["tried"]
    assert len(tried) >= 2
    assert tried[plan.extra["chosen"]] == min(tried.values())
    model = tiny.build("llama")
    found = eckart.compress(model, "auto", budget="0.4", data=batches).result
    assert [layer.form for layer in found.layers] == [layer.form for layer in plan.layers]
    assert all(f"{name} {loss:.3g}" in found.advice()[0] for name, loss in tried.items())
    lost = divergence_of(model, tiny.build("llama"), batches[-1:])
    assert lost == pytest.approx(tried[plan.extra["chosen"]], rel=1e-3)
    assert math.isfinite(lost)


def test_what_would_destroy_the_model_is_tried_on_the_least_of_its_layers() -> None:
    def curve(lost: float) -> Curve:
        return Curve([Quantized(bits=1), Dense()], [10, 100], [2 * lost, 0.0], 1.0)

    curves = {"a": curve(0.3), "b": curve(0.1), "c": curve(0.3), "d": curve(4.0)}
    assert bearable(dict.fromkeys(curves, 0), curves) == {"a": 0, "b": 0, "c": 1, "d": 1}
    alone = {"d": curves["d"]}
    assert bearable({"d": 0}, alone) == {"d": 0}  # one there must be


def test_a_model_without_logits_is_judged_by_its_features() -> None:
    """Half the squared relative distance of what leaves the encoder, which `auto` keeps below that of nearest codes."""
    batches = tiny.batches((2,) * 8, length=16)
    lost = {}
    for method in ("rtn", "auto"):
        model = tiny.build("bert").bert
        original = tiny.build("bert").bert
        eckart.compress(model, method, budget="0.25 linears", data=batches)
        with torch.no_grad():
            found, wanted = (m(**batches[-1]).last_hidden_state for m in (model, original))
        lost[method] = float((0.5 * (found - wanted).square().sum(-1) / wanted.square().sum(-1)).mean())
    assert lost["auto"] < lost["rtn"]


CODES = [f"quantized(bits={bits}, group=64{{more}})" for bits in (1, 2, 3, 4, 5, 6, 8)]
SINGLE: dict[str, dict[str, Any]] = {
    "nearest": {"form": " | ".join(CODES).format(more="")},
    "gptq": {"form": " | ".join(CODES).format(more=", rounding=gptq()"), "metric": "input_covariance()"},
}


def encoder() -> Any:
    """Of which a large table is the most, and whose answers no pooler takes part in."""
    torch.manual_seed(0)
    own = {"vocab_size": 2000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    return tiny.scattered(tf.BertModel(tf.BertConfig(**(tiny.GATED | own))).eval())


@pytest.mark.parametrize("bits", [2.6, 4.5])
def test_auto_is_no_worse_than_any_single_form_on_an_encoder(bits: float) -> None:
    """Tables, and what no answer depends on, take part: nothing that counts stays dense where bytes are scarce."""
    batches, original, lost = tiny.batches((2,) * 8, length=16), encoder(), {}
    size = sum(p.numel() for p in original.parameters())
    for name, words in {**SINGLE, "auto": {}}.items():
        model = encoder()
        if words:
            words = words | {"allocation": "optimal()", "targets": ".*"}
        result = eckart.compress(model, None if words else "auto", budget=f"{bits}bpw", data=batches, **words).result
        assert result.bytes_after <= bits * size / 8
        with torch.no_grad():
            found, wanted = (m(**batches[-1]).last_hidden_state for m in (model, original))
        lost[name] = float((0.5 * (found - wanted).square().sum(-1) / wanted.square().sum(-1)).mean())
    assert {layer.name for layer in result.layers if layer.form == "dense()" and layer.dense_bytes > 0.01 * 4 * size} == set()  # fmt: skip # noqa: E501
    assert "pooler.dense" in {layer.name for layer in result.layers}
    assert lost["auto"] <= min(lost.values())


def test_the_loss_of_a_model_that_foretells_nothing_is_not_measured(tmp_path: Path) -> None:
    trying = Trying(method_for("rtn"))
    with pytest.raises(ValueError, match="foretells no next words"):
        Engine(InMemory(tiny.build("bert")), trying, Budget.parse("0.9"), tiny.batches((2,) * 8), tmp_path).plan()
