"""Those who hold the data: what a server asks of them, and one that trains in this process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import nn

from eckart.adapters.federation.accountant import Steps
from eckart.adapters.federation.privacy import (
    Batch,
    Gradients,
    Loss,
    Privacy,
    count_of,
    gradient,
    model_loss,
    taken,
    trained,
)
from eckart.adapters.federation.state import State, put_state, state_of, trained_names


@dataclass(frozen=True)
class Reply:
    """What a client uploads.

    Attributes:
        state: what it trained.
        examples: how many it has, which weights it in the mean.
        spent: the steps of DP-SGD that it took; None where they certify nothing.
        loss: mean over its steps; None where its gradients are private, as the loss is not.
    """

    state: State
    examples: int
    spent: Steps | None = None
    loss: float | None = None


class Client(Protocol):
    """Whoever holds data and keeps nothing of the model between rounds."""

    @property
    def examples(self) -> int:
        """How many it has."""

    def train(self, sent: State, number: int) -> Reply:
        """Train from what the server sent in round `number`, counted from 1."""


@dataclass
class LocalClient:
    """Trains a model of this process by local steps with a fresh optimiser; several clients can share the model.

    Args:
        model: with an adapter on it.
        data: tensors of which the first dimension counts the client's examples, such as input_ids and labels.
        seed: of its batches, noise and dropout, of any length. It must be each client's own, and its secret, such as
            secrets.randbits(128): whoever knows it can take the noise away.
        batch: examples of a step; on average, where they are drawn as DP-SGD asks.
        steps: of a round.
        lr: the learning rate.
        privacy: what is done to gradients; None trains as ever.
        loss: mean over a batch; the model's own, if not given.
        optimizer: called with the parameters and lr.
    """

    model: nn.Module
    data: Batch
    seed: int
    batch: int = 8
    steps: int = 1
    lr: float = 5e-4
    privacy: Privacy | None = None
    loss: Loss = model_loss
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD
    examples: int = field(init=False)

    def __post_init__(self) -> None:
        if not self.data or (count := count_of(self.data)) == 0:
            raise ValueError("a client has no data: leave it out of the federation")
        self.examples = count
        for name, value in (("batch", self.batch), ("steps", self.steps)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"client({name}={value!r}): it is a whole number, at least 1")
        if self.seed < 0:
            raise ValueError(f"client(seed={self.seed}): it is a whole number, 0 or more")
        if self.batch > count:
            raise ValueError(f"client(batch={self.batch}): the client has {count} examples; lower the batch to that")

    def train(self, sent: State, number: int) -> Reply:
        put_state(self.model, sent)
        parameters = trained(self.model)
        optimizer = self.optimizer(list(parameters.values()), lr=self.lr)
        chance, noise = (np.random.default_rng((self.seed, number, which)) for which in (0, 1))
        losses: list[float] = []
        self.model.train()
        devices = {p.device.index for p in parameters.values() if p.is_cuda}
        with torch.random.fork_rng(sorted(devices)):
            torch.manual_seed(int(chance.integers(2**32)))
            for _ in range(self.steps):
                for name, g in self._gradients(chance, noise, losses).items():
                    parameters[name].grad = g.to(parameters[name].dtype)
                optimizer.step()
                optimizer.zero_grad()
        uploaded = state_of(self.model)
        return Reply({n: uploaded[n] for n in trained_names(self.model)}, self.examples, self._spent(), _mean(losses))

    def _gradients(self, chance: np.random.Generator, noise: np.random.Generator, losses: list[float]) -> Gradients:
        if self.privacy is not None:
            rows = self.privacy.rows(self.examples, self.batch, chance)
            return self.privacy.gradients(self.model, self.loss, taken(self.data, rows), self.batch, noise)
        rows = torch.from_numpy(chance.permutation(self.examples)[: self.batch])
        return gradient(self.model, functools.partial(self._noted, losses), taken(self.data, rows))

    def _noted(self, losses: list[float], model: nn.Module, batch: Batch) -> torch.Tensor:
        loss = self.loss(model, batch)
        losses.append(float(loss.detach()))
        return loss

    def _spent(self) -> Steps | None:
        if self.privacy is None or not self.privacy.certified:
            return None
        return Steps(self.privacy.noise, self.batch / self.examples, self.steps)


def _mean(losses: list[float]) -> float | None:
    return sum(losses) / len(losses) if losses else None
