"""Forms: what a compressed matrix looks like, and the modules that hold the numbers."""

from eckart.forms.algebra import Product, Sum
from eckart.forms.base import FORMS, Curve, Factored, Form, as_form, parse
from eckart.forms.block_diagonal import BlockDiagonal
from eckart.forms.codebook import Codebook
from eckart.forms.column_sparse import ColumnSparse, RowSparse
from eckart.forms.dense import Dense
from eckart.forms.densifying import densify
from eckart.forms.diagonal import Diagonal
from eckart.forms.group_sparse import GroupSparse
from eckart.forms.kronecker import Kronecker
from eckart.forms.layers import drop_in
from eckart.forms.low_rank import LowRank
from eckart.forms.one_of import OneOf
from eckart.forms.pyramid import Pyramid
from eckart.forms.quantized import Quantized
from eckart.forms.select import Select
from eckart.forms.semi_sparse import SemiSparse
from eckart.forms.sign_stack import SignStack
from eckart.forms.sparse import Sparse
from eckart.forms.tensor_train import TensorTrain
from eckart.forms.with_outliers import WithOutliers
from eckart.registry import discover

discover(__name__, __path__)

__all__ = [
    "FORMS",
    "BlockDiagonal",
    "Codebook",
    "ColumnSparse",
    "Curve",
    "Dense",
    "Diagonal",
    "Factored",
    "Form",
    "GroupSparse",
    "Kronecker",
    "LowRank",
    "OneOf",
    "Product",
    "Pyramid",
    "Quantized",
    "RowSparse",
    "Select",
    "SemiSparse",
    "SignStack",
    "Sparse",
    "Sum",
    "TensorTrain",
    "WithOutliers",
    "as_form",
    "densify",
    "drop_in",
    "parse",
]
