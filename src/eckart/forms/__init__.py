"""Forms: what a compressed matrix looks like, and the modules that hold the numbers."""

from eckart.forms.algebra import Product, Sum
from eckart.forms.base import FORMS, Curve, Factored, Form, as_form, parse
from eckart.forms.dense import Dense
from eckart.forms.diagonal import Diagonal
from eckart.forms.layers import densify, drop_in
from eckart.forms.low_rank import LowRank
from eckart.forms.quantized import Quantized
from eckart.forms.select import Select
from eckart.registry import discover

discover(__name__, __path__)

__all__ = [
    "FORMS",
    "Curve",
    "Dense",
    "Diagonal",
    "Factored",
    "Form",
    "LowRank",
    "Product",
    "Quantized",
    "Select",
    "Sum",
    "as_form",
    "densify",
    "drop_in",
    "parse",
]
