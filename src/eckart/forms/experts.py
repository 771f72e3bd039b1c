"""Experts of a mixture: how transformers stacks them, and a stand-in in which several of them are one.

Transformers keeps the routed experts of a layer in one module with two parameters, `gate_up_proj` (experts, 2 inner,
width) and `down_proj` (experts, width, inner), which is called with the tokens, the indices of the experts that the
router chose for each, and their shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from eckart.forms.base import Factored, Form, parse
from eckart.forms.stand_ins import StandIn, stand_in

PARTS = ("gate", "up", "down")
MAX_EXPERTS = 100_000


@dataclass(frozen=True)
class Stack:
    """The sizes of stacked experts: down[e] (act(gate[e] x) * (up[e] x)) for e < count."""

    count: int
    width: int
    inner: int

    def shape(self, part: str) -> tuple[int, int]:
        """(out, in) of one expert's matrix."""
        return (self.width, self.inner) if part == "down" else (self.inner, self.width)

    @property
    def numbers(self) -> int:
        """In one expert."""
        return 3 * self.width * self.inner


def stack_of(module: nn.Module) -> Stack | None:
    """The sizes of a module's stacked experts; None where it holds none.

    Raises `ValueError` on stacks of another kind: with biases, without a gate, transposed, or a gate of their own.
    """
    both, down = module._parameters.get("gate_up_proj"), module._parameters.get("down_proj")
    stacks = [p for p in module._parameters.values() if p is not None and p.dim() == 3]
    if both is None or down is None or both.dim() != 3 or down.dim() != 3:
        if len(stacks) > 1 and hasattr(module, "num_experts"):
            raise ValueError(f"{type(module).__name__} does not hold its experts as gate_up_proj and down_proj")
        return None
    odd = [name for name in ("has_bias", "is_transposed", "has_post_expert_norm") if getattr(module, name, False)]
    odd += [f"no {name}" for name in ("has_gate", "is_concatenated") if not getattr(module, name, True)]
    own = getattr(getattr(module, "_apply_gate", None), "__name__", "_default_apply_gate")
    if own != "_default_apply_gate" or not callable(getattr(module, "act_fn", None)):
        odd.append("a gate of its own")
    count, width, inner = down.shape
    if odd or both.shape != (count, 2 * inner, width):
        raise ValueError(f"the experts of {type(module).__name__} are not down (act(gate x) * (up x)) in stacks of rows ({', '.join(odd) or tuple(both.shape)})")  # fmt: skip # noqa: E501
    return Stack(count, width, inner)


def expert_matrices(module: nn.Module) -> dict[str, Float[Tensor, "experts out in"]]:
    """The gate, up and down matrices of all stacked experts: views of the parameters."""
    both, down = module._parameters["gate_up_proj"], module._parameters["down_proj"]
    assert both is not None
    assert down is not None
    gate, up = both.detach().chunk(2, dim=1)
    return {"gate": gate, "up": up, "down": down.detach()}


class Expert(nn.Module):
    """down (act(gate x) * (up x)), each matrix of any form."""

    gate: Factored
    up: Factored
    down: Factored

    def __init__(self, matrices: Mapping[str, Factored], act: Any):
        super().__init__()
        self.gate, self.up, self.down = (matrices[part] for part in PARTS)
        self.__dict__["act"] = act  # the model's own: not a part of every expert

    def forward(self, x: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        return self.down.forward(self.__dict__["act"](self.gate.forward(x)) * self.up.forward(x))


@stand_in
class MergedExperts(StandIn):
    """Fewer experts than the router knows: each of its experts is redirected to one of these, which is stored once.

    The router is left as it is. Where it chooses several experts that are one now, their shares are added.

    Args:
        merged: the experts that there are.
        clusters: for every expert of the router, which of them it is.
        form: of every matrix of theirs.
    """

    kind = "merged_experts"

    def __init__(self, merged: Sequence[Expert], clusters: Sequence[int], form: Form, act: Any):
        super().__init__()
        self.merged, self.clusters, self.form = nn.ModuleList(merged), tuple(clusters), form
        self.act_fn = act
        self.num_experts = len(clusters)

    @classmethod
    def empty(
        cls, module: nn.Module, stack: Stack, clusters: Sequence[int], form: Form, dtype: torch.dtype
    ) -> MergedExperts:
        """Without values, in place of stacked experts."""
        act: Any = module.act_fn

        def made() -> Expert:
            return Expert({part: form.build(stack.shape(part), dtype=dtype, device="meta") for part in PARTS}, act)

        return cls([made() for _ in range(max(clusters) + 1)], clusters, form, act)

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "form": str(self.form), "clusters": list(self.clusters)}

    @classmethod
    def from_spec(cls, model: nn.Module, name: str, spec: dict[str, Any], dtype: torch.dtype) -> nn.Module:
        module = model.get_submodule(name)
        stack = stack_of(module)
        if stack is None:
            raise ValueError(f"{name}: the checkpoint says {cls.kind}, the model has {type(module).__name__}")
        clusters: Any = spec.get("clusters")
        whole = isinstance(clusters, list) and len(clusters) == stack.count <= MAX_EXPERTS
        if not whole or not all(type(c) is int for c in clusters) or set(clusters) != set(range(len(set(clusters)))):
            raise ValueError(f"{name}: the checkpoint does not say which of the {stack.count} experts are one")
        try:
            form = parse(str(spec.get("form")))
            nbytes = sum(form.nbytes(stack.shape(part), dtype) for part in PARTS)
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None
        if nbytes > 4 * stack.numbers * dtype.itemsize:
            raise ValueError(f"{name}: {form} would take {nbytes} bytes an expert, more than any compressed one")
        return cls.empty(module, stack, clusters, form, dtype)

    def forward(
        self, hidden_states: Float[Tensor, "tokens width"], top_k_index: Int[Tensor, "tokens k"],
        top_k_weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens width"]:  # fmt: skip
        """What the chosen experts put out, by their shares."""
        chosen = torch.tensor(self.clusters, device=top_k_index.device)[top_k_index]
        out = torch.zeros_like(hidden_states)
        for cluster in chosen.unique().tolist():
            here = chosen == cluster
            tokens = here.any(-1).nonzero()[:, 0]
            share = (top_k_weights[tokens] * here[tokens]).sum(-1, keepdim=True)
            y = self.merged[cluster](hidden_states[tokens]) * share
            out = out.index_add(0, tokens, y.to(out.dtype))
        return out

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts of the router, {len(self.merged)} stored, {self.form}"
