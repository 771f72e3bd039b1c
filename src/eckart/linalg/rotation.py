"""Random rotations that cost n log n: random signs, a Hadamard transform, and a cosine transform of what is odd."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.linalg.constants import constant
from eckart.linalg.dct import dct_basis

LOG_WIDEST = 6
"""Of the Hadamard matrices that are multiplied by: wider transforms are made of several."""


@constant
def hadamard(n: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Float[Tensor, "n n"]:
    """Sylvester's matrix of orthonormal rows, entries ± n^(-1/2), symmetric; n is a power of two.

    Raises:
        ValueError: n is no power of two.
    """
    if n < 1 or n & (n - 1):
        raise ValueError(f"a Hadamard matrix of Sylvester's has a power of two rows, not {n}")
    i = torch.arange(n, device=device)
    shared, bits = i[:, None] & i, n.bit_length() - 1
    odd = sum(((shared >> b) & 1 for b in range(bits)), torch.zeros_like(shared)) & 1
    return ((1 - 2 * odd).to(torch.float64) / math.sqrt(n)).to(dtype)


def turned(x: Float[Tensor, "*batch n"], signs: Float[Tensor, " n"], back: bool = False) -> Float[Tensor, "*batch n"]:
    """x S (H ⊗ C), with signs S, a Hadamard transform H of the power of two in n and a cosine transform C of the rest.

    Orthogonal, and no entry is larger than (2 / n)^(1/2): what a few columns hold is spread over all of them (QuIP#,
    Tseng et al., 2024, arXiv 2402.04396, section 3; the cosine transform stands where a Hadamard matrix is not known).

    Args:
        signs: 1 or -1 for every column.
        back: the inverse, x (H ⊗ C)ᵀ S.
    """
    y = x if back else x * signs
    for size in sizes(x.shape[-1]):
        B = (dct_basis if size % 2 else hadamard)(size, x.dtype, x.device)
        y = (y.unflatten(-1, (size, -1)).mT @ (B.T if back else B)).flatten(-2)  # the first axis comes last
    return y * signs if back else y


def sizes(n: int) -> list[int]:
    """Of the matrices whose Kronecker product transforms n numbers: powers of two, then what is odd."""
    two = n & -n  # the largest power of two in n
    log = max(0, two.bit_length() - 1)
    count = -(-log // LOG_WIDEST)
    return [2 ** ((log + i) // count) for i in range(count)] + ([n // two] if n > two else [])
