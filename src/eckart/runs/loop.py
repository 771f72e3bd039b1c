"""The training loop: a step is a function of its number, the model and the optimiser, and all of it can be saved."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from eckart.calibration.tokens import Tokens
from eckart.runs.batches import Batches, Windows, on
from eckart.runs.config import Training
from eckart.runs.counting import SavedBytes, gradient_bytes, peak_memory, state_bytes, weight_bytes
from eckart.schedules import Schedule, at_step


@dataclass(frozen=True)
class Measured:
    """What one step cost.

    Attributes:
        step: its number, from 1.
        loss: mean over the predicted tokens (or the classified examples), in nats, before the step.
        lr: the learning rate of the first group.
        seconds: of the step, by the clock.
        tokens_per_second: tokens that were run.
        weight_bytes, gradient_bytes, state_bytes: counted in the model, its gradients and the optimiser.
        activation_bytes: of what autograd kept from forward to backward beside the weights, for one batch; counted once
            in a process.
        peak_memory: most bytes that this process held so far (on a GPU, most that were allocated on it).
    """

    step: int
    loss: float
    lr: float
    seconds: float
    tokens_per_second: float
    weight_bytes: int
    gradient_bytes: int
    state_bytes: int
    activation_bytes: int
    peak_memory: int


class Loop:
    """Trains a transformers model that computes its own loss: on windows of text, or on examples with labels.

    Every row is seen once in an epoch, in an order that the seed and the epoch determine. The loss of a step is the
    mean over its labels, however many batches they are in. The learning rates of all groups follow the settings; what
    they are when the loop is made is their highest.

    Args:
        model: a transformers model with a head, structured already.
        optimizer: over its parameters.
        data: windows of text, or any other rows.
        settings: of the training.
        schedule: what follows the optimiser's steps.
        seed: of the order of the rows.

    Raises `ValueError` where the rows hold padding only, or there is none.
    """

    def __init__(
        self, model: Any, optimizer: torch.optim.Optimizer, data: Tokens | Batches, settings: Training, *,
        schedule: Schedule | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        self.data: Batches = Windows(data) if isinstance(data, Tokens) else data
        if len(self.data) == 0 or not self.data.targets(torch.arange(len(self.data))):
            raise ValueError("there is not one token to predict in the data: give more text, or shorter windows")
        self.model, self.optimizer = model, optimizer
        self.settings, self.schedule, self.seed = settings, schedule, seed
        self.device = next(model.parameters()).device
        self.rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.steps = 0
        self.activations: int | None = None
        self._begun = False

    def step(self) -> Measured:
        """One step of the optimiser. Raises `RuntimeError` where the loss is not finite."""
        self._begin()
        begin = time.perf_counter()
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share(self.steps, self.settings)
        lr, loss, tokens = float(self.optimizer.param_groups[0]["lr"]), 0.0, 0
        rows = self.rows(self.steps)
        judged = self.data.targets(rows)
        for part in rows.split(self.settings.batch):
            here = self.data.targets(part)
            if here:  # the mean over no label is not a number
                inputs = self.data.batch(part)
                loss += self._batch(inputs, here / judged)
                tokens += inputs["input_ids"].numel()
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss of step {self.steps + 1} is {loss}: training has diverged; lower optimizer.lr (eckart finetune: --lr), or clip with training.clip (--clip)")  # fmt: skip # noqa: E501
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        gradients = gradient_bytes(self.model)
        self.optimizer.step()
        state = state_bytes(self.optimizer)  # before a schedule lets go of some
        if self.schedule is not None:
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        seconds = time.perf_counter() - begin
        return Measured(
            self.steps, loss, lr, seconds, tokens / seconds, weight_bytes(self.model), gradients,
            state, self.activations or 0, peak_memory(self.device),
        )  # fmt: skip

    def rows(self, step: int) -> Int[Tensor, " rows"]:
        """Numbers of the rows of a step."""
        size = self.settings.batch * self.settings.accumulate
        wanted = torch.arange(step * size, (step + 1) * size)
        epochs = wanted // len(self.data)
        orders = {int(e): torch.randperm(len(self.data), generator=_generator(self.seed, int(e))) for e in epochs.unique()}  # fmt: skip # noqa: E501
        return torch.stack([orders[int(e)][i] for e, i in zip(epochs, wanted % len(self.data), strict=True)])

    def _begin(self) -> None:
        if self._begun:
            return
        self._begun = True
        self.model.train()
        if self.schedule is not None:
            self.schedule.begin(self.optimizer, self.settings.steps)

    def _batch(self, inputs: dict[str, Any], weight: float) -> float:
        """Forward and backward of the loss times its weight in the step's; returns that."""
        inputs = on(self.device, inputs)
        counting = SavedBytes(self.model) if self.activations is None else None
        half = self.settings.precision == "bfloat16"
        with counting or contextlib.nullcontext(), torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            loss = self.model(**inputs).loss * weight
        if counting is not None:
            self.activations = counting.total
        loss.backward()
        return float(loss.detach())

    def state(self) -> dict[str, Any]:
        """All that the steps to come depend on; tensors and numbers only."""
        return {
            "steps": self.steps,
            "data": self.data.fingerprint(),
            "model": self.weights(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`, before the first step. Raises `ValueError` where it is of other data."""
        if state["data"] != self.data.fingerprint():
            raise ValueError("the texts are not those that this run began with: bring them back, or begin anew")
        self.put(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"])
        if state["cuda"]:
            torch.cuda.set_rng_state_all(state["cuda"])
        self.steps = state["steps"]

    def weights(self) -> dict[str, Tensor]:
        """Tensors of the model that a state holds."""
        found: dict[str, Tensor] = self.model.state_dict()
        return found

    def put(self, weights: dict[str, Tensor]) -> None:
        """Put such tensors back."""
        self.model.load_state_dict(weights)


def share(step: int, settings: Training) -> float:
    """Of the highest learning rate, at a step counted from 0: a linear rise, then the decay to the floor."""
    warmup = at_step(settings.warmup, settings.steps, "training.warmup")
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    done = max(0, step - warmup) / max(1, settings.steps - warmup)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "none": 1.0}[settings.decay]
    return rise * (settings.floor + (1 - settings.floor) * left)


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
