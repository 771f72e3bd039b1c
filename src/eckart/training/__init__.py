"""Structured training: weights that are low-rank, sparse or both while they are trained. One file per method."""

from eckart.registry import discover
from eckart.training.base import NoSaving, StructuredSchedule, TrainingMethod, structure
from eckart.training.linformer import projected_attention, use_linformer
from eckart.training.lorentz import Lorentz, LorentzLinear

discover(__name__, __path__)

__all__ = [
    "Lorentz",
    "LorentzLinear",
    "NoSaving",
    "StructuredSchedule",
    "TrainingMethod",
    "projected_attention",
    "structure",
    "use_linformer",
]
