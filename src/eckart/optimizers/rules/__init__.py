"""Inner rules: how a (projected) gradient becomes a direction."""

from eckart.optimizers.rules.adafactor import Adafactor
from eckart.optimizers.rules.adam import Adam, Adam8bit
from eckart.optimizers.rules.base import Direction, Rule
from eckart.optimizers.rules.lion import Lion
from eckart.optimizers.rules.sgd import SGD

RULES: dict[str, type[Rule]] = {"adam": Adam, "adam8bit": Adam8bit, "adafactor": Adafactor, "sgd": SGD, "lion": Lion}
"""Those that presets know by name."""

__all__ = ["RULES", "SGD", "Adafactor", "Adam", "Adam8bit", "Direction", "Lion", "Rule"]
