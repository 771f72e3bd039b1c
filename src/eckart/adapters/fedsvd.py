"""FedSVD: clients train B alone, and the server turns the frozen A to the singular vectors of what they learned."""

from __future__ import annotations

from dataclasses import dataclass

from eckart.adapters.base import Adapter
from eckart.adapters.federation.factors import Federated
from eckart.adapters.federation.rules import Refresh, Rule
from eckart.adapters.host import Site
from eckart.adapters.tuner import adapter


@adapter("fedsvd", family="federated", paper="FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA, Lee et al., NeurIPS 2025, arXiv 2505.12805")  # fmt: skip # noqa: E501
@dataclass
class FedSVD(Adapter):
    """W + (alpha / r) B A of which clients train B, and the server refreshes A by the SVD of B A after a round.

    With A common and frozen, the mean of products is the product of means, and noise enters once and not squared. The
    refresh leaves B A as it is, gives A orthonormal rows, and is post-processing: it costs no privacy. It turns A
    within the span of its first rows, which no round leaves: what that span misses cannot be learned. On its own it is
    LoRA with a frozen A (FFA-LoRA, arXiv 2403.12313); `eckart.adapters.federation` trains it.

    Args:
        rank: r.
        alpha: of the scale alpha / r.
        period: rounds between refreshes; 0 keeps the first A for ever, which is FFA-LoRA.
        warmup: rounds without a refresh, before the first.
        dropout: of the adapter's input, in training.
    """

    rank: int = 8
    alpha: float = 8.0
    period: int = 1
    warmup: int = 0
    dropout: float = 0.05

    def check(self) -> None:
        self.at_least(rank=self.rank)
        self.positive(alpha=self.alpha)
        for name, value in (("period", self.period), ("warmup", self.warmup)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{self.key}({name}={value!r}): it is a whole number of rounds, 0 or more")

    def update(self, site: Site) -> Federated:
        rank, (out, in_) = self.fitting(site), site.shape
        A = site.uniform(rank, in_, bound=in_**-0.5)
        return Federated(out, A, self.alpha / rank, frozen=True)

    def rule(self) -> Rule:
        """How the server joins uploads."""
        return Refresh(self.period, self.warmup)
