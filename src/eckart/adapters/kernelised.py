"""What SNELL and SNELLA have in common: factors merged by a distance, and entries that compete for their place."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.adapters.base import Adapter
from eckart.adapters.host import Site
from eckart.adapters.regenerated import Regenerated

SURVIVORS = ("magnitude", "plain")


class Kernelised(Regenerated):
    """Factors P (heads, in, q) and Q (heads, out, q), merged by their distances, thinned to the largest entries.

    Args:
        P, Q: the start of the factors.
        scale: c, of the distances.
        p: of the norm that measures them.
        survivors: whether an entry that stays is multiplied by its own `magnitude`, or left `plain`.
    """

    kept: Tensor

    def __init__(
        self, P: Float[Tensor, "heads columns q"], Q: Float[Tensor, "heads rows q"], kept: int, scale: float, p: float,
        survivors: str,
    ):  # fmt: skip
        super().__init__()
        self.P, self.Q = nn.Parameter(P), nn.Parameter(Q)
        self.register_buffer("kept", torch.tensor(kept))
        self.scale, self.p, self.survivors = scale, p, survivors

    def made(self, P: Tensor, Q: Tensor, *mixture: Tensor) -> Float[Tensor, "out in"]:  # type: ignore[override]
        return thinned(self.merged(P, Q, *mixture), int(self.kept), self.survivors)

    def merged(self, P: Tensor, Q: Tensor, *mixture: Tensor) -> Float[Tensor, "out in"]:
        """The matrix before any entry is dropped."""
        return self.scale * distances(P, Q, self.p)


def distances(
    P: Float[Tensor, "heads columns q"], Q: Float[Tensor, "heads rows q"], p: float = 2.0
) -> Float[Tensor, "out in"]:
    """sum_h (-1)^h ||Q_h[j] - P_h[i]||_p, in float32 at least: small differences decide (SNELL, section 3.2)."""
    wide = torch.promote_types(P.dtype, torch.float32)
    D = torch.cdist(Q.to(wide), P.to(wide), p)
    return D[0::2].sum(0) - D[1::2].sum(0)


def thinned(M: Float[Tensor, "out in"], kept: int, survivors: str = "magnitude") -> Float[Tensor, "out in"]:
    """The `kept` largest entries, of equal ones perhaps fewer; the gradient is that of the entries times their gates.

    Where all are kept nothing is done, as in the authors' code; else each survivor is multiplied by its own magnitude
    (or by 1), which counts as a constant.
    """
    dropped = M.numel() - kept
    if dropped <= 0:
        return M
    size = M.detach().abs()
    bound = size.flatten().kthvalue(dropped).values
    gates = size if survivors == "magnitude" else torch.ones_like(size)
    return M * torch.where(size > bound, gates, 0.0)


def entries_kept(sparsity: float, count: int) -> int:
    """ceil((1 - sparsity) count), without the error of that difference."""
    return count - math.floor(sparsity * count + 1e-6)


def drawn(
    site: Site, rank: int, heads: int = 2
) -> tuple[Float[Tensor, "heads columns q"], Float[Tensor, "heads rows q"]]:
    """P and Q as the authors start them: uniform within 1 / sqrt(in q) and 1 / sqrt(out q)."""
    out, in_ = site.shape
    q, rest = divmod(rank, heads)
    if rest or not q:
        raise ValueError(f"{site.name}: rank {rank} cannot be shared between {heads} heads: give the layer a multiple of them")  # fmt: skip # noqa: E501
    P, Q = (site.uniform(heads, n, q, bound=(n * q) ** -0.5) for n in (in_, out))
    return P, Q


def check_heads(adapter: Adapter, rank: int, heads: int = 2) -> None:
    """Raises `ValueError` where a rank cannot be shared between heads, of which every other one is subtracted."""
    adapter.at_least(rank=rank, heads=heads)
    if heads % 2:
        raise ValueError(f"{adapter.key}(heads={heads}): it is an even number, as every other one is subtracted")
    if rank % heads:
        raise ValueError(f"{adapter.key}(rank={rank}): it is a multiple of {heads}, the number of heads")


def check_survivors(adapter: Adapter, survivors: str) -> None:
    """Raises `ValueError` where it is no word for what becomes of survivors."""
    if survivors not in SURVIVORS:
        raise ValueError(f"{adapter.key}(survivors={survivors!r}): it is one of {', '.join(SURVIVORS)}")
