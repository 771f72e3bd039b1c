"""Every registered optimiser, put through the contract that ships with the package."""

from eckart.testing import OptimizerContract


class TestRegistered(OptimizerContract):
    pass
