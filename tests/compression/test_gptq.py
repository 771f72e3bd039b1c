"""GPTQ through models: below nearest rounding in its metric on every layer."""

from __future__ import annotations

from pathlib import Path

from quantised import check_method, correlated, heavy, lost

import eckart
import tiny


def test_through_a_model(tmp_path: Path) -> None:
    check_method("gptq", tmp_path)


def test_below_nearest_on_every_layer() -> None:
    data, errors = tiny.batches((4, 4, 4, 4), length=16), {}
    for rounding in ("nearest()", "gptq()"):
        form = f"quantized(bits=3, group=16, rounding={rounding})"
        found = eckart.compress(tiny.build("llama"), "gptq", budget="1.0", form=form, data=data, one_shot=True)
        errors[rounding] = {layer.name: layer.measured_error for layer in found.result.layers}
    assert len(errors["gptq()"]) == 21
    assert all(error < errors["nearest()"][name] for name, error in errors["gptq()"].items())


def test_below_nearest_on_heavy_tails() -> None:
    norm = correlated()
    for bits in (2, 3, 4):
        near, fed = (
            lost(heavy(), f"quantized(bits={bits}, group=16, rounding={r}())", norm) for r in ("nearest", "gptq")
        )
        assert fed < 0.8 * near


def test_bits_per_weight_decide_the_bits() -> None:
    model = tiny.build("llama", hidden_size=64, intermediate_size=128, num_attention_heads=4)
    found = eckart.compress(model, "gptq", budget="0.15 linears", data=tiny.batches((4, 4)))
    assert {layer.form for layer in found.result.layers} <= {f"quantized(bits={b}, rounding=gptq())" for b in (3, 4)}
    assert 0.85 * found.result.budget < found.result.bytes_after <= found.result.budget
