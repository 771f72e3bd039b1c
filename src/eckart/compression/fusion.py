"""Folding the decoders of compressed tables into the linear layers that read them (AFM, arXiv 2405.18146)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.calibration.stream import Batch
from eckart.forms import Dense, LowRank, drop_in
from eckart.forms.algebra import ProductMatrix
from eckart.forms.base import Factored
from eckart.forms.layers import FactoredEmbedding, FactoredLinear


def fuse(model: nn.Module, tables: str | Sequence[str], linear: str, batch: Batch) -> None:
    """Fold decoders and means of compressed tables into the linear layer that reads their vectors, in place.

    What is looked up is then the code (k,) of a row, and the layer has that many columns fewer. Tables whose vectors
    the model stacks must be folded by one call, and to one k, because a stack wants vectors of one width.

    Args:
        tables: names of tables in low-rank form.
        linear: name of a dense or low-rank nn.Linear, which must read each table's vectors as they are, flattened.
        batch: keyword arguments of the model's forward pass, rows that differ; they show what the layer reads.

    Raises `ValueError` where the layer does not read these vectors (an interaction layer stands in between), or
    something else reads them, too. The model is then as it was.
    """
    names = [tables] if isinstance(tables, str) else list(tables)
    old = {name: model.get_submodule(name) for name in [*names, linear]}
    for name in names:
        if not isinstance(old[name], FactoredEmbedding) or not isinstance(old[name].matrix, ProductMatrix):
            raise ValueError(f"{name} has no decoder to fold: it is {type(old[name]).__name__}, not a low-rank table")
    layer = _Folded.of(old[linear], linear)
    wanted, calls = _watched(model, old, batch)
    x, _ = _only(calls, linear)
    at = {name: _columns(x, _only(calls, name)[1], name, linear) for name in names}
    for name in sorted(names, key=at.__getitem__, reverse=True):  # from the right, so that columns keep their numbers
        table: Any = old[name]
        layer.fold(table, at[name], _only(calls, name)[1].numel() // len(x) // table.embedding_dim)
    try:
        model.set_submodule(linear, layer.built())
        for name in names:
            codes: Any = old[name].matrix
            model.set_submodule(name, drop_in(old[name], codes.left).requires_grad_(False))
        _check_same(wanted, _watched(model, {}, batch)[0])
    except Exception as e:
        for name, module in old.items():
            model.set_submodule(name, module)
        raise ValueError(
            f"{', '.join(names)} cannot be folded into {linear}, because something else reads their vectors or counts "
            f"on their width: keep the decoders, or fold all tables that belong together at once ({e})"
        ) from e


@dataclass
class _Folded:
    """A linear layer whose columns are replaced: left (out, r) times W (r, in), or W alone; everything in float64."""

    layer: Any
    left: Factored | None
    W: Float[Tensor, "r in"]
    shift: Float[Tensor, " r"]

    @classmethod
    def of(cls, layer: Any, name: str) -> _Folded:
        form = layer.matrix.form if isinstance(layer, FactoredLinear) else Dense()
        if not isinstance(layer, nn.Linear) or not isinstance(form, Dense | LowRank):
            raise ValueError(
                f"{name} is {type(layer).__name__} ({form}): decoders fold into dense and low-rank linears"
            )
        held: Any = layer.matrix if isinstance(form, LowRank) else None
        weight = layer.weight.as_subclass(Tensor) if held is None else held.right.dense()
        W = weight.detach().double()
        return cls(layer, None if held is None else held.left, W, W.new_zeros(W.shape[0]))

    def fold(self, table: Any, at: int, copies: int) -> None:
        """Let the columns from `at` on, `copies` times as many as a vector has numbers, read codes instead."""
        scale = table.scale or 1.0
        stop = at + copies * table.embedding_dim
        block = self.W[:, at:stop].unflatten(1, (copies, -1))
        codes = block @ (scale * table.matrix.right.dense().detach().double().T)
        if table.bias is not None:
            self.shift = self.shift + block.sum(1) @ (scale * table.bias.detach().double())
        self.W = torch.cat([self.W[:, :at], codes.flatten(1), self.W[:, stop:]], dim=1)

    def built(self) -> nn.Module:
        """The layer with its new columns; dense, where two factors would take more than their product."""
        dtype = next(self.layer.parameters()).dtype
        matrix: Factored = Dense().fit(self.W, dtype=dtype)
        shift = self.shift
        if self.left is not None:
            L = self.left.dense().detach().double()
            (out, r), in_ = L.shape, self.W.shape[1]
            pays = r * (out + in_) < out * in_
            matrix = ProductMatrix(self.left, matrix, LowRank(r)) if pays else Dense().fit(L @ self.W, dtype=dtype)
            shift = L @ shift
        bias = shift if self.layer.bias is None else shift + self.layer.bias.detach().double()
        return drop_in(self.layer, matrix, bias.to(dtype)).requires_grad_(False)


Calls = dict[str, list[tuple[Tensor, Tensor]]]


@torch.no_grad()
def _watched(model: nn.Module, modules: Mapping[str, nn.Module], batch: Batch) -> tuple[list[Tensor], Calls]:
    """What the model puts out, and for every call of these modules what it read and put out."""
    calls: Calls = {name: [] for name in modules}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            calls[name].append((args[0] if args else next(iter(kwargs.values())), output))

        return hook

    handles = [module.register_forward_hook(watch(name), with_kwargs=True) for name, module in modules.items()]
    training = model.training
    model.eval()
    try:
        return list(_tensors(model(**batch))), calls
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | list | tuple):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)


def _only(calls: Calls, name: str) -> tuple[Tensor, Tensor]:
    """What the one call of a module read, as rows, and what it put out."""
    if len(calls[name]) != 1:
        raise ValueError(
            f"{name} is called {len(calls[name])} times in a forward pass: only a single call can be folded"
        )
    x, y = calls[name][0]
    return x.reshape(-1, x.shape[-1]), y


def _columns(x: Float[Tensor, "rows in"], e: Float[Tensor, "*batch dim"], table: str, linear: str) -> int:
    """The first of the adjacent columns of x that hold the vectors e."""
    found = []
    if e.numel() % len(x) == 0:
        rows = e.reshape(len(x), -1)
        width = rows.shape[1]
        starts = (x == rows[:, :1]).all(0).nonzero().flatten().tolist()
        found = [i for i in starts if torch.equal(x[:, i : i + width], rows)]
    if not found:
        raise ValueError(f"{linear} does not read the vectors of {table} as they are: an interaction or another layer stands in between, so keep the decoder")  # fmt: skip # noqa: E501
    if len(found) > 1:
        raise ValueError(f"{linear} reads the same numbers as {table} holds in {len(found)} places: give a batch whose rows differ more")  # fmt: skip # noqa: E501
    return found[0]


def _check_same(wanted: list[Tensor], found: list[Tensor]) -> None:
    for a, b in zip(wanted, found, strict=True):
        if a.is_floating_point():
            off, scale = float((a - b).abs().max()), float(a.abs().max())
            if not off <= torch.finfo(a.dtype).eps ** 0.5 * scale:
                raise ValueError(
                    f"the model's output would be off by {off:.2g}, where its largest number is {scale:.2g}"
                )
