"""A model in a Hugging Face folder, of which one part at a time is in memory; and the folder that a job writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from eckart.checkpoint.converted import Converted, converted
from eckart.checkpoint.layout import Layout, file_bytes, layout_of, save_json, save_tensors
from eckart.checkpoint.reader import WeightReader, read_header
from eckart.checkpoint.source import Source
from eckart.linalg.whitening import all_finite


class Folder:
    """A model whose weights are read from safetensors when their turn comes, as float32.

    Raises `ValueError` where the folder's tensors are not those of the model its config names.
    """

    def __init__(self, source: Source):
        self.source = source
        self.storage_dtype = source.dtype
        self.reader = WeightReader(source.folder)
        self.config = config = transformers.AutoConfig.from_pretrained(source.folder)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(f"{source.folder} is already compressed or quantised: give the original model")
        with init_empty_weights(include_buffers=False):
            self.model: nn.Module = model_class(config)._from_config(config, dtype=torch.float32)
        self.model.eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.tied: dict[str, str] = dict(getattr(self.model, "all_tied_weights_keys", None) or {})
        self.keys = self._match()

    def _match(self) -> dict[str, str | Converted]:
        """Name in the model -> name in the files, or how it is made of several there."""
        named = renamed(self.model, self.reader.names())
        have: dict[str, str | Converted] = {**named, **converted(self.model, named)}
        prefix = getattr(self.model, "base_model_prefix", "") + "."
        keys: dict[str, str | Converted] = {}
        missing = []
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            stored = next((have[n] for n in (name, name.removeprefix(prefix), prefix + name) if n in have), None)
            if stored is None:
                if name not in self.tied and isinstance(tensor, nn.Parameter):
                    missing.append(name)
                continue
            shape = self._shape(stored)
            if shape != tensor.shape:
                what = stored if isinstance(stored, str) else f"{name}, made of {len(stored.sources)} tensors,"
                raise ValueError(f"{self.source.folder}: {what} has shape {tuple(shape)}, the model needs {tuple(tensor.shape)}")  # fmt: skip # noqa: E501
            keys[name] = stored
        if missing:
            raise ValueError(f"{self.source.folder} lacks {len(missing)} tensors of {type(self.model).__name__}, the first of them {missing[0]}: load it with transformers and save it again, or compress the model in memory")  # fmt: skip # noqa: E501
        return keys

    def _shape(self, stored: str | Converted) -> torch.Size:
        if isinstance(stored, str):
            return self.reader.shape(stored)

        def empty(name: str) -> Tensor:
            return torch.empty(self.reader.shape(name), dtype=self.reader.dtype(name), device="meta")

        try:
            return stored.made(self.model, empty).shape
        except ValueError as e:
            raise ValueError(f"{self.source.folder}: {e}") from e

    def read(self, name: str) -> Tensor:
        """The tensor called `name` in the model, as it is stored."""
        stored = self.keys[name if name in self.keys else self.tied[name]]
        return self.reader.load(stored) if isinstance(stored, str) else stored.made(self.model, self.reader.load)

    @contextmanager
    def loaded(self, *names: str) -> Iterator[None]:
        """Within the context, the modules called `names` hold their weights."""
        filled: list[tuple[nn.Module, str]] = []
        cache: dict[str, nn.Parameter] = {}
        try:
            for name in names:
                for inner, module in self.model.get_submodule(name).named_modules(prefix=name):
                    self._fill(inner, module, filled, cache)
            yield
        finally:
            for module, key in filled:
                value = module._parameters.get(key)
                if value is not None:
                    module._parameters[key] = nn.Parameter(value.to("meta"), requires_grad=False)

    def _fill(self, name: str, module: nn.Module, filled: list[tuple[nn.Module, str]], cache: dict[str, nn.Parameter]) -> None:  # fmt: skip # noqa: E501
        for key, value in list(module._parameters.items()):
            full = f"{name}.{key}"
            if value is None or value.device.type != "meta" or (full not in self.keys and full not in self.tied):
                continue
            source = full if full in self.keys else self.tied[full]
            if source not in cache:
                data = self.read(source)
                if data.is_floating_point() and not all_finite(data):
                    raise ValueError(f"{full} holds NaN or infinity: the model in {self.source.folder} is damaged")
                cache[source] = nn.Parameter(data.float() if data.is_floating_point() else data, requires_grad=False)
            module._parameters[key] = cache[source]
            filled.append((module, key))
        for key, buffer in list(module._buffers.items()):
            if buffer is not None and f"{name}.{key}" in self.keys:
                module._buffers[key] = self.read(f"{name}.{key}").to(buffer.dtype)


def renamed(model: nn.Module, names: list[str]) -> dict[str, str]:
    """Name of a tensor as transformers renames it for this model -> its name in the files."""
    found = {}
    rules = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    for stored in names:
        name = stored
        for rule in rules:
            name, _ = rule.rename_source_key(name)
        found[name] = stored
    return found


def model_class(config: Any) -> Any:
    """The transformers class that a config's `architectures` names. Only transformers' own classes are looked up."""
    names = getattr(config, "architectures", None) or []
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None or not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise ValueError(f"the config names {names or 'no architecture'}, which transformers {transformers.__version__} does not have")  # fmt: skip # noqa: E501
    return cls


def part_state(model: nn.Module, names: list[str], skip: set[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of the modules called `names`, as they are stored: floating point ones as `dtype`."""
    state = {}
    for name in names:
        for key, value in model.get_submodule(name).state_dict(keep_vars=True).items():
            full = f"{name}.{key}"
            if full not in skip:
                state[full] = value.detach().to(dtype) if value.is_floating_point() else value.detach()
    return state


def shard_name(index: int, count: int) -> str:
    """transformers' name of shard `index`, from 0."""
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


class Output:
    """The folder of a compressed model, written part by part.

    Args:
        folder: where it is made.
        parts: how many files its weights will be in.
    """

    def __init__(self, folder: Path, parts: int):
        self.folder, self.parts = folder, parts

    def path(self, part: int) -> Path:
        return self.folder / shard_name(part, self.parts)

    def write(self, part: int, tensors: dict[str, Tensor]) -> None:
        save_tensors(tensors, self.path(part))

    def complete(self, source: Path, config: dict[str, Any], files: dict[str, str]) -> None:
        """Add what is not weights, and remove what a killed run may have left half written."""
        shards = [self.path(part) for part in range(self.parts)]
        for left in self.folder.iterdir():
            if left not in shards:
                left.unlink()
        headers = {shard.name: read_header(shard) for shard in shards}
        if self.parts > 1:
            total = sum(entry.nbytes for header in headers.values() for entry in header.values())
            index = {name: shard for shard, header in headers.items() for name in header}
            table = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
            save_json(table, self.folder / "model.safetensors.index.json")
        save_json(config, self.folder / "config.json")
        for name in companions(source):
            shutil.copyfile(source / name, self.folder / name)
        for name, text in files.items():
            (self.folder / name).write_text(text, encoding="utf-8")


WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
OWN = ("config.json", "model.safetensors.index.json", "README.md", "eckart.json", "evaluation.json", "report.html")


def companions(source: Path) -> list[str]:
    """Files beside the weights that the new folder keeps: tokenizer, generation settings, licence."""
    return sorted(
        p.name
        for p in source.iterdir()
        if p.is_file() and not p.name.startswith(".") and p.suffix not in WEIGHTS and p.name not in OWN
    )


def checkpoint_bytes(parts: list[Layout]) -> int:
    """Bytes of the weight files that hold these parts, headers included; the index is JSON and not counted."""
    return sum(file_bytes(part) for part in parts)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as a dict."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


__all__ = ["Folder", "Output", "checkpoint_bytes", "layout_of", "model_class", "part_state", "read_config"]
