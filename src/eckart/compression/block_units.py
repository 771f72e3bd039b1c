"""Blocks with fewer MLP neurons and attention heads, stored so that transformers' own code runs them unchanged.

MLP matrices simply get smaller. A removed head's rows of q, k, v and columns of o are no longer stored, and what reads
their places finds zeros: weights and their multiplications shrink, scores and the KV cache do not.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor, nn

from eckart.anatomy import Attention, Block, Projection
from eckart.compression.narrowing import Site, Widths, bias_of, narrow_mlp, sites, weight_of
from eckart.forms import Dense, Product, Select, drop_in
from eckart.forms.algebra import ProductMatrix
from eckart.forms.layers import matrix_shape


def block_sites(model: nn.Module, block: Block, neurons: int | None, heads: int | None) -> list[Site]:
    """What becomes of a block's matrices when so many neurons and key heads stay; None leaves them as they are."""
    found = {site.name: site for site in sites(model, block, Widths(neurons, None, None))}
    if heads is not None:
        for site in _head_sites(model, block.attention, heads):
            found[site.name] = site
    return list(found.values())


def narrow_block(
    model: nn.Module, block: Block, neurons: Int[Tensor, " n"] | None, heads: Int[Tensor, " h"] | None,
    dtype: torch.dtype,
) -> dict[str, nn.Module]:  # fmt: skip
    """Modules of a block that keeps these neurons and key heads (each with the query heads that read it)."""
    found: dict[str, nn.Module] = {}
    if neurons is not None:
        down = weight_of(model, block.mlp.down.module)
        found |= narrow_mlp(model, block, neurons, down[:, neurons.to(down.device)], dtype)
    if heads is not None:
        for site in _head_sites(model, block.attention, len(heads)):
            found[site.name] = _without_heads(model, block.attention, site, heads, dtype)
    return found


def _head_sites(model: nn.Module, a: Attention, heads: int) -> list[Site]:
    found = []
    for name in (*a.readers(), *a.writers()):
        module = model.get_submodule(name)
        if name == a.o.module:
            form = Product(Dense(), Select(a.o.shape[1] // a.kv_heads * heads))
        else:
            form = Product(Select(sum(p.shape[0] for p in _parts(a, name)) // a.kv_heads * heads), Dense())
        found.append(Site(name, form, matrix_shape(module), getattr(module, "bias", None) is not None))
    return found


def _parts(a: Attention, name: str) -> list[Projection]:
    return [p for p in (a.q, a.k, a.v) if p.module == name]


def _without_heads(
    model: nn.Module, a: Attention, site: Site, heads: Int[Tensor, " h"], dtype: torch.dtype
) -> nn.Module:
    W, bias, form = weight_of(model, site.name), bias_of(model, site.name), site.form
    out, in_ = site.shape
    assert isinstance(form, Product)
    if site.name == a.o.module:
        places = torch.arange(in_).view(a.kv_heads, -1)[heads].flatten()
        assert isinstance(form.right, Select)
        stored = Dense().fit(W[:, places.to(W.device)], dtype=dtype)
        matrix = ProductMatrix(stored, form.right.at(places.to(W.device), (len(places), in_), dtype), form)
    else:
        places = torch.cat([p.index().view(a.kv_heads, -1)[heads].flatten() for p in _parts(a, site.name)])
        places = places.sort().values.to(W.device)
        assert isinstance(form.left, Select)
        stored = Dense().fit(W[places], dtype=dtype)
        matrix = ProductMatrix(form.left.at(places, (out, len(places)), dtype), stored, form)
        if bias is not None:
            bias = torch.zeros_like(bias).index_copy(0, places, bias[places])
    module = drop_in(model.get_submodule(site.name), matrix, None if bias is None else bias.to(dtype))
    return module.requires_grad_(False)
