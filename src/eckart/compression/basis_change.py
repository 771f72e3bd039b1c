"""Changing the basis of the residual stream: what stands at each site afterwards, and the numbers in it."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eckart.anatomy import Norm
from eckart.compression.residual_stream import ResidualStream, Site
from eckart.forms.layers import STAND_INS, matrix_of, matrix_shape
from eckart.forms.residual import Narrow, ResidualWriter, StreamNorm

Basis = Float[Tensor, "d k"]
ROWS = 4096
"""Rows of a matrix that are in float64 at a time."""


def _spec(model: nn.Module, stream: ResidualStream, site: Site, width: int) -> dict[str, Any]:
    """What stands at a site when the stream is `width` wide, as checkpoints describe it."""
    if site.role == "norm":
        assert site.norm is not None
        return {"kind": StreamNorm.kind, "width": width, "divisor": stream.width, "eps": float(site.norm.eps)}
    module = model.get_submodule(site.name)
    out, in_ = matrix_shape(module)
    bias = getattr(module, "bias", None) is not None
    if site.role == "reader" and site.norm is not None:
        bias = bias or getattr(model.get_submodule(site.norm.name), "bias", None) is not None
    shape = [width, in_] if site.role == "writer" else [out, width]
    if site.since is None:
        return {"kind": Narrow.kind, "shape": shape, "bias": bias}
    assert site.norm is not None
    return {"kind": ResidualWriter.kind, "shape": shape, "bias": bias, "norm": site.norm.name}


def _empty(job: Job, site: Site, spec: dict[str, Any]) -> nn.Module:
    return STAND_INS[spec["kind"]].from_spec(job.model, site.name, spec, job.dtype)


def _rewritten(job: Job, stream: ResidualStream, site: Site, bases: dict[int, Basis]) -> nn.Module:
    """The module that stands at a site from now on, filled."""
    basis = bases[site.point]
    new = _empty(job, site, _spec(job.model, stream, site, basis.shape[1]))
    if site.role == "norm":
        return new
    module = job.model.get_submodule(site.name)
    matrix, own = matrix_of(module).detach(), getattr(module, "bias", None)
    bias = None if own is None else own.detach().double()
    basis = basis.to(matrix.device)
    tensors: dict[str, Tensor] = {}
    if site.role == "reader":
        gain, shift = _gain_and_shift(job.model, site.norm)
        weight = _project(matrix, basis if gain is None else gain[:, None] * basis, job.dtype)
        if shift is not None:
            moved = _project(matrix, shift[:, None], torch.float64)[:, 0]
            bias = moved if bias is None else bias + moved
    else:
        written = _centred(basis) if stream.centred else basis
        if site.role == "source":
            weight = _project(matrix, written, job.dtype)
        else:
            weight = _project(matrix.T, written, job.dtype).T
            bias = None if bias is None else bias @ written
    if site.since is not None:
        tensors["shortcut"] = bases[site.since].T @ bases[site.point]
    prefix = "" if site.since is None else "linear."
    tensors[f"{prefix}weight"] = weight.T if isinstance(module, Conv1D) else weight
    if bias is not None:
        tensors[f"{prefix}bias"] = bias
    stored = {k: v.to(matrix.device, job.dtype).contiguous() for k, v in tensors.items()}
    new.load_state_dict(stored, assign=True)
    return new


def _gain_and_shift(model: nn.Module, norm: Norm | None) -> tuple[Tensor | None, Tensor | None]:
    """What a norm multiplies by and adds, in float64."""
    assert norm is not None
    module = model.get_submodule(norm.name)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    gain = None if weight is None else norm.gain_offset + weight.detach().double()
    return gain, None if bias is None else bias.detach().double()


def _project(rows: Float[Tensor, "n d"], right: Float[Tensor, "d k"], dtype: torch.dtype) -> Float[Tensor, "n k"]:
    """rows @ right, computed in float64."""
    return torch.cat([(chunk.double() @ right).to(dtype) for chunk in rows.split(ROWS)])


def _centred(columns: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
    """(I - 1 1^T / d) columns: what a centred stream makes of them."""
    return columns - columns.mean(0, keepdim=True)
