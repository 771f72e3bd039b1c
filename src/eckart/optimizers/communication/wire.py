"""The collectives of a process group, and the bytes that went into them."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import torch
from jaxtyping import UInt8
from torch import Tensor, distributed
from torch.distributed import ProcessGroup, Work

Kind = Literal["start", "dense", "compressed", "planning"]


class Wire:
    """Starts collectives and counts what this process hands to them.

    Attributes:
        sent: bytes by kind: gradients before compression starts, those that are never compressed, compressed ones, and
            what choosing the settings takes. How often a collective forwards them is the backend's affair.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.rank, self.world = distributed.get_rank(group), group.size()
        self.sent: Counter[str] = Counter()

    def sum(self, x: Tensor, kind: Kind) -> Work:
        """Start to add up x over all processes, in place."""
        self.sent[kind] += x.nbytes
        return distributed.all_reduce(x, group=self.group, async_op=True)

    def mean(self, x: Tensor, kind: Kind) -> Work:
        """Start to average x over all processes, in place; divided first, so that narrow types do not overflow."""
        return self.sum(x.div_(self.world), kind)

    def gather(self, x: UInt8[Tensor, " n"], kind: Kind) -> tuple[Work, UInt8[Tensor, "world n"]]:
        """Start to collect what every process sends; all of them send equally much."""
        self.sent[kind] += x.nbytes
        everyone = torch.empty(self.world, x.numel(), dtype=x.dtype, device=x.device)
        return distributed.all_gather(list(everyone), x, group=self.group, async_op=True), everyone

    def share(self, x: Tensor, kind: Kind) -> Work:
        """Start to send the first process's x to all, in place."""
        self.sent[kind] += x.nbytes if self.rank == 0 else 0
        source = distributed.get_global_rank(self.group, 0)
        return distributed.broadcast(x, source, group=self.group, async_op=True)
