"""A form of the rotated matrix: inputs are turned by a fast transform first, so that no column stands out."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from eckart.forms import kernels
from eckart.forms.base import FORMS, Curve, Factored, Form
from eckart.forms.packing import pack, unpack
from eckart.forms.quantized import Quantized
from eckart.forms.wrapper import Wrapper
from eckart.linalg.rotation import sizes, turned
from eckart.linalg.weighting import Weighting
from eckart.linalg.whitening import IdentityRoot, Root


class RotatedMatrix(Factored):
    """`matrix` @ Hᵀ, with an orthogonal H that is made of signs.

    Attributes:
        signs: (1, bytes) one bit for every column.
    """

    matrix: Factored
    signs: Tensor
    form: Rotated

    def __init__(self, matrix: Factored, signs: UInt8[Tensor, "1 bytes"], form: Rotated):
        super().__init__()
        self.register_buffer("signs", signs)
        self.matrix, self.shape, self.form = matrix, matrix.shape, form

    def forward(
        self, x: Float[Tensor, "*batch in"], bias: Float[Tensor, " out"] | None = None
    ) -> Float[Tensor, "*batch out"]:
        if kernels.eager(x):
            signs = kernels.kept(self).keep(str(x.dtype), [self.signs], lambda: unpacked(self.signs, x))
        else:
            signs = unpacked(self.signs, x)
        return self.matrix.forward(turned(x, signs), bias)

    def dense(self) -> Float[Tensor, "out in"]:
        return self._back(self.matrix.dense())

    def rows(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch in"]:
        return self._back(self.matrix.rows(ids))

    def _back(self, rows: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        return turned(rows, unpacked(self.signs, rows), back=True)

    def flops(self, tokens: int) -> int:
        each = 1 + sum(2 * size for size in sizes(self.shape[1]))
        return tokens * self.shape[1] * each + self.matrix.flops(tokens)


@FORMS.word("rotated")
@dataclass(frozen=True)
class Rotated(Wrapper):
    """form @ Hᵀ: what is fitted is W H, and the layer's inputs are turned by H before they meet it.

    H is a random orthogonal matrix that takes n log n operations and a bit for every column (`linalg.rotation`). Groups
    of W H are near to normally distributed whatever W holds, which codes like (incoherence processing: QuIP#,
    arXiv 2402.04396; QuaRot, arXiv 2404.00456); the weight on inputs is turned with them, so that the error in the
    metric is the form's own. `rotated(quantized_inputs(...))` rounds inputs that were turned.

    Where single entries have weights of their own, which cannot be turned, the form is fitted in the two-sided norm
    that stands in for them.

    Args:
        form: what the rotated matrix is made of.
        seed: of the signs.
    """

    form: Form = field(default_factory=Quantized)
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"rotated(seed={self.seed!r}): a seed is an integer from 0 up")

    def signs(self, width: int) -> UInt8[Tensor, "1 bytes"]:
        drawn = torch.randint(0, 2, (1, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(self.seed))
        return pack(drawn, 1)

    def around(self, module: Factored) -> RotatedMatrix:
        device = next(iter(module.state_dict().values())).device
        return RotatedMatrix(module, self.signs(module.shape[1]).to(device), self)

    def within(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting
    ) -> tuple[Float[Tensor, "out in"], Weighting]:
        W = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
        signs, right = unpacked(self.signs(W.shape[1]), W), weighting.right
        right = right if isinstance(right, IdentityRoot) else TurnedRoot(right, signs)
        return turned(W, signs), Weighting(weighting.left, right)

    def curve(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting, dtype: torch.dtype, energy: float | None = None
    ) -> Curve:
        if weighting.each is not None:  # whose norm is not that of the form within
            return Form.curve(self, matrix, weighting, dtype, energy)
        return super().curve(matrix, weighting, dtype, energy)


def unpacked(signs: UInt8[Tensor, "1 bytes"], like: Float[Tensor, "*batch n"]) -> Float[Tensor, " n"]:
    """1 and -1, from a bit for each."""
    return 1 - 2 * unpack(signs.to(like.device), 1, like.shape[-1])[0].to(like.dtype)


class TurnedRoot:
    """Hᵀ S of a root S: the weight on inputs that were turned by H."""

    def __init__(self, root: Root, signs: Float[Tensor, " n"]):
        self.root, self.signs = root, signs

    def times(self, M: Float[Tensor, "m n"]) -> Float[Tensor, "m k"]:
        return self.root.times(turned(M, self.signs.to(M), back=True))

    def over(self, M: Float[Tensor, "m k"]) -> Float[Tensor, "m n"]:
        return turned(self.root.over(M), self.signs.to(M))

    def gram(self, n: int) -> Float[Tensor, "n n"]:
        C = self.root.gram(n)
        return turned(turned(C, self.signs.to(C)).T, self.signs.to(C)).T
