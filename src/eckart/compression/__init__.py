"""Compression: one file per published method, and the main job."""

from eckart.compression.afm import AFM
from eckart.compression.api import Compressed, compress, compress_to, method_for
from eckart.compression.asvd import ASVD
from eckart.compression.auto import Auto
from eckart.compression.fwsvd import FWSVD
from eckart.compression.lord import LoRD
from eckart.compression.modegpt import MoDeGPT
from eckart.compression.plan import Layer, Plan
from eckart.compression.recipe import Method, Recipe
from eckart.compression.result import Result
from eckart.compression.slicegpt import SliceGPT
from eckart.compression.svd import SVD
from eckart.compression.svd_llm import SVDLLM
from eckart.compression.welore import WeLore

__all__ = [
    "AFM",
    "ASVD",
    "FWSVD",
    "SVD",
    "SVDLLM",
    "Auto",
    "Compressed",
    "Layer",
    "LoRD",
    "Method",
    "MoDeGPT",
    "Plan",
    "Recipe",
    "Result",
    "SliceGPT",
    "WeLore",
    "compress",
    "compress_to",
    "method_for",
]
