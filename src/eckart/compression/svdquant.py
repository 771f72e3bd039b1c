"""Outliers moved from activations to weights, from there into a low rank, and the rest in 4 bits on both sides."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.calibration.calibrate import Request
from eckart.calibration.samples import shared_inputs
from eckart.compression.settled import Settled, put, settled_plan
from eckart.forms import Dense, Diagonal, Factored, Form, LowRank, Quantized, Sum
from eckart.forms.algebra import Product, ProductMatrix, SumMatrix
from eckart.forms.base import stored
from eckart.forms.diagonal import DiagonalMatrix
from eckart.forms.grids import Uniform
from eckart.forms.layers import kind_of, matrix_of, matrix_shape
from eckart.forms.low_rank import balance
from eckart.forms.quantized_inputs import QuantizedInputs, QuantizedInputsMatrix, rounded
from eckart.forms.roundings import Nearest
from eckart.jobs.method import Job, Method
from eckart.jobs.plan import Layer, Plan
from eckart.jobs.recipe import Recipe
from eckart.linalg.svd import truncated_svd
from eckart.linalg.weighting import Weighting
from eckart.linalg.whitening import psd_root
from eckart.registry import method
from eckart.settings import check_whole

INT4 = Quantized(bits=4, group=64, grid=Uniform(symmetric=True))


@method("svdquant", family="mixture", paper="SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models, Li, Lin, Zhang et al., ICLR 2025, arXiv 2411.05007")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class SVDQuant(Method):
    """W4A4: y = Q(x / s) Q(R)ᵀ + x (L₁ L₂ / s)ᵀ, with L₁ L₂ the leading part of W diag(s), and R what it leaves.

    s_j = max |x_j|^α / max |W_j|^β is chosen among 39 pairs (α, β) by the error of the outputs with everything in
    place; then L₁ L₂ and R take turns while that error falls (section 4). Layers that read the same tensor are stacked:
    one s, one L₂. The weights' grid is INT4, the inputs' too, unsigned where calibration saw nothing negative.

    Departs from the paper: blocks are fitted in order, on what the fitted blocks before put out; R is what the branch
    leaves as it is stored; every layer keeps an s and an L₂ of its own, equal ones in a group. Shifting the outputs of
    GELU and the NVFP4 grid are left out; `form` with `rounding=gptq()` is the paper's variant of rounding R last under
    the covariance of the rounded inputs. Nothing is left to the budget, which must be large enough.

    Args:
        form: of the 4-bit part.
        rank: of the branch; 0 leaves it out. A layer for which it is too much stays dense.
        points: steps of the grid of α.
        iterations: most turns of branch and rest.
        tokens: rows of inputs on which errors are measured.
        targets: regular expression that the names of targeted layers match in full; empty for all layers in blocks.
    """

    form: Form = field(default_factory=lambda: QuantizedInputs(INT4, INT4))
    rank: int = 32
    points: int = 20
    iterations: int = 100
    tokens: int = 1024
    targets: str = ""

    def __post_init__(self) -> None:
        Recipe(targets=self.targets)  # refuses what is no regular expression
        if not isinstance(self.form, QuantizedInputs) or not isinstance(self.form.matrix, Quantized) or self.form.open:
            raise ValueError(f"svdquant(form={self.form}): it is quantized_inputs(matrix=quantized(bits=...), inputs=...)")  # fmt: skip # noqa: E501
        check_whole(self, rank=0, points=1, iterations=0, tokens=1)

    @property
    def sequential(self) -> bool:
        return True

    def request(self, model: nn.Module, blocks: list[str]) -> Request:
        return Request(probes={}, needs=frozenset())

    def plan(self, job: Job) -> Plan:
        settled = []
        for part, names in Recipe(targets=self.targets).sites(job.model, job.blocks).items():
            for name in names:
                why = self.refusal(job.model.get_submodule(name), job.dtype)
                settled.append(Settled(name, part, Dense() if why else self.whole, f"left dense: {why}" if why else None))  # fmt: skip # noqa: E501
        return settled_plan(job, self.key, settled)

    @property
    def whole(self) -> Form:
        """What stands in for a matrix."""
        smooth = Product(self.form, Diagonal())
        return Sum((smooth, LowRank(self.rank))) if self.rank else smooth

    def refusal(self, module: nn.Module, dtype: torch.dtype) -> str | None:
        """Why a layer stays dense; None where nothing is in the way."""
        if kind_of(module) == "embedding":
            return "a table multiplies no inputs"
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            return f"a kernel of {module.kernel_size} reads channels in several places, and has no one scale for each"
        shape = matrix_shape(module)
        if self.rank > min(shape) or self.whole.nbytes(shape, dtype) >= Dense().nbytes(shape, dtype):
            return f"a branch of rank {self.rank} with all else would be no smaller"
        return None

    def rewrite(self, job: Job, plan: Plan, part: int) -> list[Layer]:
        layers = {layer.name: layer for layer in plan.of(part)}
        names = [name for name, layer in layers.items() if layer.form != str(Dense())]
        if not names:
            return list(layers.values())
        assert job.stream is not None
        for group in shared_inputs(job.stream("hidden"), part, names, self.tokens):
            weights = [matrix_of(job.model.get_submodule(name)).detach() for name in group.names]
            splitting = Splitting(torch.cat(weights), group.x, self._form(group.x), self.rank, job.dtype)
            found = splitting.best(self.points, self.iterations)
            sizes = [len(w) for w in weights]
            matrices, missed = splitting.matrices(found, sizes)
            y, missed = (t.square().sum(0) / len(t) for t in (splitting.y, missed))
            for name, matrix, energy, error in zip(group.names, matrices, y.split(sizes), missed.split(sizes), strict=True):  # fmt: skip # noqa: E501
                put(job, name, matrix)
                done = replace(layers[name], form=str(matrix.form), energy=float(energy.sum()))
                layers[name] = done.measured(float(error.sum()), found.note)
        return list(layers.values())

    def _form(self, x: Float[Tensor, "rows in"]) -> QuantizedInputs:
        """The form for these inputs."""
        assert isinstance(self.form, QuantizedInputs)
        inputs = self.form.inputs
        if bool((x < 0).any()) or inputs.grid != Uniform(symmetric=True):
            return self.form
        return replace(self.form, inputs=replace(inputs, grid=Uniform()))


@dataclass(frozen=True)
class Split:
    """W ≈ codes diag(inverse) + left right, all numbers as they are stored.

    Attributes:
        inverse: 1 / s.
        residual: what the codes stand for, W diag(s) less the branch.
        error: of the outputs, squared, a mean over rows.
        note: how it was found.
    """

    inverse: Float[Tensor, " in"]
    left: Float[Tensor, "out r"]
    right: Float[Tensor, "r in"]
    residual: Float[Tensor, "out in"]
    codes: Float[Tensor, "out in"]
    error: float = 0.0
    note: str = ""


class Splitting:
    """One matrix, or several that read the same inputs, stacked.

    Args:
        W: (out, in).
        x: inputs to measure errors on.
        form: of the codes and inputs.
        rank: of the branch.
        dtype: in which numbers are stored.
    """

    def __init__(
        self, W: Float[Tensor, "out in"], x: Float[Tensor, "rows in"], form: QuantizedInputs, rank: int,
        dtype: torch.dtype,
    ):  # fmt: skip
        self.W = W.detach().to(torch.promote_types(W.dtype, torch.float32))
        self.x = x.detach().to(self.W)
        self.y = self.x @ self.W.T
        self.form, self.rank, self.dtype = form, rank, dtype
        assert isinstance(form.matrix, Quantized)
        self.nearest = replace(form.matrix, rounding=Nearest())

    def best(self, points: int = 20, iterations: int = 100) -> Split:
        """The best smoothing with its branch, and then branch and rest by turns."""
        steps = [i / points for i in range(1, points)]
        pairs = [(0.0, 0.0), *((a, 0.0) for a in steps), *((a, 1 - a) for a in steps)]
        found = (replace(self.at(self.inverse(a, b)), note=f"s = max|x|^{a:g} / max|W|^{b:g}") for a, b in pairs)
        best = min(found, key=lambda split: math.inf if math.isnan(split.error) else split.error)
        return deque(self.turns(best, iterations), maxlen=1).pop()

    def inverse(self, of_x: float, of_w: float) -> Float[Tensor, " in"]:
        """1 / s with s = max |x|^of_x / max |W|^of_w by channels; 1 where that is 0 or not finite, stored or not."""
        s = self.x.abs().amax(0) ** of_x / self.W.abs().amax(0) ** of_w
        inverse = (1 / s).to(self.dtype).to(s)
        return torch.where(torch.isfinite(inverse) & (inverse > 0), inverse, 1.0)

    def at(self, inverse: Float[Tensor, " in"], codes: Tensor | None = None) -> Split:
        """The branch that is nearest to W diag(s), or to what these codes leave of it; and then the codes."""
        smooth = self.W / inverse
        U, S, Vh, *_ = truncated_svd(smooth if codes is None else smooth - codes, self.rank)
        left, right = (t.to(self.dtype).to(smooth) for t in balance(U * S, Vh * inverse))
        residual = smooth - left @ (right / inverse)
        codes = self.nearest.fit(residual, dtype=self.dtype).dense().detach().to(smooth)
        return self.measured(Split(inverse, left, right, residual, codes))

    def turns(self, start: Split, iterations: int) -> Iterator[Split]:
        """The start, then branch and codes by turns, as long as the error falls."""
        yield (last := start)
        for i in range(iterations):
            step = self.at(start.inverse, last.codes)
            if not step.error < last.error:
                return
            yield (last := replace(step, note=f"{start.note}, {i + 1} turns"))

    def missed(self, split: Split) -> Float[Tensor, "rows out"]:
        """What is wrong about the outputs."""
        codes = rounded(self.x * split.inverse, self.form.inputs) @ split.codes.T
        return self.y - codes - self.x @ split.right.T @ split.left.T

    def measured(self, split: Split) -> Split:
        return replace(split, error=float(self.missed(split).square().sum()) / max(1, len(self.x)))

    def matrices(self, split: Split, sizes: Sequence[int]) -> tuple[list[Factored], Float[Tensor, "rows out"]]:
        """The modules of so many rows each, and what is wrong about their outputs."""
        weighting = Weighting()
        if self.form.matrix != self.nearest:
            x = rounded(self.x * split.inverse, self.form.inputs)
            weighting = Weighting(right=psd_root(x.T @ x / max(1, len(x)), 0.0, "eigen"))
        found: list[Factored] = []
        decoded: list[Tensor] = []
        for left, residual in zip(split.left.split(list(sizes)), split.residual.split(list(sizes)), strict=True):
            codes = self.form.matrix.fit(residual, weighting, dtype=self.dtype)
            shape = (residual.shape[0], residual.shape[1])
            scale = DiagonalMatrix(stored(split.inverse, self.dtype), (shape[1], shape[1]), Diagonal())
            smooth = ProductMatrix(QuantizedInputsMatrix(codes, self.form), scale, Product(self.form, Diagonal()))
            found.append(_beside(smooth, left, split.right, self.dtype) if self.rank else smooth)
            decoded.append(codes.dense().detach().to(self.W))
        return found, self.missed(replace(split, codes=torch.cat(decoded)))


def _beside(
    smooth: Factored, left: Float[Tensor, "out r"], right: Float[Tensor, "r in"], dtype: torch.dtype
) -> SumMatrix:
    low = LowRank(right.shape[0])
    branch = ProductMatrix(Dense().fit(left, dtype=dtype), Dense().fit(right, dtype=dtype), low)
    return SumMatrix([smooth, branch], Sum((smooth.form, low)))


def with_lora(
    matrix: Factored, down: Float[Tensor, "k in"], up: Float[Tensor, "out k"], scale: float = 1.0
) -> SumMatrix:
    """A matrix of SVDQuant plus `scale * up @ down`, in one branch; the codes are the very same tensors.

    The branch reads inputs that are not smoothed, so a LoRA joins it as it is. Raises `ValueError` where the matrix has
    no branch, or the rank of both together is above what its shape allows.
    """
    branch = matrix.terms[-1] if isinstance(matrix, SumMatrix) else None
    if not isinstance(branch, ProductMatrix) or not isinstance(branch.form, LowRank):
        raise ValueError(f"{matrix.form} has no low-rank branch that a LoRA could join: fit it with a rank above 0")
    assert isinstance(matrix, SumMatrix)
    smooth, left, right = matrix.terms[0], branch.left.dense().detach(), branch.right.dense().detach()
    assert isinstance(smooth, Factored)
    out, in_ = matrix.shape
    rank = right.shape[0] + down.shape[0]
    if (up.shape[0], down.shape[1]) != (out, in_) or up.shape[1] != down.shape[0] or rank > min(out, in_):
        raise ValueError(f"a LoRA of {tuple(up.shape)} @ {tuple(down.shape)} does not fit beside a branch of rank {right.shape[0]} in a matrix of shape {(out, in_)}")  # fmt: skip # noqa: E501
    return _beside(
        smooth, torch.cat([left, scale * up.to(left)], 1), torch.cat([right, down.to(right)]), left.dtype
    )  # fmt: skip
