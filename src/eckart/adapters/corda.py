"""CorDA: LoRA that starts from the parts of a weight that matter least, or most, on given data."""

from __future__ import annotations

from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from eckart.adapters.native import Native, named, put, tidied
from eckart.calibration.stream import Batch, single_rows
from eckart.forms.layers import DropIn
from eckart.registry import method
from eckart.settings import check_whole


@method("corda", family="data start", paper="CorDA, Yang et al., NeurIPS 2024, arXiv 2406.05223")
@dataclass(frozen=True)
class Corda(Native):
    """PEFT's LoRA started by CorDA: components of W C, C being the covariance of inputs, leave W to be trained.

    C is found on the batches that `adapt` is given, window by window and without padding: text that shows what the
    model must not forget (`kpm`), or what it is to learn (`ipm`). The frozen weight loses what the adapter takes, so
    that a saved adapter fits that residual only. Give `start_folder`, and save with `model.save_pretrained(out,
    path_initial_model_for_weight_conversion=start_folder)`: that writes a plain LoRA of twice the rank for the
    untouched model. No second adapter can share a model that CorDA took parts of.

    Args:
        rank: components that are trained.
        alpha: of the scale alpha / rank; 0 takes alpha = rank.
        mode: `kpm`, knowledge-preserved, trains the smallest components; `ipm`, instruction-previewed, the largest.
        start_folder: to keep the adapter as it started in.
    """

    rank: int = 32
    alpha: float = 0.0
    mode: str = "kpm"
    start_folder: str = ""

    needs_data: ClassVar[bool] = True
    of: ClassVar[type[PeftConfig]] = LoraConfig

    def check(self) -> None:
        check_whole(self, rank=1)
        if self.mode not in ("kpm", "ipm"):
            raise ValueError(f"corda(mode={self.mode!r}): it is 'kpm', which preserves knowledge, or 'ipm', which previews instructions")  # fmt: skip # noqa: E501
        if not self.alpha >= 0:
            raise ValueError(f"corda(alpha={self.alpha!r}): it is a number above 0, or 0 for the rank")

    def fits(self, name: str, module: nn.Module, shape: tuple[int, int]) -> None:
        if isinstance(module, DropIn) or not getattr(module, "weight", torch.empty(0)).is_floating_point():
            raise ValueError(f"{name} is factored or quantised, and CorDA takes a part out of the weight: call eckart.densify(model) first, or leave the layer out")  # fmt: skip # noqa: E501
        if self.rank > min(shape):
            raise ValueError(f"{name}: rank {self.rank} is more than a matrix of shape {shape} can have: lower it to {min(shape)} or leave the layer out")  # fmt: skip # noqa: E501

    def config(self) -> LoraConfig:
        return LoraConfig(
            r=self.rank, lora_alpha=self.alpha or self.rank, lora_dropout=self.dropout, init_lora_weights="corda",
            corda_config=CordaConfig(corda_method=self.mode), **self.targeting(),
        )  # fmt: skip

    def start(self, model: nn.Module, config: PeftConfig, data: list[Batch] | None, adapter_name: str) -> Any:
        self.alone(model)
        layers = named(model, self.targets(model))
        probe: Any = copy(config)
        probe.target_modules = list(layers)  # here PEFT does not know `all-linear`
        with tidied(list(layers.values()), model):
            with ExitStack() as stack:
                for name, layer in layers.items():
                    for handle in guarded(name, layer):
                        stack.callback(handle.remove)
                preprocess_corda(model, probe, lambda: run(model, data or []))
            started = put(model, config, adapter_name)
        if self.start_folder:
            as_made = started.peft_config[adapter_name]
            as_made.init_lora_weights = True  # or PEFT would ask for the covariances again when it reads this folder
            started.save_pretrained(self.start_folder, selected_adapters=[adapter_name])
            as_made.init_lora_weights = "corda"
        return started


def run(model: nn.Module, data: list[Batch]) -> None:
    """Run the model window by window, each without its padding, as PEFT's hooks expect."""
    device = next(model.parameters()).device
    with torch.no_grad():
        for batch in single_rows(data):
            inputs = without_padding({k: v for k, v in batch.items() if k != "labels"})
            model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()})


def without_padding(row: Batch) -> Batch:
    """A batch of one with the tokens that its mask keeps."""
    mask = row.get("attention_mask")
    if mask is None or mask.dim() != 2 or bool(mask.all()):
        return row
    kept = mask[0].bool()
    return {k: v[:, kept] if isinstance(v, Tensor) and v.shape[:2] == mask.shape else v for k, v in row.items()}


def guarded(name: str, layer: nn.Module) -> list[RemovableHandle]:
    """Check what enters a layer, and let a single row, as a pooler has it, pass as a window of one: PEFT takes off the
    first dimension, whatever it is."""
    alone = False

    def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        nonlocal alone
        x = inputs[0]
        guard(name, x)
        alone = x.dim() == 2 and len(x) == 1
        return (x[None], *inputs[1:]) if alone else None

    def after(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
        return output[0] if alone else None

    return [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]


def guard(name: str, x: Tensor) -> None:
    """Raises `ValueError` where what enters a layer has no covariance."""
    if not x.isfinite().all():
        raise ValueError(f"what enters {name} has NaN or infinite numbers: CorDA cannot start from it")
    if x.max() == 0:
        raise ValueError(f"the largest number that enters {name} is 0, and CorDA divides by it: leave the layer out with exclude_modules")  # fmt: skip # noqa: E501
