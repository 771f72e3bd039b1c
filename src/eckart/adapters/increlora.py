"""IncreLoRA: ranks that begin at one and grow where they matter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from eckart.adapters.base import Adapter, Update
from eckart.adapters.growing import Growing
from eckart.adapters.host import Site
from eckart.adapters.orthogonality import Factor, pull
from eckart.adapters.tuner import adapter
from eckart.remarks import remark
from eckart.schedules import Every, Schedule


@adapter("increlora", family="rank allocation", paper="IncreLoRA, Zhang et al., 2023, arXiv 2308.12043")
@dataclass
class IncreLoRA(Adapter):
    """W + alpha / rank_k B diag(e) A; every layer begins at rank 1, and the most important ones get more as it goes.

    Importance is the sum of |D * dL/dD| over the update matrix D, smoothed, times its smoothed uncertainty. A layer
    that grows keeps its function: its values are multiplied by new / old rank. Components that wait for their turn
    learn with a value of 1e-5, by which the start differs from the model.

    All components that a layer may get (`max_rank`, which the paper does not have) are parameters from the start, and
    so in every optimiser exactly once. Those not in use have no gradients: optimisers keep no state of them, and begin
    anew when they come in. The paper gives each its own learning rate schedule; here `ramp` raises the length of its
    first steps, whatever the optimiser. `finish` cuts off what was never used.

    Args:
        rank: average at the end.
        alpha: of the scale alpha / rank of the layer.
        initial_rank: of every layer.
        growth: components that a layer gets at a time; 0 takes half the rank.
        max_rank: of a layer; 0 takes four times the rank.
        top: layers that grow at a time.
        warmup: steps before the first growth.
        every: steps between growths.
        ramp: steps over which those of a new component become as long as all others'.
        advance: whether components learn before their turn.
        orthogonality: strength of the mean of ||A Aᵀ - I||_F and ||Bᵀ B - I||_F over all layers.
        beta1, beta2: of the moving averages of importance and of its uncertainty.
    """

    rank: int = 8
    alpha: float = 16.0
    initial_rank: int = 1
    growth: int = 0
    max_rank: int = 0
    top: int = 5
    warmup: int = 100
    every: int = 100
    ramp: int = 0
    advance: bool = True
    orthogonality: float = 0.1
    beta1: float = 0.85
    beta2: float = 0.85

    def check(self) -> None:
        self.at_least(rank=self.rank, initial_rank=self.initial_rank, top=self.top, every=self.every)
        self.positive(alpha=self.alpha)
        self.not_negative(growth=self.growth, max_rank=self.max_rank, warmup=self.warmup, ramp=self.ramp, orthogonality=self.orthogonality)  # fmt: skip # noqa: E501
        if self.initial_rank > self.rank:
            raise ValueError(f"increlora(rank={self.rank}): ranks begin at {self.initial_rank} and do not fall; lower initial_rank")  # fmt: skip # noqa: E501
        if 0 < self.max_rank < self.rank:
            raise ValueError(f"increlora(max_rank={self.max_rank}): no layer may reach the average, {self.rank}; 0 takes four times that")  # fmt: skip # noqa: E501
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"increlora({name}={getattr(self, name)!r}): it is a number between 0 and 1")

    @property
    def step_size(self) -> int:
        """Components that a layer gets at a time."""
        return self.growth or max(1, self.rank // 2)

    def update(self, site: Site) -> Growing:
        if site.name in self.rank_pattern:  # its training is over
            settled = Growing(site, self.fitting(site), site.rank, 0, self.alpha, False)
            settled.settle()
            return settled
        self.fitting(site, self.rank)
        most = min(self.max_rank or 4 * self.rank, *site.shape)
        waiting = min(self.step_size, most - self.initial_rank) if self.advance else 0
        return Growing(site, self.initial_rank, most, waiting, self.alpha, self.advance)

    def schedule(self, model: nn.Module, updates: dict[str, Update]) -> Schedule:
        return Growth(self, {n: u for n, u in updates.items() if isinstance(u, Growing)})


class Growth(Schedule):
    """Scores layers with every step's gradients, and lets the best ones grow until the ranks' sum is the target.

    Args:
        config: the adapter's settings.
        updates: layer -> its components.
    """

    def __init__(self, config: IncreLoRA, updates: dict[str, Growing]):
        super().__init__()
        self.config, self.updates = config, updates
        self.target = config.rank * len(updates)
        self._young: list[tuple[nn.Parameter, Tensor, float]] = []

    @property
    def missing(self) -> int:
        """How many components are still to be given out."""
        return self.target - sum(u.rank for u in self.updates.values()) if not self.config.rank_pattern else 0

    def begin(self, optimizer: Optimizer | None = None, total: int | None = None) -> None:
        super().begin(optimizer, total)
        reached = self._reached()
        if self.total and self.steps == 0 and reached >= self.total:
            remark(f"increlora will not have grown to rank {self.config.rank} in the {self.total} steps of this run, but in {reached}: lower warmup or every, or raise top or growth", UserWarning)  # fmt: skip # noqa: E501

    def _reached(self) -> int:
        """The step at which the last component would be given out."""
        c = self.config
        rounds = math.ceil(self.missing / (c.step_size * min(c.top, max(1, len(self.updates)))))
        return 0 if not rounds else (c.warmup or c.every) + (rounds - 1) * c.every

    def at(self, step: int) -> None:
        growing = self.missing > 0
        for update in self.updates.values():
            update.watched, update.sensitivity = growing, None

    def gradients(self, step: int) -> None:
        self._score()
        if self.config.orthogonality:
            pull([f for u in self.updates.values() for f in parts(u)], self.config.orthogonality)
        self._young = [
            (p, p.detach().clone(), share)
            for u in self.updates.values() if self.config.ramp
            for p, born in young(u)
            if (share := (step - born + 1) / (self.config.ramp + 1)) < 1
        ]  # fmt: skip

    @torch.no_grad()
    def _score(self) -> None:
        """Moving averages of importance and of its uncertainty."""
        watched = [u for u in self.updates.values() if u.watched]
        if not watched:
            return
        device = watched[0].scores.device  # a model may lie on several
        seen = [u.scores.new_zeros(()) if u.sensitivity is None else u.sensitivity for u in watched]
        found = torch.stack([s.to(device) for s in seen])
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(found)  # each process has seen its own data, and all must decide alike
            found /= distributed.get_world_size()
        for update, s in zip(watched, found, strict=True):
            importance, uncertainty = update.scores
            s = s.to(importance.device)
            importance.lerp_(s, 1 - self.config.beta1)
            uncertainty.lerp_((s - importance).abs(), 1 - self.config.beta2)

    @torch.no_grad()
    def after(self, step: int) -> None:
        for parameter, before, share in self._young:
            parameter.copy_(before.lerp(parameter, share))
        self._young = []
        if step and self.missing and Every(self.config.every, self.config.warmup)(step):
            self._give_out(step)

    def _give_out(self, step: int) -> None:
        left, size = self.missing, self.config.step_size
        able = [u for u in self.updates.values() if u.rank < u.most]
        able.sort(key=lambda u: -float(u.scores.prod()))
        for update in able[: min(self.config.top, left)]:
            by = min(size, left, update.most - update.rank)
            update.grow(by, size if self.config.advance else 0, step)
            left -= by
        if not left:
            for update in self.updates.values():
                update.stop()

    def finish(self) -> None:
        """Cut off components that were never used, and note the ranks in the settings."""
        for name, update in self.updates.items():
            update.settle()
            self.config.rank_pattern[name] = update.rank


def parts(update: Growing) -> list[Factor]:
    """Both factors of a layer."""
    return [(update.parts("A"), 0), (update.parts("B"), 1)]


def young(update: Growing) -> list[tuple[nn.Parameter, int]]:
    """Parameters in use that were not from the start, and the step at which they came into use."""
    vectors, values = update.born.tolist()
    with_births = [*zip(update.A, vectors, strict=True), *zip(update.B, vectors, strict=True), *zip(update.E, values, strict=True)]  # fmt: skip # noqa: E501
    return [(p, born) for p, born in with_births if born]
