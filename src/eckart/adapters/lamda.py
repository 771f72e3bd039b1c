"""LaMDA: a square core between two projections, of which one is frozen and the other freezes column by column."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.adapters.base import Adapter, FactoredUpdate, Update
from eckart.adapters.frames import own
from eckart.adapters.host import Host, Site
from eckart.adapters.matching import inner, targets
from eckart.adapters.spectral_ranks import ranks_at_one_energy
from eckart.adapters.tuner import adapter
from eckart.linalg.svd import singular_values, truncated_svd
from eckart.schedules import Schedule, at_step
from eckart.schedules.base import forget


class Core(FactoredUpdate):
    """scale * (B C - start) A with A frozen, C trained, and B trained until its columns freeze.

    The factors are multiplied before the input enters, so that of the path into the layer only A x, r numbers for each
    token, waits for the backward pass.

    Args:
        start: what is subtracted of B C, (out, r); None where B C is zero at first.
    """

    A: Tensor
    start: Tensor | None

    def __init__(
        self, B: Float[Tensor, "out r"], C: Float[Tensor, "r r"], A: Float[Tensor, "r in"], scale: float,
        start: Float[Tensor, "out r"] | None,
    ):  # fmt: skip
        super().__init__()
        self.B, self.C, self.scale = nn.Parameter(own(B)), nn.Parameter(own(C)), scale
        self.register_buffer("A", own(A))
        self.register_buffer("start", None if start is None else own(start))
        self.settled = False

    def factors(self, host: Host) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
        product = self.B @ self.C
        return self.scale * (product if self.start is None else product - self.start), self.A

    def held(self) -> tuple[nn.Parameter, ...]:
        return (self.B,) if self.settled else ()


class Freezing(Schedule):
    """Freezes the columns of all B, the first ones first, over a share of the run.

    In the step that follows t others, floor(r t / T_i) columns are frozen, T_i being that share of all steps. They are
    put back after each step, as neither moments nor weight decay stop at a gradient of zero. From T_i on B has no
    gradient and no optimiser state.

    Args:
        share: T_i over the number of steps.
    """

    needs_total = True

    def __init__(self, cores: list[Core], share: float):
        super().__init__()
        self.cores, self.share = cores, share
        self._frozen: list[Tensor] = []

    @property
    def needs_optimizer(self) -> bool:
        return True

    @property
    def end(self) -> int:
        """T_i."""
        return max(1, at_step(self.share, self.total, "freeze"))

    def columns(self, core: Core, step: int) -> int:
        """How many are frozen in the step that follows so many others."""
        rank = core.B.shape[1]
        return min(rank, rank * step // self.end)

    def at(self, step: int) -> None:
        for core in self.cores:
            core.settled = step >= self.end
            if core.settled:
                forget(self.optimizer, [core.B])
                core.B.grad = None
                core.B.requires_grad_(False)

    def gradients(self, step: int) -> None:
        self._frozen = [core.B.detach()[:, : self.columns(core, step)].clone() for core in self.cores]
        for core, frozen in zip(self.cores, self._frozen, strict=True):
            if core.B.grad is not None:
                core.B.grad[:, : frozen.shape[1]] = 0

    @torch.no_grad()
    def after(self, step: int) -> None:
        for core, frozen in zip(self.cores, self._frozen, strict=False):  # none before the first step
            core.B[:, : frozen.shape[1]] = frozen
        self._frozen = []


@adapter("lamda", family="frozen frame", paper="LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation, Azizi et al., Findings of EMNLP 2024, arXiv 2406.12832")  # fmt: skip # noqa: E501
@dataclass
class LaMDA(Adapter):
    """W + scale (B C - B_0 C_0) A, with A = V_rᵀ, B_0 = U_r of W: A never learns, B only at first, C always.

    The columns of B freeze in order of their singular values, the largest first, so that r² numbers of each layer
    learn in most of the run (`eckart.adapters.schedule`, which must know its length). The paper's released code freezes
    3 columns at most and has no spectral start; the schedule is the text's. Dropout stands before A, and keeps a mask
    of the input's width. What the rows of A do not see, no training can change.

    Args:
        rank: r.
        scale: of the update.
        freeze: the share of the run after which all of B is frozen.
        start: `residual`, C_0 = diag(S_r) / scale; `additive`, C_0 = 0; `lora`, B_0 = 0 with A and C drawn as PyTorch
            draws linear layers.
        adaptive: LaMDA++: `rank` is the mean, and layers get the ranks at which all hold one share of their spectrum,
            from half the mean to twice it.
    """

    rank: int = 32
    scale: float = 1.0
    freeze: float = 0.3
    start: str = "residual"
    adaptive: bool = False

    def check(self) -> None:
        self.at_least(rank=self.rank)
        self.positive(scale=self.scale)
        if not 0 < self.freeze <= 1:
            raise ValueError(f"lamda(freeze={self.freeze!r}): it is a share of the run, above 0 and up to 1")
        if self.start not in ("residual", "additive", "lora"):
            raise ValueError(f"lamda(start={self.start!r}): it is 'residual', 'additive' or 'lora'")

    def prepare(self, model: nn.Module) -> None:
        if not self.adaptive or self.rank_pattern:
            return
        spectra = {name: singular_values(_host(model, name).weight()) for name in targets(model, self)}
        self.rank_pattern.update(ranks_at_one_energy(spectra, self.rank))

    def update(self, site: Site) -> Core:
        rank, (out, in_) = self.fitting(site), site.shape
        if self.start == "lora":
            A = site.uniform(rank, in_, bound=in_**-0.5)
            return Core(torch.zeros(out, rank), site.uniform(rank, rank, bound=rank**-0.5), A, self.scale, None)
        svd = truncated_svd(site.host.weight(), rank)
        if self.start == "additive":
            return Core(svd.U, svd.S.new_zeros(rank, rank), svd.Vh, self.scale, None)
        C = svd.S.diag() / self.scale
        return Core(svd.U, C, svd.Vh, self.scale, svd.U @ C)

    def schedule(self, model: nn.Module, updates: dict[str, Update]) -> Schedule:
        return Freezing([u for u in updates.values() if isinstance(u, Core)], float(self.freeze))


def _host(model: nn.Module, name: str) -> Host:
    module = inner(model).get_submodule(name)
    host = getattr(module, "host", None)  # where another adapter is on it
    return host if isinstance(host, Host) else Host(module, name)
