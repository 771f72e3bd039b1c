"""LIFT: the entries that are largest in the low-rank approximation of the weight are trained, and no others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from eckart.adapters.base import Adapter, Update
from eckart.adapters.host import Host, Site
from eckart.adapters.layer import AdapterLayer
from eckart.adapters.regenerated import Regenerated
from eckart.adapters.tuner import adapter
from eckart.linalg.svd import truncated_svd
from eckart.remarks import remark
from eckart.schedules import Schedule


class Entries(Regenerated):
    """Trained values at some places of a matrix, and frozen ones at places that were trained before.

    Args:
        indices: of the K trained entries, counted row by row.
        shape: (out, in) of the matrix.
        left: how many frozen ones there are, for loading.
    """

    elastic: ClassVar[tuple[str, ...]] = ("left", "left_values")
    indices: Tensor
    left: Tensor
    left_values: Tensor

    def __init__(self, indices: Int[Tensor, " K"], shape: tuple[int, int], left: int = 0):
        super().__init__()
        self.shape = shape
        self.values = nn.Parameter(torch.zeros(len(indices)))
        self.register_buffer("indices", self._short(indices))
        self.register_buffer("left", self._short(indices.new_zeros(left)))
        self.register_buffer("left_values", torch.zeros(left))

    def _short(self, indices: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        return indices.to(torch.int32 if self.shape[0] * self.shape[1] < 2**31 else torch.int64)

    def made(self, values: Tensor) -> Float[Tensor, "out in"]:  # type: ignore[override]
        flat = values.new_zeros(self.shape[0] * self.shape[1])
        flat = flat.index_copy(0, self.left.long(), self.left_values.to(values.dtype))
        return flat.index_copy(0, self.indices.long(), values).view(self.shape)

    @torch.no_grad()
    def select(self, indices: Int[Tensor, " K"], optimizer: Optimizer | None) -> None:
        """Train these entries from now on.

        The matrix stays. The optimiser's state of entries that stay selected is kept to the bit, that of new ones is
        zero; what counts steps goes on.
        """
        before, trained = self.indices.long(), self.delta_flat()
        for name, state in self._state(optimizer).items():
            if isinstance(state, Tensor) and state.shape == self.values.shape:
                self._state(optimizer)[name] = state.new_zeros(len(trained)).index_copy(0, before, state)[indices]
        self.values.copy_(trained[indices])
        self.values.grad = None
        outside = trained.index_fill(0, indices, 0.0)
        left = outside.nonzero().flatten()
        self.indices, self.left, self.left_values = self._short(indices), self._short(left), outside[left]

    def delta_flat(self) -> Float[Tensor, " n"]:
        """The change of the matrix, row by row."""
        return self.made(self.values).flatten()

    def _state(self, optimizer: Optimizer | None) -> dict[str, Any]:
        return {} if optimizer is None else optimizer.state.get(self.values, {})


def principal(W: Float[Tensor, "out in"], rank: int, count: int) -> Int[Tensor, " count"]:
    """Where the best approximation of this rank is largest: sorted places, counted row by row (LIFT, section 3)."""
    if rank < min(W.shape):
        svd = truncated_svd(W, rank)
        W = (svd.U * svd.S) @ svd.Vh
    return W.abs().flatten().topk(count).indices.sort().values


class Reselection(Schedule):
    """Selects anew every `interval` steps, by the weights as they are then."""

    def __init__(self, hosts: dict[str, Host], entries: dict[str, Entries], settings: LIFT):
        super().__init__()
        self.hosts, self.entries, self.settings = hosts, entries, settings

    @property
    def needs_optimizer(self) -> bool:
        return True

    @torch.no_grad()
    def after(self, step: int) -> None:
        if step == 0 or step % self.settings.interval:
            return
        for name, entries in self.entries.items():
            host = self.hosts[name]
            W = host.weight() + entries.delta(host).float()
            entries.select(principal(W, self.settings.filter_rank, len(entries.indices)), self.optimizer)
            self.settings.left[name] = len(entries.left)


@adapter("lift", family="partial weights", paper="LIFT, Liu et al., ICML 2025, arXiv 2506.00772")
@dataclass
class LIFT(Adapter):
    """W + values at the places where the best rank-f approximation of W is largest: as many as LoRA would train.

    Every `interval` steps (`eckart.adapters.schedule`) places are chosen anew by the weights of then: entries that
    stay keep their optimiser state, new ones begin with none, and those that leave keep what they learned, frozen. Only
    selected entries have state; the gradient of a whole matrix lives within the backward pass of its layer. The places
    are saved. Weight decay draws entries to the frozen weight, not to zero.

    Args:
        rank: rho: K = rho (out + in) entries of each matrix are trained.
        filter_rank: f, of the approximation; from the rank of a matrix on, its own largest entries are taken.
        interval: T, steps between selections; 0 never selects again.
        left: layer -> entries that left; kept by the schedule, so that an adapter can be loaded.
    """

    rank: int = 32
    filter_rank: int = 32
    interval: int = 400
    left: dict[str, int] = field(default_factory=dict)

    def check(self) -> None:
        self.at_least(rank=self.rank, filter_rank=self.filter_rank)
        if self.interval:
            self.at_least(interval=self.interval)

    def update(self, site: Site) -> Entries:
        out, in_ = site.shape
        count = site.rank * (out + in_)
        if count >= out * in_:
            count = out * in_
            remark(f"{site.name}: lift(rank={site.rank}) trains all {count} entries of a matrix of shape {site.shape}, which is full tuning: lower the rank", UserWarning)  # fmt: skip # noqa: E501
        indices = principal(site.host.weight(), self.filter_rank, count).cpu()
        return Entries(indices, site.shape, self.left.get(site.name, 0))

    def schedule(self, model: nn.Module, updates: dict[str, Update]) -> Schedule:
        if not self.interval:
            return Schedule()
        hosts = {m.host.name: m.host for m in model.modules() if isinstance(m, AdapterLayer)}
        entries = {name: update for name, update in updates.items() if isinstance(update, Entries)}
        return Reselection(hosts, entries, self)
