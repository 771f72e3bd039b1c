"""Whole groups of weights dropped, those that stay quantised with the same groups."""

from __future__ import annotations

from dataclasses import dataclass, field

from eckart.forms import Form, GroupSparse, Quantized
from eckart.forms.selections import OBS
from eckart.jobs.recipe import Recipe
from eckart.metrics import InputCovariance, Metric
from eckart.registry import method


@method("gqsa", family="sparse", paper="GQSA: Group Quantization and Sparsity for Accelerating Large Language Model Inference, Zeng et al., IJCNLP-AACL 2025, arXiv 2412.17560")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class GQSA(Recipe):
    """Groups of 16 consecutive weights kept or dropped, each kept one on a 4-bit grid of its own.

    Groups are compared within their row by the sum of w² / [H⁻¹]_jj, so that rows keep equally many, give or take one;
    `selection=obs()` compares all rows. The budget decides the share that is kept.

    This is the one-shot stage. Both tuning stages, block by block on the outputs (BQPO) and of the grids on the loss of
    the whole model (E2E-OQP), are training and wait for that wing. In their place, what a dropped group did is taken
    over in closed form by later columns of its row (`obs`), and blocks are fitted on what the compressed ones before
    put out. A group that is cut short by the end of its row is stored in full length.
    """

    form: Form = field(
        default_factory=lambda: GroupSparse(group=16, selection=OBS(per_row=True), values=Quantized(bits=4, group=16))
    )
    metric: Metric = field(default_factory=InputCovariance)
    one_shot: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        form = self.form
        if not isinstance(form, GroupSparse):
            raise ValueError(f"gqsa(form={form}): it keeps whole groups, so its form is group_sparse(...)")
        if isinstance(form.values, Quantized) and form.values.group != form.group:
            raise ValueError(f"gqsa(form={form}): groups of {form.group} are kept and groups of {form.values.group} quantised: make them the same")  # fmt: skip # noqa: E501
