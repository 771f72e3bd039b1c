"""DCT-AdamW: moments in those columns of the cosine transform that align best with the gradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from eckart.optimizers.projected import Projected
from eckart.optimizers.projectors import DCT
from eckart.optimizers.refresh import Every
from eckart.optimizers.residual import Drop, ErrorFeedback
from eckart.optimizers.rules import Adam
from eckart.optimizers.storage import Blocks, Plain
from eckart.registry import method


@method(
    "dct_adamw",
    family="optimiser",
    paper="SVD-Free Low-Rank Adaptive Gradient Optimization, Modoranu et al., 2025, arXiv 2505.17967",
)
class DCTAdamW(Projected):
    """AdamW in the best aligned columns of a fixed basis: r whole numbers a weight, chosen anew at every step.

    Args:
        params: groups with a `rank` are projected (`eckart.optimizers.param_groups` makes them).
        lr: learning rate.
        betas, eps: of Adam, as torch's AdamW has them.
        weight_decay: decoupled, applied before the update.
        rank: of groups that have none of their own; None leaves them as they are.
        interval: T, updates between two choices.
        norm: by which columns are ranked, `l1` or `l2`.
        path: `matmul`, or `fft` for wide layers.
        rotate: carry moments over to the new columns; without it they stay as they are.
        feedback: keep what the projection misses and add it to the next gradient, in so many bits (4, 8 or 32); 0 drops
            it.
        foreach, seed: see `Projected`.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, *, rank: int | None = None, interval: int = 1, norm: Literal["l1", "l2"] = "l1",
        path: Literal["matmul", "fft"] = "matmul", rotate: bool = True, feedback: int = 0,
        foreach: bool | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        if feedback not in (0, 4, 8, 32):
            raise ValueError(f"an error is fed back in 4, 8 or 32 bits, or dropped with 0; not {feedback!r}")
        kept = Plain() if feedback == 32 else Blocks(feedback or 8, group=None)
        super().__init__(
            params, projector=DCT(norm=norm, path=path), inner=Adam(betas, eps), refresh=Every(),
            residual=ErrorFeedback(kept) if feedback else Drop(), lr=lr, weight_decay=weight_decay, rank=rank,
            interval=interval, transport="rotate" if rotate else "keep", decay_first=True, foreach=foreach, seed=seed,
        )  # fmt: skip
