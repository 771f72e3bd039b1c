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

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.allocation import BudgetError
from eckart.allocation.entropy import sparsities
from eckart.anatomy import Attention, Block, Projection, anatomy
from eckart.calibration.calibrate import Request
from eckart.calibration.store import OUTSIDE
from eckart.checkpoint.layout import file_bytes, tensor_bytes
from eckart.compression.narrowing import (
    Site,
    Widths,
    bias_of,
    check_block,
    narrow_attention,
    narrow_mlp,
    narrowed,
    sites,
    weight_of,
)  # fmt: skip
from eckart.forms.layers import kind_of, matrix_shape
from eckart.forms.low_rank import balance
from eckart.jobs.method import Job, Method, count_weights
from eckart.jobs.plan import Layer, Plan, join_notes, sample_spectrum
from eckart.linalg import pairs
from eckart.linalg.whitening import check_finite
from eckart.registry import method
from eckart.remarks import noting

STEPS = 40


@method("modegpt", family="width", paper="MoDeGPT, Lin et al., ICLR 2025, arXiv 2408.09632")
@dataclass(frozen=True)
class MoDeGPT(Method):
    """Cut the width between up and down, q and k, v and o in closed form, sparsity by block influence.

    Args:
        ridge: of the leverage scores of MLP units, relative to their mean square.
        damping: added to the second moment of the attention's input, relative to its mean diagonal.
        temperature: of the allocation, the paper's epsilon; larger is flatter.
        cap: no block loses more than this share.
        multiple: MLP widths are multiples of it. Widths of heads are not rounded, as heads are stored side by side.
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
            check_block(model, block)
        probes = {i: [block.attention.q.module, block.mlp.down.module] for i, block in enumerate(found)}
        return Request(probes=probes, needs=frozenset({"x", "outer"}), influence=True)

    def plan(self, job: Job) -> Plan:
        found = anatomy(job.model).blocks
        names = [name for block in found for name in (*block.readers(), *block.writers())]
        target = sum(tensor_bytes(job.dtype, matrix_shape(job.model.get_submodule(name))) for name in names)
        total = job.budget.total(input_bytes=job.input_bytes, weights=count_weights(job), target_bytes=target)
        return self.plan_widths(job, self._search(job, found, total), total)

    def _search(self, job: Job, found: Sequence[Block], total: int) -> list[Widths]:
        """The widths at the least mean sparsity whose bytes meet the budget."""
        cost = _cost(job, found)

        def at(mean: float) -> list[Widths]:
            losses = sparsities(job.influence, mean, self.temperature, self.cap)
            return [self.widths(block, loss) for block, loss in zip(found, losses, strict=True)]

        if cost(at(0.0)) <= total:
            return at(0.0)
        low, high = 0.0, self.cap
        smallest = cost(at(high))
        if smallest > total:
            raise BudgetError(
                f"the budget {job.budget} is {total} bytes; where no block loses more than {self.cap:g} of its width "
                f"the smallest possible is {smallest} bytes ({smallest / job.input_bytes:.3f} of the input)"
            )
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (low, middle) if cost(at(middle)) <= total else (middle, high)
        return at(high)

    def widths(self, block: Block, sparsity: float) -> Widths:
        """What a block keeps when it loses this share."""
        a = block.attention
        paired = a.rotary is not None and a.rotary.dim == a.head_dim
        return Widths(
            mlp=_kept(block.mlp.down.shape[1], 1 - sparsity, self.multiple),
            qk=None if a.qk_norm else _kept(a.head_dim, 1 - sparsity, 2 if paired else 1),
            vo=_kept(a.head_dim, 1 - sparsity, 1),
        )

    def plan_widths(self, job: Job, widths: Sequence[Widths], total: int) -> Plan:
        """The plan that keeps these widths in the blocks, whatever they cost."""
        started = time.perf_counter()
        found = anatomy(job.model).blocks
        layers: list[Layer] = []
        for part, (block, kept) in enumerate(zip(found, widths, strict=True)):
            with job.subject.loaded(block.name):
                solved = self._solve(job, part, block, kept)
            layers += [_layer(job, part, block, site, solved) for site in sites(job.model, block, kept)]
            job.progress("plan", part + 1, len(found))
        seconds = 1.2 * (time.perf_counter() - started)
        extra = {"widths": [list(kept) for kept in widths]}
        return Plan(layers, job.input_bytes, _cost(job, found)(widths), total, seconds, extra=extra)

    def rewrite(self, job: Job, plan: Plan, part: int) -> list[Layer]:
        if part == OUTSIDE:
            return []
        block = anatomy(job.model).blocks[part]
        solved = self._solve(job, part, block, Widths(*plan.extra["widths"][part]))
        modules: dict[str, nn.Module] = {}
        if solved.mlp is not None:
            modules |= narrow_mlp(job.model, block, solved.mlp.index, solved.mlp.right, job.dtype)
        if solved.qk is not None or solved.vo:
            qk = None if solved.qk is None else solved.qk.index
            values, outputs = _joined(block.attention, solved.vo)
            modules |= narrow_attention(job.model, block, qk, values, outputs, job.dtype)
        for name, module in modules.items():
            for parameter in module.parameters():
                check_finite(parameter, f"{name}, stored as {job.dtype},")
            job.model.set_submodule(name, module)
        errors = _by_module(block, solved.measured)
        return [replace(layer, measured_error=errors.get(layer.name)) for layer in plan.of(part)]

    def _solve(self, job: Job, part: int, block: Block, widths: Widths) -> Solved:
        """The closed forms for one block, which is loaded, and their errors at the precision that is stored."""
        a, down = block.attention, block.mlp.down
        solved = Solved()
        C, mean = _moments(job, part, a.q.module)
        if widths.mlp is not None:
            W, Ca = weight_of(job.model, down.module), _moments(job, part, down.module)[0]
            with noting() as notes:
                found = pairs.nystrom(W, Ca, widths.mlp, self.ridge, down.module)
            solved.note = notes.text
            stored = found.right.to(job.dtype)
            solved.mlp = replace(found, right=stored)
            solved.predicted["mlp"], solved.energy["mlp"] = found.error, found.energy
            solved.measured["mlp"] = pairs.restricted_error(W, stored, found.index, Ca)
        if widths.qk is not None:
            squares = [_squares(job, p, C, mean) for p in (a.q, a.k)]
            scores = (squares[0].view(a.kv_heads, a.group, -1) * squares[1].view(a.kv_heads, 1, -1)).sum(1)
            turning = a.rotary.pairs() if a.rotary else ()
            solved.qk = pairs.strongest_coordinates(scores, turning, widths.qk, a.name)
            solved.predicted["qk"] = solved.measured["qk"] = solved.qk.error
            solved.energy["qk"] = solved.qk.energy
        if widths.vo is not None:
            C = C + self.damping * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device)
            groups = list(zip(*_value_output(job, a), strict=True))
            products = [pairs.truncated_product(o, v, C, widths.vo, a.name) for v, o in groups]
            for product in products:
                left, right = balance(product.left, product.right)
                solved.vo.append(replace(product, left=left.to(job.dtype), right=right.to(job.dtype)))
            solved.predicted["vo"] = float(sum(p.squares[widths.vo :].sum() for p in products))
            solved.energy["vo"] = float(sum(p.squares.sum() for p in products))
            solved.measured["vo"] = sum(
                pairs.product_error(o, v, p.left, p.right, C) for (v, o), p in zip(groups, solved.vo, strict=True)
            )
        return solved


@dataclass
class Solved:
    """What the closed forms gave for one block: errors by pair (`mlp`, `qk`, `vo`), and a note on `mlp`."""

    mlp: pairs.Nystrom | None = None
    qk: pairs.Coordinates | None = None
    vo: list[pairs.Product] = field(default_factory=list)
    predicted: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    energy: dict[str, float] = field(default_factory=dict)
    note: str | None = None


def _moments(job: Job, part: int, name: str) -> tuple[Float[Tensor, "in in"], Float[Tensor, " in"]]:
    """E[x xᵀ] and E[x] of a module's input, in float64, where the module is."""
    statistics = job.statistics(name, part)
    device = next(job.model.get_submodule(name).parameters()).device
    C, mean = (statistics.mean(key, name).to(device, torch.float64) for key in ("outer", "x"))
    return C, mean


def _squares(job: Job, p: Projection, C: Float[Tensor, "in in"], mean: Float[Tensor, " in"]) -> Float[Tensor, " out"]:
    """E[(w x + b)²] for every row w and bias b of a projection."""
    W, bias = weight_of(job.model, p.module), bias_of(job.model, p.module)
    rows = p.index().to(W.device)
    W = W[rows]
    squares = ((W @ C) * W).sum(1)
    return squares if bias is None else squares + 2 * bias[rows] * (W @ mean) + bias[rows].square()


def _value_output(job: Job, a: Attention) -> tuple[Float[Tensor, "kv_heads h in"], Float[Tensor, "kv_heads m h"]]:
    """The value matrix of every group, and the output matrices of its heads, one upon the other."""
    V = weight_of(job.model, a.v.module)
    V = V[a.v.index().to(V.device)].view(a.kv_heads, a.head_dim, -1)
    O = weight_of(job.model, a.o.module).view(-1, a.kv_heads, a.group, a.head_dim)
    return V, O.permute(1, 2, 0, 3).reshape(a.kv_heads, -1, a.head_dim)


def _joined(a: Attention, products: list[pairs.Product]) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """`_value_output` the other way round: values (kv_heads, k, in) and outputs (out, heads * k)."""
    if not products:
        return None, None
    L = torch.stack([p.left for p in products])
    L = L.view(a.kv_heads, a.group, -1, L.shape[-1]).permute(2, 0, 1, 3)
    return torch.stack([p.right for p in products]), L.flatten(1)


def _kept(full: int, share: float, multiple: int) -> int | None:
    """The first multiple that is no less than a share; None where that is all."""
    width = math.ceil(share * full / multiple) * multiple
    return None if width >= full else width


def _cost(job: Job, found: Sequence[Block]) -> Callable[[Sequence[Widths]], int]:
    """Bytes of all weight files, headers included, from the widths of all blocks."""

    @functools.cache
    def of(part: int, widths: Widths) -> int:
        return file_bytes(narrowed(job.layouts[part], sites(job.model, found[part], widths), job.dtype))

    return lambda widths: file_bytes(job.layouts[OUTSIDE]) + sum(of(i, w) for i, w in enumerate(widths))


def _by_module(block: Block, values: dict[str, float]) -> dict[str, float]:
    """What is known of a pair, under the module that stands for it."""
    names = {"mlp": block.mlp.down.module, "vo": block.attention.o.module, "qk": block.attention.q.module}
    return {names[pair]: value for pair, value in values.items()}


def _layer(job: Job, part: int, block: Block, site: Site, solved: Solved) -> Layer:
    a, module = block.attention, job.model.get_submodule(site.name)
    before = [entry for key, entry in job.layouts[part].items() if key in (f"{site.name}.weight", f"{site.name}.bias")]
    dense_bytes = sum(tensor_bytes(*entry) for entry in before)
    after = site.layout(job.dtype).values() if site.changed else before
    predicted, energy = (_by_module(block, values).get(site.name) for values in (solved.predicted, solved.energy))
    spectrum = None
    if solved.vo and site.name == a.o.module:
        spectrum = sample_spectrum(torch.cat([p.squares for p in solved.vo]).sqrt().sort(descending=True).values)
    normed = a.qk_norm and site.name in (a.q.module, a.k.module)
    return Layer(
        site.name, kind_of(module) or "", part, matrix_shape(module), str(site.form), dense_bytes,
        sum(tensor_bytes(*entry) for entry in after), predicted, energy, spectrum=spectrum,
        note=join_notes(
            solved.note if site.name == block.mlp.down.module else None,
            "queries and keys are left dense: a norm of whole heads stands before the scores" if normed else None,
            None if site.changed or normed else "left dense: its share keeps every unit",
        ),
    )  # fmt: skip
