"""How relevance passes through every function of a network (the rules of layer-wise relevance propagation)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

RULES = ("zplus", "epsilon")
EPSILON = {"zplus": 1e-9, "epsilon": 1e-6}
"""What keeps the sums of each rule from zero, where nothing else is asked for."""


class RelevanceRules(TorchFunctionMode):
    """Within it, gradients times activations are relevances: what is computed stays as it is, its gradients do not.

    Let R be the relevance of a number y and g = R / y. A sum hands its g on unchanged, as gradients do, so that every
    rule is a function of the same value with another gradient (Montavon et al., 2019; for attention, Ali et al., 2022):

    * linear maps and convolutions, `zplus`: R_i = sum_j z_ij / z_j R_j over contributions z_ij = a_i w_ij > 0, and
      z_j their sum, without a bias; with `beta`, (1 + beta) times that, less beta times the same over z_ij < 0;
      `epsilon`: over all contributions, z_j with its bias, moved from zero by epsilon;
    * ReLU, maxima, means, sums: as gradients; other activations and powers: R passes unchanged;
    * norms: their scale is a constant; attention: its weights are constants; products of two activations: half each;
      what divides is a constant.

    Contributions, not weights, decide what is positive, so that relevance is conserved where activations are negative.
    It is lost under `zplus` where a number has no positive contribution, and under `epsilon` to biases.

    Args:
        rule: for linear maps and convolutions.
        epsilon: that keeps sums from zero; None is 1e-9 for `zplus` and 1e-6 for `epsilon`.
        beta: weight of negative contributions under `zplus`.

    Raises `ValueError` within, on a function of activations that no rule covers.
    """

    def __init__(self, rule: str = "zplus", epsilon: float | None = None, beta: float = 0.0):
        super().__init__()
        if rule not in RULES:
            raise ValueError(f"rule={rule!r}: it is one of {', '.join(RULES)}")
        if beta < 0 or (beta and rule != "zplus"):
            raise ValueError(f"beta={beta:g}: it is 0 or more, and belongs to the rule 'zplus'")
        self.rule, self.epsilon, self.beta = rule, EPSILON[rule] if epsilon is None else epsilon, beta
        if not self.epsilon > 0:
            raise ValueError(f"epsilon={epsilon}: it keeps sums from zero, so it is a positive number")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LINEAR:
            return self._linear(func, *args, **kwargs)
        if func is torch.addmm and len(args) == 3 and not kwargs and not _varies(args[2]):
            bias, x, weight = args
            return self._linear(F.linear, x, weight.T, bias)
        if func in _CONSTANT:
            return func(*args, **kwargs).detach()
        if func in _PASSED:
            if kwargs.get("inplace"):
                raise ValueError(f"relevance cannot pass through {_name(func)} in place: build the model with inplace=False")  # fmt: skip # noqa: E501
            x = args[0] if args else kwargs["input"]
            return passed(x, func(*args, **kwargs), self.epsilon)
        if func is F.embedding:
            y = func(*args, **kwargs).detach()
            return y.requires_grad_(torch.is_grad_enabled())
        if func is F.layer_norm:
            return _layer_norm(*args, **kwargs)
        if func is F.rms_norm:
            return _rms_norm(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            query, key, *rest = args
            return func(query.detach(), key.detach(), *rest, **kwargs)
        if func in _QUOTIENTS:
            below = args[1].detach() if isinstance(args[1], Tensor) else args[1]
            return func(args[0], below, *args[2:], **kwargs)
        both = len(args) > 1 and all(_varies(a) for a in args[:2])
        y = func(*args, **kwargs)
        if func in _PRODUCTS:
            return y / 2 + y.detach() / 2 if both else y
        if isinstance(y, Tensor) and y.requires_grad and (_name(func) not in _AS_GRADIENTS or (both and func in _SCALED)):  # fmt: skip # noqa: E501
            raise ValueError(f"no rule says how relevance passes through the function {_name(func)}, which the model computes of its activations")  # fmt: skip # noqa: E501
        return y

    def _linear(
        self, func: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any,
        **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        y = func(input, weight, bias, *args, **kwargs)
        if self.rule == "epsilon":
            return _with_value(y * (y / away(y, self.epsilon)).detach(), y)
        carrier = (1 + self.beta) * self._share(func, 1.0, input, weight, y, *args, **kwargs)
        if self.beta:
            carrier = carrier - self.beta * self._share(func, -1.0, input, weight, y, *args, **kwargs)
        return _with_value(carrier, y)

    def _share(
        self, func: Callable[..., Tensor], sign: float, input: Tensor, weight: Tensor, y: Tensor, *args: Any,
        **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """What hands R_j on to the contributions of that sign, in proportion to them."""
        z = func(input.clamp_min(0), (sign * weight).clamp_min(0), None, *args, **kwargs)
        if bool((input.detach() < 0).any()):
            z = z + func(input.clamp_max(0), (sign * weight).clamp_max(0), None, *args, **kwargs)
        return z * (y / away(z, self.epsilon)).detach()


_LINEAR = {F.linear, F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d}
_CONSTANT = {F.softmax, torch.softmax, Tensor.softmax, torch.rsqrt, Tensor.rsqrt}
_PASSED = {
    F.gelu, F.silu, torch.tanh, Tensor.tanh, F.tanh, F.elu, F.leaky_relu, F.softplus, F.mish, F.hardswish, F.selu,
    torch.sigmoid, Tensor.sigmoid, F.sigmoid, torch.pow, Tensor.pow, Tensor.__pow__, torch.square, Tensor.square,
    F.relu6, torch.erf, Tensor.erf,
}  # fmt: skip
_PRODUCTS = {
    torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__,
    torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm,
}  # fmt: skip
_QUOTIENTS = {torch.div, Tensor.div, Tensor.__truediv__, torch.true_divide, Tensor.true_divide}
_SCALED = {Tensor.mul_, Tensor.__imul__, Tensor.div_, Tensor.__itruediv__}
_AS_GRADIENTS = {
    "__get__", "__getitem__", "view", "reshape", "transpose", "permute", "t", "swapaxes", "movedim", "contiguous",
    "clone", "detach", "expand", "expand_as", "repeat", "repeat_interleave", "unsqueeze", "squeeze", "flatten",
    "unflatten", "chunk", "split", "unbind", "cat", "stack", "roll", "pad", "view_as", "reshape_as", "unfold",
    "float", "double", "half", "bfloat16", "to", "type", "type_as", "cpu", "requires_grad_",
    "add", "__add__", "__radd__", "add_", "__iadd__", "sub", "__sub__", "__rsub__", "rsub", "sub_", "__isub__", "neg",
    "__neg__", "sum", "mean", "mul_", "__imul__", "div_", "__itruediv__",
    "relu", "relu_", "clamp_min", "dropout", "dropout1d", "dropout2d", "where", "masked_fill", "gather",
    "index_select", "index_copy", "max", "amax", "maximum", "_max_pool1d", "_max_pool2d", "_max_pool3d", "max_pool1d",
    "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_max_pool2d", "_adaptive_max_pool1d",
    "adaptive_max_pool1d", "adaptive_max_pool2d",
}  # fmt: skip


def _name(func: Any) -> str:
    return getattr(func, "__name__", str(func))


def _varies(a: Any) -> bool:
    """Whether a is something that was computed from the inputs: parameters are frozen meanwhile."""
    return isinstance(a, Tensor) and a.requires_grad and not isinstance(a, nn.Parameter)


def _with_value(carrier: Tensor, y: Tensor) -> Tensor:
    """y, with the gradients of the carrier."""
    return carrier + (y - carrier).detach()


def away(z: Tensor, epsilon: float) -> Tensor:
    """z, moved away from zero by epsilon."""
    return z.detach() + torch.where(z.detach() >= 0, epsilon, -epsilon)


def passed(x: Tensor, y: Tensor, epsilon: float) -> Tensor:
    """y, whose relevance is that of x, number by number."""
    return _with_value(x * (y / away(x, epsilon)).detach(), y)


def _layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    axes = tuple(range(-len(normalized_shape), 0))
    y = _rms_norm(input - input.mean(axes, keepdim=True), normalized_shape, weight, eps)
    return y if bias is None else y + bias.detach()


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    y = input * (input.square().mean(axes, keepdim=True) + eps).rsqrt().detach()
    return y if weight is None else y * weight.detach()


@contextmanager
def explained(model: nn.Module, rules: RelevanceRules | None) -> Iterator[None]:
    """Within the context gradients are recorded: of activations alone, and where `rules` are given, by these.

    Raises `ValueError` on layers that no rule covers, and on a model in training mode, whose dropout draws anew.
    """
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode: call .eval() first")
    if rules is not None:
        check_rules(model)
    frozen = [p for p in model.parameters() if p.requires_grad]
    hooks = []
    try:
        for p in frozen:
            p.requires_grad_(False)
        if rules is None:
            with torch.enable_grad():
                yield
            return
        for module in model.modules():
            if _activates(module):
                hooks.append(module.register_forward_hook(_passing(rules.epsilon)))
        with torch.enable_grad(), rules:
            yield
    finally:
        for p in frozen:
            p.requires_grad_(True)
        for hook in hooks:
            hook.remove()


def _activates(module: nn.Module) -> bool:
    """Whether it is an activation that transformers writes out in several functions, whose parts have no rule."""
    return type(module).__module__ == "transformers.activations"


def _passing(epsilon: float) -> Callable[..., Tensor]:
    return lambda module, args, output: passed(args[0], output, epsilon)


def check_rules(model: nn.Module) -> None:
    """Raise `ValueError` on a layer with weights that no rule covers."""
    ruled = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.RMSNorm, nn.Embedding)
    for name, module in model.named_modules():
        own = any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False))
        leaf = own and not any(True for _ in module.children())
        normal = type(module).__name__.endswith("RMSNorm") or "Embedding" in type(module).__name__
        if leaf and not isinstance(module, ruled) and not normal:
            hint = ": fuse it into the layer before it (torch.nn.utils.fusion.fuse_conv_bn_eval)" if "BatchNorm" in type(module).__name__ else ""  # fmt: skip # noqa: E501
            raise ValueError(f"{name}: no rule says how relevance passes through {type(module).__name__}{hint}")
