"""Our methods as types of PEFT: copies, other libraries' ways in, and PEFT's own errors where it has them."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_config, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType

from eckart import adapters
from eckart.adapters.registration import member, peft_name
from eckart.adapters.svfit import SVFit
from eckart.registry import find
from eckart.testing.adapters import adapted, answers, registered_adapters, small_model, trained


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A folder with a trained adapter, and what the model answered with it."""
    model = trained(adapted("svfit"))
    model.save_pretrained(tmp_path)
    return tmp_path, answers(model)


def test_every_type_is_a_member_that_copies_and_pickles_to_itself() -> None:
    for key in registered_adapters():
        name = peft_name(key)
        kind = PeftType[name]
        assert kind is PeftType(name) is member(name)
        assert kind in list(PeftType)
        assert (kind.name, kind.value, str.__str__(kind)) == (name, name, name)
        assert copy.deepcopy(kind) is copy.copy(kind) is pickle.loads(pickle.dumps(kind)) is kind
        assert issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[kind], adapters.Adapter)
        assert PEFT_TYPE_TO_TUNER_MAPPING[kind].prefix == "updates"


def test_settings_copy_pickle_and_come_back_from_a_dictionary() -> None:
    config = SVFit(rank=3, target_modules=["q_proj"], seed=4)
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), get_peft_config(config.to_dict())):
        assert type(again) is SVFit
        assert again.to_dict() == config.to_dict()
        assert again.peft_type is PeftType.ECKART_SVFIT


def test_an_adapted_model_copies_and_the_copy_is_its_own() -> None:
    model = trained(adapted("svfit"))
    other = copy.deepcopy(model)
    assert torch.equal(answers(other), answers(model))
    before = answers(model)
    trained(other)
    assert torch.equal(answers(model), before)
    assert not torch.equal(answers(other), before)


def test_importing_again_changes_nothing() -> None:
    members, known = dict(PeftType.__members__), dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    assert member("ECKART_SVFIT") is members["ECKART_SVFIT"]
    importlib.import_module("eckart.adapters")
    own = sys.modules.pop("eckart.adapters.registration")
    try:
        again = importlib.import_module("eckart.adapters.registration")
        assert again is not own
        assert again.member("ECKART_SVFIT") is members["ECKART_SVFIT"]
    finally:
        sys.modules["eckart.adapters.registration"] = own
    assert dict(PeftType.__members__) == members
    assert len(list(PeftType)) == len({m.value for m in PeftType}) == len(members)
    assert known == PEFT_TYPE_TO_CONFIG_MAPPING


@pytest.mark.parametrize("key", [k for k in registered_adapters() if not find(k, "adapters").cls.shares])
def test_transformers_loads_every_method_whose_layers_share_nothing(key: str, tmp_path: Path) -> None:
    trained_one = trained(adapted(key))
    trained_one.save_pretrained(tmp_path)
    model = small_model()
    model.load_adapter(str(tmp_path))
    assert torch.equal(answers(model), answers(trained_one))


def test_transformers_switches_it_off_and_adds_one(saved: tuple[Path, torch.Tensor]) -> None:
    folder, expected = saved
    model = small_model()
    plain = answers(model)
    model.load_adapter(str(folder))
    assert torch.equal(answers(model), expected)
    model.disable_adapters()
    assert torch.equal(answers(model), plain)
    other = small_model()
    other.add_adapter(SVFit(rank=4))
    assert sum(p.numel() for p in other.parameters() if p.requires_grad) == 4 * 14


def test_a_type_that_nobody_registered_is_peft_s_key_error(saved: tuple[Path, torch.Tensor]) -> None:
    folder, _ = saved
    path = folder / "adapter_config.json"
    words: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert words["peft_type"] == "ECKART_SVFIT"
    path.write_text(json.dumps({**words, "peft_type": "ECKART_OF_ANOTHER_RELEASE"}), encoding="utf-8")
    with pytest.raises(KeyError, match="ECKART_OF_ANOTHER_RELEASE"):
        PeftModel.from_pretrained(small_model(), folder)


def test_different_methods_on_one_model_are_refused_by_peft() -> None:
    model = adapted("svfit")
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        adapters.adapt(model, "s2_lora", rank=4, adapter_name="two")
    with pytest.raises(ValueError, match="is not compatible with the `PeftMixedModel`"):
        get_peft_model(small_model(), SVFit(rank=2, target_modules=["q_proj"]), mixed=True)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model", "ignore:Already found a .peft_config.")
def test_an_adapter_of_peft_s_own_below_is_refused() -> None:
    model = adapters.adapt(small_model(), "bone", rank=4)
    with pytest.raises(ValueError, match=r"carries a MissLinear of PEFT: .* unload the other one first"):
        get_peft_model(model.base_model.model, SVFit(rank=2, target_modules=["q_proj"]))
