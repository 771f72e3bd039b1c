"""What every metric owes, as tests: a norm that is what it says, sums that add up, and finite weights on poor data."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from eckart.forms import LowRank
from eckart.linalg.weighting import Weighting
from eckart.linalg.whitening import Damped
from eckart.metrics import METRICS, Metric, Statistics, as_metric
from eckart.metrics.statistics import GRADIENT_SUMS, INPUT_SUMS
from eckart.testing.numbers import error_ratio, gaussian

OUT, IN = 6, 8
EXAMPLES, LENGTH = 20, 16


class MetricContract:
    """The battery. A subclass names its metrics in `metrics`; without that it covers every registered word."""

    def metrics(self) -> list[Metric]:
        """Metrics to try."""
        return [cls() for cls in METRICS.words.values()]

    def definition(
        self, metric: Metric, x: Float[Tensor, "examples length in"], g: Float[Tensor, "examples length out"],
        delta: Float[Tensor, "out in"],
    ) -> float | None:  # fmt: skip
        """The squared norm of an error, computed naively from the data in float64; None where nobody wrote it down.

        Args:
            x: inputs of the matrix.
            g: gradients of each example's summed loss at the outputs.
            delta: the error.
        """
        return None

    def pytest_generate_tests(self, metafunc: Any) -> None:
        if "metric" in metafunc.fixturenames:
            metafunc.parametrize("metric", self.metrics(), ids=str)

    def test_text_and_back(self, metric: Metric) -> None:
        again = METRICS.parse(str(metric))
        assert (again, hash(again), str(again)) == (metric, hash(metric), str(metric))
        assert as_metric(metric) is metric
        assert as_metric(str(metric)) == metric

    def test_needs_only_what_is_collected(self, metric: Metric) -> None:
        assert metric.needs <= INPUT_SUMS | GRADIENT_SUMS
        assert metric.labels in ("data", "model")

    def test_norm_is_the_definition(self, metric: Metric) -> None:
        x, g = samples()
        delta = gaussian(OUT, IN, seed=5, dtype=torch.float64)
        wanted = self.definition(metric, x.double(), g.double(), delta)
        if wanted is None:
            pytest.skip(f"no definition of {metric} is given to compare with")
        assert weighting_of(metric, x, g).norm2(delta) == pytest.approx(wanted, rel=1e-5)

    def test_norm_is_that_of_its_weights(self, metric: Metric) -> None:
        weighting = weighting_of(metric, *samples())
        delta = gaussian(OUT, IN, seed=5, dtype=torch.float64)
        G, C = weighting.left.gram(OUT), weighting.right.gram(IN)
        wanted = G @ delta @ C * delta if weighting.each is None else weighting.each * delta.square()
        assert weighting.norm2(delta) == pytest.approx(float(wanted.sum()), rel=1e-9)
        assert weighting.norm2(3 * delta) == pytest.approx(9 * weighting.norm2(delta), rel=1e-9)
        assert weighting.norm2(0 * delta) == 0

    def test_chunks_add_up_to_one_pass(self, metric: Metric) -> None:
        x, g = samples()
        whole, merged = statistics_of(metric, x, g), Statistics()
        for part in zip(x.chunk(10), g.chunk(10), strict=True):
            merged.merge(statistics_of(metric, *part))
        assert merged.sums.keys() == whole.sums.keys()
        for name, value in whole.sums.items():
            assert error_ratio(merged.sums[name], value) <= 1e-6
        delta = gaussian(OUT, IN, seed=5)
        found, wanted = metric.weighting(merged).norm2(delta), metric.weighting(whole).norm2(delta)
        assert found == pytest.approx(wanted, rel=1e-6)

    def test_reads_its_statistics_only(self, metric: Metric) -> None:
        statistics = statistics_of(metric, *samples())
        before = {name: value.clone() for name, value in statistics.sums.items()}
        delta = gaussian(OUT, IN, seed=5)
        assert metric.weighting(statistics).norm2(delta) == metric.weighting(statistics).norm2(delta)
        assert all(torch.equal(statistics.sums[name], value) for name, value in before.items())

    @pytest.mark.parametrize("poverty", ["dead inputs", "dead outputs", "few tokens", "one token", "all zero"])
    def test_poor_data_gives_finite_weights(self, metric: Metric, poverty: str) -> None:
        x, g = samples()
        if poverty == "dead inputs":
            x[..., :3] = 0
        elif poverty == "dead outputs":
            g[..., :3] = 0
        elif poverty == "few tokens":
            x, g = x[:1, :4], g[:1, :4]
        elif poverty == "one token":
            x, g = x[:1, :1], g[:1, :1]
        else:
            x, g = 0 * x, 0 * g
        with damping_allowed():
            weighting = weighting_of(metric, x, g)
        matrix = gaussian(OUT, IN, seed=5)
        assert 0 <= weighting.norm2(matrix) < float("inf")
        fitted = LowRank(2).fit(matrix, weighting)
        assert bool(torch.isfinite(fitted.dense()).all())
        assert weighting.norm2(matrix - fitted.dense().detach()) <= weighting.norm2(matrix) * (1 + 1e-6)

    def test_missing_statistics_name_the_layer(self, metric: Metric) -> None:
        if metric.needs:
            with pytest.raises(ValueError, match=r"layers\.3\.up_proj"):
                metric.weighting(Statistics(), "layers.3.up_proj")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_numbers_that_are_none_name_the_layer(self, metric: Metric, value: float) -> None:
        x, g = samples()
        x[0, 0, 0] = g[0, 0, 0] = value
        if metric.needs:
            with pytest.raises(ValueError, match=r"layers\.3\.up_proj.* holds NaN or infinity"):
                weighting_of(metric, x, g, "layers.3.up_proj")

    def test_the_mean_is_that_of_the_inputs(self, metric: Metric) -> None:
        x, g = samples()
        mean = weighting_of(metric, x, g).mean
        if mean is not None:
            assert error_ratio(mean, x.double().mean((0, 1))) <= 1e-6


def samples() -> tuple[Float[Tensor, "examples length in"], Float[Tensor, "examples length out"]]:
    """Correlated inputs about a mean that is not zero, and gradients."""
    x = gaussian(EXAMPLES, LENGTH, IN, seed=1) @ gaussian(IN, IN, seed=2) + gaussian(IN, seed=3)
    return x, 0.1 * gaussian(EXAMPLES, LENGTH, OUT, seed=4) @ gaussian(OUT, OUT, seed=6)


def statistics_of(metric: Metric, x: Tensor, g: Tensor) -> Statistics:
    """What a calibration run would collect for a metric: all rows of x, and g example by example."""
    statistics = Statistics()
    if metric.needs & INPUT_SUMS:
        statistics.add_inputs(x, metric.needs)
    if metric.needs & GRADIENT_SUMS:
        for inputs, gradients in zip(x, g, strict=True):
            statistics.add_gradients(inputs, gradients, metric.needs)
    return statistics


def weighting_of(metric: Metric, x: Tensor, g: Tensor, where: str = "") -> Weighting:
    """The norm that a metric makes of this data."""
    return metric.weighting(statistics_of(metric, x, g), where)


@contextmanager
def damping_allowed() -> Iterator[None]:
    """Within the context, a weight may be damped more than was asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Damped)
        yield
