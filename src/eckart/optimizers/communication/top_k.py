"""The largest numbers of a gradient, with their places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from eckart.forms.packing import pack_wide, packed_width, unpack_wide
from eckart.optimizers.communication.compressor import Packed, Shape, check_whole


@dataclass(frozen=True)
class TopK(Packed, word="top_k"):
    """The k numbers of the largest magnitude, as they are, and their places in as many bits as the layer's size needs.

    Sparsified SGD with memory (Stich et al., NeurIPS 2018, arXiv 1809.07599). The dial is k.

    Args:
        density: the uniform share of numbers that is sent.
        points: settings to choose from, in even ratios from `low` to `high`; the default one is added.
    """

    density: float = 0.01
    low: float = 0.25
    high: float = 4.0
    points: int = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.density <= 1:
            raise ValueError(f"the density of top_k is above 0 and at most 1, not {self.density!r}")
        check_whole("top_k", "number of points", self.points, 1)

    def default(self, shape: Shape) -> int:
        return max(1, round(self.density * math.prod(shape)))

    def dials(self, shape: Shape) -> tuple[int, ...]:
        ratios = np.geomspace(self.low, self.high, self.points)
        wanted = {round(float(ratio) * self.density * math.prod(shape)) for ratio in ratios}
        return tuple(sorted({min(max(1, k), math.prod(shape)) for k in wanted} | {self.default(shape)}))

    def nbytes(self, shape: Shape, dial: int, itemsize: int) -> int:
        return dial * itemsize + packed_width(dial, _place_bits(math.prod(shape)))

    def errors(self, M: Float[Tensor, "n m"], dials: Sequence[int]) -> Float[np.ndarray, " dials"]:
        ascending = M.flatten().double().square().sort().values
        tails = torch.cat([ascending.new_zeros(1), ascending.cumsum(0)]).sqrt()
        return tails[[M.numel() - k for k in dials]].cpu().numpy()

    def encode(self, M: Float[Tensor, "n m"], dial: int, dtype: torch.dtype, seed: int) -> UInt8[Tensor, " bytes"]:
        flat = M.flatten()
        places = flat.abs().topk(dial, sorted=False).indices
        values = flat[places].to(dtype).view(torch.uint8)
        return torch.cat([values, pack_wide(places[None], _place_bits(M.numel()))[0]])

    def decode(self, message: UInt8[Tensor, " bytes"], dial: int, dtype: torch.dtype, like: Tensor) -> Tensor:
        values, places = message.split([dial * dtype.itemsize, message.numel() - dial * dtype.itemsize])
        index = unpack_wide(places[None], _place_bits(like.numel()), dial)[0]
        # only a tensor of its own begins where numbers of that type may
        numbers = values.clone().view(dtype).to(like)
        return torch.zeros_like(like).flatten().index_copy_(0, index, numbers).view_as(like)


def _place_bits(numel: int) -> int:
    return max(1, (numel - 1).bit_length())
