"""Sums over calibration data from which every metric is made. They add up: over batches, shards and workers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

FLOAT64_WIDTH = 2048
"""Outer products up to this width are summed in float64, wider ones in float32."""

TILE = 256
"""Rows of an outer product that are computed at a time."""

INPUT_SUMS = frozenset({"x", "abs", "square", "outer"})
EXPERT_SUMS = frozenset({"similarity", "routed", "expert_outer", "inner_outer"})
FORWARD_SUMS = INPUT_SUMS | EXPERT_SUMS
GRADIENT_SUMS = frozenset({"fisher", "fisher_in", "fisher_out", "grad_outer", "whole_gradients"})

COUNTED = {
    "fisher": "examples", "fisher_in": "examples", "fisher_out": "examples",
    "grad_outer": "grad_tokens", "whole_gradients": "grad_tokens",
}  # fmt: skip
"""What the sums over gradients are divided by for a mean; all others, by rows."""


@dataclass
class Statistics:
    """Sums over the rows that enter (and the gradients that leave) one matrix of shape (out, in).

    Attributes:
        sums: by name,
            `tokens` () rows seen, `x` (in,) their sum, `abs` (in,) of absolute values, `square` (in,) of squares,
            `outer` (in, in) of x xᵀ;
            `counts` (rows,) how often each row of a table was looked up, whose inputs are ids and not numbers;
            `similarity` (experts, experts) of cosines between what all experts of a mixture put out for a row, `routed`
            (experts,) rows sent to each, `expert_outer` (experts, width, width) and `inner_outer` (experts, inner,
            inner) of x xᵀ over the rows sent to each, before its gate and before its last matrix, in float32;
            `examples` () sequences seen by the backward pass, `fisher` (out, in) squared per-example gradients,
            `fisher_in` (in,) and `fisher_out` (out,) the same summed over the other side, `grad_tokens` () terms of
            their losses and `grad_outer` (out, out) of g gᵀ, g being the gradient of the summed loss with respect to
            one output row; `whole_gradients` (in + 2,) the sums over examples, with D = Σ g xᵀ and d = Σ g over the
            rows of each, of Dᵀ d, |D|² and |d|².
    """

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add_inputs(self, x: Float[Tensor, "*batch in"], needs: frozenset[str], mask: Bool[Tensor, "*batch"] | None = None) -> None:  # fmt: skip # noqa: E501
        """Add the rows of x where `mask` holds."""
        rows = x.reshape(-1, x.shape[-1]) if mask is None else x[mask]
        rows = as_multiplied(rows.detach())
        self._add("tokens", torch.tensor(float(rows.shape[0]), dtype=torch.float64))
        if "x" in needs:
            self._add("x", rows.sum(0, dtype=torch.float64))
        if "abs" in needs:
            self._add("abs", rows.abs().sum(0, dtype=torch.float64))
        if "square" in needs:
            self._add("square", rows.square().sum(0, dtype=torch.float64))
        if "outer" in needs:
            self._add_outer("outer", rows)

    def add_ids(self, ids: Int[Tensor, "*batch"], rows: int, mask: Bool[Tensor, "*batch"] | None = None) -> None:
        """Count the ids where `mask` holds, each from 0 to `rows` - 1."""
        ids = (ids if mask is None else ids[mask]).detach().reshape(-1)
        self._add("tokens", torch.tensor(float(ids.shape[0]), dtype=torch.float64))
        counts = self.sums.setdefault("counts", torch.zeros(rows, dtype=torch.float64, device=ids.device))
        counts.index_add_(0, ids, torch.ones(ids.shape[0], dtype=torch.float64, device=ids.device))

    def add_gradients(
        self, x: Float[Tensor, "*batch in"], g: Float[Tensor, "*batch out"], needs: frozenset[str],
        terms: int | None = None,
    ) -> None:  # fmt: skip
        """Add one example: inputs x of a layer and gradients g of the example's loss at its outputs.

        The loss is a sum of so many `terms`, by default of one a row.
        """
        x, g = (as_multiplied(t.detach().reshape(-1, t.shape[-1])) for t in (x, g))
        self._add("examples", torch.tensor(1.0, dtype=torch.float64))
        D = g.T @ x if needs & {"fisher", "fisher_in", "fisher_out", "whole_gradients"} else None
        if D is not None and needs & {"fisher", "fisher_in", "fisher_out"}:
            squared = D.square()
            self._add("fisher_in", squared.sum(0, dtype=torch.float64))
            self._add("fisher_out", squared.sum(1, dtype=torch.float64))
            if "fisher" in needs:
                self._add("fisher", squared)  # in float32: as large as the weight itself
        if needs & {"grad_outer", "whole_gradients"}:
            self._add("grad_tokens", torch.tensor(float(g.shape[0] if terms is None else terms), dtype=torch.float64))
        if "grad_outer" in needs:
            self._add_outer("grad_outer", g)
        if D is not None and "whole_gradients" in needs:
            d = g.sum(0)
            norms = torch.stack([D.double().square().sum(), d.double().square().sum()])
            self._add("whole_gradients", torch.cat([(D.T @ d).double(), norms]))

    def _add_outer(self, name: str, rows: Float[Tensor, "n width"]) -> None:
        """Add rowsᵀ rows, of which only tiles on and below the diagonal are computed; the sum is exactly symmetric."""
        width = rows.shape[1]
        if name not in self.sums:
            dtype = torch.float64 if width <= FLOAT64_WIDTH else torch.float32
            self.sums[name] = torch.zeros(width, width, dtype=dtype, device=rows.device)
        total = self.sums[name]
        for start in range(0, width, TILE):
            end = min(start + TILE, width)
            tile = rows[:, start:end].T @ rows[:, :end]
            total[start:end, :end] += tile
            total[:start, start:end] += tile[:, :start].T

    def _add(self, name: str, value: Tensor) -> None:
        if name in self.sums:
            self.sums[name] += value
        else:
            self.sums[name] = value.clone()

    def gradient_norm2(self, mean: Float[Tensor, " in"] | None, where: str = "") -> float:
        """E |Σ g (x - mean)ᵀ|² over terms of the loss, the sum over all rows of an example; `mean` None is zero."""
        sums = self.mean("whole_gradients", where)
        whole, bias = sums[-2:].tolist()
        if mean is None:
            return float(whole)
        return max(0.0, whole - 2 * float(sums[:-2] @ mean.to(sums)) + float(mean.square().sum()) * bias)

    def merge(self, other: Statistics) -> None:
        """Add the sums of another shard of the data."""
        for name, value in other.sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def all_reduce(self) -> None:
        """Add up over the processes of torch.distributed, which must hold sums of the same names."""
        for name in sorted(self.sums):
            self.sums[name] = self.sums[name].clone()  # layers that read one tensor share its sums
            torch.distributed.all_reduce(self.sums[name])

    def mean(self, name: str, where: str = "", dtype: torch.dtype | None = None) -> Tensor:
        """The sum called `name`, divided by what it counts. Raises `ValueError` that says what was not collected."""
        counter = COUNTED.get(name, "tokens")
        if name not in self.sums or counter not in self.sums or float(self.sums[counter]) == 0:
            raise ValueError(f"{where or 'a layer'} has no statistics {name!r}: calibrate on data that reaches it")
        found = torch.empty_like(self.sums[name], dtype=dtype).copy_(self.sums[name])
        return found.div_(self.sums[counter].to(found.dtype))

    @property
    def tokens(self) -> int:
        """Rows seen."""
        return int(self.sums["tokens"]) if "tokens" in self.sums else 0


def as_multiplied(x: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
    """x as float32 products see it at the precision that is set, so that sums of x and of x xᵀ fit together."""
    return x.bfloat16().float() if torch.get_float32_matmul_precision() == "medium" else x.float()
