"""Metrics: which error a fit minimises, made from calibration statistics."""

from eckart.metrics.activation_diagonal import ActivationDiagonal
from eckart.metrics.base import METRICS, Metric, as_metric
from eckart.metrics.fisher import Fisher
from eckart.metrics.fisher_rows import FisherRows
from eckart.metrics.input_covariance import InputCovariance
from eckart.metrics.kronecker import Kronecker
from eckart.metrics.output_covariance import OutputCovariance
from eckart.metrics.plain import Plain
from eckart.metrics.statistics import Statistics
from eckart.registry import discover

discover(__name__, __path__)

__all__ = [
    "METRICS",
    "ActivationDiagonal",
    "Fisher",
    "FisherRows",
    "InputCovariance",
    "Kronecker",
    "Metric",
    "OutputCovariance",
    "Plain",
    "Statistics",
    "as_metric",
]
