"""Sparse spectral training: all singular values are trained, and the singular vectors in turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from eckart.forms import LowRank
from eckart.forms.base import Factored
from eckart.forms.layers import matrix_shape
from eckart.linalg.svd import truncated_svd
from eckart.registry import method
from eckart.schedules import Every, Schedule
from eckart.schedules.base import forget
from eckart.training.base import (
    StructuredSchedule,
    TrainingMethod,
    dtype_of,
    factored_or_dense,
    generator_of,
    like,
    put,
    weights,
)


class SpectralMatrix(Factored):
    """U diag(s) V, of which r pairs of vectors are trained and the others are frozen; all k values are trained.

    `u` (out, r), `v` (r, in), `frozen_u` (out, k - r), `frozen_v` (k - r, in), `s` (k,) by pair, `order` (k,): the pair
    at every place, active ones first.

    Args:
        rank: r.
        enhanced: leave the factor s out of the gradients of u and v, so that small values do not slow their vectors.
    """

    order: Tensor
    frozen_u: Tensor
    frozen_v: Tensor

    def __init__(self, W: Float[Tensor, "out in"], rank: int, enhanced: bool, dtype: torch.dtype):
        super().__init__()
        self.shape, self.rank, self.enhanced = (W.shape[0], W.shape[1]), rank, enhanced
        self.form = LowRank(min(W.shape))
        U, S, Vh, *_ = truncated_svd(W, purpose="spectrum")
        self.u, self.v = nn.Parameter(U[:, :rank].to(dtype)), nn.Parameter(Vh[:rank].to(dtype))
        self.s = nn.Parameter(S.to(dtype))
        self.register_buffer("frozen_u", U[:, rank:].to(dtype).contiguous())
        self.register_buffer("frozen_v", Vh[rank:].to(dtype).contiguous())
        self.register_buffer("order", torch.arange(len(S), device=W.device))

    def forward(
        self, x: Float[Tensor, "*batch in"], bias: Float[Tensor, " out"] | None = None
    ) -> Float[Tensor, "*batch out"]:
        active, frozen = self.s[self.order[: self.rank]], self.s[self.order[self.rank :]]
        y = spectral_product(x, self.u, active, self.v) if self.enhanced else F.linear(F.linear(x, self.v) * active, self.u)  # fmt: skip # noqa: E501
        y = y + F.linear(F.linear(x, self.frozen_v) * frozen, self.frozen_u)
        return y if bias is None else y + bias.to(y.dtype)

    def vectors(self) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
        """U and V, in the order of the values."""
        places = self.order.argsort()
        return torch.cat([self.u, self.frozen_u], 1)[:, places], torch.cat([self.v, self.frozen_v])[places]

    def dense(self) -> Float[Tensor, "out in"]:
        U, V = self.vectors()
        return U * self.s @ V

    def flops(self, tokens: int) -> int:
        return 2 * tokens * min(self.shape) * (self.shape[0] + self.shape[1])

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> Int[Tensor, " r"]:
        """r different pairs, with probabilities proportional to their values; where too few are positive, any."""
        chances = self.s.detach().double().cpu().clamp_min(0)
        positive = int((chances > 0).sum())
        if positive < self.rank:
            filler = (chances == 0).double()
            rest = torch.multinomial(filler, self.rank - positive, generator=generator)
            return torch.cat([chances.nonzero()[:, 0], rest])
        return torch.multinomial(chances, self.rank, generator=generator)

    @torch.no_grad()
    def activate(self, pairs: Int[Tensor, " r"]) -> None:
        """Let these pairs be the trained ones: what goes out changes places with what comes in."""
        wanted = set(pairs.tolist())
        order = self.order.tolist()
        out = [i for i in range(self.rank) if order[i] not in wanted]
        come = [i for i in range(self.rank, len(order)) if order[i] in wanted]
        if not out:
            return
        at = [i - self.rank for i in come]
        for active, frozen, dim in ((self.u.data, self.frozen_u, 1), (self.v.data, self.frozen_v, 0)):
            a, b = torch.tensor(out, device=active.device), torch.tensor(at, device=active.device)
            leaving, coming = active.index_select(dim, a), frozen.index_select(dim, b)
            active.index_copy_(dim, a, coming)
            frozen.index_copy_(dim, b, leaving)
        for i, j in zip(out, come, strict=True):
            order[i], order[j] = order[j], order[i]
        self.order.copy_(torch.tensor(order))

    @torch.no_grad()
    def retract(self) -> None:
        """Values are not negative, trained vectors have length one."""
        self.s.clamp_(min=0)
        self.u.div_(self.u.norm(dim=0, keepdim=True).clamp_min(1e-12))
        self.v.div_(self.v.norm(dim=1, keepdim=True).clamp_min(1e-12))

    @torch.no_grad()
    def decompose_again(self) -> None:
        """The same matrix by its own singular vectors, orthogonal once more."""
        wide = torch.promote_types(self.s.dtype, torch.float32)
        again = SpectralMatrix(self.dense().to(wide), self.rank, self.enhanced, self.s.dtype)
        for own, new in zip(self.state_dict().values(), again.state_dict().values(), strict=True):
            own.copy_(new)


def spectral_product(
    x: Float[Tensor, "*batch in"], u: Float[Tensor, "out r"], s: Float[Tensor, " r"], v: Float[Tensor, "r in"]
) -> Float[Tensor, "*batch out"]:
    """x (u diag(s) v)ᵀ, where u and v learn as if every s were 1; nothing is divided by s."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, u, s, v = (t.to(dtype) for t in (x, u, s, v))
    y: Tensor = _Spectral.apply(x, u, s, v)
    return y


class _Spectral(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
        z = F.linear(x, v)
        ctx.save_for_backward(x, u, s, v, z)
        return F.linear(z * s, u)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, u, s, v, z = ctx.saved_tensors
        h = g @ u
        rows, across, inner = (t.reshape(-1, t.shape[-1]) for t in (x, g, h))
        inside = z.reshape(-1, z.shape[-1])
        return (h * s) @ v, across.T @ inside, (inner * inside).sum(0), inner.T @ rows


@method("sst", family="low-rank", paper="Sparse Spectral Training, Zhao et al., ICML 2025, arXiv 2405.15481")
@dataclass(frozen=True)
class SST(TrainingMethod):
    """W = U diag(s) Vᵀ; all of s learns at every step, r sampled pairs of vectors for some steps each.

    The start is exact. Pairs are sampled in proportion to their values; after about k / r iterations the matrix is
    decomposed again. Gradients and optimiser state are those of r pairs and all values, but U and V together take
    (out + in) min(out, in) numbers, which is twice a square matrix. The optimiser forgets what a swap changes.

    In a hyperbolic network it is the `linear` within every `LorentzLinear` that is decomposed, gate and all; the way
    from there onto the hyperboloid stays as it is, so outputs are points at every step.

    Args:
        rank: r, how many pairs are trained at a time.
        every: steps of an iteration.
        warmup: steps after each swap over which the learning rate, of all groups, rises to its value.
        enhanced: leave s out of the gradients of the vectors.
        keep: share of the sum of the values that `finish` keeps; at 1.0 it leaves an ordinary layer.
    """

    rank: int = 64
    every: int = 200
    warmup: int = 20
    enhanced: bool = True
    keep: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("every", 1), ("warmup", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"sst({name}={value!r}): it is a whole number, at least {least}")
        if not 0 < self.keep <= 1:
            raise ValueError(f"sst(keep={self.keep!r}): it is a share above 0, up to 1")

    def place(self, model: nn.Module, names: list[str], seed: int) -> Schedule:
        for name in names:
            shape = matrix_shape(model.get_submodule(name))
            if self.rank > min(shape):
                raise ValueError(f"{name}: sst(rank={self.rank}) does not fit a matrix of shape {shape}: the rank is at most {min(shape)}")  # fmt: skip # noqa: E501
        for name, W in weights(model, names):
            module = model.get_submodule(name)
            put(model, name, like(module, SpectralMatrix(W, self.rank, self.enhanced, dtype_of(module))))
        return SpectralTraining(model, names, self, seed)


class SpectralTraining(StructuredSchedule):
    """Retractions, swaps and decompositions of SST."""

    def __init__(self, model: nn.Module, names: list[str], settings: SST, seed: int):
        super().__init__(model, names)
        self.settings, self.seed = settings, seed
        self.rates: list[Any] = []

    @property
    def needs_optimizer(self) -> bool:
        return True

    @property
    def matrices(self) -> Iterator[SpectralMatrix]:
        for name in self.names:
            module: Any = self.model.get_submodule(name)
            yield module.matrix

    def gradients(self, step: int) -> None:
        since = step % self.settings.every + 1
        if since < self.settings.warmup and self.optimizer is not None:
            self.rates = [group["lr"] for group in self.optimizer.param_groups]
            for group in self.optimizer.param_groups:
                group["lr"] = group["lr"] * since / self.settings.warmup

    def after(self, step: int) -> None:
        if self.rates and self.optimizer is not None:
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate
            self.rates = []
        swap = Every(self.settings.every)(step)
        for i, matrix in enumerate(self.matrices):
            if step:
                matrix.retract()
            if not swap:
                continue
            rounds = -(-min(matrix.shape) // self.settings.rank)
            if step and (step // self.settings.every) % rounds == 0:
                matrix.decompose_again()
                forget(self.optimizer, [matrix.s])
            matrix.activate(matrix.draw(generator_of(self.seed, step, i)))
            forget(self.optimizer, [matrix.u, matrix.v])

    def settle(self) -> None:
        for name, matrix in zip(self.names, list(self.matrices), strict=True):
            module = self.model.get_submodule(name)
            wide = torch.promote_types(matrix.s.dtype, torch.float32)
            W = matrix.dense().to(wide)
            rank = len(matrix.s)
            if self.settings.keep < 1:
                sums = truncated_svd(W, purpose="spectrum").S.double().cumsum(0)
                rank = min(rank, int((sums < self.settings.keep * sums[-1]).sum()) + 1)
            put(self.model, name, factored_or_dense(module, W, rank))
