"""DSFormer's straight-through factoriser: a dense weight is trained through its dictionary and sparse codes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eckart.forms.algebra import ProductMatrix
from eckart.forms.block_dictionary import BlockDictionary
from eckart.forms.layout import as_matrix
from eckart.linalg.sparse_coding import ksvd_step, omp
from eckart.registry import method
from eckart.remarks import remark
from eckart.schedules import Every, Schedule, at_step
from eckart.training.base import NoSaving, TrainingMethod, dtype_of, like, put, weights
from eckart.training.parametrised import ParametrisedTraining, original

RIDGE = 1e-6
"""Of the atoms' mean square, added where codes are solved for, so that equal atoms share what one would have."""


class StraightThrough(nn.Module):
    """W -> S D, S the least-squares codes of W on the supports as they are; gradients pass to W whole.

    Attributes:
        atoms: D (blocks, k, b), trained by its own gradient.
        index: (out, blocks, s), the atoms that a fragment of a row may use, ascending, in the state of the model.
    """

    index: Tensor

    def __init__(self, start: ProductMatrix, form: BlockDictionary, transposed: bool):
        super().__init__()
        out, self.width = start.shape
        blocks, k, _ = form.sizes(start.shape)
        codes: Any = start.left
        self.form, self.transposed = form, transposed
        self.atoms = nn.Parameter(next(start.right.parameters()).detach())
        self.register_buffer("index", (codes.flat() % k).view(out, blocks, -1).to(torch.uint8))

    def fragments(self, weight: Tensor) -> Float[Tensor, "out blocks b"]:
        """The rows of the matrix in blocks, in float32 or wider, the last one padded."""
        W = (weight.t() if self.transposed else weight.flatten(1)).to(torch.promote_types(weight.dtype, torch.float32))
        blocks, _, b = self.atoms.shape
        return F.pad(W, (0, blocks * b - self.width)).unflatten(1, (blocks, b))

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # least squares need more digits than it keeps
            X = self.codes(weight.detach(), self.index.long())
            flat: Tensor = _Straight.apply(self.fragments(weight), X, self.atoms)
        W = flat.flatten(1)[:, : self.width].to(weight.dtype)
        return W.t() if self.transposed else W.view_as(weight)

    @torch.no_grad()
    def codes(self, weight: Tensor, index: Int[Tensor, "out blocks s"]) -> Float[Tensor, "out blocks k"]:
        """The least-squares codes of the weight's fragments on these supports."""
        Y = self.fragments(weight)
        D = self.atoms.to(Y.dtype)
        G = D @ D.mT
        block = torch.arange(len(D), device=D.device)[:, None]
        scale = G.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(G.dtype).tiny ** 0.5)
        part = G[block[..., None], index[..., :, None], index[..., None, :]]
        part.diagonal(dim1=-2, dim2=-1).add_(RIDGE * scale[:, None])
        b = torch.einsum("ojb,jkb->ojk", Y, D).gather(2, index)
        x = torch.cholesky_solve(b[..., None], torch.linalg.cholesky(part))[..., 0]
        return Y.new_zeros(*Y.shape[:2], D.shape[1]).scatter(2, index, x)

    @torch.no_grad()
    def refresh(self, weight: Tensor, sweeps: int) -> None:
        """New supports by pursuit of the weight, where they are better; then `sweeps` of K-SVD on the atoms."""
        Y, index = self.fragments(weight), self.index.long()
        D = F.normalize(self.atoms.to(Y.dtype), dim=2)
        found = [omp(d @ d.mT, y @ d.mT, index.shape[2])[0] for y, d in zip(Y.unbind(1), D, strict=True)]
        new = torch.stack(found, 1).sort(2).values
        old, now = (self.error(weight, i) for i in (index, new))
        index = torch.where((now < old)[..., None], new, index)
        self.index.copy_(index)
        if not sweeps:
            return
        X = self.codes(weight, index) * self.atoms.to(Y.dtype).norm(dim=2)
        support = torch.zeros_like(X, dtype=torch.bool).scatter(2, index, True)
        for j, d in enumerate(D):
            x = X[:, j].clone()
            rest = Y[:, j] - x @ d
            for _ in range(sweeps):
                ksvd_step(rest, x, support[:, j], d, self.form.power_steps)
        self.atoms.copy_(D * self.atoms.to(Y.dtype).norm(dim=2, keepdim=True))

    @torch.no_grad()
    def error(self, weight: Tensor, index: Int[Tensor, "out blocks s"]) -> Float[Tensor, "out blocks"]:
        """Of every fragment, squared."""
        X = self.codes(weight, index)
        rest = self.fragments(weight) - torch.einsum("ojk,jkb->ojb", X, self.atoms.to(X.dtype))
        return rest.square().sum(2)

    def factors(self, weight: Tensor, dtype: torch.dtype) -> ProductMatrix:
        """What is computed, in the form that stores it."""
        index = self.index.long()
        X = self.codes(weight, index)
        keep = torch.zeros_like(X, dtype=torch.bool).scatter(2, index, True)
        return self.form.holding(X.flatten(1), keep.flatten(1), self.atoms.detach(), self.width, dtype)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fragments: Tensor, X: Tensor, atoms: Tensor) -> Tensor:
        ctx.save_for_backward(X)
        ctx.dtype = atoms.dtype
        return torch.einsum("ojk,jkb->ojb", X, atoms.to(X.dtype))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, Tensor]:
        (X,) = ctx.saved_tensors
        return g, None, torch.einsum("ojk,ojb->jkb", X, g).to(ctx.dtype)


@method("dsformer_stf", family="dictionary", paper="DSFormer: Effective Compression of Text-Transformers by Dense-Sparse Weight Factorization, Chand et al., EACL 2024, arXiv 2312.13211")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class DSFormerSTF(TrainingMethod):
    """Layers compute with S_j D_j, a projection of a dense W_j that gets the gradient of what it is projected to.

    `dsformer` compresses to the same form without training. Here it is only the start: W moves by the task's gradient,
    the codes S follow it by least squares in every forward pass, the atoms D are trained by their own gradient, and now
    and then the supports are chosen anew. `finish` stores `block_dictionary` and drops W. That D is trained, the sizes
    and the times are a reading of the paper, whose code is not published; the loss is the user's own, distilled or not.

    Args:
        nonzeros: s, entries of a code.
        atoms: r, of every block; at most 64, and at most the rows of a layer.
        block: b, most columns of a block.
        refresh: steps between choices of the supports.
        frozen: from here on they stay; whole numbers are steps, 0.0 to 1.0 are shares of the run.
        sweeps: of K-SVD over the atoms after every choice.
        iterations: of pursuit and K-SVD that make the start.
    """

    nonzeros: int = 8
    atoms: int = 64
    block: int = 64
    refresh: int = 200
    frozen: int | float = 0.8
    sweeps: int = 1
    iterations: int = 20

    def __post_init__(self) -> None:
        for name in ("refresh", "nonzeros"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"dsformer_stf({name}={value!r}): it is a positive integer")
        if isinstance(self.sweeps, bool) or not isinstance(self.sweeps, int) or self.sweeps < 0:
            raise ValueError(f"dsformer_stf(sweeps={self.sweeps!r}): it is a number of sweeps, 0 for none")
        at_step(self.frozen, 1, "dsformer_stf: frozen")
        if self.nonzeros > self.form.atoms:
            raise ValueError(f"dsformer_stf(nonzeros={self.nonzeros}, atoms={self.atoms}): a code has no more entries than there are atoms")  # fmt: skip # noqa: E501

    @property
    def form(self) -> BlockDictionary:
        """What every layer's weight is projected to."""
        return BlockDictionary(self.nonzeros, self.atoms, self.block, self.iterations)

    def place(self, model: nn.Module, names: list[str], seed: int) -> Schedule:
        found, form = {}, replace(self.form, seed=seed)
        for name, W in weights(model, names):
            module = model.get_submodule(name)
            if self.atoms > W.shape[0]:
                raise ValueError(f"{name}: {self.atoms} atoms are more than its {W.shape[0]} rows: lower `atoms`, or leave it out with layers=...")  # fmt: skip # noqa: E501
            try:
                start = form.fit(W, dtype=dtype_of(module))
            except ValueError as e:
                raise ValueError(f"{name}: {e}") from None
            found[name] = StraightThrough(start, form, isinstance(module, Conv1D)).to(W.device)
        return Factoriser(model, found, self)


class Factoriser(ParametrisedTraining[StraightThrough]):
    """Chooses the supports anew."""

    def __init__(self, model: nn.Module, found: dict[str, StraightThrough], settings: DSFormerSTF):
        super().__init__(model, found)
        self.settings = settings
        self.needs_total = isinstance(settings.frozen, float)

    def after(self, step: int) -> None:
        end = at_step(self.settings.frozen, self.total, "dsformer_stf: frozen")
        if step == 0 or step > end or not Every(self.settings.refresh)(step):
            return
        for name, module, straight in self.layers:
            latent = original(module).detach()
            if not bool(torch.isfinite(latent).all()):
                raise ValueError(f"the weight of {name} is no longer finite: training has diverged, lower the learning rate")  # fmt: skip # noqa: E501
            straight.refresh(latent, self.settings.sweeps)

    def settle(self) -> None:
        for name, module, straight in list(self.layers):
            matrix = straight.factors(original(module).detach(), dtype_of(module))
            plain = self.plain(name)
            W = as_matrix(plain, plain.weight)  # type: ignore[arg-type]
            if matrix.nbytes < W.numel() * W.element_size():
                put(self.model, name, like(plain, matrix))
            else:
                remark(f"{name} stays dense: {matrix.form} would be no smaller", NoSaving)
