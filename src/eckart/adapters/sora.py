"""SoRA: LoRA with a gate on each component, which a proximal step closes for good."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from eckart.adapters.adapt import schedule as schedule_of
from eckart.adapters.adapt import updates as updates_of
from eckart.adapters.base import Adapter, Update
from eckart.adapters.cutting import Cuttable, cut
from eckart.adapters.host import Host, Site
from eckart.adapters.proximal import Proximal
from eckart.adapters.tuner import adapter
from eckart.schedules import Ramp, Schedule, at_step
from eckart.schedules.base import add_gradient


class Gated(Cuttable):
    """scale * B diag(gate) A."""

    def __init__(
        self, B: Float[Tensor, "out r"], A: Float[Tensor, "r in"], gate: Float[Tensor, " r"], scale: float
    ):  # fmt: skip
        super().__init__(B, A, scale)
        self.gate = nn.Parameter(gate)

    def factors(self, host: Host) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
        return self.scale * self.gate * self.B, self.A

    def keep(self, components: Int[Tensor, " kept"]) -> None:
        super().keep(components)
        cut(self.gate, components, 0)


class Closing(Proximal):
    """Thresholds the gates by xi after every step; at the end, cuts what is closed."""

    def __init__(self, config: SoRA, updates: dict[str, Gated]):
        super().__init__(lambda: [u.gate for u in updates.values() if u.rank], config.xi)
        self.config, self.updates = config, updates
        self.needs_total = bool(config.warmup) and isinstance(config.warmup, float)

    def begin(self, optimizer: Optimizer | None = None, total: int | None = None) -> None:
        for group in getattr(optimizer, "param_groups", ()):
            if group.get("weight_decay") and {id(p) for p in group["params"]} & {id(g) for g in self.gates()}:
                raise ValueError(f"sora's gates would decay by {group['weight_decay']}, which is no part of the method: give them a group of their own without weight decay, AdamW(eckart.adapters.sora.groups(model, ...))")  # fmt: skip # noqa: E501
        super().begin(optimizer, total)

    def bound(self, step: int, rate: float) -> float:
        warmup = at_step(self.config.warmup, self.total, "warmup") if self.config.warmup else 0
        xi = Ramp(0, warmup, 0.0, self.strength)(step)
        return xi * rate if self.config.times_rate else xi

    def gradients(self, step: int) -> None:
        gates = self.gates() if self.config.l1 else []
        for gate in gates:
            add_gradient(gate, self.config.l1 / sum(len(g) for g in gates) * gate.detach().sign())

    def finish(self) -> None:
        for name, update in self.updates.items():
            update.keep(update.gate.detach().nonzero()[:, 0])
            self.config.rank_pattern[name] = update.rank


@adapter("sora", family="low rank", paper="SoRA, Ding et al., EMNLP 2023, arXiv 2311.11696")
@dataclass
class SoRA(Adapter):
    """W + alpha / rank B diag(g) A, where soft thresholding of g decides how many components each layer keeps.

    It follows every step of the optimiser (`eckart.adapters.schedule`), and its `finish` cuts the closed components
    out; a layer with none left adds nothing. A closed gate opens again where one step moves it by more than xi. As in
    the authors' code, xi is not multiplied by the learning rate, unless `times_rate` says so. Gates take no weight
    decay: `groups` sorts an optimiser's parameters. `sparsify` is the paper's sweep over rising xi.

    Args:
        rank: components at the start.
        alpha: over that rank, the scale of the update, also after cutting.
        xi: what each step takes off |g|.
        times_rate: whether xi is times the learning rate: a proximal step in the strict sense, which fades with it.
        l1: of mean |g| in the loss, through the ordinary gradient.
        warmup: steps, or a share of the run, over which xi rises from 0: B = 0 leaves gates without gradient at first.
    """

    rank: int = 8
    alpha: float = 16.0
    xi: float = 3e-4
    times_rate: bool = False
    l1: float = 0.0
    warmup: float = 0.0

    def check(self) -> None:
        self.at_least(rank=self.rank)
        self.positive(alpha=self.alpha)
        self.not_negative(xi=self.xi, l1=self.l1)
        at_step(self.warmup, 1, "sora(warmup)")

    def update(self, site: Site) -> Gated:
        rank, (out, in_) = self.fitting(site), site.shape
        A = site.uniform(rank, in_, bound=in_**-0.5)
        return Gated(torch.zeros(out, rank), A, site.normal(rank), self.alpha / self.rank)

    def schedule(self, model: nn.Module, updates: dict[str, Update]) -> Schedule:
        return Closing(self, {n: u for n, u in updates.items() if isinstance(u, Gated)})


def groups(
    model: nn.Module, lr: float = 8e-4, *, gate_lr: float | None = None, weight_decay: float = 0.1
) -> list[dict[str, Any]]:
    """Parameter groups of an optimiser: the gates, by identity, apart from all else that is trained."""
    gates = [m.gate for m in model.modules() if isinstance(m, Gated) and m.gate.requires_grad]
    apart = {id(g) for g in gates}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
    return [
        {"params": others, "lr": lr, "weight_decay": weight_decay},
        {"params": gates, "lr": lr if gate_lr is None else gate_lr, "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class Stage:
    """One point of the sweep: the threshold, the open gates, the parameters of the cut LoRA, and the metric."""

    xi: float
    gates: int
    parameters: int
    metric: float


def sparsify(
    model: nn.Module, thresholds: Sequence[float], train: Callable[[Schedule], None], measure: Callable[[], float]
) -> list[Stage]:  # fmt: skip
    """Train at one threshold after the other, each from where the last one ended (SoRA, Algorithm 1).

    Args:
        model: with a `sora` adapter, which is the active one.
        thresholds: xi, rising, from 0 or more.
        train: trains the model for one stage with the schedule that it is given, without calling its `finish`.
        measure: the metric of the model as it stands.

    Returns:
        The curve of metric against size. Raises `ValueError` where the thresholds do not rise.
    """
    if not thresholds or thresholds[0] < 0 or any(b <= a for a, b in pairwise(thresholds)):
        raise ValueError(f"sparsify(thresholds={list(thresholds)!r}): they start at 0 or above, and each is larger than the one before")  # fmt: skip # noqa: E501
    found = updates_of(model)
    gated = {n: u for n, u in found.items() if isinstance(u, Gated)}
    if not gated:
        raise ValueError("sparsify closes the gates of SoRA, and the active adapter has none: put a sora adapter on the model")  # fmt: skip # noqa: E501
    curve = []
    for xi in thresholds:
        stage: Any = schedule_of(model)
        stage.strength = xi
        train(stage)
        stage.release()
        counts = {n: int(u.gate.count_nonzero()) for n, u in gated.items()}
        size = sum(counts[n] * (u.A.shape[1] + len(u.B)) for n, u in gated.items())
        curve.append(Stage(xi, sum(counts.values()), size, measure()))
    return curve
