"""The discrete cosine transform of type II, orthonormal: as a matrix, and by one FFT (Makhoul 1980)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.linalg.constants import constant


@constant
def dct_basis(n: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Float[Tensor, "n n"]:
    """B whose column i is the i-th DCT-II vector, sqrt(2/n) cos(pi i (2j + 1) / 2n) (the first times sqrt(1/2)).

    x B is the transform of the rows of x. Computed in float64 whatever the dtype.
    """
    j = torch.arange(n, dtype=torch.float64)
    # whole numbers modulo 4n keep the angles exact for large n
    angles = torch.remainder(j[None, :] * (2 * j[:, None] + 1), 4 * n) * (math.pi / (2 * n))
    B = math.sqrt(2 / max(n, 1)) * angles.cos()
    B[:, :1] *= math.sqrt(0.5)
    return B.to(device=device, dtype=dtype)


def dct(x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """The same transform of the last dimension in n log n operations; x is float32 or float64."""
    n = x.shape[-1]
    if n == 0:
        return x.clone()
    spectrum = torch.fft.fft(torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], dim=-1))
    twiddle = _twiddle(n, x.dtype, x.device)
    return spectrum.real * twiddle[0] + spectrum.imag * twiddle[1]


@constant
def _twiddle(n: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "2 n"]:
    """sqrt(2/n) (cos, sin)(pi k / 2n), the first column times sqrt(1/2)."""
    angles = torch.arange(n, dtype=torch.float64) * (math.pi / (2 * n))
    found = math.sqrt(2 / n) * torch.stack([angles.cos(), angles.sin()])
    found[:, 0] *= math.sqrt(0.5)
    return found.to(device=device, dtype=dtype)
