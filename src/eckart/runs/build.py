"""From settings to the parts of a run: texts, tokenizer, windows, model, optimiser."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from eckart.calibration.data import load_texts, token_batches
from eckart.calibration.tokens import Tokens
from eckart.checkpoint.source import no_bars, resolve
from eckart.downloads import Progress, silent
from eckart.optimizers import int8_linears, param_groups
from eckart.registry import entries, find, suggest
from eckart.runs.base import device_of, rows_held_out
from eckart.runs.config import Config, Data, Model
from eckart.runs.config import Optimizer as OptimizerSettings
from eckart.schedules import Schedule
from eckart.training import structure

END = "<|end|>"
SMALL: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


def texts_of(data: Data, progress: Progress = silent) -> list[str]:
    """All documents. Raises `ValueError` where a file is not there, or is of another kind."""
    found = [load_texts(text, split="all", column=data.column, progress=progress) for text in data.texts]
    return [document for document in chain(*found) if isinstance(document, str)]


def train_tokenizer(texts: Iterable[str], vocabulary: int, length: int) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of so many entries, the first of which, `<|end|>`, ends a text; `length` is the models'."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], show_progress=False, initial_alphabet=alphabet
    )
    bpe.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, model_max_length=length)


def tokenizer_for(config: Config, texts: list[str], kept: Path) -> Any:
    """The tokenizer of the run; one that is trained is kept in a folder, and taken from there when a run goes on."""
    spec = config.model.folder or config.model.tokenizer
    if spec:
        return transformers.AutoTokenizer.from_pretrained(resolve(spec).folder)
    if not (kept / "tokenizer.json").exists():
        made = train_tokenizer(texts, config.model.vocabulary, 2 * config.data.length)
        fresh = kept.with_name(f".{kept.name}.new")
        with no_bars():
            made.save_pretrained(fresh)
        fresh.rename(kept)
    return transformers.AutoTokenizer.from_pretrained(kept)


def windows_of(texts: list[str], tokenizer: Any, data: Data, progress: Progress = silent) -> tuple[Tokens, Tokens]:
    """Windows to train on, and the last ones to judge on. Raises `ValueError` where there is too little text."""
    windows = token_batches(texts, tokenizer, samples=None, length=data.length, progress=progress)
    held = rows_held_out(data.held_out, len(windows))
    if held == len(windows):
        raise ValueError(f"data.held_out: of {len(windows)} windows of {data.length} tokens, {held} would be held out: give more text, or another share")  # fmt: skip # noqa: E501
    border = len(windows) - held
    return windows[:border], windows[border:][: data.judged]


def new_model(settings: Model, tokenizer: Any, length: int, seed: int) -> Any:
    """A random model in float32. Raises `ValueError` on an unknown type, or a size that it does not have."""
    known = sorted(transformers.CONFIG_MAPPING.keys())
    if settings.type not in known:
        raise ValueError(f"model.type: transformers knows no {settings.type!r}{suggest(settings.type, known)}")
    plain = transformers.CONFIG_MAPPING[settings.type]()
    names = set(plain.to_dict()) | set(getattr(plain, "attribute_map", {}))
    for name in settings.settings:
        if name not in names:
            raise ValueError(f"model.{name}: {settings.type} has no such setting{suggest(name, sorted(names))}")
    sizes = {k: v for k, v in SMALL.items() if k in names}
    special = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id", None) for k in ("bos", "eos", "pad")}
    words = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 2 * length, **special, **settings.settings}  # fmt: skip # noqa: E501
    if words["vocab_size"] < len(tokenizer):
        raise ValueError(f"model.vocab_size: {words['vocab_size']} is less than the tokenizer's {len(tokenizer)} entries")  # fmt: skip # noqa: E501
    torch.manual_seed(seed)
    try:
        made = transformers.CONFIG_MAPPING[settings.type](**words)
        return transformers.AutoModelForCausalLM.from_config(made)
    except (
        StrictDataclassError,
        ValueError,
        TypeError,
    ) as e:  # what its own code says of sizes that do not go together
        raise ValueError(f"model: transformers cannot make this {settings.type}: {' '.join(str(e).split())}") from e


def model_for(config: Config, tokenizer: Any) -> Any:
    """The model of the run, dense."""
    if config.model.folder:
        folder = resolve(config.model.folder).folder
        with no_bars():
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        model = new_model(config.model, tokenizer, config.data.length, config.seed)
    return model.to(device=device_of(config.training.device), dtype=getattr(torch, config.model.dtype))


def structured(model: Any, config: Config) -> Schedule | None:
    """The model's weights in the structure that the settings ask for, in place, and what follows the steps."""
    asked = config.structure
    if asked is None:
        return None
    try:
        return structure(
            model, asked.method or None, form=asked.form or None, layers=asked.layers, seed=config.seed,
            **asked.settings,
        )  # fmt: skip
    except (ValueError, TypeError) as e:
        raise ValueError(f"structure: {e}") from e


def optimizer_for(model: Any, settings: OptimizerSettings, seed: int = 0) -> torch.optim.Optimizer:
    """The optimiser over a model's parameters. Raises `ValueError` on words and settings that do not go together."""
    cls = optimizer_class(settings.name)
    words: dict[str, Any] = {"lr": settings.lr, **settings.settings}
    known = set(inspect.signature(cls.__init__).parameters) - {"self", "params", "lr", "rank", "density"}
    for name in settings.settings:
        if name not in known:
            raise ValueError(f"optimizer.{name}: {settings.name} has no such setting{suggest(name, sorted(known))}")
    if "seed" in known:
        words.setdefault("seed", seed)
    try:
        if settings.int8:
            int8_linears(model, settings.include)
        return cls(_groups(model, settings, cls), **words)
    except (ValueError, TypeError) as e:
        raise ValueError(f"optimizer: {e}") from e


def _groups(model: Any, settings: OptimizerSettings, cls: Any) -> list[Any]:
    dial = {k: v for k in ("rank", "density") if (v := getattr(settings, k)) is not None}
    if not dial:
        return [p for p in model.named_parameters() if p[1].requires_grad]
    if settings.name == "adamw":
        raise ValueError("adamw projects nothing: leave out rank and density, or name an optimiser of the catalogue")
    return param_groups(model, **dial, include=settings.include, exclude=settings.exclude)


def optimizer_class(name: str) -> Any:
    """The class of that name. Raises `ValueError` that names the nearest ones."""
    known = {e.key: e.cls for e in entries("optimizers") if inspect.isclass(e.cls) and issubclass(e.cls, torch.optim.Optimizer)}  # fmt: skip # noqa: E501
    if name == "adamw":
        return torch.optim.AdamW
    if name not in known:
        hint = "; it is no optimiser but works beside one" if name in {e.key for e in entries("optimizers")} else ""
        raise ValueError(f"optimizer.name: unknown optimiser {name!r}{hint or suggest(name, ['adamw', *known])}")
    return known[name]


def check_words(config: Config) -> None:
    """Raises `ValueError` on names that are not known, before any text is read."""
    optimizer_class(config.optimizer.name)
    if config.structure is not None and config.structure.method:
        try:
            cls = find(config.structure.method, "training").cls
        except ValueError as e:
            raise ValueError(f"structure.method: {e}") from e
        known = [f.name for f in dataclasses.fields(cls)]
        for name in config.structure.settings:
            if name not in known:
                raise ValueError(f"structure.{name}: {config.structure.method} has no such setting{suggest(name, known)}")  # fmt: skip # noqa: E501
