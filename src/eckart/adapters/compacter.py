"""Compacter: bottlenecks behind a layer, of sums of Kronecker products with one factor for the whole model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from eckart.adapters.base import Adapter, Update
from eckart.adapters.host import Host, Shared, Site, seeded
from eckart.adapters.kinds import carries, matrix_shape
from eckart.adapters.layer import AdapterLayer
from eckart.adapters.matching import targets
from eckart.adapters.tuner import adapter

RULES = "rules"
"""Name of the (n, n, n) matrices of all layers."""
RULE_STD = 1e-4
"""Of the rules at the start, so that a bottleneck changes its layer by about its square."""


class Hypercomplex(nn.Module):
    """x -> x H + b with H = sum over i of R_i ⊗ (s_i t_i); R is the model's.

    Args:
        inputs, outputs: p and q, of which n is a divisor.
        terms: n.
        rank: m, of s_i t_i.
        generator: of the start.
    """

    def __init__(self, inputs: int, outputs: int, terms: int, rank: int, generator: torch.Generator):
        super().__init__()
        self.s = nn.Parameter(glorot(terms, inputs // terms, rank, generator))
        self.t = nn.Parameter(glorot(terms, rank, outputs // terms, generator))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Float[Tensor, "*batch p"], rules: Float[Tensor, "n n n"]) -> Float[Tensor, "*batch q"]:
        parts = x.unflatten(-1, (len(rules), -1))
        parts = torch.einsum("...ac,icm->...iam", parts, self.s.to(x.dtype))
        parts = torch.einsum("...iam,iau->...uim", parts, rules.to(x.dtype))
        return torch.einsum("...uim,imv->...uv", parts, self.t.to(x.dtype)).flatten(-2) + self.bias.to(x.dtype)

    def matrix(self, rules: Float[Tensor, "n n n"]) -> Float[Tensor, "p q"]:
        """H, formed."""
        return torch.stack([torch.kron(R, s @ t) for R, s, t in zip(rules, self.s, self.t, strict=True)]).sum(0)


class Bottleneck(Update):
    """Up(gelu(Down(y0))): the layer's output goes through a narrow place and back, and is added to itself."""

    linear = False

    def __init__(self, down: Hypercomplex, up: Hypercomplex, shared: Shared):
        super().__init__()
        self.down, self.up, self.of_all = down, up, [shared]

    def forward(self, x: Tensor, y0: Tensor, host: Host) -> Tensor:
        rules = self.of_all[0].get(RULES)
        h = y0.movedim(host.channels, -1)
        h = F.dropout(h.to(x.dtype), self.dropout, self.training and self.dropout > 0)
        h = self.up(F.gelu(self.down(h, rules), approximate="tanh"), rules)
        return h.movedim(-1, host.channels)


@adapter("compacter", family="inserted modules", paper="Compacter, Karimi Mahabadi et al., NeurIPS 2021, arXiv 2106.04647")  # fmt: skip # noqa: E501
@dataclass
class Compacter(Adapter):
    """y -> y + Up(gelu(Down(y))) behind a layer, with about k + d numbers for a k x d projection.

    H = sum over i of R_i ⊗ s_i t_i has full rank in general; the R_i (n, n) are one parameter of the whole model.
    Compacter sits on the last layer of attention and on that of the feed-forward part (`target_modules=["o_proj",
    "down_proj"]` in a Llama), Compacter++ on the latter alone. The R_i start near zero, so that the model starts where
    it was up to rounding. It is no matrix: it stays beside the model and cannot be merged. Dropout acts on y.

    Args:
        terms: n, Kronecker products in a sum; a divisor of both widths.
        reduction: k / d.
        rank: of s_i t_i.
        norms: whether all normalisation layers of the model are trained and saved, too, without which most of the
            accuracy is lost.
    """

    terms: int = 4
    reduction: int = 16
    rank: int = 1
    norms: bool = True

    shares: ClassVar[bool] = True

    def check(self) -> None:
        self.at_least(terms=self.terms, reduction=self.reduction, rank=self.rank)

    def prepare(self, model: nn.Module) -> None:
        for name in targets(model, self):
            module = model.get_submodule(name)
            if isinstance(module, AdapterLayer) or carries(module):
                self.narrow(name, module.host.out if isinstance(module, AdapterLayer) else matrix_shape(module)[0])
        if self.norms:
            self.modules_to_save = [*(self.modules_to_save or []), *norms_of(model)]

    def shared_of(self, shared: Shared) -> None:
        drawn, n = seeded(self.seed, RULES), self.terms
        shared.parameter(RULES, lambda: RULE_STD * torch.randn(n, n, n, generator=drawn))

    def update(self, site: Site) -> Bottleneck:
        width, n, rank = site.host.out, self.terms, site.rank
        narrow = self.narrow(site.name, width)
        down = Hypercomplex(width, narrow, n, rank, site.generator)
        return Bottleneck(down, Hypercomplex(narrow, width, n, rank, site.generator), site.shared)

    def narrow(self, name: str, width: int) -> int:
        """d of a layer. Raises `ValueError` where n does not divide k or d."""
        narrow, n = width // self.reduction, self.terms
        if width % n:
            raise ValueError(f"{name}: terms={n} does not divide its {width} outputs: take a divisor of them, or leave the layer out")  # fmt: skip # noqa: E501
        if narrow < n or narrow % n:
            fits = [d for d in range(n, width + 1, n) if width // (width // d) == d]
            near = min(fits, key=lambda d: abs(math.log(d * self.reduction / width)))
            raise ValueError(f"{name}: reduction={self.reduction} of {width} outputs leaves {narrow}, which is no multiple of terms={n}: take reduction={width // near}, or other terms")  # fmt: skip # noqa: E501
        return narrow


def glorot(terms: int, rows: int, columns: int, generator: torch.Generator) -> Float[Tensor, "n rows columns"]:
    """Uniform, with gain sqrt 2 (Glorot and Bengio, 2010)."""
    bound = math.sqrt(2) * math.sqrt(6 / (rows + columns))
    return (2 * torch.rand(terms, rows, columns, generator=generator) - 1) * bound


def norms_of(model: nn.Module) -> list[str]:
    """Names of a model's normalisation layers. Raises `ValueError` where PEFT, which looks at how names end, would take
    another layer for one of them."""
    names = {n.removesuffix(".original_module"): m for n, m in model.named_modules() if ".modules_to_save" not in n}
    found = {n for n, m in names.items() if "norm" in type(m).__name__.lower() and list(m.parameters(recurse=False))}
    for name in names.keys() - found:
        taken = next((n for n in found if name.endswith(n)), None)
        if taken is not None:
            raise ValueError(f"PEFT cannot tell the normalisation layer {taken!r} from {name!r}, whose name ends alike: rename one of them, or set norms=False and name others in modules_to_save")  # fmt: skip # noqa: E501
    return sorted(found)
