"""Export: compressed models, and adapters, as other programs read them."""

from eckart.export.export import ADAPTERS, TARGETS, Exported, export

__all__ = ["ADAPTERS", "TARGETS", "Exported", "export"]
