"""SNELLA: SNELL with a kernel of higher rank, whose layers compete for one budget of entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.adapters.base import Adapter, Update
from eckart.adapters.host import Site
from eckart.adapters.kernelised import Kernelised, check_heads, check_survivors, distances, drawn, entries_kept
from eckart.adapters.tuner import adapter
from eckart.schedules import Ramp, Schedule, at_step


class Mixed(Kernelised):
    """D + alpha softmax(D / gamma) + beta, over the rows of each column of D = c (||Q_1 - P_1|| - ||Q_2 - P_2||)."""

    def __init__(self, P: Tensor, Q: Tensor, kept: int, scale: float, survivors: str):
        super().__init__(P, Q, kept, scale, 2.0, survivors)
        self.alpha, self.beta = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(0.0))
        self.log_gamma = nn.Parameter(torch.tensor(0.0))  # gamma itself could cross zero, where the softmax blows up

    def merged(self, P: Tensor, Q: Tensor, *mixture: Tensor) -> Float[Tensor, "out in"]:
        alpha, beta, log_gamma = mixture
        D = self.scale * distances(P, Q)
        return D + alpha * torch.softmax(D * torch.exp(-log_gamma), 0) + beta

    @property
    def count(self) -> int:
        """Entries of the matrix."""
        return self.P.shape[1] * self.Q.shape[1]


class Competition(Schedule):
    """Follows the importance of each matrix, and shares the budget of entries among them.

    Importance is that of AdaLoRA (section 3.2) for all numbers of P and Q: |p dL/dp|, smoothed, times its smoothed
    deviation, averaged over P and over Q. It is read after the optimiser's step, as in the authors' code: new numbers,
    the gradient that moved them. Its two averages lie in the optimiser's state, and are saved with that.
    """

    needs_total = True

    def __init__(self, matrices: Sequence[Mixed], settings: SNELLA):
        super().__init__()
        self.matrices, self.settings = list(matrices), settings

    @property
    def needs_optimizer(self) -> bool:
        return True

    @property
    def ramp(self) -> Ramp:
        """Entries that are kept at each step, of all matrices together."""
        s = self.settings
        begin, end = (at_step(getattr(s, name), self.total, f"snella: {name}") for name in ("begin", "end"))
        if end <= begin:
            raise ValueError(f"snella(begin={s.begin!r}, end={s.end!r}): over {self.total} steps it ends at {end}, no later than it begins at {begin}: train for longer, or move them apart")  # fmt: skip # noqa: E501
        first, last = (sum(entries_kept(share, m.count) for m in self.matrices) for share in (s.initial_sparsity, s.sparsity))  # fmt: skip # noqa: E501
        return Ramp(begin, end, first, last, exponent=3.0)

    @torch.no_grad()
    def after(self, step: int) -> None:
        ramp = self.ramp
        if step == 0:
            return
        if self.optimizer is None or all(p.grad is None for m in self.matrices for p in (m.P, m.Q)):
            raise RuntimeError("SNELLA reads gradients after the optimiser's step, and finds none: call schedule.step() before optimizer.zero_grad()")  # fmt: skip # noqa: E501
        scores = [sum(self._importance(p) for p in (m.P, m.Q)) for m in self.matrices]
        if step == ramp.end or (step > ramp.begin and step % self.settings.interval == 0):
            kept = shared_out(round(ramp(step)), scores, [m.count for m in self.matrices])
            for matrix, count in zip(self.matrices, kept, strict=True):
                matrix.kept.fill_(count)

    def _importance(self, p: nn.Parameter) -> float:
        """The mean score of a factor, with its averages brought up to date where it has a gradient."""
        assert self.optimizer is not None
        state: dict[str, Any] = self.optimizer.state.get(p, {}) if p.grad is None else self.optimizer.state[p]
        if p.grad is not None:
            for name in ("importance", "uncertainty"):
                if name not in state:
                    state[name] = torch.zeros_like(p)
            now = torch.nan_to_num(p * p.grad).abs()
            state["importance"].lerp_(now, 1 - self.settings.beta1)
            state["uncertainty"].lerp_((now - state["importance"]).abs(), 1 - self.settings.beta2)
        return float((state["importance"] * state["uncertainty"]).mean()) if "importance" in state else 0.0


def shared_out(budget: int, scores: Sequence[float], capacities: Sequence[int]) -> list[int]:
    """Whole numbers in proportion to scores, none above its capacity, that sum to the budget as far as there is room.

    v = min(capacity, l score) with the l that spends the budget. What those with a score cannot hold goes to the
    others in equal shares; so does everything where no score is positive.
    """
    shares = [0.0] * len(scores)
    left = float(min(budget, sum(capacities)))
    for members, weight in (([i for i, s in enumerate(scores) if s > 0], lambda i: scores[i]),
                            ([i for i, s in enumerate(scores) if not s > 0], lambda i: 1.0)):  # fmt: skip
        by_level = sorted(members, key=lambda i: capacities[i] / weight(i))
        weights = [weight(i) for i in by_level]
        for place, i in enumerate(by_level):  # those that fill up first leave their surplus to the rest
            shares[i] = min(float(capacities[i]), left * weights[place] / sum(weights[place:]))
            left -= shares[i]
    whole = [int(share) for share in shares]
    missing = min(budget, sum(capacities)) - sum(whole)
    for i in sorted(range(len(whole)), key=lambda i: whole[i] - shares[i]):
        extra = min(capacities[i] - whole[i], missing, 1)
        whole[i], missing = whole[i] + extra, missing - extra
    return whole


@adapter("snella", family="generated sparse", paper="SNELLA, Shen et al., 2025, arXiv 2510.24037")
@dataclass
class SNELLA(Adapter):
    """W + S(D + alpha softmax(D / gamma) + beta), D as in SNELL; how many entries S keeps is each layer's own.

    While `eckart.adapters.schedule` follows the training, the number of entries of all layers together falls along a
    cubic ramp, and is shared out by the layers' importance; how many a layer has is saved. The paper counts epochs,
    here it is steps of the optimiser. The start is not zero: the softmax alone adds 1 / out to all entries.

    Args:
        rank: r: r (in + out) + 3 numbers are trained; an even number, for two pairs of factors.
        initial_sparsity, sparsity: shares of all entries that are dropped before and after the ramp.
        begin, end: of the ramp; whole numbers are steps, 0.0 to 1.0 are shares of the run.
        interval: steps between two allocations; the last one of the ramp is exactly at its end.
        beta1, beta2: how slowly the two averages of the importance follow.
        scale: c, of the distances.
        survivors: `magnitude`: an entry that stays is multiplied by its own, which counts as a constant; or `plain`.
    """

    rank: int = 32
    initial_sparsity: float = 0.0
    sparsity: float = 0.7
    begin: int | float = 0.0
    end: int | float = 0.8
    interval: int = 100
    beta1: float = 0.85
    beta2: float = 0.85
    scale: float = 0.1
    survivors: str = "magnitude"

    exact_start: ClassVar[bool] = False

    def check(self) -> None:
        check_heads(self, self.rank)
        check_survivors(self, self.survivors)
        self.at_least(interval=self.interval)
        self.positive(scale=self.scale)
        for name in ("initial_sparsity", "sparsity", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"snella({name}={getattr(self, name)!r}): it is a share from 0, below 1")
        if self.sparsity < self.initial_sparsity:
            raise ValueError(f"snella(initial_sparsity={self.initial_sparsity}, sparsity={self.sparsity}): it ends with more entries than it begins with; the second is at least the first")  # fmt: skip # noqa: E501
        begin, end = (at_step(getattr(self, name), 10**9, f"snella: {name}") for name in ("begin", "end"))
        if type(self.begin) is type(self.end) and end <= begin:
            raise ValueError(f"snella(begin={self.begin}, end={self.end}): the ramp ends before it begins")

    def update(self, site: Site) -> Mixed:
        out, in_ = site.shape
        return Mixed(*drawn(site, site.rank), entries_kept(self.initial_sparsity, out * in_), self.scale, self.survivors)  # fmt: skip # noqa: E501

    def schedule(self, model: nn.Module, updates: dict[str, Update]) -> Schedule:
        return Competition([u for u in updates.values() if isinstance(u, Mixed)], self)
