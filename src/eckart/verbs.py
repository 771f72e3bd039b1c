"""`fit`, the one verb, for a matrix outside any model."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.forms import Factored, Form, as_form
from eckart.linalg.weighting import PLAIN, Weighting
from eckart.linalg.whitening import check_finite
from eckart.metrics import Metric, as_metric


def fit(
    form: Form | str,
    matrix: Float[Tensor, "out in"],
    metric: Metric | Weighting | str | None = None,
    *,
    inputs: Float[Tensor, "*batch in"] | None = None,
    dtype: torch.dtype | None = None,
) -> Factored:
    """The module of this form that is nearest to a matrix.

    Args:
        form: a closed form, or its text, such as `low_rank(rank=8) + diagonal()`.
        matrix: (out, in), floating point.
        metric: which error counts; a metric that is made from data needs `inputs`, a `Weighting` does not. Plain
            Frobenius where not given.
        inputs: samples of what the matrix is multiplied with.
        dtype: in which the factors are stored; the matrix's own where not given.

    Raises `ValueError` where the form is open or does not fit, or the matrix holds NaN or infinity.
    """
    if matrix.dim() != 2 or not matrix.is_floating_point():
        raise ValueError(f"fit needs a matrix of floating point numbers, not {matrix.dtype} of shape {tuple(matrix.shape)}")  # fmt: skip # noqa: E501
    check_finite(matrix, "the matrix")
    closed = as_form(form)
    if closed.open:
        raise ValueError(f"{closed} has an open dial: close it, or let `compress` decide it under a budget")
    if isinstance(metric, Weighting):
        weighting = metric
    elif metric is None:
        weighting = PLAIN
    else:
        found = as_metric(metric)
        if found.needs and inputs is None:
            raise ValueError(f"{found} is made from data: pass inputs=")
        weighting = found.of(inputs) if inputs is not None else PLAIN
    return closed.fit(matrix.detach(), weighting, dtype=dtype)
