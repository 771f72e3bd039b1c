"""Quantised matrices as GGUF's blocks of 32 weights, where a block type holds the very same numbers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from eckart.forms.packing import unpack
from eckart.forms.quantized import Groups, QuantizedMatrix

BLOCK = 32
SIGNED = ((Type.Q4_0, -8, 7), (Type.Q5_0, -16, 15), (Type.Q8_0, -128, 127))
"""Types that hold scale * step, with the steps they reach from and to; smaller ones first."""
SHIFTED = ((Type.Q4_1, 0, 15), (Type.Q5_1, 0, 31))
"""Types that hold scale * step + offset."""
HALF = 2.0**-11
"""Largest relative error of a number rounded to float16, unless it is too small or too large for it."""


class Blocks(NamedTuple):
    """A matrix as GGUF holds it.

    Attributes:
        type: of the blocks.
        data: (out, bytes) uint8.
        rounded: largest relative error of a scale or an offset by its storage in float16; 0 where all is exact.
    """

    type: Type
    data: np.ndarray
    rounded: float


class Unfit(Exception):
    """No type of GGUF holds this matrix; says why."""


def blocks_of(matrix: QuantizedMatrix) -> Blocks:
    """The smallest block type that holds the matrix's own codes and scales. Raises `Unfit`."""
    form, width = matrix.form, matrix.shape[1]
    if width % BLOCK:
        raise Unfit(f"its {width} columns are not a multiple of {BLOCK}")
    at = Groups(form, width)
    if at.group % BLOCK and at.count > 1:
        raise Unfit(f"groups of {at.group} columns are not made of blocks of {BLOCK}")
    steps, parameters = linear_in_scale(matrix)
    least, most = int(steps.min()), int(steps.max())
    types = SHIFTED if "zero" in parameters else SIGNED
    chosen = next((kind for kind, low, high in types if low <= least and most <= high), None)
    if chosen is None:
        raise Unfit(f"steps from {least} to {most} are more than {types[-1][0].name} reaches")
    halves, worst = [], 0.0
    for name in ("scale", "zero") if "zero" in parameters else ("scale",):
        half, error = halved(parameters[name])
        per_group = max(1, at.group // BLOCK)
        halves.append(half.repeat_interleave(per_group, dim=1)[:, : width // BLOCK])
        worst = max(worst, error)
    if worst > HALF:
        raise Unfit("its scales are too small or too large for float16")
    return Blocks(chosen, packed(chosen, steps, torch.stack(halves, dim=-1)), worst)


def linear_in_scale(
    matrix: QuantizedMatrix,
) -> tuple[Integer[Tensor, "out in"], dict[str, Float[Tensor, "out groups"]]]:
    """Whole steps and, for every group, the scale (and the offset `zero`) with matrix = scale * steps + zero.

    Raises `Unfit` where the grid is not of this kind.
    """
    form = matrix.form
    at = Groups(form, matrix.shape[1])
    p: dict[str, Tensor] = {}
    for name, slot in form.grid.slots(at.bits).items():
        if slot.bits is None:
            held = matrix.floats[name]
            p[name] = held.dense().detach().float().T.unflatten(1, (at.count, slot.width))  # type: ignore[operator]
        else:
            codes = unpack(getattr(matrix, name), slot.bits, at.count * slot.width)
            p[name] = codes.float().unflatten(1, (at.count, slot.width))
    design = form.grid.design(at.split(unpack(matrix.codes, at.bits, at.width)), p, at.bits)
    wide = any(p[name].shape[-1] != 1 for name in design)
    if "scale" not in design or not design.keys() <= {"scale", "zero"} or wide:
        raise Unfit(f"the numbers of the grid {form.grid} are not evenly spaced")
    steps = at.joined(design["scale"][..., 0])
    if not torch.equal(steps, steps.round()) or ("zero" in design and not bool((design["zero"] == 1).all())):
        raise Unfit(f"the numbers of the grid {form.grid} are not whole steps apart")
    return steps.to(torch.int16), {name: p[name][..., 0] for name in design}


def halved(x: Float[Tensor, "out groups"]) -> tuple[Float[Tensor, "out groups"], float]:
    """Numbers in float16, and the largest relative error that this makes."""
    half = x.half()
    off = (half.float() - x).abs()
    relative = torch.where(off == 0, 0.0, off / x.abs())
    return half, float(relative.max()) if relative.numel() else 0.0


def packed(
    kind: Type, steps: Integer[Tensor, "out in"], scales: Float[Tensor, "out blocks k"]
) -> UInt8[np.ndarray, "out bytes"]:
    """Blocks of one type: the float16 numbers first, then the fifth bits, then the rest of the codes.

    Codes of four bits lie two in a byte: the low half holds those of the block's first 16 columns.
    """
    q = steps.unflatten(1, (-1, BLOCK)).numpy()
    heads = [np.ascontiguousarray(scales.numpy()).view(np.uint8)]
    if kind == Type.Q8_0:
        return _joined([*heads, q.astype(np.int8).view(np.uint8)])
    low = {name: least for name, least, _ in (*SIGNED, *SHIFTED)}[kind]
    codes = (q - low).astype(np.uint8)
    if kind in (Type.Q5_0, Type.Q5_1):
        heads.append(np.packbits(codes >> 4, axis=-1, bitorder="little"))
    nibbles = codes & 15
    return _joined([*heads, nibbles[..., : BLOCK // 2] | (nibbles[..., BLOCK // 2 :] << 4)])


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    whole = np.concatenate(parts, axis=-1)
    return whole.reshape(whole.shape[0], -1)
