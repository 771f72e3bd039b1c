"""Gradients on their way from process to process: what compresses them, and who chooses how far."""

from eckart.optimizers.communication.compressor import COMPRESSORS, Compressor, Draw, Layer
from eckart.optimizers.communication.plan import NoPlan, Plan, choose
from eckart.optimizers.communication.power_sgd import PowerSGD
from eckart.optimizers.communication.qsgd import QSGD
from eckart.optimizers.communication.top_k import TopK
from eckart.optimizers.communication.wire import Wire

__all__ = [
    "COMPRESSORS",
    "QSGD",
    "Compressor",
    "Draw",
    "Layer",
    "NoPlan",
    "Plan",
    "PowerSGD",
    "TopK",
    "Wire",
    "choose",
]
