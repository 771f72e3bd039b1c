"""Channels split and merged: a sparse matrix that leaves no channel much larger than the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from eckart.forms.base import FORMS, Factored, Form, Shape, check_shape
from eckart.linalg.weighting import PLAIN, Weighting


class ReassemblyMatrix(Factored):
    """Channel `split[k]` becomes `copies[k]` rows that share it equally; `merged[k]` is averaged into `into[k]`.

    Every other channel has one row, which for those merged into is the mean. Rows are in the order of channels.
    """

    split: Tensor
    copies: Tensor
    merged: Tensor
    into: Tensor
    like: Tensor

    def __init__(
        self, split: Int[Tensor, " s"], copies: Int[Tensor, " s"], merged: Int[Tensor, " e"], into: Int[Tensor, " e"],
        shape: Shape, form: Reassembly, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        narrow = torch.int16 if max(shape) < 2**15 else torch.int32
        for name, value in (("split", split), ("copies", copies), ("merged", merged), ("into", into)):
            self.register_buffer(name, value.to(narrow))
        # nothing else here has a floating point dtype, and `dense` must answer in the model's
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=split.device), persistent=False)
        self.shape, self.form = shape, form

    def forward(
        self, x: Float[Tensor, "*batch in"], bias: Float[Tensor, " out"] | None = None
    ) -> Float[Tensor, "*batch out"]:
        source, count = self._sources()
        y = (self._added(x) / count.to(x.dtype))[..., source]
        return y if bias is None else y + bias

    def columns(self, W: Float[Tensor, "n in"]) -> Float[Tensor, "n out"]:
        """The matrix for reassembled inputs: columns repeated where channels are split, added where they are merged.

        W x is `columns(W)` times the reassembled x where nothing is merged; a pair that is merged is off by
        (x_i - x_j) (w_i - w_j) / 2.
        """
        return self._added(W)[:, self._sources()[0]]

    def dense(self) -> Float[Tensor, "out in"]:
        return self.forward(torch.eye(self.shape[1], dtype=self.like.dtype, device=self.like.device)).T

    def flops(self, tokens: int) -> int:
        return tokens * (self.shape[1] + self.merged.shape[0])

    def _added(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        """Merged channels added to those that they are merged into."""
        return x.index_add(-1, self.into.long(), x.index_select(-1, self.merged.long()))

    def _sources(self) -> tuple[Int[Tensor, " out"], Int[Tensor, " in"]]:
        """The channel of every row, and by how much each channel's sum is divided."""
        out, in_ = self.shape
        split, copies, merged, into = (t.long() for t in (self.split, self.copies, self.merged, self.into))
        places = torch.cat([split, merged, into])
        if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < in_:
            raise ValueError(f"a reassembly names channels outside its {in_}: the file is damaged")
        rows = torch.ones(in_, dtype=torch.long, device=split.device)
        rows[split], rows[merged] = copies, 0
        if int(rows.sum()) != out or bool((copies < 1).any()) or bool((rows[into] != 1).any()):
            raise ValueError(f"a reassembly does not make {out} channels of {in_}: the file is damaged")
        count = rows.clamp_min(1).index_add(0, into, torch.ones_like(into))
        return torch.arange(in_, device=rows.device).repeat_interleave(rows, output_size=out), count


@FORMS.word("reassembly")
@dataclass(frozen=True)
class Reassembly(Form):
    """Some channels split into equal parts, as many others merged (QLLM, arXiv 2310.08041, section 4.1).

    As a factor of a product it is square. It stores the channels and their numbers; multiplying by it is a copy.

    Args:
        split: channels that become several.
        merged: channels that vanish in others.
    """

    split: int = 1
    merged: int = 0

    def __post_init__(self) -> None:
        for name in ("split", "merged"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"reassembly({name}={value!r}): it is a number of channels, from 0 up")

    def inner(self, out: int | None = None, in_: int | None = None) -> int | None:
        return out if out is not None else in_

    def ladder(self, shape: Shape) -> list[Form]:
        return [self]

    def _extra(self, shape: Shape) -> int:
        """Rows beyond one for each channel that is not merged."""
        check_shape(shape, self)
        out, in_ = shape
        extra = out - in_ + self.merged
        left = in_ - self.split - self.merged
        if extra < 0 or left < int(self.merged > 0) or (extra and not self.split):
            raise ValueError(f"{self} makes no {out} channels of {in_}")
        return extra

    def build(self, shape: Shape, *, dtype: torch.dtype | None = None, device: str | None = None) -> ReassemblyMatrix:
        self._extra(shape)
        s, e = (torch.empty(n, dtype=torch.int32, device=device) for n in (self.split, self.merged))
        return ReassemblyMatrix(s, s, e, e, shape, self, dtype)

    def at(
        self, split: Int[Tensor, " s"], copies: Int[Tensor, " s"], merged: Int[Tensor, " e"], into: Int[Tensor, " e"],
        shape: Shape, dtype: torch.dtype | None = None,
    ) -> ReassemblyMatrix:  # fmt: skip
        """The module that splits and merges these channels. Raises `ValueError` where they do not fit together."""
        self._extra(shape)
        apart = len(torch.cat([split, merged]).unique()) == self.split + self.merged
        if not apart or (len(copies), len(into)) != (self.split, self.merged):
            raise ValueError(f"{self} needs {self.split} channels to split and {self.merged} others to merge")
        made = ReassemblyMatrix(split, copies, merged, into, shape, self, dtype)
        made._sources()
        return made

    def fit(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting = PLAIN, *, dtype: torch.dtype | None = None
    ) -> ReassemblyMatrix:
        """Splits the columns that carry most in the weighted norm, evenly, and merges those that carry least.

        Which channels are alike is not in a matrix: whoever has their numbers chooses by `at`.
        """
        shape = (matrix.shape[0], matrix.shape[1])
        extra = self._extra(shape)
        carried = weighting.left.times(matrix.double().T).square().sum(1)
        carried = carried * weighting.right.gram(shape[1]).diagonal().to(carried.device)
        order = carried.sort(descending=True, stable=True).indices
        split, kept, merged = order.tensor_split([self.split, shape[1] - self.merged])
        deal = torch.arange(self.split, device=order.device)
        copies = 1 + extra // max(1, self.split) + (deal < extra % max(1, self.split)).long()
        into = kept.flip(0).repeat(-(-self.merged // max(1, len(kept))))[: self.merged]
        return self.at(split, copies, merged, into, shape, dtype or matrix.dtype)
