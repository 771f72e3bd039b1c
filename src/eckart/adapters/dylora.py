"""DyLoRA: LoRA of which every leading part is a LoRA of lower rank, by dropping trailing components in training."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.adapters.adapt import updates as updates_of
from eckart.adapters.base import Adapter, Update
from eckart.adapters.cutting import Cuttable
from eckart.adapters.host import Host, Site
from eckart.adapters.tuner import adapter
from eckart.schedules import Schedule


class Nested(Cuttable):
    """alpha / b * B[:, :b] A[:b]: b is drawn in training, asked for by `at_rank`, or else all there is.

    Attributes:
        drawn: components that take part in training at present; None takes all.
        still: of these, the leading ones that do not learn.
        asked: components that are used where they are not drawn.
    """

    def __init__(self, B: Float[Tensor, "out r"], A: Float[Tensor, "r in"], alpha: float):
        super().__init__(B, A, alpha)
        self.drawn: int | None = None
        self.asked: int | None = None
        self.still = 0

    @property
    def learning(self) -> slice:
        """The components that this step trains."""
        return slice(min(self.still, self.rank), min(self.drawn or self.rank, self.rank))

    def factors(self, host: Host) -> tuple[Float[Tensor, "out b"], Float[Tensor, "b in"]]:
        b, still = min(self.asked or self.rank, self.rank), 0
        if self.training and self.drawn:
            still, b = self.learning.start, self.learning.stop
        B, A = self.B[:, :b], self.A[:b]
        if still:
            B = torch.cat([B[:, :still].detach(), B[:, still:]], 1)
            A = torch.cat([A[:still].detach(), A[still:]])
        return self.scale / b * B, A


class Drawing(Schedule):
    """Draws the rank of every step from the seed and the step; puts back what an optimiser moved unasked."""

    def __init__(self, config: DyLoRA, updates: list[Nested]):
        super().__init__()
        self.config, self.updates = config, updates
        self._before: list[tuple[Nested, Tensor, Tensor]] = []

    @property
    def needs_optimizer(self) -> bool:
        return self.config.masked

    def at(self, step: int) -> None:
        b = self.config.rank_at(step)
        for update in self.updates:
            update.drawn, update.still = b, b - self.config.block if self.config.frozen else 0

    def gradients(self, step: int) -> None:
        if self.config.masked:
            self._before = [(u, u.B.detach().clone(), u.A.detach().clone()) for u in self.updates]

    @torch.no_grad()
    def after(self, step: int) -> None:
        for update, B, A in self._before:
            rows = update.learning
            B[:, rows], A[rows] = update.B[:, rows], update.A[rows]
            update.B.copy_(B)
            update.A.copy_(A)
        self._before = []

    def finish(self) -> None:
        for update in self.updates:
            update.drawn, update.still = None, 0


@adapter("dylora", family="low rank", paper="DyLoRA, Valipour et al., EACL 2023, arXiv 2210.07558")
@dataclass
class DyLoRA(Adapter):
    """W + alpha / b B[:, :b] A[:b] with one b for the whole model, drawn anew for every step (nested dropout).

    After one run every b of the range is an adapter of its own: `at_rank(model, b)` tries one, `truncate(model, b)`
    cuts to it. The model in evaluation uses all components, whatever was drawn last. The draws depend on the seed and
    the step alone, so parallel processes and resumed runs agree. Quality at the full rank can be a little below a LoRA
    trained for it.

    Args:
        rank: r_max, components.
        lowest: r_min, that are always trained.
        alpha: over the components in use, the scale of the update.
        decay: how much less likely each larger rank is than the one before; 1 draws them uniformly.
        block: components that are drawn together (LyCORIS).
        frozen: whether a step trains only the last block drawn; the authors' script for GLUE does.
        masked: whether components that take no part in a step are left alone by momentum and weight decay, which
            moves them in the authors' code.
    """

    rank: int = 8
    lowest: int = 1
    alpha: float = 16.0
    decay: float = 1.0
    block: int = 1
    frozen: bool = False
    masked: bool = True

    def check(self) -> None:
        self.at_least(rank=self.rank, lowest=self.lowest, block=self.block)
        self.positive(alpha=self.alpha, decay=self.decay)
        if self.lowest > self.rank:
            raise ValueError(f"dylora(lowest={self.lowest!r}): it is at most the rank, {self.rank}")
        if self.rank % self.block:
            raise ValueError(f"dylora(block={self.block!r}): blocks of {self.block} do not make up the rank, {self.rank}")  # fmt: skip # noqa: E501
        if self.decay > 1:
            raise ValueError(f"dylora(decay={self.decay!r}): it is a factor above 0, at most 1")

    def rank_at(self, step: int) -> int:
        """The rank drawn for a step."""
        ranks = [b for b in range(self.block, self.rank + 1, self.block) if b >= self.lowest]
        weights = [self.decay**i for i in range(len(ranks))]
        return random.Random(f"dylora {self.seed} {step}").choices(ranks, weights)[0]

    def update(self, site: Site) -> Nested:
        rank, (out, in_) = self.fitting(site), site.shape
        return Nested(torch.zeros(out, rank), site.uniform(rank, in_, bound=in_**-0.5), self.alpha)

    def schedule(self, model: nn.Module, updates: dict[str, Update]) -> Schedule:
        return Drawing(self, [u for u in updates.values() if isinstance(u, Nested)])


@contextmanager
def at_rank(model: nn.Module, rank: int | Mapping[str, int], adapter_name: str | None = None) -> Iterator[None]:
    """Use that many components of each layer in evaluation, here; a mapping from layer to rank has them differ."""
    found = {n: (u, r) for n, (u, r) in _ranks(model, rank, adapter_name).items()}
    before = {n: u.asked for n, (u, _) in found.items()}
    try:
        for update, b in found.values():
            update.asked = b
        yield
    finally:
        for name, (update, _) in found.items():
            update.asked = before[name]


def truncate(model: nn.Module, rank: int | Mapping[str, int], adapter_name: str | None = None) -> None:
    """Cut an adapter to its leading components, in place; saved, it is built with so many.

    Raises `ValueError` where a rank is outside the range that was trained, or more than a layer has left.
    """
    config: Any = getattr(model, "peft_config", {}).get(adapter_name or getattr(model, "active_adapter", ""))
    for name, (update, b) in _ranks(model, rank, adapter_name).items():
        update.keep(torch.arange(b))
        config.rank_pattern[name] = b


def _ranks(
    model: nn.Module, rank: int | Mapping[str, int], adapter_name: str | None
) -> dict[str, tuple[Nested, int]]:  # fmt: skip
    """layer -> (its update, the rank asked for there), checked."""
    config: Any = getattr(model, "peft_config", {}).get(adapter_name or getattr(model, "active_adapter", ""))
    if not isinstance(config, DyLoRA):
        raise ValueError("only an adapter that dylora trained has leading parts of lower rank, and the active one, or the one named, is none")  # fmt: skip # noqa: E501
    found = {n: u for n, u in updates_of(model, adapter_name).items() if isinstance(u, Nested)}
    wanted = dict(rank) if isinstance(rank, Mapping) else dict.fromkeys(found, rank)
    strange = sorted(set(wanted) - set(found))
    if strange:
        raise ValueError(f"there is no dylora adapter on {strange[0]}: it sits on {', '.join(sorted(found))}")
    for name, b in wanted.items():
        if not config.lowest <= b <= found[name].rank:
            raise ValueError(f"{name}: rank {b} is outside what was trained and is there, {config.lowest} to {found[name].rank}")  # fmt: skip # noqa: E501
    return {n: (found[n], b) for n, b in wanted.items()}
