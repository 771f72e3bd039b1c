"""DP-LoRA: a LoRA that clients with private data train together, each adding noise to its clipped gradients."""

from __future__ import annotations

from dataclasses import dataclass

from eckart.adapters.base import Adapter
from eckart.adapters.federation.factors import Federated, gaussian_rows
from eckart.adapters.federation.rules import RULES, Rule
from eckart.adapters.host import Site
from eckart.adapters.tuner import adapter


@adapter("dp_lora", family="federated", paper="Differentially Private Low-Rank Adaptation of Large Language Model Using Federated Learning, Liu et al., ACM TMIS 2025, arXiv 2312.17493")  # fmt: skip # noqa: E501
@dataclass
class DPLoRA(Adapter):
    """W + (alpha / r) B A with both factors trained by clients, whose noisy uploads a server averages each round.

    On its own it is LoRA with a Gaussian A and B = 0. `eckart.adapters.federation` trains it: `Server` holds the
    factors, a `LocalClient` its data, and its `Privacy` clips and adds noise. The paper's rank is 512, of models of 7B.

    Args:
        rank: r.
        alpha: of the scale alpha / r; None takes the rank.
        aggregation: how the server joins uploads: `mean` of each factor, as in the paper; `exact`, the mean product,
            its best rank r trained on and the rest kept beside it; `stack`, all factors side by side, and new ones
            to train (FLoRA, arXiv 2409.05976); `residual`, the mean of each factor, and beside it what the mean
            product differs by (FedEx-LoRA, arXiv 2410.09432).
    """

    rank: int = 8
    alpha: float | None = None
    aggregation: str = "mean"

    def check(self) -> None:
        self.at_least(rank=self.rank)
        if self.alpha is not None:
            self.positive(alpha=self.alpha)
        if self.aggregation not in RULES:
            raise ValueError(f"{self.key}(aggregation={self.aggregation!r}): it is one of {', '.join(RULES)}")

    def update(self, site: Site) -> Federated:
        rank, (out, in_) = self.fitting(site), site.shape
        scale = 1.0 if self.alpha is None else self.alpha / rank
        return Federated(out, gaussian_rows(rank, in_, site.generator), scale, frozen=False)

    def rule(self) -> Rule:
        """How the server joins uploads."""
        return RULES[self.aggregation]()
