"""Making a method a real PEFT type: `get_peft_model`, `PeftModel.from_pretrained` and `load_adapter` then know it.

A process that has not imported `eckart.adapters` reads such a checkpoint with `KeyError: "ECKART_..."`: import it.
"""

from __future__ import annotations

from typing import Any

from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType


def peft_name(key: str) -> str:
    """What `adapter_config.json` calls a method of ours; PEFT may one day have one of the same key."""
    return f"ECKART_{key.upper()}"


def member(name: str) -> PeftType:
    """The member of `PeftType` with this name, made where there is none.

    PEFT's list of types is a closed enumeration, and transformers' `load_adapter` asks for `.value` of what it finds
    in it, so text would not do. This touches what `enum` keeps to itself; a test runs on every new Python and PEFT.
    """
    members: Any = PeftType
    if name in members.__members__:
        return members[name]
    new = str.__new__(PeftType, name)
    new._name_, new._value_ = name, name
    members._member_names_.append(name)
    members._member_map_[name] = new
    members._value2member_map_[name] = new
    type.__setattr__(PeftType, name, new)
    return new


def register(key: str, config: type, tuner: type) -> None:
    """Let PEFT know a method: the class of its settings, and the tuner that puts it into models."""
    member(peft_name(key))
    register_peft_method(
        name=peft_name(key).lower(), config_cls=config, model_cls=tuner, prefix=getattr(tuner, "prefix", None)
    )
