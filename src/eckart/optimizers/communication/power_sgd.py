"""PowerSGD: one step of block power iteration from where the last one ended (Vogels et al., NeurIPS 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from eckart.linalg.power import orthonormalise, random_basis
from eckart.linalg.svd import singular_values
from eckart.optimizers.communication.compressor import Compressor, Draw, Layer, Rounds, Shape, check_whole
from eckart.optimizers.communication.wire import Wire


@dataclass(frozen=True)
class PowerSGD(Compressor, word="power_sgd"):
    """M ~ P Qᵀ with P = orth(mean of M Q) and then Q = mean of Mᵀ P: both are sums, which all processes share.

    arXiv 1905.13727, algorithm 1. The dial is the rank.

    Args:
        rank: the uniform one, of which every layer has no more than its shorter side.
    """

    rank: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("power_sgd", "rank", self.rank, 1)

    def default(self, shape: Shape) -> int:
        return min(self.rank, *shape)

    def dials(self, shape: Shape) -> tuple[int, ...]:
        most = min(math.ceil(self.high * self.rank), *shape)
        return tuple(range(min(max(1, math.floor(self.low * self.rank)), *shape), most + 1))

    def nbytes(self, shape: Shape, dial: int, itemsize: int) -> int:
        return dial * sum(shape) * itemsize

    def errors(self, M: Float[Tensor, "n m"], dials: Sequence[int]) -> Float[np.ndarray, " dials"]:
        """By the tail of the singular values, which power iteration converges to."""
        squares = singular_values(M).square().cpu().numpy()
        tails = np.append(squares[::-1].cumsum()[::-1], 0.0)
        return np.sqrt(tails[list(dials)])

    def exchange(
        self, layers: Sequence[Layer], matrices: Sequence[Tensor], dtype: torch.dtype, wire: Wire, draw: Draw
    ) -> Rounds:
        pairs = list(zip(layers, matrices, strict=True))
        for layer, M in pairs:
            if layer.basis is None:
                layer.basis = random_basis(layer.shape[1], layer.dial, draw.shared(layer), M)
        message = _flat([M @ orthonormalise(_basis(layer))[0] for layer, M in pairs], dtype)
        yield wire.mean(message, "compressed")
        left = [orthonormalise(P.to(M))[0] for P, (_, M) in zip(_parts(message, layers, 0), pairs, strict=True)]
        message = _flat([M.mT @ P for P, (_, M) in zip(left, pairs, strict=True)], dtype)
        yield wire.mean(message, "compressed")
        found = []
        for P, Q, (layer, M) in zip(left, _parts(message, layers, 1), pairs, strict=True):
            Q = Q.to(M)
            # what is not finite arrives, and is not where the next step begins
            layer.basis = torch.where(Q.isfinite().all(), Q, _basis(layer))
            found.append((mean := P @ Q.mT, mean))
        return found


def _basis(layer: Layer) -> Tensor:
    if layer.basis is None:
        raise RuntimeError(f"{layer.name} has no basis to start from")
    return layer.basis


def _flat(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([F.to(dtype).flatten() for F in factors])


def _parts(message: Tensor, layers: Sequence[Layer], side: int) -> list[Tensor]:
    """The factors (n or m, rank) of every layer."""
    sizes = [layer.shape[side] * layer.dial for layer in layers]
    return [x.view(-1, layer.dial) for x, layer in zip(message.split(sizes), layers, strict=True)]
