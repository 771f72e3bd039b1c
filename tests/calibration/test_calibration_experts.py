"""Sums over experts against loops over tokens and experts, padding left out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mixtures
import tiny
from eckart.calibration.collect import Collector
from eckart.forms.experts import expert_matrices
from eckart.metrics.statistics import EXPERT_SUMS
from eckart.testing import error_ratio
from mixtures import EXPERTS, INNER, WIDTH

NAME = "model.layers.1.mlp.experts"


@pytest.mark.parametrize("padded", [False, True])
def test_sums_are_those_of_loops_over_tokens(padded: bool) -> None:
    model = mixtures.build("qwen2_moe")
    collector, seen = Collector(EXPERT_SUMS), list[tuple[Tensor, Tensor]]()
    handle = model.get_submodule(NAME).register_forward_pre_hook(lambda m, args: seen.append((args[0], args[1])))
    batches = tiny.batches((2, 1), padded=padded)
    with collector.hooked(model, [NAME]), torch.no_grad():
        for batch in batches:
            mask = batch.get("attention_mask")
            collector.next_batch(None if mask is None else mask.bool())
            model(**batch)
    handle.remove()
    real = torch.cat([b.get("attention_mask", torch.ones_like(b["input_ids"])).flatten().bool() for b in batches])
    x, index = (torch.cat(parts)[real] for parts in zip(*seen, strict=True))
    sums, W = collector.of(NAME).sums, expert_matrices(model.get_submodule(NAME))
    assert float(sums["tokens"]) == len(x) == int(real.sum())
    inner = torch.stack([torch.nn.functional.silu(x @ W["gate"][e].T) * (x @ W["up"][e].T) for e in range(EXPERTS)])
    out = torch.stack([h @ d.T for h, d in zip(inner, W["down"], strict=True)])
    cosines = torch.cosine_similarity(out[:, None], out[None], dim=-1).sum(-1)
    assert error_ratio(sums["similarity"], cosines) < 1e-5
    for e in range(EXPERTS):
        own = (index == e).any(-1)
        assert float(sums["routed"][e]) == int(own.sum())
        assert torch.allclose(sums["expert_outer"][e], x[own].T @ x[own], atol=1e-3)
        assert torch.allclose(sums["inner_outer"][e], inner[e][own].T @ inner[e][own], atol=1e-3)
    assert sums["expert_outer"].shape == (EXPERTS, WIDTH, WIDTH)
    assert sums["inner_outer"].shape == (EXPERTS, INNER, INNER)


def test_only_what_is_needed_is_summed() -> None:
    model, collector = mixtures.build("mixtral"), Collector({"routed"})
    with collector.hooked(model, [NAME]), torch.no_grad():
        collector.next_batch(None)
        model(**tiny.batches((1,))[0])
    assert set(collector.of(NAME).sums) == {"tokens", "routed"}
