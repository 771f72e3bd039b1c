"""Structured training: weights that are low-rank, sparse or both while they are trained. One file per method."""

from eckart.registry import discover
from eckart.training.base import NoSaving, StructuredSchedule, TrainingMethod, structure

discover(__name__, __path__)

__all__ = ["NoSaving", "StructuredSchedule", "TrainingMethod", "structure"]
