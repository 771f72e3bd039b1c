"""Weight compander: weights are a saturating function of what is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from eckart.forms.layers import matrix_of
from eckart.forms.layout import laid_out
from eckart.registry import method
from eckart.schedules import Schedule
from eckart.training.base import TrainingMethod, weights
from eckart.training.parametrised import ParametrisedTraining, original

Pair = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
MU = 255.0
"""Of the mu-law, as in telephony."""

FUNCTIONS: dict[str, Pair] = {
    "arctan": (torch.arctan, torch.tan),
    "tanh": (torch.tanh, torch.atanh),
    "softsign": (lambda t: t / (1 + t.abs()), lambda y: y / (1 - y.abs())),
    "erf": (torch.erf, torch.erfinv),
    "mu_law": (
        lambda t: t.sign() * torch.log1p(MU * t.abs()) / math.log1p(MU),
        lambda y: y.sign() * torch.expm1(y.abs() * math.log1p(MU)) / MU,
    ),
}
"""Odd increasing functions and their inverses."""

LIMITS = {"arctan": math.pi / 2, "tanh": 1.0, "softsign": 1.0, "erf": 1.0, "mu_law": math.inf}
"""What they stay below."""

ROOM = 1.1
"""How far above the largest weight the limit is set where weights are to be matched."""


class Compander(nn.Module):
    """w = a f(v / b), with a, b > 0 kept as their logarithms."""

    log_a: Tensor
    log_b: Tensor

    def __init__(self, function: str, a: float, b: float, learned: bool, like: Tensor):
        super().__init__()
        if not (a > 0 and b > 0 and math.isfinite(a) and math.isfinite(b)):
            raise ValueError(f"a compander needs a > 0 and b > 0, not a={a} and b={b}")
        self.function = function
        for name, value in (("log_a", a), ("log_b", b)):
            tensor = torch.tensor(math.log(value), dtype=like.dtype, device=like.device)
            if learned:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    @property
    def bound(self) -> Tensor:
        """What |w| stays below."""
        return self.log_a.exp() * LIMITS[self.function]

    def forward(self, v: Tensor) -> Tensor:
        wide = torch.promote_types(v.dtype, torch.float32)  # half precision would overflow inside the mu-law
        a, b = self.log_a.to(wide).exp(), self.log_b.to(wide).exp()
        return (a * FUNCTIONS[self.function][0](v.to(wide) / b)).to(v.dtype)

    @torch.no_grad()
    def right_inverse(self, w: Tensor) -> Tensor:
        """The v of which w is made. Raises `ValueError` where |w| is not below the bound."""
        over = int((w.abs() >= self.bound).sum())
        if over:
            raise ValueError(f"{over} of {w.numel()} weights are not below the bound {float(self.bound):.3g} of the compander: raise a, or start with 'draw'")  # fmt: skip # noqa: E501
        wide = torch.promote_types(w.dtype, torch.float32)
        a, b = self.log_a.to(wide).exp(), self.log_b.to(wide).exp()
        return (b * FUNCTIONS[self.function][1](w.to(wide) / a)).to(w.dtype)


@method("weight_compander", family="regularisation", paper="Weight Compander, Cakaj et al., IJCNN 2023, arXiv 2306.16993")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class WeightCompander(TrainingMethod):
    """w = a f(v / b), v trained and f odd, increasing and saturating, so that no weight grows and few stay near zero.

    An SGD step moves w by f'(v / b)² (a / b)² times what it would be. a and b are set per layer from the standard
    deviation of its weights; weight decay acts on v. The function and its constants are a reading of the paper, which
    leaves room for others. `finish` leaves an ordinary layer with the very weights that were computed.

    Args:
        function: `arctan`, `tanh`, `softsign`, `erf`, or the `mu_law`, which is not bounded.
        a, b: in standard deviations of the layer's weights; equal ones give slope f'(0) at zero.
        learned: whether each layer's a and b are trained.
        start: `match` inverts the function, so that the layer begins exactly as it is (with a raised where its largest
            weight asks for it); `draw` takes the weights for v.
    """

    function: Literal["arctan", "tanh", "softsign", "erf", "mu_law"] = "arctan"
    a: float = 3.0
    b: float = 3.0
    learned: bool = False
    start: Literal["match", "draw"] = "match"

    def __post_init__(self) -> None:
        if self.function not in FUNCTIONS:
            raise ValueError(f"weight_compander(function={self.function!r}): it is one of {', '.join(FUNCTIONS)}")
        for name in ("a", "b"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"weight_compander({name}={getattr(self, name)!r}): it is positive")
        if self.start not in ("match", "draw"):
            raise ValueError(f"weight_compander(start={self.start!r}): it is 'match' or 'draw'")

    def place(self, model: nn.Module, names: list[str], seed: int) -> Schedule:
        made = {}
        for name, W in weights(model, names):
            weight: Tensor = model.get_submodule(name).weight  # type: ignore[assignment]
            deviation = float(W.square().mean().sqrt()) or 1.0
            a, b = self.a * deviation, self.b * deviation
            needed = ROOM * float(W.abs().max()) / LIMITS[self.function]
            if self.start == "match" and a < needed:
                a, b = needed, b * needed / a
            made[name] = Compander(self.function, a, b, self.learned, weight)
        return Companding(model, made, drawn=self.start == "draw")


class Companding(ParametrisedTraining[Compander]):
    """Nothing follows the steps; in the end the weights are what they were computed to be.

    Args:
        drawn: the layers' weights are taken for v, not for w.
    """

    def __init__(self, model: nn.Module, companders: dict[str, Compander], drawn: bool):
        taken = dict(weights(model, companders)) if drawn else {}
        for name in taken:
            matrix_of(model.get_submodule(name)).data.zero_()  # any w of which there is a v
        super().__init__(model, companders)
        for name, module, _ in self.layers:
            if drawn:
                original(module).data.copy_(laid_out(module, taken[name]))

    def settle(self) -> None:
        for name in self.names:
            self.plain(name)
