"""One self-contained HTML page about a compressed model, or about several beside each other."""

from __future__ import annotations

from eckart.report.comparison import comparison_report
from eckart.report.report import model_report

__all__ = ["comparison_report", "model_report"]
