"""Units of models that are no transformers, and their removal: every layer becomes an ordinary smaller one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from eckart.allocation import Budget
from eckart.calibration.store import OUTSIDE
from eckart.calibration.stream import Batch
from eckart.calibration.subject import InMemory
from eckart.checkpoint.layout import Layout, file_bytes, layout_of
from eckart.compression.unit_ranking import Kept, Scores, check_settings, check_smallest, fewest, remove_least, scorer
from eckart.compression.unit_tracing import Units, find_units


def _sides(module: nn.Module) -> tuple[int, int]:
    """Channels out and in."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1:
        return module.out_channels, module.in_channels
    raise ValueError(f"{type(module).__name__} is neither a linear layer nor a convolution without groups")


def prune(
    model: nn.Module, data: Sequence[Batch], *, budget: str | float, units: Sequence[Units] | None = None,
    score: str = "relevance", rule: str = "zplus", step: float = 0.05, per: str = "unit",
) -> Kept:  # fmt: skip
    """Prune a model that is no transformer, in place: its layers become ordinary smaller ones.

    Args:
        model: in evaluation mode, batch norms fused into the layers before them.
        data: reference samples, each batch the keyword arguments of the forward pass and `labels`, the true classes.
        budget: what all weights may take, as for `eckart.compress`.
        units: what may be removed; found by `find_units` where not given.
        score, rule, step, per: see `eckart.compression.lrp_prune.LRPPrune`; the paper ranks all units alike.

    Returns:
        which units are left.
    """
    check_settings(score, rule, step, per)
    if not data:
        raise ValueError("there are no reference samples: give at least one batch")
    units = find_units(model, data[0]) if units is None else units
    if not units:
        raise ValueError(f"no units of {type(model).__name__} can be removed: it has no two linear layers or convolutions in a row")  # fmt: skip # noqa: E501
    kept = all_kept(model, units)
    before, weights = file_bytes(layout_of(model.state_dict())), sum(p.numel() for p in model.state_dict().values())
    asked = Budget.parse(budget)
    total = asked.total(input_bytes=before, weights=weights, target_bytes=before)

    def cost(kept: Kept) -> int:
        return file_bytes(smaller_layout(model, units, kept))

    check_smallest(asked, total, cost(fewest(kept)), before)
    with tempfile.TemporaryDirectory(prefix="eckart-") as work:
        scores = measured(model, units, data, Path(work), score, rule)
        kept = remove_least(kept, scores, cost, total, step, None if per == "unit" else _sizes(model, units))
    for name, module in smaller(model, units, kept).items():
        model.set_submodule(name, module)
    return kept


def measured(
    model: nn.Module, units: Sequence[Units], data: Sequence[Batch], work: Path, score: str, rule: str
) -> Callable[[Kept], Scores]:
    """What scores the units that are there; of several producers the scores are added up."""
    if score == "weight":
        return lambda kept: _filter_sizes(model, units, kept)
    if any("labels" not in batch for batch in data):
        raise ValueError("every batch of reference samples must hold its true classes as `labels`")
    labels = [batch["labels"] for batch in data]
    counts = {name: len(alive) for name, alive in all_kept(model, units).items()}
    places = {OUTSIDE: {p: counts[group.name] for group in units for p in group.producers}}
    of_layers = scorer(InMemory(model), data, labels, work, [], places, "output", score, rule)

    def scores(kept: Kept) -> Scores:
        found = of_layers({p: kept[group.name] for group in units for p in group.producers})
        return {g.name: torch.stack([found[p] for p in g.producers]).sum(0) for g in units}

    return scores


def _filter_sizes(model: nn.Module, units: Sequence[Units], kept: Kept) -> dict[str, Tensor]:
    """Sums of absolute weights of each filter, of the inputs that are left."""
    found: dict[str, Tensor] = {}
    columns = {name: kept[group.name] for group in units for name in group.consumers}
    for group in units:
        for name in group.producers:
            weight: Tensor = model.get_submodule(name).weight.detach().abs().double()  # type: ignore[operator]
            if name in columns:
                mask = columns[name]
                weight = weight[:, mask.repeat_interleave(weight.shape[1] // len(mask))]
            found[group.name] = found.get(group.name, 0) + weight.flatten(1).sum(1)
    return found


def _sizes(model: nn.Module, units: Sequence[Units]) -> dict[str, float]:
    """Weights that go with one unit of each group."""
    found = {}
    for group in units:
        layers = [model.get_submodule(name) for name in (*group.producers, *group.consumers)]
        counts = [m.weight.numel() for m in layers]  # type: ignore[operator]
        found[group.name] = sum(counts) / _sides(layers[0])[0]
    return found


def all_kept(model: nn.Module, units: Sequence[Units]) -> Kept:
    """Every unit is there. Raises `ValueError` where layers do not fit together."""
    kept: Kept = {}
    written: set[str] = set()
    for group in units:
        counts = {name: _sides(model.get_submodule(name))[0] for name in group.producers}
        if len(set(counts.values())) != 1:
            raise ValueError(f"{group.name}: producers of one group have equally many channels, not {counts}")
        count = next(iter(counts.values()))
        for name in group.consumers:
            if _sides(model.get_submodule(name))[1] % count:
                raise ValueError(f"{name} reads {_sides(model.get_submodule(name))[1]} channels, which are no multiple of the {count} units of {group.name}")  # fmt: skip # noqa: E501
        if written & set(group.producers) or not group.consumers:
            raise ValueError(f"{group.name}: every layer produces the units of one group, which some layer reads")
        written |= set(group.producers)
        kept[group.name] = torch.ones(count, dtype=torch.bool)
    return kept


def smaller(model: nn.Module, units: Sequence[Units], kept: Kept) -> dict[str, nn.Module]:
    """Layers that stand where the old ones did, without the rows and columns of removed units."""
    found = {}
    for name, (rows, columns) in _left(model, units, kept).items():
        module = model.get_submodule(name)
        weight: Tensor = module.weight.detach()  # type: ignore[operator]
        bias: Tensor | None = module.bias  # type: ignore[assignment]
        weight = weight if rows is None else weight[rows]
        weight = weight if columns is None else weight[:, columns]
        found[name] = _layer(module, weight, None if bias is None else bias.detach() if rows is None else bias.detach()[rows])  # fmt: skip # noqa: E501
    return found


def smaller_layout(model: nn.Module, units: Sequence[Units], kept: Kept) -> Layout:
    """The tensors of the model that `smaller` makes."""
    found = dict(layout_of(model.state_dict()))
    for name, (rows, columns) in _left(model, units, kept).items():
        dtype, shape = found[f"{name}.weight"]
        out = shape[0] if rows is None else int(rows.sum())
        in_ = shape[1] if columns is None else int(columns.sum())
        found[f"{name}.weight"] = dtype, (out, in_, *shape[2:])
        if f"{name}.bias" in found:
            found[f"{name}.bias"] = dtype, (out,)
    return found


def _left(
    model: nn.Module, units: Sequence[Units], kept: Kept
) -> dict[str, tuple[Bool[Tensor, " rows"] | None, Bool[Tensor, " columns"] | None]]:
    """Layer -> which of its channels out, and of its channels in, stay; None is all."""
    rows = {name: kept[group.name] for group in units for name in group.producers}
    columns: dict[str, Tensor] = {}
    for group in units:
        for name in group.consumers:
            mask = kept[group.name]
            columns[name] = mask.repeat_interleave(_sides(model.get_submodule(name))[1] // len(mask))
    return {name: (rows.get(name), columns.get(name)) for name in dict.fromkeys([*rows, *columns])}


def _layer(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A layer like `module` with other weights."""
    with torch.device("meta"):
        if isinstance(module, nn.Linear):
            layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
        else:
            assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
            given: Any = (module.stride, module.padding, module.dilation, 1, bias is not None, module.padding_mode)
            layer = type(module)(weight.shape[1], weight.shape[0], cast(Any, module.kernel_size), *given)
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer
