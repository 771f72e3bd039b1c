"""TLoRA: a full-rank transform of the layer's input and a residual, both as rings of small tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.adapters.base import Adapter, Update
from eckart.adapters.host import Host, Site
from eckart.adapters.tuner import adapter
from eckart.linalg.trains import joined, most_even

NOISE = 0.02
"""Of the transform's cores, where it leaves the start the identity: all directions of the ring must differ."""


class Transformed(Update):
    """W (T - I) + R.

    T[i_1..i_D, j_1..j_D] = trace(A_1[i_1, j_1] ... A_D[i_D, j_D]) with cores A_d (I_d, I_d, q, q), and
    R[o, i] = trace(B_1[o_1] ... C_1[i_1] ...) with cores (p, size, p). On a convolution T mixes the input channels,
    and the places of the kernel are the last digit of R's columns.
    """

    def __init__(self, transform: list[Tensor], left: list[Tensor], right: list[Tensor], scale: float):
        super().__init__()
        self.transform = nn.ParameterList([nn.Parameter(c) for c in transform])
        self.left = nn.ParameterList([nn.Parameter(c) for c in left])
        self.right = nn.ParameterList([nn.Parameter(c) for c in right])
        self.scale = scale

    def T(self) -> Float[Tensor, "channels channels"]:
        """The transform, formed."""
        return formed(list(self.transform))

    def residual(self) -> tuple[Float[Tensor, "out pp"], Float[Tensor, "pp in"]]:
        """R as a product of rank p²: the two halves of the ring."""
        left, right = joined(list(self.left)), joined(list(self.right))
        return self.scale * left.transpose(0, 1).flatten(1), right.permute(2, 0, 1).flatten(0, 1)

    def delta(self, host: Host) -> Float[Tensor, "out in"]:
        T = self.T()
        W = host.weight().to(T.dtype).view(host.out, len(T), -1)
        left, right = self.residual()
        return torch.einsum("oik,ij->ojk", W, T - torch.eye(len(T)).to(T)).flatten(1) + left @ right

    def forward(self, x: Tensor, y0: Tensor, host: Host) -> Tensor:
        rows = x.movedim(host.channels, -1)
        cores = [c.to(x.dtype) for c in self.transform]
        moved = turned(rows.reshape(-1, rows.shape[-1] // host.groups), cores).view(rows.shape) - rows
        left, right = (f.to(x.dtype) for f in self.residual())
        return host.frozen(moved.movedim(-1, host.channels)) + host.up(host.down(x, right), left)


def turned(x: Float[Tensor, "n j"], cores: Sequence[Float[Tensor, "i j q q"]]) -> Float[Tensor, "n i"]:
    """x Tᵀ by the way that keeps less for the backward pass: T once, or what lies between the cores for every row."""
    if x.shape[0] * cores[0].shape[2] ** 2 > 2 * x.shape[1]:
        return x @ formed(cores).T
    return contracted(x, cores)


def formed(cores: Sequence[Float[Tensor, "i j q q"]]) -> Float[Tensor, "i j"]:
    """T."""
    q, sizes = cores[0].shape[2], [len(c) for c in cores]
    *first, last = (c.permute(2, 0, 1, 3).reshape(q, -1, q) for c in cores)
    chain = joined(first) if first else torch.eye(q, dtype=last.dtype, device=last.device)[:, None]
    whole = chain.transpose(0, 1).flatten(1) @ last.permute(2, 0, 1).flatten(0, 1)
    order = [*range(0, 2 * len(sizes), 2), *range(1, 2 * len(sizes), 2)]
    return whole.view([n for size in sizes for n in (size, size)]).permute(order).reshape(math.prod(sizes), -1)


def contracted(x: Float[Tensor, "n j"], cores: Sequence[Float[Tensor, "i j q q"]]) -> Float[Tensor, "n i"]:
    """x Tᵀ core by core; T is never formed."""
    n, rest = x.shape
    *first, last = cores
    if not first:
        return torch.einsum("nj,ijaa->ni", x, last)
    rest //= len(first[0])
    state = torch.einsum("njr,ijab->niabr", x.view(n, -1, rest), first[0])
    for core in first[1:]:
        rest //= len(core)
        parts = state.reshape(*state.shape[:4], len(core), rest)
        state = torch.einsum("npabjr,ijbc->npiacr", parts, core).flatten(1, 2)
    return torch.einsum("npabj,ijba->npi", state, last).flatten(1)


@adapter("tlora", family="transforms", paper="TLoRA, Tao et al., ICCV 2025, arXiv 2501.08727")
@dataclass
class TLoRA(Adapter):
    """W T + R: a full-rank transform of very few numbers aligns the weight, a compact residual does the rest.

    Cores that are all alike receive like gradients and stay a Kronecker product for ever, so here T starts as exactly
    the identity with a ring whose directions differ: the first column of every core but the last is (I, 0, ...), the
    first row is all that the last one has, and what this leaves free is noise. The transform wants a smaller
    learning rate than the residual.

    Args:
        rank: p, of the residual's ring, which is a matrix of rank p².
        transform_rank: q, of the transform's; 1 is a Kronecker product.
        factors: how many factors each width is split into.
        sizes: width -> its factors, where these are not to be found by themselves, such as `{"640": [8, 8, 10]}`.
        scale: of the residual.
    """

    rank: int = 4
    transform_rank: int = 2
    factors: int = 2
    sizes: dict[str, list[int]] = field(default_factory=dict)
    scale: float = 1.0

    def check(self) -> None:
        self.at_least(rank=self.rank, transform_rank=self.transform_rank, factors=self.factors)
        self.positive(scale=self.scale)
        for width, sizes in self.sizes.items():
            if not sizes or any(n < 1 for n in sizes) or str(math.prod(sizes)) != str(width):
                best = most_even(int(width), max(2, len(sizes)), 1) if str(width).isdigit() else None
                hint = "" if best is None else f", as {list(best)} do"
                raise ValueError(f"tlora(sizes={{{width!r}: {sizes}}}): give whole numbers whose product is the width{hint}")  # fmt: skip # noqa: E501

    def split(self, width: int, site: Site) -> list[int]:
        """Factors of a width. Raises `ValueError` where it has too few."""
        if str(width) in self.sizes:
            return self.sizes[str(width)]
        sizes = most_even(width, self.factors, 1 if self.factors == 1 else 2)
        if sizes is None:
            raise ValueError(f"{site.name}: its width {width} is no product of {self.factors} factors above 1: leave the layer out, or give some, such as sizes={{'{width}': [1, {width}]}} (a dense transform)")  # fmt: skip # noqa: E501
        return list(sizes)

    def update(self, site: Site) -> Transformed:
        conv = site.host.conv
        channels = site.host.width if conv is None else conv.in_channels // conv.groups
        ins, outs, p = self.split(channels, site), self.split(site.host.out, site), site.rank
        places = site.host.width // channels
        columns = [*ins, places] if places > 1 else ins
        left = [site.normal(p, n, p, std=p**-0.5) for n in outs]
        left[0].zero_()
        right = [site.normal(p, n, p, std=(p * n) ** -0.5) for n in columns]
        return Transformed(self._identity(ins, site), left, right, self.scale)

    def _identity(self, sizes: list[int], site: Site) -> list[Tensor]:
        q = self.transform_rank
        cores = [site.normal(n, n, q, q, std=NOISE) for n in sizes]
        for core in cores[:-1]:
            core[..., 0] = 0
        cores[-1][:, :, 1:] = 0
        for core in cores:
            core[:, :, 0, 0] = torch.eye(len(core))
        return cores
