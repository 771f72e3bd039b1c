"""The frozen model that an adapter is trained on: any MODEL, with the head that the task takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

from eckart.checkpoint.folder import model_class
from eckart.checkpoint.source import Source, no_bars
from eckart.runs.config import Device

CAUSAL, CLASSES = "CAUSAL_LM", "SEQ_CLS"
"""What PEFT calls the tasks."""


@dataclass(frozen=True)
class Base:
    """A loaded model.

    Attributes:
        model: in the memory of a device.
        fresh: modules whose weights the folder does not hold, such as a new classifier; they are trained whole.
    """

    model: Any
    fresh: list[str]


def rows_held_out(share: float, rows: int) -> int:
    """How many rows are not trained on, one at least if any are asked for. May be all of them."""
    return max(1, round(share * rows)) if share > 0 else 0


def device_of(asked: Device) -> str:
    """The device that was asked for. Raises `ValueError` where there is none."""
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("training.device: torch sees no GPU here; say auto or cpu")
    return asked


def tokenizer_of(source: Source, padded: bool) -> Any:
    """The model's tokenizer, with a token to fill up with where one is needed.

    Raises `ValueError` where the model has none, or no token that would do.
    """
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source.folder)
    except (OSError, ValueError, KeyError) as e:
        raise ValueError(f"{source.spec} has no tokenizer that transformers can load: put its files beside the weights ({str(e).splitlines()[0]})") from e  # fmt: skip # noqa: E501
    if padded and tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token_id is None:
            raise ValueError(f"the tokenizer of {source.spec} has neither a padding token, nor an end of text that could stand for one: set tokenizer.pad_token and save it")  # fmt: skip # noqa: E501
    return tokenizer


def check_length(source: Source, length: int) -> None:
    """Raises `ValueError` where the model has fewer positions."""
    config = transformers.AutoConfig.from_pretrained(source.folder)
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and 0 < most < length:
        raise ValueError(f"length: {length} is more than the {most} positions of {source.spec}")


def decoder(source: Source, dtype: torch.dtype) -> Base:
    """A causal language model. Raises `ValueError` where the folder holds another one."""
    config = transformers.AutoConfig.from_pretrained(source.folder)
    cls = model_class(config)
    if not cls.can_generate() or getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{source.spec} is a {cls.__name__}, which does not foretell next words: only classification can be learned with it (--task classification)")  # fmt: skip # noqa: E501
    with no_bars():
        model = transformers.AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype)
    return Base(_uncached(model), [])


def classifier(source: Source, labels: list[str], tokenizer: Any, dtype: torch.dtype, seed: int) -> Base:
    """A model with a head for so many classes; what the folder does not hold of it is drawn.

    Raises `ValueError` where transformers has no classifier of this kind.
    """
    words = {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": {x: i for i, x in enumerate(labels)}}  # fmt: skip # noqa: E501
    torch.manual_seed(seed)
    try:
        with no_bars():
            model, found = transformers.AutoModelForSequenceClassification.from_pretrained(
                source.folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **words
            )
    except ValueError as e:
        raise ValueError(f"{source.spec} cannot be made a classifier: {str(e).splitlines()[0]}") from e
    model.config.pad_token_id = tokenizer.pad_token_id
    keys = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
    body = f"{model.base_model_prefix}."
    fresh = {key.rpartition(".")[0] for key in keys if key.startswith(body)}
    fresh |= {name for name, child in model.named_children() if f"{name}." != body and list(child.parameters())}
    return Base(_uncached(model), sorted(fresh))


def _uncached(model: Any) -> Any:
    model.config.use_cache = False
    return model
