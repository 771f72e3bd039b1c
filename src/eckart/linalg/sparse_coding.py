"""Sparse coding: vectors as combinations of few atoms, and the atoms that serve best."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CHUNK = 2**25
"""Numbers that a pursuit keeps at a time."""


def omp(
    G: Float[Tensor, "k k"], b: Float[Tensor, "lines k"], nonzeros: int
) -> tuple[Int[Tensor, "lines s"], Float[Tensor, "lines s"]]:
    """For every line the x with `nonzeros` entries and a small xᵀ G x - 2 bᵀ x, by orthogonal matching pursuit.

    With atoms D (k, d), G = D Dᵀ and b = y Dᵀ, that is || y - x D ||². In every step the atom is added whose angle with
    the residual is least, and all coefficients are solved anew (Pati et al., 1993), with the atoms made orthogonal on
    the way. An atom that depends on the ones before gets the coefficient zero.

    Returns:
        index (lines, s), in the order of their choice, and coefficients.
    """
    lines, k = b.shape
    if not 0 <= nonzeros <= k:
        raise ValueError(f"a pursuit cannot choose {nonzeros} of {k} atoms")
    chunk = max(1, CHUNK // max(1, nonzeros * k))
    found = [_pursue(G, part, nonzeros) for part in b.split(chunk)] if lines and nonzeros else []
    if not found:
        return torch.zeros(lines, nonzeros, dtype=torch.int64, device=b.device), b.new_zeros(lines, nonzeros)
    return torch.cat([i for i, _ in found]), torch.cat([v for _, v in found])


def _pursue(G: Tensor, b: Tensor, nonzeros: int) -> tuple[Tensor, Tensor]:
    lines, k = b.shape
    row = torch.arange(lines, device=b.device)
    norms2 = G.diagonal().clamp_min(0)
    scale = torch.where(norms2 > 0, norms2, torch.inf).rsqrt()
    floor = k * torch.finfo(G.dtype).eps * norms2
    left, open_ = b.clone(), torch.ones_like(b, dtype=torch.bool)
    P = b.new_zeros(lines, nonzeros, k)  # products of the orthonormal directions with all atoms
    index = torch.zeros(lines, nonzeros, dtype=torch.int64, device=b.device)
    L, z = b.new_zeros(lines, nonzeros, nonzeros), b.new_zeros(lines, nonzeros)
    for t in range(nonzeros):
        j = torch.where(open_, (left * scale).abs(), -1.0).argmax(1)
        index[:, t], open_[row, j] = j, False
        w = P[row, :t, j]
        rest = norms2[j] - w.square().sum(1)
        usable = rest > floor[j]
        pivot = torch.where(usable, rest, 1.0).sqrt()
        p = (G[j] - (w[:, None] @ P[:, :t])[:, 0]) / pivot[:, None]
        P[:, t] = torch.where(usable[:, None], p, 0.0)
        L[:, t, :t], L[:, t, t] = torch.where(usable[:, None], w, 0.0), pivot
        z[:, t] = torch.where(usable, left[row, j] / pivot, 0.0)
        left -= z[:, t, None] * P[:, t]
    values = torch.linalg.solve_triangular(L.mT, z[..., None], upper=True)[..., 0]
    return index, values


def ksvd_step(
    rest: Float[Tensor, "lines d"], X: Float[Tensor, "lines k"], support: Bool[Tensor, "lines k"],
    D: Float[Tensor, "k d"], power_steps: int = 2,
) -> None:  # fmt: skip
    """One pass over the atoms (K-SVD, Aharon et al., 2006), in place; `rest` is Y - X D and stays so.

    Every atom and its coefficients become a better rank-one fit to what the other atoms leave of the lines that use it,
    by power iteration from the atom as it is, so that || rest || never grows. The supports stay. Atoms keep unit norm.
    """
    for i in range(D.shape[0]):
        users = support[:, i].nonzero()[:, 0]
        if len(users) == 0:
            continue
        x = X[users, i]
        own = rest[users] + x[:, None] * D[i]
        for _ in range(power_steps):
            atom = x @ own if bool(x.any()) else own[own.square().sum(1).argmax()]
            norm = atom.norm()
            if not norm > 0:
                break
            D[i] = atom / norm
            x = own @ D[i]
        X[users, i] = x
        rest[users] = own - x[:, None] * D[i]


def learn_dictionary(
    Y: Float[Tensor, "lines d"], atoms: int, nonzeros: int, *, iterations: int, power_steps: int = 2, seed: int = 0,
    tolerance: float = 1e-3,
) -> tuple[Float[Tensor, "lines k"], Bool[Tensor, "lines k"], Float[Tensor, "k d"], list[float]]:  # fmt: skip
    """X with `nonzeros` entries in every line and unit atoms D (k, d) that make || Y - X D || small.

    Pursuit and K-SVD in turn, from random lines of Y (where every line uses all atoms, from the singular vectors, which
    are the optimum). A line takes over what the pursuit found only where that is better, so that the error never grows.
    Atoms that nobody uses start anew from the worst line. Stops after `iterations`, or once one gains less than the
    share `tolerance`.

    Returns:
        X, its support, D, and the squared error after every step (pursuit, atoms, pursuit, ...).
    """
    lines = Y.shape[0]
    D = _first_atoms(Y, atoms, nonzeros, seed)
    X, support = Y.new_zeros(lines, atoms), torch.zeros(lines, atoms, dtype=torch.bool, device=Y.device)
    rest, errors = Y.clone(), [float("inf")]
    for iteration in range(iterations):
        index, values = omp(D @ D.T, Y @ D.T, nonzeros)
        coded = torch.zeros_like(X).scatter(1, index, values)
        left = Y - coded @ D
        better = left.square().sum(1) < rest.square().sum(1) if iteration else torch.ones_like(Y[:, 0], dtype=torch.bool)  # fmt: skip # noqa: E501
        chosen = torch.zeros_like(support).scatter(1, index, True)
        X, rest = (torch.where(better[:, None], new, old) for new, old in ((coded, X), (left, rest)))
        support = torch.where(better[:, None], chosen, support)
        errors.append(float(rest.double().square().sum()))
        _reseed(D, support, rest)
        ksvd_step(rest, X, support, D, power_steps)
        rest = Y - X @ D  # free of what many small updates have added up
        errors.append(float(rest.double().square().sum()))
        if iteration and errors[-3] - errors[-1] <= tolerance * errors[-3]:
            break
    return X, support, D, errors[1:]


def _first_atoms(Y: Tensor, atoms: int, nonzeros: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    D = torch.randn(atoms, Y.shape[1], dtype=torch.float64, generator=generator).to(Y)
    if nonzeros == atoms:
        V = torch.linalg.svd(Y, full_matrices=False).Vh[:atoms]
        D[: V.shape[0]] = V
    else:
        lines = Y[torch.randperm(Y.shape[0], generator=generator)[:atoms]]
        D[: lines.shape[0]] = torch.where(lines.any(1, keepdim=True), lines, D[: lines.shape[0]])
    return D / D.norm(dim=1, keepdim=True).clamp_min(torch.finfo(D.dtype).tiny)


def _reseed(D: Tensor, support: Tensor, rest: Tensor) -> None:
    """Unused atoms become the lines that are fitted worst, each another."""
    unused = (~support.any(0)).nonzero()[:, 0]
    norms = rest.norm(dim=1)
    worst = norms.argsort(descending=True)[: len(unused)]
    for i, line in zip(unused.tolist(), worst.tolist(), strict=False):
        if norms[line] > 0:
            D[i] = rest[line] / norms[line]
