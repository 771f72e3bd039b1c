"""Back to ordinary layers: what a drop-in stood in for, with its matrix formed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eckart.forms.base import Factored
from eckart.forms.layers import DropIn, FactoredEmbedding
from eckart.remarks import remark


class RoundingLost(UserWarning):
    """A layer that rounded its inputs became one that does not."""


def densify(model: Any) -> Any:
    """Replace every factored layer of `model` by an ordinary dense one, in place, and return the model.

    Warns `RoundingLost` where a layer rounded its inputs (`quantized_inputs`), as no ordinary layer does.
    """
    described: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    for name, module in list(model.named_modules()):
        if not isinstance(module, DropIn):
            continue
        if not module.matrix.exact:
            remark(f"{name}: {module.matrix.form} rounds its inputs, and the dense layer in its place does not", RoundingLost)  # fmt: skip # noqa: E501
        formed: Any = module.weight
        weight = formed.as_subclass(Tensor).clone(memory_format=torch.contiguous_format)
        bias = None if module.bias is None else module.bias.detach().clone()
        model.set_submodule(name, dense_layer(module, weight, bias))
        if name in getattr(described, "modules", {}):
            described.modules.pop(name)  # else `save_pretrained` would say that it is still factored
    return model


def make_portable(model: nn.Module) -> list[tuple[Factored, Factored]]:
    """Put what other runtimes can read in the place of every matrix within a model; what was replaced, and by what."""
    found = [(name, m, m.portable()) for name, m in list(model.named_modules()) if isinstance(m, Factored)]
    replaced = [(name, before, after) for name, before, after in found if after is not before]
    for name, _, after in replaced:
        model.set_submodule(name, after)
    return [(before, after) for _, before, after in replaced]


def dense_layer(module: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The ordinary layer that a drop-in stands in for, with this weight, laid out as the layer has it."""
    conv: Any = module
    with torch.device("meta"):
        if isinstance(module, Conv1D):
            layer: Any = Conv1D(module.nf, module.nx)
            bias = weight.new_zeros(module.nf) if bias is None else bias
        elif isinstance(module, FactoredEmbedding):
            layer = nn.Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx)
            weight, bias = (weight if module.scale is None else weight * module.scale), None
        elif isinstance(module, nn.Conv2d):
            layer = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
                              conv.dilation, 1, bias is not None, conv.padding_mode)  # fmt: skip
        else:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer
