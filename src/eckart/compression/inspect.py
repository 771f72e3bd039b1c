"""What a model is made of, before anything is decided: bytes and spectra, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.calibration.store import OUTSIDE
from eckart.calibration.subject import block_names
from eckart.checkpoint.folder import Folder
from eckart.checkpoint.source import Source, resolve
from eckart.downloads import Progress, silent
from eckart.forms.layers import kind_of, matrix_of
from eckart.jobs.plan import sample_spectrum
from eckart.jobs.recipe import Recipe
from eckart.linalg.svd import singular_values


def inspect_model(model: str | Path | Source, *, progress: Progress = silent) -> dict[str, Any]:
    """Spectrum, effective rank and bytes of every layer that can be factored, one block in memory at a time.

    The effective rank is the exponential of the entropy of the normalised singular values (Roy and Vetterli, 2007);
    `rank_90` and `rank_99` keep that share of the squared Frobenius norm; at the break-even rank two factors take as
    many bytes as the matrix.
    """
    source = model if isinstance(model, Source) else resolve(model, progress=progress)
    folder = Folder(source)
    blocks = block_names(folder.model)
    sites = Recipe().sites(folder.model, blocks)
    layers = []
    for done, part in enumerate([*range(len(blocks)), OUTSIDE]):
        names = sites.get(part, [])
        with folder.loaded(*names):
            layers += [_describe(folder, name, part) for name in names]
        progress("inspect", done + 1, len(blocks) + 1)
    return {
        "source": source.spec,
        "model_type": folder.config.model_type,
        "dtype": str(source.dtype).removeprefix("torch."),
        "bytes": source.bytes,
        "layer_bytes": sum(layer["bytes"] for layer in layers),
        "note": source.note,
        "layers": layers,
    }


def _describe(folder: Folder, name: str, part: int) -> dict[str, Any]:
    module = folder.model.get_submodule(name)
    matrix = matrix_of(module).detach()
    values = singular_values(matrix)
    out, in_ = matrix.shape
    return {
        "name": name,
        "block": None if part == OUTSIDE else part,
        "kind": kind_of(module),
        "shape": [out, in_],
        "bytes": out * in_ * folder.storage_dtype.itemsize,
        "effective_rank": effective_rank(values),
        "rank_90": rank_for_energy(values, 0.90),
        "rank_99": rank_for_energy(values, 0.99),
        "break_even_rank": out * in_ // (out + in_),
        "spectrum": sample_spectrum(values),
    }


def effective_rank(values: Float[Tensor, " k"]) -> float:
    """exp of the entropy of s / sum s; 0 for a zero matrix."""
    total = float(values.sum())
    if total <= 0:
        return 0.0
    p = values.double() / total
    return float(torch.exp(-(p * p.clamp_min(1e-300).log()).sum()))


def rank_for_energy(values: Float[Tensor, " k"], share: float) -> int:
    """The least rank whose squared singular values sum up to `share` of all."""
    energy = values.double().square().cumsum(0)
    return int((energy < share * energy[-1]).sum()) + 1 if len(energy) else 0
