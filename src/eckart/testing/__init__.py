"""Contract tests, for this package's own words and for yours.

A form, metric, allocator or optimiser that registers itself inherits a battery: subclass the contract in a test module,
under a name that pytest collects, and nothing else is needed.

    from eckart.testing import FormContract

    class TestMyForms(FormContract):
        def forms(self):
            return [(MyForm(bits=3), (12, 10))]

Needs pytest.
"""

import pytest

pytest.register_assert_rewrite(*(f"eckart.testing.{n}" for n in ("allocation", "forms", "metrics", "optimizers")))

from eckart.testing.allocation import AllocatorContract  # noqa: E402
from eckart.testing.forms import FormContract, composed_forms, registered_forms  # noqa: E402
from eckart.testing.metrics import MetricContract  # noqa: E402
from eckart.testing.numbers import error_ratio, gaussian  # noqa: E402
from eckart.testing.optimizers import OptimizerContract, registered_optimizers  # noqa: E402

__all__ = [
    "AllocatorContract",
    "FormContract",
    "MetricContract",
    "OptimizerContract",
    "composed_forms",
    "error_ratio",
    "gaussian",
    "registered_forms",
    "registered_optimizers",
]
