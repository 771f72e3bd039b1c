"""Projectors: in which subspace of a gradient moments are kept."""

from eckart.optimizers.projectors.base import Draw, Projector, low_shape
from eckart.optimizers.projectors.blocks import Blocks
from eckart.optimizers.projectors.columns import Columns
from eckart.optimizers.projectors.dct import DCT
from eckart.optimizers.projectors.random import Random
from eckart.optimizers.projectors.svd import SVD

__all__ = ["DCT", "SVD", "Blocks", "Columns", "Draw", "Projector", "Random", "low_shape"]
