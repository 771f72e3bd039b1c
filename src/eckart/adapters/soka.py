"""SoKA: a few Kronecker products, the principal ones of the weight, are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from eckart.adapters.base import Adapter, Update
from eckart.adapters.frames import own
from eckart.adapters.host import Host, Site
from eckart.adapters.tuner import adapter
from eckart.forms.kronecker import Kronecker
from eckart.linalg.svd import truncated_svd
from eckart.linalg.trains import Split

Terms = tuple[Float[Tensor, "terms a b"], Float[Tensor, " terms"], Float[Tensor, "terms c d"]]


class KroneckerSum(Update):
    """sum_k s_k P_k ⊗ Q_k, less what it was at the start; P_k ⊗ Q_k is never formed to answer, save in convolutions.

    Args:
        split: out = a c, in = b d, either filled up with zeros where it has no such factors.
        P, s, Q: the start, (terms, a, b), (terms) and (terms, c, d).
        captured: the share of the weight's squared norm that the start holds.
    """

    P0: Tensor
    s0: Tensor
    Q0: Tensor

    def __init__(
        self, split: Split, P: Float[Tensor, "terms a b"], s: Float[Tensor, " terms"], Q: Float[Tensor, "terms c d"],
        captured: float,
    ):  # fmt: skip
        super().__init__()
        self.split, self.captured = split, captured
        for name, start in (("P", P), ("s", s), ("Q", Q)):
            self.register_parameter(name, nn.Parameter(own(start)))
            self.register_buffer(f"{name}0", own(start))

    def _now(self) -> Terms:
        P, s, Q = self.get_parameter("P"), self.get_parameter("s"), self.get_parameter("Q")
        return P, s, Q

    def _matrix(self, terms: Terms) -> Float[Tensor, "out in"]:
        P, s, Q = terms
        return self.split.matrix((P * s[:, None, None]).flatten(1).T @ Q.flatten(1))

    def delta(self, host: Host) -> Float[Tensor, "out in"]:
        return self._matrix(self._now()) - self._matrix((self.P0, self.s0, self.Q0))

    def forward(self, x: Tensor, y0: Tensor, host: Host) -> Tensor:
        if host.conv is not None:
            return super().forward(x, y0, host)
        b, d = self.split.in_
        filled = F.pad(x, (0, b * d - x.shape[-1])) if x.shape[-1] < b * d else x
        X = filled.unflatten(-1, (b, d))
        y = _product(X, self._now()) - _product(X, (self.P0, self.s0, self.Q0))
        return y.flatten(-2)[..., : self.split.shape[0]]

    def extra_repr(self) -> str:
        return f"terms={len(self.s0)}, captured={self.captured:.3g}"


def _product(X: Float[Tensor, "*batch b d"], terms: Terms) -> Float[Tensor, "*batch a c"]:
    """sum_k s_k P_k X Q_kᵀ, which is what P ⊗ Q does to the rows of X one after the other; in the cheaper order."""
    P, s, Q = (t.to(X.dtype) for t in terms)
    (count, a, b), (_, c, d) = P.shape, Q.shape
    if a * d * (b + c) < b * c * (a + d):
        return _product(X.mT, (Q, s, P)).mT
    # matrices alone: how torch multiplies stacks of them, to the bit, depends on what is trained
    h = X.reshape(-1, d) @ (Q * s[:, None, None]).flatten(0, 1).T
    h = h.view(-1, b, count, c).permute(0, 3, 2, 1).reshape(-1, count * b)
    y = h @ P.transpose(0, 1).flatten(1).T
    return y.view(*X.shape[:-2], c, a).mT


def terms_at(values: Float[Tensor, " k"], energy: float, whole: float) -> int:
    """The fewest values that hold this share of a squared norm, or those before the elbow, where these are fewer.

    The elbow is the point furthest below the chord between the first value and the last one given, both axes scaled
    to one.
    """
    squares = values.double().square().cumsum(0)
    enough = int((squares < energy * whole * (1 - 1e-6)).sum()) + 1
    if len(values) < 3 or float(values[0]) <= float(values[-1]):
        return min(enough, len(values))
    heights = (values.double() - values[-1]) / (values[0] - values[-1])
    chord = 1 - torch.arange(len(values), dtype=torch.float64, device=values.device) / (len(values) - 1)
    return max(1, min(enough, int((chord - heights).argmax())))


@adapter("soka", family="kronecker", paper="Singular Value Decomposition on Kronecker Adaptation for Large Language Model, Chong and Qu, 2025, arXiv 2506.15251")  # fmt: skip # noqa: E501
@dataclass
class SoKA(Adapter):
    """W + sum s_k P_k ⊗ Q_k - (the same at the start), which is the nearest sum of so many Kronecker products to W.

    The start is the truncated SVD of the rearranged weight (Van Loan and Pitsianis, 1993); P, Q and s are all trained.
    The number of terms is the smaller of two, up to `rank`: the fewest that hold `energy`, and those before the elbow
    of the leading `rank` + 1 values. The paper's abstract leaves open the share, what an elbow is, and which of the two
    counts. Pretrained weights are far from Kronecker sums, so that `rank` often decides; `print(model)` shows the
    share that a layer's terms capture.

    Args:
        rank: terms, at most.
        energy: the share of the squared norm that is enough; 0 takes `rank` terms, whatever the spectrum.
        left_shape: (a, b) of every P, which divides the shape of every targeted weight; empty takes factors of
            similar size, filling up with zeros a side that has none.
    """

    rank: int = 16
    energy: float = 0.9
    left_shape: Any = ()

    def check(self) -> None:
        self.at_least(rank=self.rank)
        if not 0 <= self.energy <= 1:
            raise ValueError(f"soka(energy={self.energy!r}): it is a share of the spectrum, up to 1; 0 takes the rank")
        self.left_shape = list(self.left_shape)
        if self.left_shape and (len(self.left_shape) != 2 or not all(isinstance(n, int) and n > 0 for n in self.left_shape)):  # fmt: skip # noqa: E501
            raise ValueError(f"soka(left_shape={self.left_shape!r}): it is two whole numbers above 0")

    def update(self, site: Site) -> KroneckerSum:
        try:
            split = Kronecker(left_shape=tuple(self.left_shape)).split(site.shape)
        except ValueError as e:
            raise ValueError(f"{site.name}: {e}; leave the layer out") from None
        W = site.host.weight()
        R = split.tensor(W)
        most = min(R.shape)
        chosen = self.energy > 0 and site.name not in self.rank_pattern
        svd = truncated_svd(R, min(most, site.rank + 1 if chosen else site.rank))
        whole = float(W.double().square().sum())
        if chosen:
            self.rank_pattern[site.name] = min(site.rank, terms_at(svd.S, self.energy, whole))
        terms = min(most, self.rank_pattern.get(site.name, site.rank))
        (a, c), (b, d) = split.out, split.in_
        captured = float(svd.S[:terms].double().square().sum()) / whole if whole else 1.0
        P, Q = svd.U[:, :terms].T.reshape(terms, a, b), svd.Vh[:terms].reshape(terms, c, d)
        return KroneckerSum(split, P, svd.S[:terms], Q, captured)
