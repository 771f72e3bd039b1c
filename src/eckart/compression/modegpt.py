"""MoDeGPT: the width between two matrices of a block is cut, instead of factoring every matrix by itself.

Lin, Gao, Smith, Patel, Tuli, Shen, Jin, Hsu: MoDeGPT: Modular Decomposition for Large Language Model Compression,
ICLR 2025, arXiv 2408.09632. The closed forms are in `eckart.linalg.pairs`:

- MLP: units are kept by ridge leverage, and the down projection is refitted to them (Nyström).
- Queries and keys: coordinates are kept by sqrt(E[q_i²] E[k_i²]), without rescaling (CR). Rotary pairs stay whole, the
  heads of a group share one set.
- Values and output: the product of both is truncated under the input's second moment, a group's heads together (SVD).

Departures from the paper:

- transformers' own attention code runs unchanged, so heads keep their nominal width at run time: the kept rows of q, k
  and v are stored alone and scattered into zeros (`select() @ dense()`), the kept columns of o likewise. Weights and
  their multiplications shrink; scores and the KV cache do not. The softmax scale stays what it was.
- Queries and keys are left dense where a norm stands between projection and score (Qwen3, Gemma 3): that norm reads the
  whole head.
- A bias of the values is moved into the output's (b_o += W_o b_v), which is exact as attention weights sum to one.
- The mean sparsity is not given but searched, so that the bytes of the output meet the budget.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from eckart.allocation import BudgetError
from eckart.allocation.entropy import sparsities
from eckart.anatomy import Block, Projection, anatomy
from eckart.calibration.calibrate import Request
from eckart.calibration.store import OUTSIDE
from eckart.checkpoint.layout import Layout, file_bytes, layout_of, tensor_bytes
from eckart.compression.plan import Layer, Plan, join_notes
from eckart.compression.recipe import Job, Method, count_weights
from eckart.compression.solve import _noting
from eckart.forms import Dense, Form, Product, Select, drop_in
from eckart.forms.algebra import ProductMatrix
from eckart.forms.base import Factored
from eckart.forms.layers import StandIn, kind_of, matrix_of, matrix_shape
from eckart.forms.low_rank import balance
from eckart.linalg import pairs
from eckart.linalg.whitening import check_finite
from eckart.registry import method

STEPS = 40
QK_NORM = "left dense: a norm of whole heads stands between this projection and the scores"


class Widths(NamedTuple):
    """What a block keeps: MLP units, coordinates of each q/k head, of each v/o head. None leaves a pair as it is."""

    mlp: int | None
    qk: int | None
    vo: int | None


@method("modegpt", family="width", paper="MoDeGPT, Lin et al., ICLR 2025, arXiv 2408.09632")
@dataclass(frozen=True)
class MoDeGPT(Method):
    """Cut the width between up and down, q and k, v and o in closed form, sparsity by block influence.

    Args:
        ridge: of the leverage scores of MLP units, relative to their mean square.
        damping: added to the second moment of the attention's input, relative to its mean diagonal.
        temperature: of the allocation; larger is flatter (the paper's epsilon).
        cap: no block loses more than this share.
        multiple: MLP widths are multiples of it.
    """

    ridge: float = 1e-2
    damping: float = 1e-4
    temperature: float = 0.1
    cap: float = 0.8
    multiple: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.cap < 1 or self.temperature <= 0:
            raise ValueError(f"modegpt needs 0 < cap < 1 and temperature > 0, not {self.cap} and {self.temperature}")
        if self.ridge <= 0 or self.damping < 0 or self.multiple < 1:
            raise ValueError(f"modegpt needs ridge > 0, damping >= 0 and multiple >= 1, not {self.ridge}, {self.damping} and {self.multiple}")  # fmt: skip # noqa: E501

    def request(self, model: nn.Module, blocks: list[str]) -> Request:
        found = anatomy(model).blocks
        for block in found:
            _check(model, block)
        probes = {i: [block.attention.q.module, block.mlp.down.module] for i, block in enumerate(found)}
        return Request(probes=probes, needs=frozenset({"x", "outer"}), influence=True)

    def plan(self, job: Job) -> Plan:
        found = anatomy(job.model).blocks
        target = sum(_weight_bytes(job, i, name) for i, b in enumerate(found) for name in (*b.readers(), *b.writers()))
        total = job.budget.total(input_bytes=job.input_bytes, weights=count_weights(job), target_bytes=target)
        return self.plan_widths(job, self._search(job, found, total), total)

    def _search(self, job: Job, found: tuple[Block, ...], total: int) -> list[Widths]:
        """The widths at the least mean sparsity whose bytes meet the budget."""

        def at(mean: float) -> list[Widths]:
            losses = sparsities(job.influence, mean, self.temperature, self.cap)
            return [self.widths(block, loss) for block, loss in zip(found, losses, strict=True)]

        if output_bytes(job, found, at(0.0)) <= total:
            return at(0.0)
        low, high = 0.0, self.cap
        smallest = output_bytes(job, found, at(high))
        if smallest > total:
            raise BudgetError(
                f"the budget {job.budget} is {total} bytes; with no block losing more than {self.cap:g} of its width "
                f"the smallest possible is {smallest} bytes ({smallest / job.input_bytes:.3f} of the input)"
            )
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (low, middle) if output_bytes(job, found, at(middle)) <= total else (middle, high)
        return at(high)

    def widths(self, block: Block, sparsity: float) -> Widths:
        """What a block keeps when it loses this share."""
        attention = block.attention
        paired = attention.rotary is not None and attention.rotary.dim == attention.head_dim
        qk = None if attention.qk_norm else _share(attention.head_dim, 1 - sparsity, 2 if paired else 1)
        mlp = _share(block.mlp.down.shape[1], 1 - sparsity, self.multiple)
        return Widths(mlp, qk, _share(attention.head_dim, 1 - sparsity, 1))

    def plan_widths(self, job: Job, widths: list[Widths], total: int) -> Plan:
        """The plan that keeps these widths, whatever they cost."""
        started = time.perf_counter()
        layers: list[Layer] = []
        found = anatomy(job.model).blocks
        for part, (block, kept) in enumerate(zip(found, widths, strict=True)):
            with job.subject.loaded(block.name):
                solved = self._solve(job, part, block, kept)
            layers += [_layer(job, part, site, solved, block) for site in sites(job, part, block, kept)]
            job.progress("plan", part + 1, len(job.blocks))
        after = output_bytes(job, found, widths)
        seconds = 1.2 * (time.perf_counter() - started)
        extra = {"widths": [list(kept) for kept in widths]}
        return Plan(layers, job.input_bytes, after, total, seconds, extra=extra)

    def _solve(self, job: Job, part: int, block: Block, widths: Widths) -> Solved:
        """The closed forms of one block, which is loaded."""
        a, mlp = block.attention, block.mlp
        C, mean = _moments(job, part, a.q.module)
        tasks: list[partial[Any]] = []
        if widths.mlp is not None:
            W = _rows(job.model, mlp.down)
            tasks.append(partial(pairs.nystrom, W, _moments(job, part, mlp.down.module)[0].to(W.device), widths.mlp, self.ridge, mlp.down.module))  # fmt: skip # noqa: E501
        if widths.qk is not None:
            q, k = (
                second_moments(_rows(job.model, p), _bias(job.model, p), C, mean).view(-1, a.head_dim)
                for p in (a.q, a.k)
            )
            scores = (q.view(a.kv_heads, a.group, -1) * k[:, None]).sum(1)
            turning = a.rotary.pairs() if a.rotary else ()
            tasks.append(partial(pairs.strongest_coordinates, scores, turning, widths.qk, a.name))
        if widths.vo is not None:
            V, O = value_output(job.model, block)
            C = _damped(C, self.damping).to(V.device)
            tasks += [partial(pairs.truncated_product, o, v, C, widths.vo, a.name) for v, o in zip(V, O, strict=True)]
        return Solved.of(list(job.executor.map(_run, tasks)), widths)

    def rewrite(self, job: Job, plan: Plan, part: int) -> list[Layer]:
        if part == OUTSIDE:
            return []
        block, widths = anatomy(job.model).blocks[part], Widths(*plan.extra["widths"][part])
        solved = self._solve(job, part, block, widths)
        measured = {layer.name: layer.predicted_error for layer in plan.of(part)}
        modules: dict[str, nn.Module] = {}
        if widths.mlp is not None and solved.mlp is not None:
            modules |= _cut_mlp(job, block, solved.mlp)
            C = _moments(job, part, block.mlp.down.module)[0]
            measured[block.mlp.down.module] = _stored_mlp_error(job, block, modules, solved.mlp, C)
        if widths.qk is not None or widths.vo is not None:
            modules |= _cut_attention(job, block, solved)
        if widths.vo is not None:
            C = _damped(_moments(job, part, block.attention.q.module)[0], self.damping)
            measured[block.attention.o.module] = _stored_value_error(job, block, modules, C)
        for name, module in modules.items():
            for tensor in module.state_dict().values():
                check_finite(tensor, f"{name}, stored as {job.dtype},")
            job.model.set_submodule(name, module.requires_grad_(False))
        return [replace(layer, measured_error=measured[layer.name]) for layer in plan.of(part)]
