"""EVA: LoRA that starts from what explains most of its inputs' variance, with ranks where there is most of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from peft import EvaConfig, LoraConfig, PeftConfig, get_eva_state_dict, initialize_lora_eva_weights
from torch import Tensor, nn

from eckart.adapters.native import Native, named, put, tidied
from eckart.calibration.stream import Batch
from eckart.registry import method
from eckart.remarks import remark
from eckart.settings import check_whole


@method("eva", family="data start", paper="EVA, Paischer et al., NeurIPS 2025, arXiv 2410.07170")
@dataclass(frozen=True)
class Eva(Native):
    """PEFT's LoRA started by EVA: A is made of leading principal directions of the layer's inputs, B is zero.

    The directions are found on the batches that `adapt` is given, which go round until directions stand still; padding
    is left out. Ranks are handed out over all layers by the share of variance that each direction explains: a layer may
    end with none. It is an ordinary LoRA from there on. Learning rates of plain LoRA diverge with alpha = 2 rank here.

    Args:
        rank: average of all layers.
        alpha: of the scale alpha / rank, which is the same in every layer, whatever its own rank.
        spread: a layer's rank is at most this times the average; 1 gives all layers the same.
        similarity: |cosine| to the step before at which a direction stands still.
        whiten: divide each direction by the root of its singular value.
        labels_only: where batches have labels, leave out the tokens whose label is -100.
        passes: over the data, after which directions that still move are an error.
    """

    rank: int = 16
    alpha: float = 1.0
    spread: float = 2.0
    similarity: float = 0.99
    whiten: bool = False
    labels_only: bool = True
    passes: int = 50

    needs_data: ClassVar[bool] = True
    of: ClassVar[type[PeftConfig]] = LoraConfig

    def check(self) -> None:
        check_whole(self, rank=1, passes=1)
        if not (math.isfinite(self.spread) and self.spread >= 1):
            raise ValueError(f"eva(spread={self.spread!r}): it is a number, at least 1")
        if not 0 <= self.similarity <= 1:
            raise ValueError(f"eva(similarity={self.similarity!r}): it is a cosine from 0 to 1")
        if not self.alpha > 0:
            raise ValueError(f"eva(alpha={self.alpha!r}): it is a number above 0")

    @property
    def directions(self) -> int:
        """How many of them are looked for in each layer."""
        return round(self.rank * self.spread)

    def fits(self, name: str, module: nn.Module, shape: tuple[int, int]) -> None:
        if self.rank > min(shape):
            raise ValueError(f"{name}: rank {self.rank} is more than a matrix of shape {shape} can have: lower it to {min(shape)} or leave the layer out")  # fmt: skip # noqa: E501
        if self.directions > shape[1]:
            raise ValueError(f"{name}: rank {self.rank} with spread {self.spread} looks for {self.directions} directions, and the layer has {shape[1]} inputs: lower one of them")  # fmt: skip # noqa: E501

    def config(self) -> LoraConfig:
        eva = EvaConfig(rho=self.spread, tau=self.similarity, whiten=self.whiten, use_label_mask=self.labels_only)
        return LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, init_lora_weights="eva", eva_config=eva,
            **self.targeting(),
        )  # fmt: skip

    def start(self, model: nn.Module, config: PeftConfig, data: list[Batch] | None, adapter_name: str) -> Any:
        self.alone(model)
        names = self.targets(model)
        batches = self._large_enough(data or [])
        probe: Any = copy(config)
        probe.target_modules = names  # here PEFT does not know `all-linear`
        with tidied(list(named(model, names).values()), model):
            found = get_eva_state_dict(
                model, Rounds(batches, self.passes), probe, show_progress_bar=False,
                prepare_model_inputs_fn=lambda batch, _: self._mask(batch), prepare_layer_inputs_fn=rows,
            )  # fmt: skip
        with warnings.catch_warnings():  # of memory that is taken while inputs are looked at, which is over
            warnings.filterwarnings("ignore", message="lora with eva initialization")
            started = put(model, config, adapter_name)
        found = {f"base_model.model.{name}": value for name, value in found.items()}
        initialize_lora_eva_weights(started, eva_state_dict=found, adapter_name=adapter_name)
        return started

    def _mask(self, batch: Batch) -> Tensor | None:
        """(b, length) True for tokens that count; None where all do."""
        mask: Tensor | None = batch.get("attention_mask")
        mask = None if mask is None or mask.dim() != 2 else mask.bool()
        labels = batch.get("labels")
        if self.labels_only and isinstance(labels, Tensor) and "input_ids" in batch and labels.shape == batch["input_ids"].shape:  # fmt: skip # noqa: E501
            labelled = labels != -100
            mask = labelled if mask is None else mask & labelled
        return mask

    def _large_enough(self, data: list[Batch]) -> list[Batch]:
        """Batches with as many tokens as directions; raises `ValueError` where there are none."""
        sizes = [self._tokens(batch) for batch in data]
        kept = [batch for batch, size in zip(data, sizes, strict=True) if size is None or size >= self.directions]
        if not kept:
            raise ValueError(f"eva looks for {self.directions} directions (rank {self.rank}, spread {self.spread}) in every layer, and no batch has as many tokens: the largest has {max((s for s in sizes if s), default=0)}; give larger ones")  # fmt: skip # noqa: E501
        if len(kept) < len(data):
            remark(f"eva leaves out {len(data) - len(kept)} of {len(data)} batches, which have fewer tokens than the {self.directions} directions it looks for", UserWarning)  # fmt: skip # noqa: E501
        return kept

    def _tokens(self, batch: Batch) -> int | None:
        """How many count; None where the batch does not tell."""
        mask = self._mask(batch)
        if mask is not None:
            return int(mask.sum())
        ids = batch.get("input_ids")
        return ids.numel() if isinstance(ids, Tensor) else None


def rows(entered: Any, mask: Tensor | None, name: str) -> Float[Tensor, "tokens in"]:
    """What entered a layer, token by token. Raises `ValueError` where it is not finite, or always the same."""
    x: Tensor = entered[0] if isinstance(entered, tuple | list) else entered
    x = x[mask.to(x.device)] if mask is not None and x.shape[:2] == mask.shape else x.flatten(0, -2)
    if not x.isfinite().all():
        raise ValueError(f"what enters {name} has NaN or infinite numbers: EVA cannot start from it")
    if len(x) > 1 and bool((x == x[0]).all()):
        raise ValueError(f"what enters {name} is the same for all tokens: it has no direction that EVA could start from; leave the layer out with exclude_modules")  # fmt: skip # noqa: E501
    return x.contiguous()


class Rounds:
    """Batches that go round a limited number of times, where PEFT would go on for ever."""

    def __init__(self, batches: Sequence[Batch], passes: int):
        self.batches, self.passes = batches, passes

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.passes):
            yield from self.batches
        raise RuntimeError(f"directions of the inputs still moved after {self.passes} passes over {len(self.batches)} batches: give more or larger batches, a lower rank or spread, or lower eva's similarity")  # fmt: skip # noqa: E501
