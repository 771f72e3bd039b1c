"""Atomic feature mimicking: linear layers and embedding tables by the principal components of what they put out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from eckart.forms import Form, LowRank, as_form
from eckart.forms.algebra import ProductMatrix
from eckart.forms.layers import FactoredEmbedding, FactoredLinear, kind_of, matrix_shape
from eckart.jobs.recipe import Recipe
from eckart.metrics import Metric, OutputCovariance
from eckart.registry import method


@method("afm", family="low-rank", paper="Unified Low-rank Compression Framework for Click-through Rate Prediction, Yu et al., KDD 2024, arXiv 2405.18146")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class AFM(Recipe):
    """Project what linear layers and embedding tables put out on its principal components, with its mean in the bias.

    A linear layer is treated as by `lord`. A table E (V, d) becomes (E - 1 muᵀ) U (V, k), a decoder Uᵀ (k, d) and the
    bias mu, where mu and U are mean and leading components of the vectors looked up in the calibration data, so that
    every row counts as often as it is used. `fuse` (in `fusion`) folds decoders into the linear layer that reads them;
    `activate` makes the variant with activations between the factors.

    Departs from the papers: ranks come from the allocator (uniform here) unless the forms are closed; the fine-tuning
    that follows there is a training job of its own. Rows that were never looked up get a weight near zero. Tables with
    no more rows than dimensions, those whose weight is shared and those of classes with code of their own stay dense.

    Args:
        table: form of the tables (the paper's is `low_rank(rank=2)` for d = 16, and `low_rank(rank=64)` for layers).
    """

    metric: Metric = field(default_factory=OutputCovariance)
    table: Form | str = field(default_factory=LowRank)

    def sites(self, model: nn.Module, blocks: list[str]) -> dict[int, list[str]]:
        for name, module in model.named_modules():
            if isinstance(module, nn.EmbeddingBag) and self._targeted(name, "embedding", blocks, False):
                raise ValueError(
                    f"{name} is an EmbeddingBag: pooled tables have no factored form. Name the layers to compress "
                    "with `targets`, or look rows up with nn.Embedding and pool them afterwards"
                )
        return super().sites(model, blocks)

    def _targeted(self, name: str, kind: str, blocks: list[str], head: bool) -> bool:
        return super()._targeted(name, kind, blocks, head) or (kind == "embedding" and not self.targets)

    def stays(self, model: nn.Module, name: str) -> str | None:
        module = model.get_submodule(name)
        if name in sharing(model):
            return "its weight is shared with another layer"
        if not isinstance(module, nn.Embedding):
            return None
        rows, dim = matrix_shape(module)
        if rows <= dim:
            return f"it has {rows} rows of {dim} numbers, so that its decoder would be larger than its codes"
        if module.max_norm is not None:
            return "it renormalises its rows when they are looked up"
        plain = type(module) in (nn.Embedding, FactoredEmbedding) or hasattr(module, "scalar_embed_scale")
        return None if plain else f"{type(module).__name__} adds something of its own to nn.Embedding"

    def form_of(self, model: nn.Module, name: str) -> Form:
        module = model.get_submodule(name)
        if kind_of(module) != "embedding":
            return self.form
        form, (rows, dim) = as_form(self.table), matrix_shape(module)
        if isinstance(form, LowRank) and (form.rank or 1) > dim:
            raise ValueError(f"{name} has {rows} rows of {dim} numbers: {form} cannot have a larger rank than {dim}")
        return form


def sharing(model: nn.Module) -> set[str]:
    """Names of the modules that hold a parameter which another module holds, too."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    names = {*tied, *tied.values()}
    first: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(parameter, name) != name:
            names |= {name, first[parameter]}
    return {name.rpartition(".")[0] for name in names}


def activate(model: nn.Module, layers: Sequence[str], activation: Callable[[], nn.Module]) -> None:
    """Put an activation between the two factors of these low-rank layers, in place: the paper's "Ada-Act".

    The network's own activation is meant. The model is no approximation of the original until it is fine-tuned. The
    layers become ordinary modules of torch, with a bias (k,) before the activation that the budget did not count.
    """
    if hasattr(model, "save_pretrained"):
        raise TypeError(f"{type(model).__name__} is one of transformers' models, whose checkpoints have no such layers")
    for name in layers:
        layer: Any = model.get_submodule(name)
        if not isinstance(layer, FactoredLinear) or not isinstance(layer.matrix, ProductMatrix):
            raise ValueError(f"{name} is {type(layer).__name__}, not a low-rank linear layer: nothing can come between")
        right, left = _linear(layer.matrix.right.dense()), _linear(layer.matrix.left.dense(), layer.bias)
        model.set_submodule(name, nn.Sequential(right, activation(), left))


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        layer.weight.copy_(weight)
        nn.init.zeros_(layer.bias) if bias is None else layer.bias.copy_(bias)
    return layer
