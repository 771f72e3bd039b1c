"""What starts on compressed bases have in common: the low rank beside the codes becomes a LoRA of PEFT's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from peft import LoraConfig
from torch import Tensor, nn

from eckart.adapters.matching import targets
from eckart.adapters.native import BESIDE, Native, drawn_from, named, put
from eckart.checkpoint.folder import Folder
from eckart.checkpoint.hf import EckartConfig, describe
from eckart.checkpoint.source import resolve
from eckart.forms.layers import DropIn, matrix_of
from eckart.forms.low_rank import LowRank
from eckart.forms.splits import Split, rank_pattern, splits
from eckart.linalg.weighting import PLAIN, Weighting
from eckart.settings import check_whole


@dataclass(frozen=True)
class LowRankStart(Native):
    """LoRA whose factors are the low-rank terms of a compressed model, which leave it: the base keeps the rest.

    The model answers as before, and only the LoRA learns. Layers without such a term get, where the `original` is
    given, the low rank that is nearest to what their compression lost.

    Terms that left the base would count twice where a saved LoRA is put on the compressed folder. Give `start_folder`,
    and save with `model.save_pretrained(out, path_initial_model_for_weight_conversion=start_folder)`: that writes a
    LoRA of twice the rank for the compressed folder. Or save `model.unload()`, once training is over, as the base that
    the LoRA belongs to.

    Args:
        rank: of layers that get one from the `original`.
        alpha: of the scale alpha / rank, which is taken out of the factors; None takes each layer's rank.
        original: the model before it was compressed, or its folder.
        start_folder: to keep the adapter as it started in (in a folder within, where it is not called `default`);
            nothing is kept where no term left the base.
    """

    rank: int = 16
    alpha: float | None = None
    original: Any = None
    start_folder: str = ""

    sits_on: ClassVar[tuple[type[nn.Module], ...]] = BESIDE

    def check(self) -> None:
        check_whole(self, rank=1)
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"{self.key}(alpha={self.alpha!r}): it is a number above 0")

    def put(self, model: nn.Module, data: list[Any] | None, adapter_name: str) -> Any:
        self.alone(model)
        names = targets(model, LoraConfig(**self.targeting()))
        apart, whole = splits(model)
        moved = {name: apart[name] for name in names if name in apart}
        repaired: dict[str, Split] = {}
        if self.original is not None:
            repaired = self.repairs(model, [name for name in names if _coded(model, name) and name not in moved], data)
        found = {**moved, **repaired}
        if not found:
            why = next((f" ({name}: {whole[name]})" for name in names if name in whole), "")
            raise ValueError(f"no targeted layer has a low-rank term beside others{why}: compress with 'lq_lora' or 'eora', or give the model before compression, original=...")  # fmt: skip # noqa: E501
        for name, module in named(model, list(found)).items():
            self.stands(name, module)
        _leave(model, moved)
        if moved and not self.start_folder:
            model.name_or_path = None  # type: ignore[assignment]
        with drawn_from(self.seed):
            adapted = put(model, self._lora(model, found), adapter_name)
        _fill(adapted, moved, adapter_name)
        if moved and self.start_folder:
            words = {"selected_adapters": [adapter_name], "save_embedding_layers": False}
            adapted.save_pretrained(self.start_folder, **words)
        _fill(adapted, repaired, adapter_name)
        return adapted

    def weightings(self, model: nn.Module, names: list[str], data: list[Any] | None) -> dict[str, Weighting]:
        """In which norm the low rank of a layer is nearest to what was lost."""
        return dict.fromkeys(names, PLAIN)

    def repairs(self, model: nn.Module, names: list[str], data: list[Any] | None) -> dict[str, Split]:
        """For each layer the low rank that is nearest to what its compression lost."""
        weightings, read = self.weightings(model, names, data), reader_of(self.original)
        found: dict[str, Split] = {}
        for name in names:
            matrix: Any = model.get_submodule(name).matrix
            W = read(name)
            if W.shape != matrix.shape:
                raise ValueError(f"{name} has shape {tuple(matrix.shape)}, and {tuple(W.shape)} in the original: give the model that was compressed")  # fmt: skip # noqa: E501
            coded = matrix.dense().detach().float()
            lost = W.to(coded) - coded
            low = LowRank(min(self.rank, *matrix.shape)).fit(lost, weightings[name])
            found[name] = Split(matrix, low.left.dense().detach(), low.right.dense().detach())
        return found

    def _lora(self, model: Any, found: dict[str, Split]) -> LoraConfig:
        common, ranks = rank_pattern({name: parts.rank for name, parts in found.items()})
        alphas: dict[str, Any] = dict(ranks) if self.alpha is None else {}
        return LoraConfig(
            r=common, lora_alpha=common if self.alpha is None else self.alpha,
            rank_pattern=ranks, alpha_pattern=alphas, target_modules=sorted(found), lora_dropout=self.dropout,
            modules_to_save=self.modules_to_save,
            fan_in_fan_out={model.get_submodule(name).kind for name in found} == {"conv1d"},
        )  # fmt: skip


def _leave(model: Any, moved: dict[str, Split]) -> None:
    """Take the low-rank terms out of the base, which then describes itself without them."""
    for name, parts in moved.items():
        model.get_submodule(name).matrix = parts.rest
    described = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(described, EckartConfig):
        model.config.quantization_config = EckartConfig(describe(model), described.tied, described.history)


@torch.no_grad()
def _fill(adapted: Any, found: dict[str, Split], adapter_name: str) -> None:
    """Let the LoRA of these layers be their low rank."""
    for name, parts in found.items():
        layer = adapted.get_base_model().get_submodule(name)
        root = layer.scaling[adapter_name] ** 0.5
        layer.lora_A[adapter_name].weight.copy_(parts.right / root)
        layer.lora_B[adapter_name].weight.copy_(parts.left / root)


def _coded(model: nn.Module, name: str) -> bool:
    module = model.get_submodule(name)
    return isinstance(module, DropIn) and module.kind in ("linear", "conv1d")


def reader_of(original: Any) -> Callable[[str], Float[Tensor, "out in"]]:
    """Gives the matrix of a layer before compression, from a model or a folder."""
    if isinstance(original, nn.Module):
        return lambda name: _matrix(original, name)
    folder = Folder(resolve(original if isinstance(original, Path) else str(original)))

    def read(name: str) -> Tensor:
        _matrix(folder.model, name)
        with folder.loaded(name):
            return _matrix(folder.model, name).clone()

    return read


def _matrix(model: nn.Module, name: str) -> Tensor:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the original has no layer {name}: give the model that was compressed") from None
    return matrix_of(module).detach()
