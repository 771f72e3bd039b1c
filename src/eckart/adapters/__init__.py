"""Adapters: parameter-efficient fine-tuning as tuners for Hugging Face PEFT. One file per method."""

from eckart.adapters.adapt import adapt, schedule, updates
from eckart.adapters.base import Adapter, FactoredUpdate, Update
from eckart.adapters.matching import targets
from eckart.adapters.native import Native
from eckart.adapters.tuner import adapter
from eckart.registry import discover

discover(__name__, __path__)

__all__ = ["Adapter", "FactoredUpdate", "Native", "Update", "adapt", "adapter", "schedule", "targets", "updates"]
