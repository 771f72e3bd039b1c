"""A quantised base and a LoRA adapter, as PEFT loads them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from eckart.checkpoint.folder import companions
from eckart.checkpoint.hf import EckartConfig, describe
from eckart.checkpoint.layout import save_json, save_tensors
from eckart.checkpoint.source import no_bars
from eckart.export.export import Written
from eckart.forms.splits import rank_pattern, splits

BASE, ADAPTER = "base", "adapter"


def write(model: Any, source: Path, out: Path, strict: bool = False) -> Written:
    """Write `out/base`, the model without its low-rank terms, and `out/adapter`, these terms as a LoRA.

    `PeftModel.from_pretrained(base, adapter)` computes what the model did: left is lora_B, right is lora_A, alpha is
    the rank. A layer that is no sum with a low-rank term stays in the base as it is, so nothing is lost in any case.

    Raises `ValueError` where no layer has a low-rank term for the adapter.
    """
    found, whole = splits(model)
    if not found:
        first = next((f": {name} stays whole, for {why}" for name, why in whole.items()), ", as nothing is factored")
        raise ValueError(f"no layer of {source} can be taken apart into a base and an adapter{first}. Compress with a form such as 'quantized(bits=4) + low_rank()'")  # fmt: skip # noqa: E501
    for name, parts in found.items():
        model.get_submodule(name).matrix = parts.rest
    described = model.config.quantization_config
    model.config.quantization_config = EckartConfig(describe(model), described.tied, described.history)
    with no_bars():
        model.save_pretrained(out / BASE)
    for name in companions(source):
        if not (out / BASE / name).exists():
            shutil.copyfile(source / name, out / BASE / name)
    (out / ADAPTER).mkdir()
    tensors = {}
    for name, parts in found.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = parts.right
        tensors[f"base_model.model.{name}.lora_B.weight"] = parts.left
    save_tensors(tensors, out / ADAPTER / "adapter_model.safetensors")
    ranks = {name: parts.rank for name, parts in found.items()}
    task = "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None
    conv1d = {model.get_submodule(name).kind for name in found} == {"conv1d"}
    save_json(lora_config(ranks, BASE, task, conv1d), out / ADAPTER / "adapter_config.json")
    layers = {name: f"{parts.rest.form}, with a LoRA of rank {parts.rank}" for name, parts in found.items()}
    layers |= {name: f"whole in the base: {why}" for name, why in whole.items()}
    return Written(layers, ["the base is loaded by transformers after `import eckart`"])


def lora_config(
    ranks: dict[str, int], base: str, task: str | None, conv1d: bool, saved: list[str] | None = None
) -> dict[str, Any]:
    """What adapter_config.json holds. All is scaled by alpha over rank, which is 1 everywhere.

    Args:
        ranks: layer -> its rank.
        base: what the base model is called.
        task: what PEFT calls the task.
        conv1d: whether the layers are transformers' Conv1D.
        saved: modules that are saved whole.
    """
    common, pattern = rank_pattern(ranks)
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": sorted(ranks),
        "modules_to_save": saved or None,
        "fan_in_fan_out": conv1d,
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
