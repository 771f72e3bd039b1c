"""Random numbers that a key and a position determine, on any device and under any release of any library."""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor

VERSION = "splitmix64"
"""What adapters that regenerate their numbers save: a library that draws others must refuse them."""


def stream_key(*words: object) -> int:
    """64 bits that words determine."""
    digest = hashlib.blake2b("\0".join(map(str, words)).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def uniform_at(key: int, start: int, count: int, device: torch.device | None = None) -> Float[Tensor, " count"]:
    """Numbers `start` and those that follow of a stream, uniform in [-1, 1) in steps of 2^-23; float32.

    Two of them are the halves of each output of SplitMix64 (Steele et al., 2014), which a counter enters: integer
    products and shifts alone, so all devices agree to the bit. `start` and `count` are even.
    """
    z = torch.arange(start // 2 + 1, (start + count) // 2 + 1, device=device)
    z = z.mul_(_signed(0x9E3779B97F4A7C15)).add_(_signed(key))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = z.bitwise_xor_(_shifted(z, shift)).mul_(_signed(factor))
    z.bitwise_xor_(_shifted(z, 31))
    return z.view(torch.int32).bitwise_right_shift_(8).float().mul_(2.0**-23)


def _shifted(z: Tensor, by: int) -> Tensor:
    """A shift to the right that brings in zeros; torch's brings in the sign."""
    return (z >> by).bitwise_and_((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
