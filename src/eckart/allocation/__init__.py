"""Allocation: one byte budget spent over all weights of a model."""

from eckart.allocation.base import ALLOCATORS, Allocator, BudgetError, Problem, as_allocator
from eckart.allocation.budget import Budget
from eckart.allocation.entropy import Entropy
from eckart.allocation.optimal import Optimal
from eckart.allocation.spectrum_threshold import SpectrumThreshold
from eckart.allocation.uniform import Uniform
from eckart.registry import discover

discover(__name__, __path__)

__all__ = [
    "ALLOCATORS",
    "Allocator",
    "Budget",
    "BudgetError",
    "Entropy",
    "Optimal",
    "Problem",
    "SpectrumThreshold",
    "Uniform",
    "as_allocator",
]
