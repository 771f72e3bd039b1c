"""Matrix product operators instead of the weights of attention and of the feed-forward layers."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from eckart.calibration.subject import block_names
from eckart.forms import Form, TensorTrain
from eckart.jobs.recipe import Recipe
from eckart.registry import method


@method("compactifai", family="tensor network", paper="CompactifAI: Extreme Compression of Large Language Models using Quantum-Inspired Tensor Networks, Tomut et al., 2024, arXiv 2401.14109")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class CompactifAI(Recipe):
    """Each weight a chain of cores (TT-SVD), its bond dimension the dial that the budget turns.

    A truncated chain drops correlations between groups of digits of the indices, not directions: the matrix keeps its
    full rank, and a model that is cut hard is of no use before it is retrained. That step ("healing": all cores, on
    less than an epoch of text) is a training job of its own, as is the quantisation behind the paper's largest
    ratios; this is the tensorisation alone.

    Departs from the paper in how layers are spared: it measures every layer over a list of bond dimensions and finds
    the early ones fragile; here `spare` leaves the first blocks dense, and an allocation may give bonds by error.

    Args:
        spare: leading blocks that stay dense.
    """

    form: Form = field(default_factory=TensorTrain)
    spare: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spare < 0:
            raise ValueError(f"spare={self.spare}: the number of blocks that stay dense is not negative")

    def stays(self, model: nn.Module, name: str) -> str | None:
        spared = any(name == b or name.startswith(f"{b}.") for b in block_names(model)[: self.spare])
        return f"it is in one of the first {self.spare} blocks, which are spared" if spared else None
