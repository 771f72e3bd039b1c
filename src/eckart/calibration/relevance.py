"""Relevance: how much of a model's decision flowed through each unit (layer-wise relevance propagation)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

RULES = ("zplus", "epsilon")


class RelevanceRules(TorchFunctionMode):
    """Within it, gradients times activations are relevances: what is computed stays as it is, its gradients do not.

    Let R be the relevance of a number y and g = R / y. A sum hands its g on unchanged, as gradients do, so that every
    rule is a function of the same value with another gradient (Montavon et al., 2019; for attention, Ali et al., 2022):

    * linear maps and convolutions, `zplus`: R_i = sum_j z_ij / z_j R_j over contributions z_ij = a_i w_ij > 0, and
      z_j their sum; `epsilon`: over all of them, z_j with its bias, moved from zero by epsilon;
    * ReLU, maxima, means, sums: as gradients; other activations: R passes unchanged;
    * norms: their scale is a constant; attention: its weights are constants; products of two activations: half each.

    Args:
        rule: for linear maps and convolutions.
        epsilon: that keeps sums from zero.
    """

    def __init__(self, rule: str = "zplus", epsilon: float = 1e-9):
        super().__init__()
        if rule not in RULES:
            raise ValueError(f"rule={rule!r}: it is one of {', '.join(RULES)}")
        self.rule, self.epsilon = rule, epsilon

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LINEAR:
            return self._linear(func, *args, **kwargs)
        if func in _CONSTANT:
            return func(*args, **kwargs).detach()
        if func in _PASSED:
            y = func(*args, **kwargs)
            x = args[0] if args else kwargs["input"]
            return _with_value(x * (y / _away(x, self.epsilon)).detach(), y)
        if func is F.layer_norm:
            return _layer_norm(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            query, key, *rest = args
            return func(query.detach(), key.detach(), *rest, **kwargs)
        y = func(*args, **kwargs)
        both = func in _PRODUCTS and all(_varies(a) for a in args[:2])
        return y / 2 + y.detach() / 2 if both else y

    def _linear(
        self, func: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any,
        **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        y = func(input, weight, bias, *args, **kwargs)
        z = y
        if self.rule == "zplus":
            positive = func(input.clamp_min(0), weight.clamp_min(0), None, *args, **kwargs)
            z = positive + func(input.clamp_max(0), weight.clamp_max(0), None, *args, **kwargs)
        return _with_value(z * (y / _away(z, self.epsilon)).detach(), y)


_LINEAR = {F.linear, F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d}
_CONSTANT = {F.softmax, torch.softmax, Tensor.softmax, torch.rsqrt, Tensor.rsqrt}
_PASSED = {F.gelu, F.silu, torch.tanh, Tensor.tanh, F.tanh, F.elu, F.leaky_relu, F.softplus, F.mish, F.hardswish}
_PRODUCTS = {
    torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__,
    torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm,
}  # fmt: skip


def _varies(a: Any) -> bool:
    """Whether a is something that was computed from the inputs, and no parameter."""
    return isinstance(a, Tensor) and a.requires_grad and not isinstance(a, nn.Parameter)


def _with_value(carrier: Tensor, y: Tensor) -> Tensor:
    """y, with the gradients of the carrier."""
    return carrier + (y - carrier).detach()


def _away(z: Tensor, epsilon: float) -> Tensor:
    """z, moved away from zero by epsilon."""
    return z.detach() + torch.where(z.detach() >= 0, epsilon, -epsilon)


def _layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    axes = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(axes, keepdim=True)
    y = centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt().detach()
    y = y if weight is None else y * weight.detach()
    return y if bias is None else y + bias.detach()


def unit_relevance(
    model: nn.Module, inputs: Mapping[str, Any], labels: Int[Tensor, "*batch"], layers: Sequence[str], *,
    rule: str = "zplus", epsilon: float = 1e-9,
) -> dict[str, Float[Tensor, " units"]]:  # fmt: skip
    """Relevance at the outputs of some layers, per unit (a channel of a convolution), summed over places and samples.

    Every label that is not negative starts with relevance 1 at its logit (Yeom et al., 2021, arXiv 1912.08881, section
    3.1), so that layers can be compared without being normalised.

    Args:
        model: in evaluation mode, with batch norms fused into the convolutions before them; gives logits (*batch,
            classes), or something that has them as `logits`.
        inputs: keyword arguments of its forward pass.
        labels: the true classes; negative ones do not count.

    Raises `ValueError` on layers that no rule covers, and labels that are no class.
    """
    _check(model, layers)
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            outputs[name] = output if output.requires_grad else output.requires_grad_()
            return output.clone()  # what comes next may work in place

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    try:
        with torch.enable_grad(), RelevanceRules(rule, epsilon):
            found = model(**inputs)
    finally:
        for handle in hooks:
            handle.remove()
    logits = found if isinstance(found, Tensor) else found.logits
    counted = labels >= 0
    if labels.shape != logits.shape[:-1] or (bool(counted.any()) and int(labels.max()) >= logits.shape[-1]):
        raise ValueError(f"labels of shape {tuple(labels.shape)} up to {int(labels.max())} do not fit logits of shape {tuple(logits.shape)}")  # fmt: skip # noqa: E501
    chosen = logits[counted].gather(-1, labels[counted][:, None])
    start = (chosen / _away(chosen, epsilon)).sum()
    gradients = torch.autograd.grad(start, [outputs[name] for name in layers], allow_unused=True)
    scores = {}
    for name, gradient in zip(layers, gradients, strict=True):
        out = outputs[name].detach()
        R = torch.zeros_like(out) if gradient is None else out * gradient
        channels = 1 if isinstance(model.get_submodule(name), nn.Conv1d | nn.Conv2d | nn.Conv3d) else R.dim() - 1
        scores[name] = R.movedim(channels, -1).flatten(0, -2).sum(0) if R.dim() > 1 else R
    return scores


def _check(model: nn.Module, layers: Sequence[str]) -> None:
    for name in layers:
        if name not in dict(model.named_modules()):
            raise ValueError(f"the model has no layer called {name!r}")
    ruled = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.Embedding)
    for name, module in model.named_modules():
        own = any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False))
        leaf = own and not any(True for _ in module.children())
        normal = type(module).__name__.endswith("RMSNorm") or "Embedding" in type(module).__name__
        if leaf and not isinstance(module, ruled) and not normal:
            hint = ": fuse it into the layer before it" if "BatchNorm" in type(module).__name__ else ""
            raise ValueError(f"{name}: no rule says how relevance passes through {type(module).__name__}{hint}")
