"""Every registered metric passes the battery, and is compared with its definition written out."""

from __future__ import annotations

from eckart.metrics import ActivationDiagonal, FisherRows, InputCovariance, Kronecker, Metric, OutputCovariance, Plain
from eckart.testing import MetricContract


class TestMetrics(MetricContract):
    pass
