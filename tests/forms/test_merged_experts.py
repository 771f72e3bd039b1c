"""Stacked experts read, and the stand-in in which several are one: against the loop that is obviously right."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn

import mixtures
from eckart.forms import Dense, parse
from eckart.forms.experts import PARTS, Expert, MergedExperts, Stack, expert_matrices, stack_of
from eckart.testing import error_ratio, gaussian
from mixtures import EXPERTS, INNER, TOP_K, WIDTH

CLUSTERS = [0, 1, 0, 2, 2, 1, 0, 3]


def stacked(name: str = "mixtral") -> Any:
    return mixtures.build(name).model.layers[0].mlp.experts


def merged(module: Any, clusters: list[int] = CLUSTERS, form: str = "dense()") -> MergedExperts:
    """Every cluster is its first member."""
    matrices, closed = expert_matrices(module), parse(form)
    firsts = [clusters.index(c) for c in range(max(clusters) + 1)]
    made = [Expert({part: closed.fit(matrices[part][e]) for part in PARTS}, module.act_fn) for e in firsts]
    return MergedExperts(made, clusters, closed, module.act_fn)


def naive(
    module: MergedExperts, x: Float[Tensor, "tokens width"], index: Tensor, shares: Tensor
) -> Float[Tensor, "tokens width"]:
    out = torch.zeros_like(x)
    for t, (chosen, share) in enumerate(zip(index.tolist(), shares, strict=True)):
        for e, s in zip(chosen, share, strict=True):
            expert: Any = module.merged[module.clusters[e]]
            gate, up, down = (getattr(expert, part).dense() for part in PARTS)
            out[t] = out[t] + s * (down @ (torch.nn.functional.silu(gate @ x[t]) * (up @ x[t])))
    return out


def routing(tokens: int) -> tuple[Tensor, Tensor]:
    order = gaussian(tokens, EXPERTS, seed=2).argsort(1)[:, : TOP_K + 1]
    return order, gaussian(tokens, TOP_K + 1, seed=3).abs()


@pytest.mark.parametrize("form", ["dense()", "low_rank(rank=5)", "quantized(bits=4, group=8)"])
@pytest.mark.parametrize("tokens", [0, 1, 11])
def test_forward_is_that_of_the_naive_loop(form: str, tokens: int) -> None:
    module, x = merged(stacked(), form=form), gaussian(tokens, WIDTH)
    assert error_ratio(module(x, *routing(tokens)), naive(module, x, *routing(tokens))) < 1e-5


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_with_every_expert_kept_it_is_the_models_own_module(name: str) -> None:
    own = stacked(name)
    module, x = merged(own, list(range(EXPERTS))), gaussian(9, WIDTH)
    index, shares = routing(9)
    assert error_ratio(module(x, index, shares), own(x, index, shares)) < 1e-5
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in own.parameters())


def test_gradients_reach_what_was_chosen() -> None:
    module, x = merged(stacked()), gaussian(5, WIDTH).requires_grad_()
    index, shares = torch.tensor([[0, 2]] * 5), torch.ones(5, 2)
    module(x, index, shares).sum().backward()
    reached = [all(p.grad is not None for p in expert.parameters()) for expert in module.merged]
    assert reached == [True, False, False, False]
    assert x.grad is not None
    again = x.detach().clone().requires_grad_()
    naive(module, again, index, shares).sum().backward()
    assert again.grad is not None
    assert error_ratio(x.grad, again.grad) < 1e-5


def test_an_empty_one_has_the_layout_of_a_full_one() -> None:
    own = stacked()
    stack = stack_of(own)
    assert stack == Stack(EXPERTS, WIDTH, INNER)
    empty = MergedExperts.empty(own, stack, CLUSTERS, Dense(), torch.float32)
    full = merged(own)
    assert {k: t.shape for k, t in empty.state_dict().items()} == {k: t.shape for k, t in full.state_dict().items()}
    assert empty.spec() == full.spec() == {"kind": "merged_experts", "form": "dense()", "clusters": CLUSTERS}


NAME = "model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"clusters": [0] * 7}, "which of the 8 experts are one"),
        ({"clusters": [0, 2] * 4}, "which of the 8 experts are one"),
        ({"clusters": [0, -1] * 4}, "which of the 8 experts are one"),
        ({"clusters": [0, True] * 4}, "which of the 8 experts are one"),
        ({"clusters": "00000000"}, "which of the 8 experts are one"),
        ({"clusters": None}, "which of the 8 experts are one"),
        ({"form": "sorcery()"}, "sorcery"),
        ({"form": "low_rank(rank=99)"}, "does not fit"),
        ({"form": "low_rank()"}, "no rank yet"),
        ({"form": "dense() + dense() + dense() + dense() + dense()"}, "more than any compressed one"),
    ],
)
def test_what_a_damaged_checkpoint_says_is_refused(spec: dict[str, Any], message: str) -> None:
    model = mixtures.build("mixtral")
    good = {"kind": "merged_experts", "form": "dense()", "clusters": CLUSTERS}
    assert isinstance(MergedExperts.from_spec(model, NAME, good, torch.float32), MergedExperts)
    with pytest.raises(ValueError, match=message) as refused:
        MergedExperts.from_spec(model, NAME, good | spec, torch.float32)
    assert NAME in str(refused.value)
    with pytest.raises(ValueError, match="the model has"):
        MergedExperts.from_spec(model, "lm_head", good, torch.float32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"has_bias": True}, "has_bias"), ({"has_gate": False}, "no has_gate"), ({"is_transposed": True}, "transposed"),
        ({"is_concatenated": False}, "no is_concatenated"), ({"act_fn": None}, "a gate of its own"),
        ({"_apply_gate": lambda x: x}, "a gate of its own"),
    ],
)  # fmt: skip
def test_stacks_of_another_kind_are_refused(settings: dict[str, Any], message: str) -> None:
    module = copy.deepcopy(stacked())
    for key, value in settings.items():
        setattr(module, key, value)
    with pytest.raises(ValueError, match=message):
        stack_of(module)


def test_other_modules_are_no_stacks() -> None:
    assert all(stack_of(m) is None for m in (nn.Linear(2, 3), nn.ModuleList([nn.Linear(2, 2)]), merged(stacked())))
    odd = nn.Module()
    odd.num_experts = 2  # type: ignore[assignment]
    odd.w1, odd.w2 = nn.Parameter(torch.zeros(2, 3, 4)), nn.Parameter(torch.zeros(2, 4, 3))
    with pytest.raises(ValueError, match="does not hold its experts as gate_up_proj and down_proj"):
        stack_of(odd)
