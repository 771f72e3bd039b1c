"""Blocks with fewer inner coordinates, stored so that transformers' own modelling code runs them unchanged.

MLP matrices simply get smaller. Attention code reshapes by head width, so there the kept rows (of q, k, v) and columns
(of o) are stored alone, with their places, and what was dropped counts as zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from eckart.anatomy import Attention, Block, Projection
from eckart.checkpoint.layout import Layout, layout_of
from eckart.forms import Dense, Form, Product, Select, drop_in
from eckart.forms.algebra import ProductMatrix
from eckart.forms.base import Factored, Shape
from eckart.forms.layers import kind_of, matrix_of, matrix_shape
from eckart.forms.stand_ins import StandIn


class Widths(NamedTuple):
    """What a block keeps: MLP units, coordinates of each q/k head, of each v/o head. None leaves a pair as it is."""

    mlp: int | None
    qk: int | None
    vo: int | None


@dataclass(frozen=True)
class Site:
    """What becomes of one module.

    Attributes:
        form, shape: of the matrix that will stand there; `dense()` leaves the module as it is.
        bias: whether it will have one.
    """

    name: str
    form: Form
    shape: Shape
    bias: bool

    @property
    def changed(self) -> bool:
        return self.form != Dense()

    def layout(self, dtype: torch.dtype) -> Layout:
        """The tensors that will be stored, by their names in the model."""
        tensors = dict(self.form.build(self.shape, dtype=dtype, device="meta").state_dict(prefix="matrix."))
        if self.bias:
            tensors["bias"] = torch.empty(self.shape[0], dtype=dtype, device="meta")
        return {f"{self.name}.{key}": value for key, value in layout_of(tensors).items()}


def sites(model: nn.Module, block: Block, widths: Widths) -> list[Site]:
    """What becomes of every matrix of a block. The model's weights are not read."""
    a, mlp = block.attention, block.mlp
    found = []
    for name in a.readers():
        roles = _roles(a, name, widths)
        kept = sum(p.shape[0] if width is None else p.shape[0] // a.head_dim * width for p, width in roles)
        untouched = all(width is None for _, width in roles)
        emptied = widths.vo is not None and [p for p, _ in roles] == [a.v]
        form = Dense() if untouched else Product(Select(kept), Dense())
        found.append(Site(name, form, _shape(model, name), _has_bias(model, name) and not emptied))
    bias = _has_bias(model, a.o.module) or (widths.vo is not None and _has_bias(model, a.v.module))
    form = Dense() if widths.vo is None else Product(Dense(), Select(a.heads * widths.vo))
    found.append(Site(a.o.module, form, _shape(model, a.o.module), bias))
    k = widths.mlp
    for name in mlp.readers():
        rows, columns = _shape(model, name)
        if k is not None:
            rows = k * sum(p is not None and p.module == name for p in (mlp.gate, mlp.up))
        found.append(Site(name, Dense() if k is None else Dense(rows), (rows, columns), _has_bias(model, name)))
    rows, columns = _shape(model, mlp.down.module)
    form, shape = (Dense(), (rows, columns)) if k is None else (Dense(k), (rows, k))
    return [*found, Site(mlp.down.module, form, shape, _has_bias(model, mlp.down.module))]


def narrowed(layout: Layout, changes: Iterable[Site], dtype: torch.dtype) -> Layout:
    """The stored tensors of a block, of which `changes` describes modules."""
    changed = [site for site in changes if site.changed]
    gone = {f"{site.name}.{key}" for site in changed for key in ("weight", "bias")}
    result = {name: entry for name, entry in layout.items() if name not in gone}
    for site in changed:
        result |= site.layout(dtype)
    return result


def narrow_mlp(
    model: nn.Module, block: Block, index: Int[Tensor, " k"], down: Float[Tensor, "out k"], dtype: torch.dtype
) -> dict[str, nn.Module]:
    """Modules of an MLP that keeps the units `index`, with a new second matrix."""
    mlp, found = block.mlp, {}
    for name in mlp.readers():
        parts = [p.index().to(index.device)[index] for p in (mlp.gate, mlp.up) if p is not None and p.module == name]
        rows = torch.cat(parts).sort().values
        bias = bias_of(model, name)
        matrix = Dense(len(rows)).fit(weight_of(model, name)[rows], dtype=dtype)
        found[name] = _drop_in(model, name, matrix, None if bias is None else bias[rows], dtype)
    name = mlp.down.module
    found[name] = _drop_in(model, name, Dense(len(index)).fit(down, dtype=dtype), bias_of(model, name), dtype)
    return found


def narrow_attention(
    model: nn.Module, block: Block, qk: Int[Tensor, "kv_heads a"] | None,
    values: Float[Tensor, "kv_heads b in"] | None, outputs: Float[Tensor, "out b_of_all_heads"] | None,
    dtype: torch.dtype,
) -> dict[str, nn.Module]:  # fmt: skip
    """Modules of an attention whose q/k heads keep the coordinates `qk`, and whose v/o heads have new matrices.

    The new values stand in the first places of each head. None leaves q and k, or v and o, as they are.
    """
    a, found = block.attention, {}
    widths = Widths(None, None if qk is None else qk.shape[1], None if values is None else values.shape[1])
    for site in sites(model, block, widths):
        if not site.changed:
            continue
        W, bias = weight_of(model, site.name).clone(), bias_of(model, site.name)
        places = torch.cat([_places(a, p, qk, widths) for p, _ in _roles(a, site.name, widths)] or [_columns(a, widths)])  # fmt: skip # noqa: E501
        places = places.sort().values.to(W.device)
        if site.name == a.o.module:
            assert outputs is not None
            moved = bias_of(model, a.v.module)
            if moved is not None:
                per_head = moved[a.v.index().to(W.device)].view(a.kv_heads, a.head_dim)
                shift = W @ per_head.repeat_interleave(a.group, 0).flatten()
                bias = shift if bias is None else bias + shift
            matrix = _product(site, Dense().fit(outputs, dtype=dtype), places, dtype)
        else:
            if values is not None and site.name == a.v.module:
                W[_places(a, a.v, qk, widths).to(W.device)] = values.flatten(0, 1).to(W)
                if bias is not None:
                    bias[a.v.index().to(W.device)] = 0
            if bias is not None:
                bias = torch.zeros_like(bias).index_copy(0, places, bias[places])
            matrix = _product(site, Dense().fit(W[places], dtype=dtype), places, dtype)
        found[site.name] = _drop_in(model, site.name, matrix, bias if site.bias else None, dtype)
    return found


def _roles(a: Attention, name: str, widths: Widths) -> list[tuple[Projection, int | None]]:
    """The projections that the module `name` holds, and what is kept of their heads."""
    every = ((a.q, widths.qk), (a.k, widths.qk), (a.v, widths.vo))
    return [(p, width) for p, width in every if p.module == name]


def _places(a: Attention, p: Projection, qk: Int[Tensor, "kv_heads a"] | None, widths: Widths) -> Int[Tensor, " rows"]:
    """The rows of a projection's module that are kept."""
    heads = p.index().view(-1, a.head_dim)
    if p == a.v:
        return heads[:, : widths.vo].flatten()
    return heads.flatten() if qk is None else heads.gather(1, qk.cpu().repeat_interleave(len(heads) // len(qk), 0)).flatten()  # fmt: skip # noqa: E501


def _columns(a: Attention, widths: Widths) -> Int[Tensor, " columns"]:
    """The columns of the output projection that are kept."""
    return torch.arange(a.heads * a.head_dim).view(a.heads, a.head_dim)[:, : widths.vo].flatten()


def _product(site: Site, stored: Factored, places: Int[Tensor, " k"], dtype: torch.dtype) -> ProductMatrix:
    """The stored rows or columns at their places in a matrix of zeros."""
    out, in_ = site.shape
    form = site.form
    assert isinstance(form, Product)
    if isinstance(form.left, Select):
        return ProductMatrix(form.left.at(places, (out, len(places)), dtype), stored, form)
    assert isinstance(form.right, Select)
    return ProductMatrix(stored, form.right.at(places, (len(places), in_), dtype), form)


def _drop_in(model: nn.Module, name: str, matrix: Factored, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    module = drop_in(model.get_submodule(name), matrix, None if bias is None else bias.to(dtype))
    return module.requires_grad_(False)


def weight_of(model: nn.Module, name: str) -> Float[Tensor, "out in"]:
    """The matrix of a module, in float64."""
    return matrix_of(model.get_submodule(name)).detach().double()


def bias_of(model: nn.Module, name: str) -> Float[Tensor, " out"] | None:
    """A copy of the bias of a module, in float64."""
    bias = getattr(model.get_submodule(name), "bias", None)
    return None if bias is None else bias.detach().double().clone()


def _has_bias(model: nn.Module, name: str) -> bool:
    return getattr(model.get_submodule(name), "bias", None) is not None


def _shape(model: nn.Module, name: str) -> Shape:
    return matrix_shape(model.get_submodule(name))


def check_block(model: nn.Module, block: Block) -> None:
    """Raise `ValueError` where a block cannot be narrowed."""
    a = block.attention
    if a.heads % a.kv_heads:
        raise ValueError(f"{a.name}: {a.heads} query heads do not share {a.kv_heads} key heads evenly, so no width fits all")  # fmt: skip # noqa: E501
    for name in (*block.readers(), *block.writers()):
        module = model.get_submodule(name)
        if isinstance(module, StandIn) or kind_of(module) is None:
            raise ValueError(f"{name} ({type(module).__name__}) is compressed or quantised already: make it dense first (`eckart.densify(model)`)")  # fmt: skip # noqa: E501
