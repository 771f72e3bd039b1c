"""Export: compressed models as other programs read them."""

from eckart.export.export import TARGETS, Exported, export

__all__ = ["TARGETS", "Exported", "export"]
