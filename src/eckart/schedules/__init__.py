"""What changes in a model as its training goes on: one protocol for bare loops and for transformers' Trainer."""

from eckart.schedules.base import Schedule, Together
from eckart.schedules.points import Every, Ramp, at_step
from eckart.schedules.trainer import ScheduleCallback

__all__ = ["Every", "Ramp", "Schedule", "ScheduleCallback", "Together", "at_step"]
