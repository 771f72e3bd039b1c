"""Linear layers whose weight lives in 8-bit integers and is trained there, without a copy in higher precision."""

from __future__ import annotations

import re
import weakref
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from eckart.forms.grids import Uniform
from eckart.optimizers.groups import linear_weights
from eckart.optimizers.storage import Blocks, State

GROUP = 256
_LAYERS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Stand-in parameter -> its layer, for layers that have been run; copies of a layer have their own."""


class Int8Linear(nn.Module):
    """y = x Wᵀ + b with W in blocks of 8-bit codes (Q-GaLore, section 3.3).

    `weight` is a parameter of W's shape and the activations' dtype that holds a single number: it stands for W where
    autograd, hooks, clipping and optimisers look for a parameter, and gets a gradient like any other. Its values mean
    nothing; `dequantized()` has them. An optimiser writes new ones through `requantize`, as `QGaLore` does.

    Args:
        linear: the layer whose weight is taken over; its bias stays as it is.
        group: numbers in a block, along the flattened weight.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, group: int = GROUP) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # with the least weight as zero point both ends are on the grid, and no weight is ever cut off
        self.blocks = Blocks(8, group, Uniform(zero="real"))
        if not bool(linear.weight.isfinite().all()):
            raise ValueError(f"the weight of a linear layer of shape {tuple(linear.weight.shape)} holds NaN or infinity and cannot be quantised")  # fmt: skip # noqa: E501
        self.weight = nn.Parameter(_stand_in(linear.weight.detach()), requires_grad=linear.weight.requires_grad)
        self.bias = linear.bias
        for name, tensor in self._stored(linear.weight.detach()).items():
            self.register_buffer(name, tensor)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        _LAYERS[self.weight] = weakref.ref(self)
        return _Product.apply(x, self.weight, self.bias, self)

    @torch.no_grad()
    def dequantized(self) -> Float[Tensor, "out in"]:
        """W in float32."""
        state: State = {f"weight.{part}": getattr(self, part) for part in ("codes", "scale", "zero")}
        W = self.blocks.get(state | {"weight.shape": (self.out_features, self.in_features)}, "weight")
        assert W is not None
        return W

    @torch.no_grad()
    def requantize(self, W: Float[Tensor, "out in"], generator: torch.Generator | None = None) -> None:
        """Take up new weights, with scales of their own; rounding is stochastic where there is a generator.

        Stochastic rounding is unbiased: updates far below a step of the grid arrive in the mean.
        """
        for name, tensor in self._stored(W, generator).items():
            getattr(self, name).copy_(tensor)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(getattr(self, name).nbytes for name in ("codes", "scale", "zero"))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _stored(self, W: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        state: State = {}
        self.blocks.put(state, "weight", W)
        if generator is not None:
            # nearest rounding of a number moved by an even draw of half a step is floor plus a Bernoulli draw
            blocks, parameters = self.blocks.blocks(W), {n: state[f"weight.{n}"].float() for n in ("scale", "zero")}
            draw = torch.rand(blocks.shape, generator=generator).to(blocks.device)
            state["weight.codes"] = self.blocks.grid.encode(blocks + (draw - 0.5) * parameters["scale"], parameters, 8)
        return {name: state[f"weight.{name}"] for name in ("codes", "scale", "zero")}

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        """Moves and casts; scales and zero points stay in float32, and the stand-in stays a single number."""
        kept = {name: self.get_buffer(name) for name in ("scale", "zero")}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            setattr(self, name, tensor.to(self.get_buffer("codes").device))
        self.weight.data = _stand_in(self.weight.data)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.weight.data = _stand_in(self.weight.data)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}weight")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict | {f"{prefix}weight": self.weight.data}, prefix, *rest)


class _Product(torch.autograd.Function):
    """x Wᵀ + b, of which only x is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Int8Linear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.dtype = layer, weight.dtype
        return nn.functional.linear(x, layer.dequantized().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (grad,) = ctx.saved_tensors, grads
        # under autocast the product, and thus its gradient, has another dtype than x
        into_x = (grad @ ctx.layer.dequantized().to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        flat, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        into_weight = (flat.mT @ rows.to(grad.dtype)).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return into_x, into_weight, flat.sum(0) if ctx.needs_input_grad[2] else None, None


def _stand_in(W: Tensor) -> Tensor:
    """One zero, expanded to W's shape."""
    return torch.zeros(1, dtype=W.dtype, device=W.device).expand(W.shape)


def layer_of(p: Tensor) -> Int8Linear | None:
    """The layer whose weight a parameter stands for, if it does."""
    link = _LAYERS.get(p)
    return None if link is None else link()


def int8_linears(model: nn.Module, include: str | None = None, group: int = GROUP) -> list[str]:
    """Replace linear layers of a model by `Int8Linear`, in place, and return their names.

    Args:
        include: a regular expression found in the names of those layers; by default the ones that `param_groups`
            projects: the linear layers within the model's blocks.

    Raises ValueError where no layer is left to replace, or a weight is tied to another one.
    """
    inside = {name.removesuffix(".weight") for name in linear_weights(model)}
    replaced = []
    for name, module in list(model.named_modules()):
        wanted = re.search(include, name) if include else name in inside
        if wanted and isinstance(module, nn.Linear):
            if sum(p is module.weight for _, p in model.named_parameters(remove_duplicate=False)) > 1:
                raise ValueError(f"the weight of {name} is tied to another one, which an Int8Linear cannot share: leave it out of include=")  # fmt: skip # noqa: E501
            model.set_submodule(name, Int8Linear(module, group))
            replaced.append(name)
    if not replaced:
        raise ValueError(f"no linear layer of {type(model).__name__} was replaced: name some with include=")
    return replaced


def plain_linears(model: nn.Module) -> list[str]:
    """Replace every `Int8Linear` of a model by a linear layer with its weight, in place, and return their names."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, Int8Linear)]
    for name, module in found:
        linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        linear.weight = nn.Parameter(module.dequantized().to(module.weight.dtype), module.weight.requires_grad)
        linear.register_parameter("bias", module.bias)
        model.set_submodule(name, linear)
    return [name for name, _ in found]
