"""FRUGAL: a rule with state in a subspace that changes, and one without on the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from eckart.optimizers.presets import rule_for
from eckart.optimizers.projected import Projected
from eckart.optimizers.projectors import DCT, SVD, Blocks, Columns, Projector, Random
from eckart.optimizers.projectors.base import Side
from eckart.optimizers.projectors.blocks import Order
from eckart.optimizers.refresh import Every
from eckart.optimizers.residual import Drop, Plainly, Residual, Sign
from eckart.optimizers.rules import Rule
from eckart.registry import method, suggest

SUBSPACES: dict[str, Callable[[Side, Order], Projector]] = {
    "blocks": lambda side, order: Blocks(order=order),
    "columns": lambda side, order: Columns("right"),
    "rows": lambda side, order: Columns("left"),
    "svd": lambda side, order: SVD(side),
    "random": lambda side, order: Random(side),
    "dct": lambda side, order: DCT(side),
}


@method("frugal", family="optimiser", paper="FRUGAL, Zmushko et al., ICML 2025, arXiv 2411.07837")
class Frugal(Projected):
    """Adam in a subspace (or on some whole tensors) and signSGD on the rest: every step is full-rank (algorithm 1).

    Args:
        params: groups with a `density` are split (`eckart.optimizers.param_groups` makes them).
        lr: learning rate.
        betas, eps: of Adam, as torch's AdamW has them.
        weight_decay: decoupled, applied before the update.
        density: rho, of groups that have none of their own: a share of the tensors for blocks, of the side that shrinks
            for the others; 0 is without state. None leaves groups as they are.
        interval: T, updates for which a choice stays.
        scale: of the learning rate of split parameters.
        rest: what moves the rest: `sign`, `sgd` or `drop`.
        rest_scale: of the rest's learning rate, besides `scale`.
        subspace: `blocks`, `columns`, `rows`, `svd`, `random` or `dct`.
        order: in which blocks take turns: random, ascending, descending or mirror.
        side: which side of a matrix shrinks, for svd, random and dct.
        reset: zero the moments and their bias correction at every choice.
        inner: `adam`, `adam8bit`, `adafactor`, `sgd`, `lion`, or a `Rule`.
        foreach, seed: see `Projected`.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, *, density: float | None = None, interval: int = 200, scale: float = 1.0,
        rest: Literal["sign", "sgd", "drop"] = "sign", rest_scale: float = 1.0, subspace: str = "blocks",
        order: Order = "descending", side: Side = "std", reset: bool = True, inner: str | Rule = "adam",
        foreach: bool | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        if subspace not in SUBSPACES:
            raise ValueError(f"unknown subspace {subspace!r}{suggest(subspace, list(SUBSPACES))}")
        rules: dict[str, Residual] = {"sign": Sign(rest_scale), "sgd": Plainly(rest_scale), "drop": Drop()}
        if rest not in rules:
            raise ValueError(f"unknown rule for the rest {rest!r}{suggest(rest, list(rules))}")
        super().__init__(
            params, projector=SUBSPACES[subspace](side, order), inner=rule_for(inner, betas, eps), refresh=Every(),
            residual=rules[rest], lr=lr, weight_decay=weight_decay, density=density, interval=interval, scale=scale,
            transport="reset" if reset else "keep", decay_first=True, foreach=foreach, seed=seed,
        )  # fmt: skip
