"""The linear modules of any model, known or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

Kind = Literal["linear", "conv1d", "embedding", "conv2d"]
_CLASSES: dict[type[nn.Module], Kind] = {
    nn.Linear: "linear",
    Conv1D: "conv1d",
    nn.Embedding: "embedding",
    nn.Conv2d: "conv2d",
}


@dataclass(frozen=True)
class LinearSite:
    """One linear module.

    Attributes:
        shape: (out, in) of the unfolded matrix. An embedding counts as (tokens, width), the shape of a head tied to it;
            a convolution as (channels out, channels in of one group * kernel height * kernel width).
        tied_to: the earlier module that owns the same weight.
        block: its index in the outermost ModuleList that holds it; None outside of one.
    """

    name: str
    kind: Kind
    shape: tuple[int, int]
    bias: bool
    tied_to: str | None
    block: int | None


def features(module: object) -> tuple[int, int] | None:
    """(out, in) of a linear module or of any module that states its `out_features` and `in_features`; else None."""
    match module:
        case Conv1D():
            return module.nf, module.nx
        case nn.Embedding():
            return module.num_embeddings, module.embedding_dim
        case nn.Conv2d():
            height, width = module.kernel_size
            return module.out_channels, module.in_channels // module.groups * height * width
    rows, columns = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return (rows, columns) if isinstance(rows, int) and isinstance(columns, int) else None


def linears(model: nn.Module) -> list[LinearSite]:
    """Every nn.Linear, Conv1D, nn.Embedding and nn.Conv2d of a model, in the order of `named_modules`."""
    modules = dict(model.named_modules())
    owners: dict[int, str] = {}
    sites = []
    for name, module in modules.items():
        kind = next((kind for cls, kind in _CLASSES.items() if isinstance(module, cls)), None)
        shape = features(module)
        if kind is None or shape is None:
            continue
        # a parametrised weight is computed anew at each access: only a real parameter can be tied
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        owner = name if weight is None else owners.setdefault(id(weight), name)
        bias = getattr(module, "bias", None) is not None
        sites.append(LinearSite(name, kind, shape, bias, None if owner == name else owner, _block(modules, name)))
    return sites


def _block(modules: dict[str, nn.Module], name: str) -> int | None:
    """Index of the ancestor that is an entry of the outermost ModuleList."""
    path = name.split(".")
    for depth in range(len(path)):
        if isinstance(modules.get(".".join(path[:depth])), nn.ModuleList):
            return int(path[depth])
    return None
