"""LoRA-SB: a square core between the singular vectors of what full fine-tuning would change first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.adapters.base import Adapter
from eckart.adapters.frames import Framed
from eckart.adapters.gradients import weight_gradients
from eckart.adapters.host import Site
from eckart.adapters.tuner import adapter
from eckart.linalg.svd import TruncatedSVD, truncated_svd


@adapter("lora_sb", family="frozen frame", paper="Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning, Ponkshe et al., 2024, arXiv 2411.19557")  # fmt: skip # noqa: E501
@dataclass
class LoRASB(Adapter):
    """W + B R A with B, A frozen and R (r, r) trained; B R A starts as the best rank r of AdamW's first step.

    That step is -eta sign(G), with G the sum of gradients over the data and eta the rate of the first warm-up step. The
    model therefore starts one approximate step away from where it was; nothing is subtracted from W. A step along the
    gradient of R changes W by the projection of the full gradient on the two subspaces, so that there is no scale.
    The paper takes about a thousandth of the training data for G.

    Args:
        rank: r; r² numbers are trained in each layer.
        learning_rate: the highest one of full fine-tuning, after its warm-up.
        warmup_steps: of full fine-tuning, in which the rate rises to that; eta is their quotient.
        at_once: layers of which gradient sums are held, for which the data is run as many times; None holds all.
    """

    rank: int = 32
    learning_rate: float = 1e-4
    warmup_steps: int = 20
    at_once: int | None = None

    needs_data: ClassVar[bool] = True
    exact_start: ClassVar[bool] = False

    def check(self) -> None:
        self.at_least(rank=self.rank, warmup_steps=self.warmup_steps)
        self.positive(learning_rate=self.learning_rate)
        if self.at_once is not None:
            self.at_least(at_once=self.at_once)

    def collect(self, model: nn.Module, names: list[str], data: list[Any]) -> dict[str, TruncatedSVD]:
        return weight_gradients(model, names, data, reduce=self.first_step, at_once=self.at_once, seed=self.seed)

    def first_step(self, name: str, gradient: Float[Tensor, "out in"]) -> TruncatedSVD:
        """The best rank r of AdamW's first step."""
        rank = self.rank_pattern.get(name, self.rank)
        if rank > min(gradient.shape):
            raise ValueError(f"{name}: rank {rank} is more than a matrix of shape {tuple(gradient.shape)} can have: lower it to {min(gradient.shape)} or leave the layer out")  # fmt: skip # noqa: E501
        if not bool(gradient.any()):
            raise ValueError(f"{name}: its gradient on the given data is zero everywhere, so there is no first step to start from; leave the layer out")  # fmt: skip # noqa: E501
        eta = self.learning_rate / self.warmup_steps
        return truncated_svd(-eta * gradient.sign(), rank)

    def update(self, site: Site) -> Framed:
        rank, found = self.fitting(site), site.statistics
        if found is None:
            out, in_ = site.shape
            frame = Framed(torch.zeros(out, rank), torch.zeros(rank, rank), torch.zeros(rank, in_), subtracted=False)
            frame.ready = False
            return frame
        return Framed(found.U, found.S.diag(), found.Vh, subtracted=False)
