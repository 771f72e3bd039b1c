"""Changing the basis of the residual stream: what stands at each site afterwards, and the numbers in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eckart.anatomy import Norm
from eckart.compression.residual_stream import ResidualStream, Site
from eckart.forms.layers import matrix_of, matrix_shape
from eckart.forms.residual import Narrow, ResidualWriter, StreamNorm
from eckart.forms.stand_ins import STAND_INS

ROWS = 4096
"""Rows of a matrix that are in float64 at a time."""


def empty_at(model: nn.Module, stream: ResidualStream, site: Site, width: int, dtype: torch.dtype) -> nn.Module:
    """What stands at a site when the stream is `width` wide, without values: just what loading a checkpoint makes."""
    spec = _spec(model, stream, site, width)
    return STAND_INS[spec["kind"]].from_spec(model, site.name, spec, dtype)


def _spec(model: nn.Module, stream: ResidualStream, site: Site, width: int) -> dict[str, Any]:
    if site.role == "norm":
        return {"kind": StreamNorm.kind, "width": width, "divisor": stream.width, "eps": float(site.norm.eps)}
    module = model.get_submodule(site.name)
    out, in_ = matrix_shape(module)
    shape = [width, in_] if site.role == "writer" else [out, width]
    bias = getattr(module, "bias", None) is not None
    if site.role == "reader":
        bias = bias or getattr(model.get_submodule(site.norm.name), "bias", None) is not None
    if site.since is None:
        return {"kind": Narrow.kind, "shape": shape, "bias": bias}
    return {"kind": ResidualWriter.kind, "shape": shape, "bias": bias, "norm": site.norm.name}


def rewritten(
    model: nn.Module, stream: ResidualStream, site: Site, bases: Mapping[int, Float[Tensor, "d k"]], dtype: torch.dtype
) -> nn.Module:
    """What stands at a site when the stream's coordinates at each point are those along the columns of its basis.

    The basis of a point must have orthonormal columns; float64. The norms' gains and biases go into the readers, and
    where the norms subtract the mean, what writes the stream is made mean-free.
    """
    basis = bases[site.point]
    new = empty_at(model, stream, site, basis.shape[1], dtype)
    if site.role == "norm":
        return new
    module = model.get_submodule(site.name)
    matrix = matrix_of(module).detach()
    bias = _double(module, "bias")
    basis = basis.to(matrix.device)
    if site.role == "reader":
        gain, shift = _gain(model, site.norm), _double(model.get_submodule(site.norm.name), "bias")
        weight = _project(matrix, basis if gain is None else gain[:, None] * basis, dtype)
        if shift is not None:
            moved = _project(matrix, shift[:, None], torch.float64)[:, 0]
            bias = moved if bias is None else bias + moved
    else:
        written = centred(basis) if stream.centred else basis
        rows = matrix if site.role == "source" else matrix.T
        weight = _project(rows, written, dtype)
        weight = weight if site.role == "source" else weight.T
        bias = None if bias is None else bias @ written
    tensors = {"weight": weight.T if isinstance(module, Conv1D) else weight}
    if bias is not None:
        tensors["bias"] = bias
    if site.since is not None:
        tensors = {f"linear.{key}": value for key, value in tensors.items()}
        tensors["shortcut"] = bases[site.since].T @ bases[site.point]
    new.load_state_dict({k: v.to(matrix.device, dtype).contiguous() for k, v in tensors.items()}, assign=True)
    return new.requires_grad_(False)


def centred(columns: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
    """(I - 1 1^T / d) columns: what they are to a norm that subtracts the mean."""
    return columns - columns.mean(0, keepdim=True)


def _gain(model: nn.Module, norm: Norm) -> Float[Tensor, " d"] | None:
    weight = _double(model.get_submodule(norm.name), "weight")
    return None if weight is None else norm.gain_offset + weight


def _double(module: nn.Module, name: str) -> Tensor | None:
    value = getattr(module, name, None)
    return None if value is None else value.detach().double()


def _project(rows: Float[Tensor, "n d"], right: Float[Tensor, "d k"], dtype: torch.dtype) -> Float[Tensor, "n k"]:
    """rows @ right, computed in float64."""
    return torch.cat([(chunk.double() @ right).to(dtype) for chunk in rows.split(ROWS)])
