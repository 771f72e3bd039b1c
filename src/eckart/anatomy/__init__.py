"""Where things are in a Hugging Face model, from its modules and config alone; nothing is run.

`anatomy(model)` describes a model of a family in `FAMILIES` part by part; `linears(model)` lists the linear modules of
any model, `experts(model)` the routed experts of any mixture. All work on models built on the meta device.
"""

from __future__ import annotations

from eckart.anatomy.experts import Experts, experts
from eckart.anatomy.families import FAMILIES, Family
from eckart.anatomy.find import UnknownModel, anatomy
from eckart.anatomy.linears import LinearSite, features, linears
from eckart.anatomy.parts import MLP, Anatomy, Attention, Block, Norm, Projection, Rotary, Rows

__all__ = [
    "FAMILIES",
    "MLP",
    "Anatomy",
    "Attention",
    "Block",
    "Experts",
    "Family",
    "LinearSite",
    "Norm",
    "Projection",
    "Rotary",
    "Rows",
    "UnknownModel",
    "anatomy",
    "experts",
    "features",
    "linears",
]
