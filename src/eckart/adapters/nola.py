"""NOLA: LoRA whose factors are combinations of random matrices, of which only the coefficients are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from eckart.adapters.adapt import updates as updates_of
from eckart.adapters.base import Adapter, FactoredUpdate
from eckart.adapters.host import Host, Site
from eckart.adapters.streams import VERSION, stream_key, uniform_at
from eckart.adapters.tuner import adapter
from eckart.forms.packing import pack, unpack


@dataclass(frozen=True)
class Bases:
    """Random matrices of one shape that are never all in memory.

    Attributes:
        key: of their stream.
        count: how many there are.
        shape: of each.
        bound: they are uniform from -bound to bound.
        piece: numbers that are generated at a time; 0 takes what suits the device.
    """

    key: int
    count: int
    shape: tuple[int, int]
    bound: float
    piece: int = 0

    def pieces(self, device: torch.device) -> Iterator[tuple[slice, Float[Tensor, "bases numbers"]]]:
        """(which, they as rows), some at a time."""
        numbers = self.shape[0] * self.shape[1]
        even = numbers + numbers % 2
        step = max(1, (self.piece or (1 << 17 if device.type == "cpu" else 1 << 22)) // even)
        for start in range(0, self.count, step):
            stop = min(start + step, self.count)
            drawn = uniform_at(self.key, start * even, (stop - start) * even, device)
            yield slice(start, stop), drawn.view(-1, even)[:, :numbers].mul_(self.bound)

    def combined(self, coefficients: Float[Tensor, " count"]) -> Float[Tensor, "rows columns"]:
        """The sum of coefficient times matrix, in float32; its backward pass draws the matrices again."""
        combined: Tensor = _Combined.apply(coefficients, self)
        return combined


class _Combined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, bases: Bases) -> Tensor:
        ctx.bases, ctx.dtype = bases, coefficients.dtype
        total = torch.zeros(bases.shape[0] * bases.shape[1], device=coefficients.device)
        with torch.autocast(total.device.type, enabled=False):
            for which, rows in bases.pieces(total.device):
                total += coefficients[which].float() @ rows
        return total.view(bases.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        flat = gradient.float().reshape(-1)
        with torch.autocast(flat.device.type, enabled=False):
            found = [rows @ flat for _, rows in ctx.bases.pieces(flat.device)]
        return torch.cat(found).to(ctx.dtype), None


class Combination(nn.Module):
    """A matrix: a frozen random start, or none, and a combination of random matrices.

    Without gradients the matrix is kept until the coefficients change.

    Args:
        bases: the random matrices.
        first: what all coefficients are at the start.
        start: one more random matrix, of coefficient 1.
        bits: of quantised coefficients, which do not learn; 0 for trained numbers.
    """

    coefficients: nn.Parameter | None
    codes: Tensor
    grid: Tensor

    def __init__(self, bases: Bases, first: float, start: Bases | None = None, bits: int = 0):
        super().__init__()
        self.coefficients = nn.Parameter(torch.full((bases.count,), first))
        self.bases, self.start, self.bits = bases, start, 0
        self._kept: tuple[Tensor, Tensor] | None = None
        if bits:
            self.quantise(bits)

    @torch.no_grad()
    def quantise(self, bits: int) -> None:
        """Round the coefficients to 2^bits numbers that divide their range evenly, and keep the codes alone."""
        exact = self.values().float()
        low, step = exact.min(), (exact.max() - exact.min()) / (2**bits - 1)
        codes = ((exact - low) / step.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.uint8)
        self.coefficients, self.bits = None, bits
        self.register_buffer("codes", pack(codes[None], bits)[0])
        self.register_buffer("grid", torch.stack([low, step]))

    def values(self) -> Float[Tensor, " count"]:
        """The coefficients."""
        if self.coefficients is not None:
            return self.coefficients
        return self.grid[0] + self.grid[1] * unpack(self.codes[None], self.bits, self.bases.count)[0]

    def forward(self) -> Float[Tensor, "rows columns"]:
        if torch.is_grad_enabled():
            self._kept = None
            return self._made()
        now = self.values().detach()
        if self._kept is None or self._kept[0].device != now.device or not torch.equal(self._kept[0], now):
            self._kept = now.clone(), self._made()
        return self._kept[1]

    def _made(self) -> Tensor:
        matrix = self.bases.combined(self.values())
        if self.start is None:
            return matrix
        return matrix + self.start.combined(torch.ones(1, device=matrix.device))


class Combined(FactoredUpdate):
    """scale * B A, both of them combinations."""

    def __init__(self, B: Combination, A: Combination, scale: float):
        super().__init__()
        self.B, self.A, self.scale = B, A, scale

    def factors(self, host: Host) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
        return self.scale * self.B(), self.A()


@adapter("nola", family="random bases", paper="NOLA, Koohpayegani et al., ICLR 2024, arXiv 2310.02556")
@dataclass
class NOLA(Adapter):
    """W + alpha / rank B A with A = A_0 + sum a_i M_i and B = sum b_j N_j: random M and N, and a and b are trained.

    What is trained and saved is 2 * `bases` numbers for each layer, of whatever width and rank. The random matrices
    are drawn anew in every forward and backward pass, some at a time, from the seed and the layer's name; none is ever
    kept. Each pass costs the drawing of bases * rank * (in + out) numbers. Their size, 1 / sqrt(bases), belongs to a
    learning rate of about 1e-3 to 5e-3. A saved adapter names the generator, and another one refuses it.

    Args:
        rank: of the update.
        alpha: over the rank, the scale of the update.
        bases: k, of each factor.
        mode: `language` (a = b = 0, and a frozen random A_0: the start is exact) or `vision` (no A_0, M and N drawn as
            PyTorch draws linear layers, a = b = 1 / k: the start is a little off; the paper has alpha = 1 there).
        generator: of the random matrices.
        bits: of coefficients that `quantise` rounded after training; 0 where they are as trained.
    """

    rank: int = 8
    alpha: float = 8.0
    bases: int = 512
    mode: str = "language"
    generator: str = VERSION
    bits: int = 0

    def check(self) -> None:
        self.at_least(rank=self.rank, bases=self.bases)
        self.positive(alpha=self.alpha)
        if self.mode not in ("language", "vision"):
            raise ValueError(f"nola(mode={self.mode!r}): it is 'language' or 'vision'")
        if not 0 <= self.bits <= 8:
            raise ValueError(f"nola(bits={self.bits!r}): it is 1 to 8, or 0 for coefficients as they are trained")
        if self.generator != VERSION:
            raise ValueError(f"nola(generator={self.generator!r}): the random matrices of this adapter were drawn by a generator that this version of eckart, which has {VERSION!r}, cannot repeat: load it with the version that saved it, and save it as a LoRA there")  # fmt: skip # noqa: E501

    def update(self, site: Site) -> Combined:
        rank = self.fitting(site)
        out, in_ = site.shape

        def made(factor: str, shape: tuple[int, int], first: float, bound: float, start: Bases | None) -> Combination:
            bases = Bases(stream_key(self.seed, site.name, factor), self.bases, shape, bound)
            return Combination(bases, first, start, self.bits)

        if self.mode == "vision":
            B = made("B", (out, rank), 1 / self.bases, rank**-0.5, None)
            A = made("A", (rank, in_), 1 / self.bases, in_**-0.5, None)
        else:
            first = Bases(stream_key(self.seed, site.name, "A0"), 1, (rank, in_), in_**-0.5)
            B = made("B", (out, rank), 0.0, self.bases**-0.5, None)
            A = made("A", (rank, in_), 0.0, self.bases**-0.5, first)
        return Combined(B, A, self.alpha / rank)


def quantise(model: nn.Module, bits: int = 4, adapter_name: str | None = None) -> None:
    """Round the coefficients of a trained adapter, in place: each factor's to an even grid over their range.

    Saved, they take `bits` each, and 8 bytes of grid; they do not learn any more. Raises `ValueError` where the adapter
    is none of nola's, or is rounded already.
    """
    config: Any = getattr(model, "peft_config", {}).get(adapter_name or getattr(model, "active_adapter", ""))
    if not isinstance(config, NOLA):
        raise ValueError("only an adapter of nola has coefficients to round, and the active one, or the one named, is none")  # fmt: skip # noqa: E501
    if config.bits:
        raise ValueError(f"the coefficients of this adapter are rounded to {config.bits} bits already")
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"nola.quantise(bits={bits!r}): it is a whole number from 1 to 8")
    config.bits = bits
    for update in updates_of(model, adapter_name).values():
        for part in update.modules():
            if isinstance(part, Combination):
                part.quantise(bits)
