"""Q-GaLore: GaLore with a 4-bit projector, 8-bit moments, 8-bit weights, and refreshes that settle down."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from eckart.forms.grids import Uniform
from eckart.optimizers.int8 import layer_of
from eckart.optimizers.presets import rule_for
from eckart.optimizers.projected import Projected
from eckart.optimizers.projectors import SVD, Draw
from eckart.optimizers.projectors.base import Side
from eckart.optimizers.refresh import Lazy
from eckart.optimizers.rules import Rule
from eckart.optimizers.storage import Blocks, Plain, State
from eckart.registry import method


@method("q_galore", family="optimiser", paper="Q-GaLore, Zhang et al., 2024, arXiv 2407.08296")
class QGaLore(Projected):
    """GaLore with an INT4 projector, 8-bit Adam, refreshes that grow rare, and INT8 weights rounded stochastically.

    Weights are 8-bit where the model's layers are `Int8Linear` (`eckart.optimizers.int8_linears` makes them so); other
    parameters are updated as they are.

    Args:
        params: groups with a `rank` are projected (`eckart.optimizers.param_groups` makes them).
        lr: learning rate; projected parameters move at scale * lr.
        betas, eps: of Adam.
        weight_decay: decoupled, applied to the whole weight after the update.
        rank: of groups that have none of their own; None leaves them as they are.
        interval: T, updates between two decompositions at first.
        scale: alpha.
        bits: of a number of the projector, 1 to 8; 0 keeps it as it is.
        group: numbers that share a scale, in the projector.
        threshold, queue, factor: a parameter's interval is multiplied by `factor` while the mean |cosine| of its last
            `queue` leading directions is at least the threshold.
        stochastic: round weights stochastically; to the nearest otherwise, which loses small updates.
        side: which side of a matrix shrinks: std, reverse, left, right or full.
        inner: `adam8bit`, `adam`, `adafactor`, `sgd`, `lion`, or a `Rule`.
        warm: steps of power iteration from the last basis instead of a decomposition; 0 decomposes.
        stagger: spread the refreshes of the parameters over the interval.
        foreach, seed: see `Projected`.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 0.01, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, *, rank: int | None = None, interval: int = 200, scale: float = 0.25, bits: int = 4,
        group: int = 256, threshold: float = 0.4, queue: int = 5, factor: float = 2.0, stochastic: bool = True,
        side: Side = "std", inner: str | Rule = "adam8bit", warm: int = 0, stagger: bool = False,
        foreach: bool | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        self.stochastic = stochastic
        storage = Blocks(bits, group, Uniform()) if bits else Plain()
        super().__init__(
            params, projector=SVD(side, warm, storage=storage), inner=rule_for(inner, betas, eps),
            refresh=Lazy(stagger, threshold, queue, factor), lr=lr, weight_decay=weight_decay, rank=rank,
            interval=interval, scale=scale, foreach=foreach, seed=seed,
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "stochastic": self.stochastic}

    def _opened(self, p: Tensor) -> Tensor:
        layer = layer_of(p)
        return super()._opened(p) if layer is None else layer.dequantized()

    def _close(self, p: Tensor, W: Tensor, state: State) -> None:
        layer = layer_of(p)
        if layer is not None:
            draw = Draw(self._place(p).index, refresh=state["step"], seed=self.seed)
            layer.requantize(W, torch.Generator().manual_seed(draw.number) if self.stochastic else None)
