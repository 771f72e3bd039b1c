"""What a run of DP-SGD has spent of privacy: Rényi accounting of the Poisson-subsampled Gaussian mechanism."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import logsumexp

ORDERS = (*(1 + k / 10 for k in range(1, 100)), *map(float, range(12, 64)), *(2.0**k for k in range(6, 11)))
"""Orders of the Rényi divergence that are tried."""


@dataclass(frozen=True)
class Steps:
    """Steps of one kind.

    Attributes:
        noise: sigma, the standard deviation of the noise on a sum of gradients, in clipping norms.
        rate: q, with which each example enters a step, independently of the others.
        count: how many.
    """

    noise: float
    rate: float
    count: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise ValueError(f"noise={self.noise!r}: the noise multiplier is a finite number, 0 or more")
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate={self.rate!r}: the sampling rate is above 0, and at most 1")
        if self.count < 0:
            raise ValueError(f"count={self.count!r}: there cannot be fewer steps than none")


@functools.lru_cache(maxsize=4096)
def renyi(noise: float, rate: float, order: float) -> float:
    """The Rényi divergence of one step, in nats (Mironov, Talwar and Zhang, 2019, arXiv 1908.10530, section 3).

    It is log E[(1 - q + q exp((2 z - 1) / (2 sigma²)))^order] / (order - 1) over z of N(0, sigma²). The integrand is
    analytic and dies off as a Gaussian, so that sums over an even grid converge faster than any power of its step.
    With noise below 0.05, where nothing is private, the bound of steps that see all examples is given instead.
    """
    if noise == 0:
        return math.inf
    if rate == 1 or noise < 0.05:
        return order / (2 * noise**2)
    step = noise * min(1.0, noise) / 3
    z = np.arange(-14 * noise, order + 14 * noise, step)
    with np.errstate(divide="ignore"):
        mixture = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * z - 1) / (2 * noise**2))
    density = -(z**2) / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi))
    return max(0.0, float(logsumexp(density + order * mixture) + math.log(step))) / (order - 1)


def rdp_epsilon(history: Sequence[Steps], delta: float) -> float:
    """The least epsilon at a delta that the orders prove (Canonne, Kamath and Steinke, 2020, proposition 12)."""
    least = math.inf
    for order in ORDERS:
        total = sum(s.count * renyi(s.noise, s.rate, order) for s in history)
        proved = total + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
        least = min(least, proved)
    return max(0.0, least)


def epsilon(history: Sequence[Steps], delta: float, accountant: str = "auto") -> float:
    """An upper bound of epsilon after all these steps, where adjacent data differ by one example that is there or not.

    Args:
        history: all steps that touched the data: local steps of all rounds.
        delta: less than one over the number of examples.
        accountant: `rdp`, ours; `prv`, the tighter one of opacus; `auto`, that where opacus is installed.

    Raises `ValueError` on an impossible delta, `ImportError` where opacus is asked for and not there.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta!r}: it lies between 0 and 1, and below one over the number of examples")
    done = [s for s in history if s.count]
    if not done:
        return 0.0
    if any(s.noise == 0 for s in done):
        return math.inf
    return _prv(done, delta) if chosen(accountant) == "prv" else rdp_epsilon(done, delta)


def chosen(accountant: str) -> str:
    """Which accountant a word stands for."""
    if accountant not in ("auto", "rdp", "prv"):
        raise ValueError(f"accountant={accountant!r}: it is 'auto', 'rdp' or 'prv'")
    if accountant == "rdp":
        return "rdp"
    try:
        import opacus.accountants  # noqa: F401
    except ImportError as e:
        if accountant == "auto":
            return "rdp"
        raise ImportError("the prv accountant is that of opacus: pip install 'eckart[privacy]'") from e
    return "prv"


def noise_for(epsilon_wanted: float, delta: float, rate: float, steps: int, accountant: str = "auto") -> float:
    """The noise multiplier with which so many steps spend at most an epsilon, to a thousandth.

    For a client, `steps` are its local steps of all rounds that it may be asked to take part in.

    Raises `ValueError` where no noise up to 10⁴ is enough.
    """
    if not epsilon_wanted > 0:
        raise ValueError(f"epsilon={epsilon_wanted!r}: it is a number above 0")

    def spent(noise: float) -> float:
        return epsilon([Steps(noise, rate, steps)], delta, accountant)

    low, high = 0.0, 1.0
    while spent(high) > epsilon_wanted:
        low, high = high, 2 * high
        if high > 1e4:
            raise ValueError(f"no noise gives epsilon={epsilon_wanted!r} at delta={delta!r} in {steps} steps at rate {rate!r}: take fewer steps, smaller batches, or a larger delta")  # fmt: skip # noqa: E501
    while high - low > 1e-3 * high and high > 0.1:  # below a tenth no guarantee is worth the name
        middle = (low + high) / 2
        low, high = (low, middle) if spent(middle) <= epsilon_wanted else (middle, high)
    return high


def _prv(history: Sequence[Steps], delta: float) -> float:
    import opacus.accountants

    accountant: Any = opacus.accountants.PRVAccountant()
    accountant.history = [(s.noise, s.rate, s.count) for s in history]
    return float(accountant.get_epsilon(delta))
