"""The protocol of schedules: masks, ranks, projections and penalties that follow the optimiser's steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


class Schedule:
    """Follows a training run, one call of `step` after every step of the optimiser.

        schedule.begin(optimizer, total=1000)
        for batch in data:
            loss(batch).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        schedule.finish()

    In transformers' Trainer, `callbacks=[ScheduleCallback(schedule)]` does the first four calls. A subclass overrides
    some of `at`, `after`, `gradients` and `finish`. What it does depends on the number of steps and on the model alone,
    so its own state is one number, and a run resumes wherever it was cut.

    Attributes:
        steps: optimiser steps done.
        total: optimiser steps that the run will have; None until `begin` is told.
        optimizer: the optimiser in use, unwrapped; None where `begin` was given none.
        needs_total: whether `begin` must know the total.
    """

    needs_total = False

    def __init__(self) -> None:
        self.steps = 0
        self.total: int | None = None
        self.optimizer: Optimizer | None = None
        self._begun = False
        self._pending = False
        self._hook: Any = None

    def at(self, step: int) -> None:
        """Set what is a function of the step alone. Called for the first step, after every one, and on resuming."""

    def after(self, step: int) -> None:
        """Change weights. Called once for step 0, before all training, and once after every optimiser step."""

    def gradients(self, step: int) -> None:
        """Change the gradients of the optimiser step that comes next, which are complete."""

    def finish(self) -> None:
        """Training is over: leave in the model what is to be kept, ready for `save_pretrained`."""

    def begin(self, optimizer: Optimizer | None = None, total: int | None = None) -> None:
        """Call before the first forward pass, after `load_state_dict` where a run is resumed.

        Raises `ValueError` where the schedule needs an optimiser or the total and is given none.
        """
        name = type(self).__name__
        self.total = self.total if total is None else total
        if self.needs_total and not self.total:
            raise ValueError(f"{name} is laid out over the whole run: say how many optimiser steps it has, begin(optimizer, total=...)")  # fmt: skip # noqa: E501
        if optimizer is None and self.needs_optimizer:
            raise ValueError(f"{name} works on the optimiser's gradients or state: give it, begin(optimizer, ...)")
        self.release()
        if optimizer is not None:
            self.optimizer = inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has no hooks
            self._hook = inner.register_step_pre_hook(lambda *_: self._on_gradients())
        self._begun, self._pending = True, False
        self.at(self.steps)
        if self.steps == 0:
            self.after(0)

    @property
    def needs_optimizer(self) -> bool:
        """Whether `begin` must be given the optimiser."""
        return type(self).gradients is not Schedule.gradients

    @property
    def pending(self) -> bool:
        """Whether the optimiser has made a step that `step` was not yet called for."""
        return self._pending

    def _on_gradients(self) -> None:
        if self._pending:
            raise RuntimeError(f"the optimiser is about to make a second step since {type(self).__name__}.step() was called: call it once after each one")  # fmt: skip # noqa: E501
        self._pending = True
        self.gradients(self.steps)

    def step(self) -> None:
        """Call once after every optimiser step. Raises `RuntimeError` where there was none."""
        if not self._begun:
            raise RuntimeError(f"{type(self).__name__}.step() was called before begin(): training has not begun")
        if self._hook is not None and not self._pending:
            raise RuntimeError(f"{type(self).__name__}.step() was called without an optimiser step before it: with accumulated gradients, call it where the optimiser really steps")  # fmt: skip # noqa: E501
        self._pending = False
        self.steps += 1
        self.after(self.steps)
        self.at(self.steps)

    def release(self) -> None:
        """Let go of the optimiser."""
        if self._hook is not None:
            self._hook.remove()
        self.optimizer = self._hook = None

    def state_dict(self) -> dict[str, int]:
        """The number of steps: all else is in the model and the optimiser."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved state. Raises `RuntimeError` after `begin`, which would have acted on the weights."""
        if self._begun:
            raise RuntimeError("load a schedule's state before begin(), together with the model's and the optimiser's")
        steps = state.get("steps")
        if not isinstance(steps, int) or steps < 0:
            raise ValueError(f"{state!r} is not the state of a schedule: it holds the number of steps")
        self.steps = steps


class Together(Schedule):
    """Several schedules as one, in their order.

    Args:
        schedules: none of them begun.
    """

    def __init__(self, schedules: Sequence[Schedule]):
        super().__init__()
        self.schedules = list(schedules)
        self.needs_total = any(s.needs_total for s in self.schedules)

    @property
    def needs_optimizer(self) -> bool:
        return any(s.needs_optimizer for s in self.schedules)

    def begin(self, optimizer: Optimizer | None = None, total: int | None = None) -> None:
        for s in self.schedules:
            s.total, s.optimizer = total, getattr(optimizer, "optimizer", optimizer)
        super().begin(optimizer, total)

    def at(self, step: int) -> None:
        for s in self.schedules:
            s.steps = step
            s.at(step)

    def after(self, step: int) -> None:
        for s in self.schedules:
            s.after(step)

    def gradients(self, step: int) -> None:
        for s in self.schedules:
            s.gradients(step)

    def finish(self) -> None:
        for s in self.schedules:
            s.finish()


def forget(optimizer: Optimizer | None, parameters: Sequence[nn.Parameter]) -> None:
    """Drop the optimiser's state of parameters that now hold something else; it begins anew at its next step."""
    if optimizer is not None:
        for parameter in parameters:
            optimizer.state.pop(parameter, None)


def add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add to a gradient that may not be there."""
    gradient = gradient.to(parameter.dtype)
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)
