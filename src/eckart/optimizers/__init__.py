"""Optimisers with their state in a subspace: one `Projected` with replaceable parts; published ones are presets.

    groups = param_groups(model, rank=128, verbose=True)       # prints what each optimiser would keep
    optimizer = GaLore(groups, lr=0.01, warm=1, stagger=True)  # no step stands out

What no paper wrote is made from the parts:

    optimizer = Projected(groups, projector=DCT(), inner=Lion(), residual=Sign(0.1), lr=1e-3)
"""

from eckart.optimizers import convex
from eckart.optimizers.dct_adamw import DCTAdamW
from eckart.optimizers.fira import Fira
from eckart.optimizers.frugal import Frugal
from eckart.optimizers.galore import GaLore
from eckart.optimizers.groups import memory, memory_table, param_groups
from eckart.optimizers.int8 import Int8Linear, int8_linears, plain_linears
from eckart.optimizers.lion_k import LionK
from eckart.optimizers.projected import Projected
from eckart.optimizers.projectors import DCT, SVD, Blocks, Columns, Projector, Random
from eckart.optimizers.q_galore import QGaLore
from eckart.optimizers.refresh import Every, Lazy
from eckart.optimizers.residual import Drop, ErrorFeedback, NormScaled, Plainly, Residual, Sign
from eckart.optimizers.rules import SGD, Adafactor, Adam, Adam8bit, Lion, Rule
from eckart.registry import discover

discover(__name__, __path__)

__all__ = [
    "DCT",
    "SGD",
    "SVD",
    "Adafactor",
    "Adam",
    "Adam8bit",
    "Blocks",
    "Columns",
    "DCTAdamW",
    "Drop",
    "ErrorFeedback",
    "Every",
    "Fira",
    "Frugal",
    "GaLore",
    "Int8Linear",
    "Lazy",
    "Lion",
    "LionK",
    "NormScaled",
    "Plainly",
    "Projected",
    "Projector",
    "QGaLore",
    "Random",
    "Residual",
    "Rule",
    "Sign",
    "convex",
    "int8_linears",
    "memory",
    "memory_table",
    "param_groups",
    "plain_linears",
]
