"""Cutting a stacked model shorter: in memory, or from one folder into a smaller one; no data, no fit."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eckart.allocation import Budget, BudgetError
from eckart.checkpoint.folder import Output, read_config
from eckart.checkpoint.hf import EckartConfig, describe
from eckart.checkpoint.layout import file_bytes, layout_of
from eckart.checkpoint.reader import WeightReader, read_header, weight_files
from eckart.checkpoint.source import Source, resolve
from eckart.checkpoint.ties import tied_keys
from eckart.forms import SignStack, parse
from eckart.forms.layers import DropIn
from eckart.forms.sign_stack import SignStackMatrix
from eckart.jobs.card import model_card
from eckart.jobs.folder_job import record, versions
from eckart.jobs.place import MODEL, Place
from eckart.jobs.plan import Layer, layers_from_json
from eckart.jobs.result import Result

ORDER = "load_order"
"""Names of layers in a model's config: every first block is loaded, then the next block of each in turn."""
ERRORS = "block_errors"
"""In what a job keeps: layer -> predicted squared error after each number of blocks."""
STACKED = ("signs", "left", "right")


@dataclass(frozen=True)
class Stack:
    """How one layer is stacked: its closed form, shape and dtype of its factors."""

    form: SignStack
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        return self.form.block_bytes(self.shape, self.dtype)


@dataclass(frozen=True)
class Cut:
    """What a budget leaves.

    Attributes:
        forms: layer -> its form with fewer blocks, where it has fewer.
        order: what is left of the load order.
        limit: bytes that are allowed.
    """

    forms: dict[str, SignStack]
    order: list[str]
    limit: int


def cut(stacks: Mapping[str, Stack], order: Sequence[str], budget: Budget, total: int, others: int) -> Cut:
    """Drop blocks from the end of the load order until what is left meets the budget.

    Args:
        total: bytes of the whole model as it is; ratios of budgets are of these.
        others: numbers in the tensors outside the stacks, which count as weights for bits per weight.

    Raises `ValueError` where the order is not one of these stacks, `BudgetError` where first blocks are too many.
    """
    above = Counter(order)
    for name, count in above.items():
        if name not in stacks or count >= (stacks[name].form.blocks or 1):
            raise ValueError(f"the load order takes {count} blocks of {name} beside the first, more than there are")
    weights = others + sum(s.shape[0] * s.shape[1] for s in stacks.values())
    held = sum((s.form.blocks or 1) * s.block_bytes for s in stacks.values())
    limit = budget.total(input_bytes=total, weights=weights, target_bytes=held)
    kept, dropped, before = list(order), Counter[str](), total
    while total > limit and kept:
        dropped[last := kept.pop()] += 1
        total -= stacks[last].block_bytes
    if total > limit:
        share = f"{total} bytes ({total / before:.3f} of what it is)"
        raise BudgetError(f"the budget {budget} is {limit} bytes; without the blocks that can be dropped the model takes {share}")  # fmt: skip # noqa: E501
    forms = {name: stacks[name].form.at((stacks[name].form.blocks or 1) - n) for name, n in dropped.items()}
    return Cut(forms, kept, limit)


def shrink(model: nn.Module, budget: str | float, order: Sequence[str] | None = None) -> list[str]:
    """Drop blocks of a model that `bitstack` compressed, in place, until its weights meet a budget.

    Args:
        model: in memory; one of transformers' knows its load order.
        budget: as for `compress`; ratios are of the model as it is.
        order: the load order (`result.extra["load_order"]`), for models that have no config to remember it.

    Returns:
        What is left of the load order.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, DropIn) and isinstance(m.matrix, SignStackMatrix)}
    found = getattr(getattr(model, "config", None), ORDER, None) if order is None else order
    if not layers or found is None:
        raise ValueError(f"{type(model).__name__} has no stacks of blocks, or no load order: compress it with bitstack")
    state = {k: t for k, t in model.state_dict().items() if k not in tied_keys(model)}
    stacks = {}
    for name, layer in layers.items():
        matrix = layer.matrix
        assert isinstance(matrix, SignStackMatrix)
        stacks[name] = Stack(matrix.form, matrix.shape, matrix.left.dtype)
    inside = {f"{name}.matrix.{part}" for name in layers for part in STACKED}
    others = sum(t.numel() for k, t in state.items() if k not in inside)
    done = cut(stacks, found, Budget.parse(budget), file_bytes(layout_of(state)), others)
    for name, form in done.forms.items():
        matrix = layers[name].matrix
        assert isinstance(matrix, SignStackMatrix)
        layers[name].matrix = matrix.first(form.blocks or 1).requires_grad_(matrix.left.requires_grad)
    config: Any = getattr(model, "config", None)
    if hasattr(config, ORDER):
        setattr(config, ORDER, done.order)
    if isinstance(described := getattr(config, "quantization_config", None), EckartConfig):
        history = [*described.history, {"resize": str(budget), "versions": versions()}]
        config.quantization_config = EckartConfig(describe(model), described.tied, history)
    return done.order


def resize(folder: str | Path, out: str | Path, budget: str | float, *, overwrite: bool = False) -> Result:
    """Write a smaller folder from one that `bitstack` compressed, one file of weights in memory at a time.

    Args:
        folder: the stored stacks.
        out: the new folder, an ordinary checkpoint with a shorter load order.
        budget: as for `compress`; ratios are of `folder`'s weights.

    Raises:
        ValueError: there is no such `folder`, it holds no stacks, or is `out`.
        FileExistsError: `out` is there, and `overwrite` was not asked for.
        BudgetError: the first blocks alone are too many.
    """
    source, target = resolve(Path(folder)).folder, Path(out).resolve()
    if target == source.resolve():
        raise ValueError(f"{out} is the folder that is to be resized: choose another one")
    config, reader = read_config(source), WeightReader(source)
    described = config.get("quantization_config") or {}
    EckartConfig(**described).validate()
    stacks = _stacks(described.get("modules") or {}, reader)
    if not stacks or not isinstance(order := config.get(ORDER), list):
        raise ValueError(f"{folder} holds no stacks of blocks, or no load order: compress with bitstack first")
    files = weight_files(source)
    inside = {f"{name}.matrix.{part}" for name in stacks for part in STACKED}
    others = sum(reader.shape(k).numel() for k in reader.names() if k not in inside)
    done = cut(stacks, order, Budget.parse(budget), sum(f.stat().st_size for f in files), others)
    for name, form in done.forms.items():
        described["modules"][name]["form"] = str(form)
    config[ORDER] = done.order
    described["history"] = [*described.get("history", []), {"resize": str(budget), "versions": versions()}]
    place = Place(target)
    place.enter({"resize": str(source.resolve()), "budget": str(budget)}, resume=False, overwrite=overwrite)
    try:
        output = Output(place.work / MODEL, len(files))
        for i, file in enumerate(files):
            output.write(i, {k: _first(reader, k, done.forms) for k in read_header(file)})
        after = sum(output.path(i).stat().st_size for i in range(len(files)))
        result, written = _retold(source, stacks, done, after, str(budget), config)
        output.complete(source, config, written)
        place.move()
    finally:
        place.leave()
    result.folder = Path(out)
    return result


def _stacks(modules: dict[str, Any], reader: WeightReader) -> dict[str, Stack]:
    """The stacks that a checkpoint describes, each checked against its tensors."""
    found = {}
    for name, spec in modules.items():
        form = parse(str(spec.get("form"))) if "form" in spec else None
        if not isinstance(form, SignStack):
            continue
        names = [f"{name}.matrix.{part}" for part in STACKED]
        if missing := [k for k in names if k not in reader.names()]:
            raise ValueError(f"{reader.folder} describes a stack at {name} and lacks {missing[0]}")
        if any(reader.shape(k)[0] != form.blocks for k in names):
            raise ValueError(f"{reader.folder}: {name} is {form}, and its tensors hold another number of blocks")
        found[name] = Stack(form, (reader.shape(names[1])[1], reader.shape(names[2])[2]), reader.dtype(names[1]))
    return found


def _first(reader: WeightReader, key: str, forms: Mapping[str, SignStack]) -> torch.Tensor:
    """A stored tensor, of a shortened stack the blocks that stay."""
    layer, _, part = key.rpartition(".matrix.")
    tensor = reader.load(key)
    return tensor[: forms[layer].blocks] if layer in forms and part in STACKED else tensor


def _retold(
    source: Path, stacks: Mapping[str, Stack], done: Cut, after: int, budget: str, config: dict[str, Any]
) -> tuple[Result, dict[str, str]]:
    """The result, and the files about it: what the folder said of itself, with sizes as they are now.

    Errors were measured on the longer stacks; those of the shorter ones are as they were predicted.
    """
    kept = source / "eckart.json"
    told = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    names = {f.name for f in fields(Layer)}
    layers = layers_from_json({k: v for k, v in item.items() if k in names} for item in told.get("layers", []))
    errors = told.get("extra", {}).get(ERRORS, {})
    if done.forms:
        layers = [_shortened(x, stacks.get(x.name), done.forms.get(x.name), errors.get(x.name)) for x in layers]
    settings = {**told.get("job", {}), "budget": budget, "resized_from": told.get("job", {}).get("budget")}
    before = told.get("totals", {}).get("bytes_before", sum(f.stat().st_size for f in weight_files(source)))
    result = Result(layers, before, after, done.limit, settings, extra={**told.get("extra", {}), ORDER: done.order})
    if not told:
        return result, {}
    model = told["model"]
    dtype = getattr(torch, model["dtype"])
    card = source / "README.md"
    hub = card.is_file() and "\nbase_model:" in card.read_text(encoding="utf-8")
    origin = Source(model["source"], source, dtype, model["bytes"], "hub" if hub else "folder", model["note"])
    text = json.dumps(record(result, origin, config), indent=1, ensure_ascii=False) + "\n"
    return result, {"eckart.json": text, "README.md": model_card(result, origin, config)}


def _shortened(layer: Layer, stack: Stack | None, form: SignStack | None, errors: Sequence[float] | None) -> Layer:
    """A layer of a shortened model: nothing is measured of it, and where it has fewer blocks, it is what they are."""
    if stack is None or form is None or form.blocks is None or stack.form.blocks is None:
        return replace(layer, measured_error=None)
    nbytes = layer.bytes - (stack.form.blocks - form.blocks) * stack.block_bytes
    predicted = errors[form.blocks - 1] if errors else None
    return replace(layer, form=str(form), bytes=nbytes, predicted_error=predicted, measured_error=None)
