"""Gradients in a few bits for each number, rounded up or down by chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from eckart.forms.grids import Uniform, divisor
from eckart.forms.packing import pack, packed_width, unpack
from eckart.optimizers.communication.compressor import Packed, Shape, check_whole

GRID = Uniform(zero="real")
ENDS = 8
"""Bytes of a group's scale and least number, in float32."""


@dataclass(frozen=True)
class QSGD(Packed, word="qsgd"):
    """Evenly spaced numbers between the least and the largest of each group; the expectation is the gradient itself.

    QSGD (Alistarh et al., NeurIPS 2017, arXiv 1610.02132, section 3) with the range of the group for its norm. The dial
    is the number of bits.

    Args:
        bits: the uniform number of bits, 1 to 8.
        group: numbers that share a range, along the flattened gradient.
    """

    unbiased: ClassVar[bool] = True
    bits: int = 4
    group: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("qsgd", "number of bits", self.bits, 1, 8)
        check_whole("qsgd", "group", self.group, 1)

    def default(self, shape: Shape) -> int:
        return self.bits

    def dials(self, shape: Shape) -> tuple[int, ...]:
        most = min(8, math.ceil(self.high * self.bits))
        return tuple(range(max(1, math.floor(self.low * self.bits)), most + 1))

    def nbytes(self, shape: Shape, dial: int, itemsize: int) -> int:
        return self._groups(math.prod(shape)) * ENDS + packed_width(math.prod(shape), dial)

    def errors(self, M: Float[Tensor, "n m"], dials: Sequence[int]) -> Float[np.ndarray, " dials"]:
        """The root of the expected square, scale² f (1 - f) for a number that is f of a step above the lower one."""
        groups = self._split(M)
        squares = []
        for bits in dials:
            p = GRID.fit(groups, bits)
            steps = (groups - p["zero"]) / divisor(p["scale"])
            share = (steps - steps.floor()).flatten()[: M.numel()]
            weight = p["scale"].square().expand_as(groups).flatten()[: M.numel()]
            squares.append(float((weight * share * (1 - share)).sum(dtype=torch.float64)))
        return np.sqrt(squares)

    def encode(self, M: Float[Tensor, "n m"], dial: int, dtype: torch.dtype, seed: int) -> UInt8[Tensor, " bytes"]:
        groups = self._split(M)
        p = {name: x.float() for name, x in GRID.fit(groups, dial).items()}
        generator = torch.Generator(M.device).manual_seed(seed)
        draw = torch.rand(groups.shape, generator=generator, dtype=groups.dtype, device=M.device)
        # the nearest number to one moved by an even draw of half a step is the one below, or by chance the one above
        codes = GRID.encode(groups + (draw - 0.5) * p["scale"], p, dial).view(1, -1)[:, : M.numel()]
        ends = torch.cat([p["scale"].flatten(), p["zero"].flatten()])
        return torch.cat([ends.view(torch.uint8), pack(codes, dial)[0]])

    def decode(self, message: UInt8[Tensor, " bytes"], dial: int, dtype: torch.dtype, like: Tensor) -> Tensor:
        count = self._groups(like.numel())
        ends, packed = message.split([count * ENDS, message.numel() - count * ENDS])
        scale, zero = ends.clone().view(torch.float32).to(like).view(2, count, 1)
        width = self._width(like.numel())
        codes = F.pad(unpack(packed[None], dial, like.numel())[0], (0, count * width - like.numel()))
        found = GRID.decode(codes.view(count, width), {"scale": scale, "zero": zero}, dial)
        return found.flatten()[: like.numel()].view_as(like)

    def _width(self, numel: int) -> int:
        return min(self.group, numel)

    def _groups(self, numel: int) -> int:
        return -(-numel // self._width(numel))

    def _split(self, M: Tensor) -> Float[Tensor, "groups width"]:
        """The last group is filled up with its own last number, which leaves its range as it is."""
        flat, width = M.flatten(), self._width(M.numel())
        return torch.cat([flat, flat[-1:].expand(-flat.numel() % width)]).view(-1, width)
