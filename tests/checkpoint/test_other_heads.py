"""A compressed folder under another class on the same body: its stand-ins find their places, heads are left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import eckart
import tiny
from eckart.checkpoint.hf import EckartConfig, describe, fitted, install
from eckart.forms import as_form, drop_in
from eckart.forms.layers import DropIn, matrix_of


def factored(name: str, *heads: str, **settings: Any) -> Any:
    """A model whose linear layers within the blocks, and those called `heads`, are low-rank."""
    model = tiny.build(name, **settings)
    for key, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and (".layer" in key or key in heads):
            matrix = eckart.fit(as_form("low_rank(rank=4)"), matrix_of(module).detach())
            bias = None if module.bias is None else module.bias.detach()
            model.set_submodule(key, drop_in(module, matrix, bias))
    model.config.quantization_config = EckartConfig(describe(model))
    return model


def stand_ins(model: Any) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, DropIn)}


@pytest.mark.parametrize(
    ("name", "heads"), [("llama", ("lm_head",)), ("bert", ("cls.predictions.transform.dense",)), ("mpnet", ())]
)
def test_a_classifier_and_a_bare_body_take_the_body_of_a_compressed_model(
    tmp_path: Path, name: str, heads: tuple[str, ...]
) -> None:
    model = factored(name, *heads)
    model.save_pretrained(tmp_path / "m")
    ids = torch.tensor([[5, 6, 7]])
    body = model.base_model_prefix
    wanted = {n for n in stand_ins(model) if n.startswith(body)}
    assert wanted
    assert len(stand_ins(model)) == len(wanted) + len(heads)
    hidden = getattr(model, body)(ids).last_hidden_state
    classifier = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", num_labels=3).eval()
    assert stand_ins(classifier) == wanted
    torch.testing.assert_close(getattr(classifier, body)(ids).last_hidden_state, hidden)
    bare = tf.AutoModel.from_pretrained(tmp_path / "m").eval()
    assert stand_ins(bare) == {n.removeprefix(f"{body}.") for n in wanted}
    torch.testing.assert_close(bare(ids).last_hidden_state, hidden)
    bare.save_pretrained(tmp_path / "bare")
    again = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "bare", num_labels=3).eval()
    assert stand_ins(again) == wanted
    torch.testing.assert_close(getattr(again, body)(ids).last_hidden_state, hidden)


def test_what_a_head_shares_is_left_out_with_it_and_other_classes_keep_all() -> None:
    spec = {"kind": "linear", "form": "low_rank(rank=4)", "shape": [8, 8]}
    names = ["model.embed_tokens", "model.layers.0.mlp.up_proj", "lm_head"]
    config = EckartConfig(dict.fromkeys(names, spec), {"lm_head": "model.embed_tokens"}, [{"method": "svd"}])
    model = tiny.build("llama-tied", num_hidden_layers=1)
    assert fitted(config, model) is config
    model.config.architectures = ["LlamaForCausalLM"]
    classifier = tf.LlamaForSequenceClassification(model.config)
    found = fitted(config, classifier)
    assert list(found.modules) == names[:2]
    assert (found.tied, found.history) == ({}, config.history)
    config.modules = {"model.layers.0.mlp.no_proj": spec}
    config.tied = {}
    with pytest.raises(ValueError, match=r"describes model\.layers\.0\.mlp\.no_proj, which .* does not have"):
        install(classifier, fitted(config, classifier), torch.float32)
