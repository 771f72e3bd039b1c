"""eckart: make neural networks small by decomposition.

A big matrix is written as an expression of cheap ones, fitted against an error that matters, under a budget shared by
the whole model. Importing this package lets transformers load what it saved.
"""

import os

# Threads that spin while they wait make small solves five times slower where another process wants the core; this is
# read when torch is first loaded, and a value that the user has set stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Elsewhere than on Intel's processors, MKL adds up in an order that depends on where in memory a tensor lies, so that a
# model that was loaded would not be the one that was saved, to the bit; read at the first product, and costs no time.
os.environ.setdefault("MKL_CBWR", "AUTO")

__version__ = "0.1.0"

from eckart import adapters, optimizers, training
from eckart.checkpoint.hf import EckartConfig
from eckart.compression import Compressed, compress, compress_to
from eckart.forms import Dense, Diagonal, Form, LowRank, Product, Sum, densify, parse
from eckart.jobs import Result
from eckart.metrics import (
    ActivationDiagonal,
    FisherRows,
    InputCovariance,
    Kronecker,
    OutputCovariance,
    Plain,
)
from eckart.verbs import fit

__all__ = [
    "ActivationDiagonal",
    "Compressed",
    "Dense",
    "Diagonal",
    "EckartConfig",
    "FisherRows",
    "Form",
    "InputCovariance",
    "Kronecker",
    "LowRank",
    "OutputCovariance",
    "Plain",
    "Product",
    "Result",
    "Sum",
    "adapters",
    "compress",
    "compress_to",
    "densify",
    "fit",
    "optimizers",
    "parse",
    "training",
]
