"""Any adapter that adds a matrix to each layer, as a plain LoRA of PEFT."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from eckart.adapters.kinds import described, is_convolution
from eckart.adapters.lora import Lora
from eckart.checkpoint.folder import companions
from eckart.checkpoint.layout import save_json, save_tensors
from eckart.export.adapted import CONFIG, SLACK, WEIGHTS, Adapted, Pair, pairs
from eckart.export.export import Written
from eckart.export.peft import lora_config
from eckart.forms.layers import kind_of

OWN = (CONFIG, "finetune.json", "metrics.jsonl", "README.md")


def write(adapted: Adapted, out: Path, rank: int | None = None, strict: bool = False) -> Written:
    """Write `out`, which PEFT, and what serves LoRA, reads without this library.

    A layer keeps its own rank, at most `rank`; alpha is the rank, so nothing is scaled. Modules that were trained and
    saved whole, such as a classifier, go along.

    Raises `ValueError` where the adapter is no matrix, or where `strict` and not all is exact.
    """
    found = pairs(adapted, rank)
    if strict:
        refuse_inexact(found)
    tensors: dict[str, Tensor] = {}
    kinds = set()
    for name, pair in found.items():
        module = adapted.inner.get_submodule(name).get_base_layer()
        kinds.add(kind_of(module))
        left, right = pair.left, pair.right
        if is_convolution(module):
            check_followed(name, module)
            left = left.view(*left.shape, *[1] * len(module.kernel_size))
            right = right.view(len(right), -1, *module.kernel_size)
        tensors[f"base_model.model.{name}.lora_A.weight"] = right
        tensors[f"base_model.model.{name}.lora_B.weight"] = left
    saved = adapted.saved()
    for name, wrapper in saved.items():
        for key, value in wrapper.modules_to_save["default"].state_dict().items():
            tensors[f"base_model.model.{name}.{key}"] = value
    save_tensors(tensors, out / WEIGHTS)
    ranks = {name: pair.rank for name, pair in found.items()}
    config = lora_config(ranks, adapted.base, adapted.config.task_type, kinds == {"conv1d"}, sorted(saved))
    save_json(config, out / CONFIG)
    for name in companions(adapted.source):
        if name not in OWN:
            shutil.copyfile(adapted.source / name, out / name)
    notes = [f"saved whole beside the LoRA: {', '.join(sorted(saved))}"] if saved else []
    return Written({name: pair.text() for name, pair in found.items()}, [*notes, *inexact(found)])


def check_followed(name: str, module: Any) -> None:
    """Raises `ValueError` for a convolution that PEFT's LoRA would compute as another one."""
    try:
        Lora().stands(name, module)
    except ValueError as e:
        raise ValueError(f"{name} is {described(module)} with settings that the LoRA of PEFT does not follow, so that it cannot be written as one: merge the adapter with model.merge_and_unload() instead") from e  # fmt: skip # noqa: E501


def inexact(found: dict[str, Pair]) -> list[str]:
    """A sentence on the layers that a LoRA does not hold exactly."""
    off = {name: pair for name, pair in found.items() if pair.error > SLACK}
    if not off:
        return []
    worst = max(off, key=lambda name: off[name].error)
    return [f"{len(off)} of {len(found)} layers are approximated; the worst is {worst}, {off[worst].text()}"]


def refuse_inexact(found: dict[str, Pair]) -> None:
    """Raises `ValueError` where a layer is approximated."""
    for line in inexact(found):
        raise ValueError(f"{line}. Raise --rank, or export without strict")
