"""Schedules in transformers' Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from eckart.schedules.base import Schedule


class ScheduleCallback(TrainerCallback):
    """Lets a schedule follow Trainer's optimiser steps, from the one at which a resumed run goes on.

    With accumulated gradients there is one call for every optimiser step, not for every batch; steps that a gradient
    scaler skips do not count. `finish` is left to the user, who knows when training is over.
    """

    def __init__(self, schedule: Schedule):
        self.schedule = schedule

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.schedule.steps = state.global_step
        self.schedule.begin(optimizer, state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.schedule.pending:
            self.schedule.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.schedule.release()
