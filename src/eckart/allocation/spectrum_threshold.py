"""One threshold on the normalised singular values of all weights (WeLore, arXiv 2407.11239, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from eckart.allocation.base import ALLOCATORS, Allocator, Problem, best_share, largest_within


@ALLOCATORS.word("spectrum_threshold")
@dataclass(frozen=True)
class SpectrumThreshold(Allocator):
    """Each spectrum is scaled to [0, 1]; a weight keeps the rank above the threshold that spends the budget.

    A weight whose kept rank would not save bytes is left dense.

    Args:
        min_reduction: weights that would lose a smaller share of their rank than this are left dense.
    """

    min_reduction: float = 0.0

    def allocate(self, problem: Problem) -> dict[str, int]:
        spectra = {}
        for name, curve in problem.curves.items():
            if curve.spectrum is None:
                raise ValueError(f"{name}: spectrum_threshold needs a form with a spectrum, such as low_rank()")
            spectra[name] = normalise(curve.spectrum)

        def at(share: float) -> dict[str, int]:
            return {name: self._keep(problem, name, s, 1.0 - share) for name, s in spectra.items()}

        # at threshold 1 only the leading value is kept; below it the kept rank only grows
        return best_share(problem, at)

    def _keep(self, problem: Problem, name: str, spectrum: torch.Tensor, threshold: float) -> int:
        curve = problem.curves[name]
        rank = max(1, int((spectrum >= threshold).sum()))
        dense = len(curve) - 1
        if 1 - rank / max(1, len(spectrum)) < self.min_reduction:
            return dense
        low = curve.forms[0]
        per_rank = curve.nbytes[0] / max(1, getattr(low, "rank", 1) or 1)
        return dense if rank * per_rank >= curve.nbytes[dense] else largest_within(curve, rank * per_rank)


def normalise(values: torch.Tensor) -> torch.Tensor:
    """(s - min s) / (max s - min s); a constant spectrum becomes ones."""
    low, high = values.min(), values.max()
    return torch.ones_like(values) if high <= low else (values - low) / (high - low)
