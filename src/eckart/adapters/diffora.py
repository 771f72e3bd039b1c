"""DiffoRA: which layers get a LoRA is learned by gradient descent on held-out data, and then decided."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from eckart.adapters.base import Adapter, FactoredUpdate, Update
from eckart.adapters.cutting import Cuttable
from eckart.adapters.host import Host, Shared, Site, seeded
from eckart.adapters.tuner import adapter
from eckart.schedules import Schedule, at_step
from eckart.schedules.base import forget


class Choice(Cuttable):
    """scale * gate * B A while choosing; then the pair alone, or without it the pair that all such layers share.

    Attributes:
        gate: how much of the update is used.
        search: what the gate is made of, and the two moments of its gradient.
        dropped: whether the layer was decided against.
        rest: where the shared pair is, and its name; None where a dropped layer gets nothing.
    """

    gate: Tensor
    search: Tensor

    def __init__(
        self, B: Float[Tensor, "out r"], A: Float[Tensor, "r in"], scale: float, rest: tuple[Shared, str] | None
    ):  # fmt: skip
        super().__init__(B, A, scale)
        self.register_buffer("gate", torch.ones(()))
        self.register_buffer("search", torch.zeros(3))
        self.dropped, self.rest = not self.rank, [rest]  # in a list: it is no submodule of this one

    def factors(self, host: Host) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
        (rest,) = self.rest
        if not self.dropped:
            return self.scale * self.gate * self.B, self.A
        if rest is None:
            return self.B[:, :0], self.A[:0]
        shared, kind = rest
        return self.scale * shared.get(f"B_{kind}"), shared.get(f"A_{kind}")

    def forward(self, x: Tensor, y0: Tensor, host: Host) -> Tensor:
        if self.dropped and self.rest == [None]:
            return torch.zeros_like(y0)
        return FactoredUpdate.forward(self, x, y0, host)


class Search(Schedule):
    """Trains the gates on held-out batches between the optimiser's steps, then keeps the best layers alone.

    Attributes:
        entropies: of the relaxed choice after each step of the gates: near 0 too early, the gates have collapsed.
        loss: of the model on a held-out batch; to be replaced where the model has none of its own.
    """

    needs_total = True

    def __init__(self, config: DiffoRA, model: nn.Module, updates: dict[str, Choice]):
        super().__init__()
        self.config, self.model, self.updates = config, model, updates
        self.entropies: list[float] = []
        self.loss: Callable[[nn.Module, dict[str, Any]], Tensor] = held_out_loss
        self.first = self.last = -1
        self.groups = config.grouped(list(updates))

    def begin(self, optimizer: Optimizer | None = None, total: int | None = None) -> None:
        if total or self.total:
            self.first = at_step(self.config.warmup, total or self.total, "warmup")
            self.last = at_step(self.config.search, total or self.total, "search")
            if not self.first < self.last <= (total or self.total or 0):
                raise ValueError(f"diffora(warmup={self.config.warmup!r}, search={self.config.search!r}) of {total or self.total} steps: the search must end after the warm-up, and within the run")  # fmt: skip # noqa: E501
        super().begin(optimizer, total)

    def at(self, step: int) -> None:
        for update in self.updates.values():
            update.dropped = not update.rank or (step >= self.last and not update.gate)

    def after(self, step: int) -> None:
        if self.first < step <= self.last:
            self.learn(step - self.first)
        if step == self.last:
            self.decide()

    def relaxed(self, logits: Float[Tensor, " layers"]) -> Float[Tensor, " layers"]:
        """The gates: of mean 1 in each group under `softmax`."""
        if self.config.gate == "sigmoid":
            return logits.sigmoid()
        gates = torch.zeros_like(logits)
        for group in self.groups:
            gates = gates.index_put((group.to(logits.device),), len(group) * logits[group].softmax(0))
        return gates

    def learn(self, count: int) -> None:
        """The `count`-th step of Adam on the gates, by the gradient of the held-out loss; the adapters stay."""
        batches, updates = self.config.validation, list(self.updates.values())
        state = torch.stack([u.search for u in updates]).float()
        logits = state[:, 0].clone().requires_grad_(True)
        with torch.enable_grad():
            self._set(self.relaxed(logits))
            loss = self.loss(self.model, batches[(count - 1) % len(batches)])
            (gradient,) = torch.autograd.grad(loss, logits)
        first, second = 0.5 * state[:, 1] + 0.5 * gradient, 0.999 * state[:, 2] + 0.001 * gradient.square()
        step = first / (1 - 0.5**count) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
        state = torch.stack([state[:, 0] - self.config.gate_lr * step, first, second], 1)
        for update, row in zip(updates, state, strict=True):
            update.search.copy_(row)
        gates = self.relaxed(state[:, 0])
        self._set(gates)
        shares = [gates[g] / gates[g].sum() for g in self.groups]
        self.entropies.append(float(sum(torch.special.entr(s).sum() for s in shares) / len(shares)))

    def _set(self, gates: Float[Tensor, " layers"]) -> None:
        for update, gate in zip(self.updates.values(), gates, strict=True):
            update.gate = gate

    @torch.no_grad()
    def decide(self) -> None:
        """Keep the best of each group, and start their pairs anew."""
        names, gates = list(self.updates), torch.stack([u.gate for u in self.updates.values()])
        for group in self.groups:
            count = max(1, round(self.config.share * len(group)))
            order = group[gates[group].argsort(descending=True, stable=True).cpu()].tolist()
            for place, index in enumerate(order):
                update = self.updates[names[index]]
                update.gate = torch.full_like(update.gate, float(place < count))
                update.A.copy_(self.config.drawn(f"{names[index]} again", update.A.shape))
                update.B.zero_()
                forget(self.optimizer, [update.A, update.B])

    def finish(self) -> None:
        if self.last < 0 or self.steps < self.last:
            ends = "has not begun" if self.last < 0 else f"ends at step {self.last}"
            raise RuntimeError(f"diffora's search {ends}, and training stopped at step {self.steps}: no layer was chosen yet")  # fmt: skip # noqa: E501
        for name, update in self.updates.items():
            if update.dropped:
                update.keep(torch.arange(0))
            self.config.rank_pattern[name] = update.rank
        self.config.forget_unused(self.updates)


@adapter("diffora", family="low rank", paper="DiffoRA, Jiang et al., 2025, arXiv 2502.08905")
@dataclass
class DiffoRA(Adapter):
    """W + alpha / rank B A on a share of the layers, which are chosen by differentiable search.

    The search has a gate on every pair. After a warm-up (B = 0 gives gates no gradient) each step of the optimiser,
    which trains the pairs, is followed by a step of Adam on the gates alone, against the loss on the held-out batches
    given as `data` (first-order, as in DARTS). Then the layers with the largest gates start anew, without gates, and
    the rest is dropped. Let the search end while the pairs still learn: once they have settled, the gradients of the
    gates are noise, which undoes the order.

    `eckart.adapters.schedule` does all this; its `finish` cuts dropped layers to rank 0. Where the model gives no loss
    of its own, such as an encoder under another head, set that schedule's `loss`, of model and batch. The paper could
    not be read in full: the form of the gates, the grouping and the split of the run are those of its lineage.

    Args:
        rank: of each pair.
        alpha: over the rank, the scale.
        share: of the layers that get a pair.
        search: steps, or share of the run, after which is decided.
        warmup: of these, the first, in which the gates stay.
        gate: `softmax` (layers of a block compete; times their number) or `sigmoid`.
        group: whether the choice is among the layers of a `block` or of the whole `model`.
        gate_lr: of Adam on the gates.
        share_rest: whether dropped layers of one kind (the last part of the name) share one pair.
    """

    rank: int = 8
    alpha: float = 16.0
    share: float = 0.5
    search: float = 0.3
    warmup: float = 0.1
    gate: str = "softmax"
    group: str = "block"
    gate_lr: float = 1e-3
    share_rest: bool = False

    needs_data: ClassVar[bool] = True
    shares: ClassVar[bool] = True

    def check(self) -> None:
        self.validation: list[Any] = []
        self.at_least(rank=self.rank)
        self.positive(alpha=self.alpha, gate_lr=self.gate_lr)
        if not 0 < self.share <= 1:
            raise ValueError(f"diffora(share={self.share!r}): it is a share of the layers, above 0 and at most 1")
        for name in ("search", "warmup"):
            at_step(getattr(self, name), 1, f"diffora({name})")
        if self.gate not in ("softmax", "sigmoid"):
            raise ValueError(f"diffora(gate={self.gate!r}): it is 'softmax' or 'sigmoid'")
        if self.group not in ("block", "model"):
            raise ValueError(f"diffora(group={self.group!r}): it is 'block' or 'model'")

    def collect(self, model: nn.Module, names: list[str], data: list[Any]) -> dict[str, Any]:
        self.validation = data
        return {}

    def drawn(self, name: str, shape: torch.Size | tuple[int, int]) -> Float[Tensor, "r in"]:
        """A down-projection."""
        return (2 * torch.rand(tuple(shape), generator=seeded(self.seed, name)) - 1) * shape[1] ** -0.5

    def grouped(self, names: list[str]) -> list[Tensor]:
        """Indices of the layers that compete: of each block, which ends at the first number in a name."""
        groups: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            block = re.match(r"(.*?\.\d+)\.", f"{name}.")
            groups.setdefault(block[1] if block and self.group == "block" else "", []).append(index)
        return [torch.tensor(g) for g in groups.values()]

    def update(self, site: Site) -> Choice:
        rank, (out, in_) = self.fitting(site), site.shape
        rest = (site.shared, site.name.rpartition(".")[2]) if self.share_rest else None
        if rest is not None and self.rank_pattern.get(site.name, 0) == 0:
            shared, kind = rest
            shared.parameter(f"B_{kind}", lambda: torch.zeros(out, self.rank))
            shared.parameter(f"A_{kind}", lambda: self.drawn(f"all {kind}", (self.rank, in_)))
            shape = (len(shared.get(f"B_{kind}")), shared.get(f"A_{kind}").shape[1])
            if shape != (out, in_):
                raise ValueError(f"{site.name}: diffora(share_rest=True) would have it share a pair with the other {kind}, which are {shape[0]} x {shape[1]} where it is {out} x {in_}: exclude it, or share none")  # fmt: skip # noqa: E501
        return Choice(torch.zeros(out, rank), self.drawn(site.name, (rank, in_)), self.alpha / self.rank, rest)

    def forget_unused(self, updates: dict[str, Choice]) -> None:
        """Delete the shared pairs that no dropped layer needs."""
        rests = [(u.dropped, *rest) for u in updates.values() for rest in u.rest if rest is not None]
        needed = {kind for dropped, _, kind in rests if dropped}
        for _, shared, kind in rests:
            if kind not in needed:
                for name in (f"A_{kind}", f"B_{kind}"):
                    shared._parameters.pop(name, None)

    def schedule(self, model: nn.Module, updates: dict[str, Update]) -> Schedule:
        if set(updates) <= set(self.rank_pattern):
            return Schedule()
        if not self.validation:
            raise ValueError("diffora chooses layers on data that are kept from training: give batches of them, adapt(model, 'diffora', data=...)")  # fmt: skip # noqa: E501
        return Search(self, model, {n: u for n, u in updates.items() if isinstance(u, Choice)})


def held_out_loss(model: nn.Module, batch: dict[str, Any]) -> Float[Tensor, ""]:
    """The model's own loss on a batch; text without labels is its own."""
    device = next(model.parameters()).device
    batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    if "labels" not in batch and "input_ids" in batch:
        labels, mask = batch["input_ids"], batch.get("attention_mask")
        batch["labels"] = labels if mask is None else labels.masked_fill(mask == 0, -100)
    loss: Tensor | None = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ValueError("the model gives no loss for diffora's held-out batches: they must hold its labels; where it has none of its own, set `loss`, a function of model and batch, of the schedule that eckart.adapters.schedule gives")  # fmt: skip # noqa: E501
    return loss
