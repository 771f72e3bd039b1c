"""Compression: one file per published method, and the main job's verbs."""

from eckart.compression.api import Compressed, compress, compress_to, method_for
from eckart.registry import discover

discover(__name__, __path__)

__all__ = ["Compressed", "compress", "compress_to", "method_for"]
