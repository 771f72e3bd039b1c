"""What changes in a model as its training goes on: one protocol for bare loops and for transformers' Trainer."""

from typing import TYPE_CHECKING, Any

from eckart.schedules.base import Schedule, Together
from eckart.schedules.points import Every, Ramp, at_step

if TYPE_CHECKING:
    from eckart.schedules.trainer import ScheduleCallback

__all__ = ["Every", "Ramp", "Schedule", "ScheduleCallback", "Together", "at_step"]


def __getattr__(name: str) -> Any:
    if name == "ScheduleCallback":  # transformers' Trainer takes seconds to import
        from eckart.schedules.trainer import ScheduleCallback

        return ScheduleCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
