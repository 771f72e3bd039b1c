"""What a recipe says of the weights it leaves."""

from __future__ import annotations

import eckart
import mixtures
import tiny


def test_weights_that_no_form_can_stand_for_are_listed_as_dense() -> None:
    """Stacked experts, of which recipes know nothing, are in the report with their bytes and the reason."""
    model = mixtures.build("mixtral")
    result = eckart.compress(model, "rtn", budget="0.95", data=tiny.batches()).result
    named = {layer.name: layer for layer in result.layers}
    own = dict(model.named_parameters())
    for block in range(2):
        for name in ("gate_up_proj", "down_proj"):
            layer = named[f"model.layers.{block}.mlp.experts.{name}"]
            assert layer.form == "dense()"
            assert layer.part == block
            assert layer.bytes == layer.dense_bytes == 4 * own[layer.name].numel()
            assert "no layer that a form can stand for" in str(layer.note)
