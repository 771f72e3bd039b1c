"""N:M sparse training in which pruned weights take part at first and fade out, in value or by a tightening pattern."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eckart.forms import SemiSparse, Sparse
from eckart.forms.layout import as_matrix
from eckart.forms.patterns import OfEvery
from eckart.forms.sparse import SparseForm
from eckart.registry import method
from eckart.remarks import remark
from eckart.schedules import Schedule, at_step
from eckart.training.base import NoSaving, TrainingMethod
from eckart.training.parametrised import ParametrisedTraining, original, store_sparse

RecipeName = Literal["mdgf-exponential", "mdgf-linear", "sdgf-stepwise", "sdgf-geometric", "sr-ste"]
RECIPES = ("mdgf-exponential", "mdgf-linear", "sdgf-stepwise", "sdgf-geometric", "sr-ste")
FADED = 10.0
"""Minus the logarithm of what is left of pruned weights after a phase without a given beta."""


class Faded(nn.Module):
    """W ∘ (M + (1 - M) b), M the n largest of every m; n, m and b are set from outside, so forward may run twice.

    Attributes:
        fade: b, what is left of pruned weights; at 1 the layer is dense.
        straight: whether gradients pass as if nothing were pruned.
        pull: lambda of SR-STE, which adds lambda (1 - M) ∘ W to the gradient.
    """

    def __init__(self, kind: str, columns: bool, n: int, m: int):
        super().__init__()
        self.kind, self.columns, self.n, self.m = kind, columns, n, m
        self.fade, self.straight, self.pull = 1.0, False, 0.0
        self.mask: Tensor | None = None

    def runs(self, weight: Tensor) -> Float[Tensor, "lines places"]:
        """The weight as lines in which the groups of m follow one another."""
        if self.kind == "conv2d":
            lines = weight.permute(0, 2, 3, 1).flatten(1)
        else:
            lines = weight.t() if self.kind == "conv1d" else weight
        return lines.t() if self.columns else lines

    def of_runs(self, lines: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `runs`."""
        lines = lines.t() if self.columns else lines
        if self.kind == "conv2d":
            out, in_, height, width = shape
            return lines.reshape(out, height, width, in_).permute(0, 3, 1, 2)
        return lines.t() if self.kind == "conv1d" else lines

    @torch.no_grad()
    def choose(self, weight: Tensor) -> Bool[Tensor, "*weight"]:
        """The mask: n of every m, of equal ones the first."""
        lines = self.runs(weight)
        kept = OfEvery((lines.shape[0], lines.shape[1]), n=self.n, m=self.m).keep(lines.abs())
        return self.of_runs(kept, weight.shape)

    def forward(self, weight: Tensor) -> Tensor:
        if self.fade == 1.0:
            return weight
        if self.mask is None or self.mask.device != weight.device:
            self.mask = self.choose(weight)
        if self.straight:
            passed: Tensor = _Straight.apply(weight, self.mask, self.pull)
            return passed
        return weight * torch.where(self.mask, 1.0, self.fade).to(weight.dtype)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, pull: float) -> Tensor:
        ctx.pull = pull
        if pull:
            ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        if not ctx.pull:
            return g, None, None
        weight, mask = ctx.saved_tensors
        return g + ctx.pull * ~mask * weight, None, None


@method(
    "nm_gradient_flow", family="sparse",
    paper="Progressive Gradient Flow for Robust N:M Sparsity Training, Bambhaniya et al., CPAL 2025, arXiv 2402.04744",
)  # fmt: skip
@dataclass(frozen=True)
class NMGradientFlow(TrainingMethod):
    """n of every m weights, the others faded out by the step: MdGf in value, SdGf by a tightening pattern.

    Three phases: dense, sparsifying, and a last one with the final mask alone. The mask follows the magnitudes
    throughout. The paper sparsifies feed-forward layers first: pass `layers=r".*mlp.*"` for these.

    Args:
        n, m: kept in every group; m places of a row, which m divides.
        recipe: `mdgf-exponential`, b = exp(-beta t); `mdgf-linear`, b = max(1 - beta t, 0); `sdgf-stepwise`, the
            patterns (m-1):m, m/2:m, ... n:m; `sdgf-geometric`, 8n:8m, 4n:4m, 2n:2m, n:m; `sr-ste`, the final pattern
            from the first with full gradients, the baseline.
        beta: rate of the fading, per step. None for one that suits the run: to exp(-10) over the sparsifying phase, or
            to nothing if it is linear. The paper's is 1e-4 and its runs have some 10⁵ steps.
        dense, fine: first and last phase, as shares of the run or in steps.
        flow: of MdGf, `decayed` differentiates what is computed, so that gradients of pruned weights fade as well;
            `ste` passes them whole, as the released code does.
        pull: lambda of SR-STE.
        runs: whether groups lie along `rows` or `columns` of (out, in); kernels are taken with their inputs last.
        refresh: steps between choices of the mask.
    """

    n: int = 2
    m: int = 4
    recipe: RecipeName = "mdgf-exponential"
    beta: float | None = None
    dense: int | float = 0.05
    fine: int | float = 0.1
    flow: Literal["decayed", "ste"] = "decayed"
    pull: float = 2e-4
    runs: Literal["rows", "columns"] = "rows"
    refresh: int = 1

    def __post_init__(self) -> None:
        pattern = f"nm_gradient_flow(n={self.n!r}, m={self.m!r})"
        if not isinstance(self.n, int) or not isinstance(self.m, int) or not 1 <= self.n <= self.m:
            raise ValueError(f"{pattern}: 1 to m of every m weights are kept")
        for name, known in (("recipe", RECIPES), ("flow", ("decayed", "ste")), ("runs", ("rows", "columns"))):
            if getattr(self, name) not in known:
                raise ValueError(f"nm_gradient_flow({name}={getattr(self, name)!r}): it is one of {', '.join(known)}")
        ratio = self.m / self.n
        if self.recipe == "sdgf-stepwise" and not math.log2(ratio).is_integer():
            raise ValueError(f"{pattern}: the stepwise recipe halves its way down, so m / n is a power of two")
        for name, value in (("beta", 0.0 if self.beta is None else self.beta), ("pull", self.pull)):
            if not value >= 0:
                raise ValueError(f"nm_gradient_flow({name}={value!r}): it is not negative")
        for name in ("dense", "fine"):
            at_step(getattr(self, name), 1, f"nm_gradient_flow: {name}")
        if not isinstance(self.refresh, int) or self.refresh < 1:
            raise ValueError(f"nm_gradient_flow(refresh={self.refresh!r}): it is a positive number of steps")

    def stages(self) -> list[tuple[int, int]]:
        """The patterns (n, m) in order; one unless the recipe tightens them."""
        if self.recipe == "sdgf-stepwise" and self.n < self.m:
            halves = [self.m // 2**i for i in range(1, int(math.log2(self.m / self.n)) + 1)]
            return [(kept, self.m) for kept in dict.fromkeys([self.m - 1, *halves])]
        if self.recipe == "sdgf-geometric":
            return [(self.n * w, self.m * w) for w in (8, 4, 2, 1)]
        return [(self.n, self.m)]

    def place(self, model: nn.Module, names: list[str], seed: int) -> Schedule:
        found = {}
        for name in names:
            module = model.get_submodule(name)
            kind = "conv1d" if isinstance(module, Conv1D) else "conv2d" if isinstance(module, nn.Conv2d) else "linear"
            found[name] = faded = Faded(kind, self.runs == "columns", self.n, self.m)
            length, widest = faded.runs(module.weight).shape[1], self.stages()[0][1]  # type: ignore[arg-type]
            if length % widest:
                raise ValueError(f"{name}: groups of {widest} do not divide its {self.runs} of {length} weights: choose another m, or leave the layer out with layers=...")  # fmt: skip # noqa: E501
        return Fading(model, found, self)


class Fading(ParametrisedTraining[Faded]):
    """Patterns and fades of MdGf, SdGf and SR-STE as functions of the step."""

    needs_total = True

    def __init__(self, model: nn.Module, faded: dict[str, Faded], settings: NMGradientFlow):
        super().__init__(model, faded)
        self.settings = settings

    def phases(self) -> tuple[int, int]:
        """Where the dense phase ends and the last phase begins."""
        fine = at_step(self.settings.fine, self.total, "fine")
        return at_step(self.settings.dense, self.total, "dense"), (self.total or 0) - fine

    def pattern(self, step: int) -> tuple[int, int]:
        """(n, m) at a step: stages of equal length between the phases."""
        begin, end = self.phases()
        stages = self.settings.stages()
        if step >= end:
            return stages[-1]
        return stages[min(len(stages) - 1, max(0, step - begin) * len(stages) // max(1, end - begin))]

    def fade(self, step: int) -> float:
        """b at a step."""
        begin, end = self.phases()
        if step < begin:
            return 1.0
        if step >= end or not self.settings.recipe.startswith("mdgf"):
            return 0.0
        exponential = self.settings.recipe == "mdgf-exponential"
        beta = self.settings.beta
        if beta is None:
            beta = (FADED if exponential else 1.0) / (end - begin)
        rate = beta * (step - begin)
        return math.exp(-rate) if exponential else max(1 - rate, 0.0)

    def at(self, step: int) -> None:
        n, m = self.pattern(step)
        for _, _, faded in self.layers:
            if (faded.n, faded.m) != (n, m) or step % self.settings.refresh == 0:
                faded.mask = None
            faded.n, faded.m, faded.fade = n, m, self.fade(step)
            sr = self.settings.recipe == "sr-ste"
            gradual = self.settings.recipe.startswith("mdgf")
            faded.straight = not gradual
            faded.pull = self.settings.pull if sr else 0.0
            if gradual and self.settings.flow == "ste":
                faded.straight = True

    def settle(self) -> None:
        for name, module, faded in list(self.layers):
            faded.n, faded.m, faded.fade, faded.straight = self.settings.n, self.settings.m, 0.0, False
            faded.mask = mask = faded.choose(original(module).detach())
            kept = as_matrix(module, mask).clone()
            form: SparseForm = SemiSparse(self.settings.n, self.settings.m) if self._in_rows(faded, module) else Sparse(float(kept.float().mean()))  # fmt: skip # noqa: E501
            self.plain(name)
            if not store_sparse(self.model, name, kept, form):
                remark(f"{name} stays dense, with zeros: {form} would be no smaller", NoSaving)

    def _in_rows(self, faded: Faded, module: Any) -> bool:
        """Whether the groups lie along the rows of the matrix, as `semi_sparse` stores them."""
        wide = isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
        return not faded.columns and not wide and self.settings.m <= 64
