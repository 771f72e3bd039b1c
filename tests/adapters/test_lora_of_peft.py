"""LoRA and DoRA: PEFT's own with our names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from eckart import adapters
from eckart.testing.adapters import answers, near, small_model, trained

WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({"rank": 4}, {"r": 4, "lora_alpha": 8}),
    "scaled": ({"rank": 4, "alpha": 6, "rooted": True}, {"r": 4, "lora_alpha": 6, "use_rslora": True}),
    "gaussian": ({"rank": 4, "start_from": "gaussian"}, {"r": 4, "lora_alpha": 8, "init_lora_weights": "gaussian"}),
    "orthogonal": (
        {"rank": 4, "start_from": "orthogonal"}, {"r": 4, "lora_alpha": 8, "init_lora_weights": "orthogonal"},
    ),
    "dora": ({"rank": 4, "dora": True}, {"r": 4, "lora_alpha": 8, "use_dora": True}),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_it_is_peft_s_own(way: str) -> None:
    ours, theirs = WAYS[way]
    model = adapters.adapt(small_model(), "lora", seed=3, **ours).eval()
    base = small_model()
    torch.manual_seed(3)
    other = get_peft_model(base, LoraConfig(target_modules="all-linear", **theirs)).eval()
    mine, wanted = model.state_dict(), other.state_dict()
    assert mine.keys() == wanted.keys()
    assert all(torch.equal(mine[n], wanted[n]) for n in wanted)
    plain = answers(small_model())
    assert near(answers(model), plain)
    assert not near(answers(trained(model)), plain)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 0}, "from 1 up"),
        ({"rank": 13}, "lower it to"),
        ({"start_from": "pissa"}, "one of zero"),
        ({"rank": 3, "start_from": "orthogonal"}, "even"),
    ],
)
def test_what_does_not_do_is_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        adapters.adapt(small_model(), "lora", **settings)
