"""SqueezeLLM against its card: the order of its parts, and exact outliers."""

from __future__ import annotations

from pathlib import Path

import torch
from quantised import IN, OUT, check_method, heavy, lost

from eckart.forms import parse
from eckart.linalg.weighting import Weighting
from eckart.testing import gaussian

KMEANS = "quantized(bits=3, group=None, grid=learned())"


def test_through_a_model(tmp_path: Path) -> None:
    check_method("squeezellm", tmp_path, "0.95", form=f"with_outliers({KMEANS}, sparse(density=0.02))")


def fisher() -> Weighting:
    return Weighting(each=gaussian(OUT, IN, seed=7, dtype=torch.float64) ** 4 + 1e-6)


def test_order_of_its_parts() -> None:
    norm = fisher()
    for seed in range(3):
        W = heavy(seed)
        near = lost(W, "quantized(bits=3, group=None)", norm)
        plain = parse(KMEANS).fit(W).dense().detach()
        weighted = lost(W, KMEANS, norm)
        split = lost(W, f"with_outliers({KMEANS}, sparse(density=0.0045))", norm)
        assert split < weighted < norm.norm2(W - plain) < near


def test_no_row_is_worse_than_rounding_or_unweighted_centres() -> None:
    W, norm = heavy(), fisher()
    F = norm.each
    assert F is not None

    def rows(found: torch.Tensor) -> torch.Tensor:
        return (F * (W - found.detach()).square()).sum(1)

    ours = rows(parse(KMEANS).fit(W, norm).dense())
    assert bool((ours <= rows(parse("quantized(bits=3, group=None)").fit(W).dense())).all())
    assert bool((ours <= rows(parse(KMEANS).fit(W).dense())).all())


def test_outliers_come_back_at_storage_precision() -> None:
    W = heavy()
    module = parse(f"with_outliers({KMEANS}, sparse(density=0.01))").fit(W, fisher(), dtype=torch.float16)
    kept = module.terms[1].dense() != 0
    assert int(kept.sum()) == round(0.01 * W.numel())
    assert torch.allclose(module.dense()[kept].float(), W[kept], rtol=2e-3, atol=2e-3)


def test_rows_with_few_values_and_dead_rows() -> None:
    W = heavy()
    W[0] = torch.where(torch.arange(IN) % 2 == 0, 1.0, -2.0)
    W[1] = 0
    norm = Weighting(each=torch.cat([torch.zeros(2, IN), torch.ones(OUT - 2, IN)]).double())
    found = parse(KMEANS).fit(W, norm).dense().detach()
    assert torch.allclose(found[:2], W[:2], atol=1e-5)
