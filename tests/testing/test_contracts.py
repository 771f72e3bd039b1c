"""The batteries pass what keeps its promises and catch what breaks one: a stranger's form, metric and allocator."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from eckart.allocation import ALLOCATORS, Allocator, Problem, Uniform
from eckart.forms import FORMS, Factored, Form
from eckart.forms.base import Shape
from eckart.linalg.weighting import PLAIN, Weighting
from eckart.linalg.whitening import DiagonalRoot, IdentityRoot
from eckart.metrics import METRICS, Metric, Statistics
from eckart.testing import AllocatorContract, FormContract, MetricContract, error_ratio, gaussian

SHAPE: Shape = (6, 5)


class ScaledMatrix(Factored):
    """A number times an oblong identity."""

    def __init__(self, scale: Tensor, shape: Shape, form: Form):
        super().__init__()
        self.scale, self.shape, self.form = nn.Parameter(scale), shape, form

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = x @ self.dense().T
        return y if bias is None else y + bias

    def dense(self) -> Tensor:
        return self.scale * torch.eye(*self.shape, dtype=self.scale.dtype, device=self.scale.device)

    def flops(self, tokens: int) -> int:
        return tokens * min(self.shape)


@dataclass(frozen=True)
class Scaled(Form):
    """What a stranger might write."""

    power: int | None = 1
    word: ClassVar[str] = "scaled"
    module: ClassVar[type[ScaledMatrix]] = ScaledMatrix

    def __post_init__(self) -> None:
        if self.power is not None and (not isinstance(self.power, int) or self.power < 1):
            raise ValueError(f"scaled(power={self.power!r}): the power is a positive integer")

    def ladder(self, shape: Shape) -> list[Form]:
        return [self]

    def build(self, shape: Shape, *, dtype: torch.dtype | None = None, device: str | None = None) -> ScaledMatrix:
        return self.module(torch.empty((), dtype=dtype, device=device), shape, self)

    def fit(self, matrix: Tensor, weighting: Weighting = PLAIN, *, dtype: torch.dtype | None = None) -> ScaledMatrix:
        mean = matrix.diagonal().mean() if matrix.numel() else matrix.new_zeros(())
        return self.module(mean.to(dtype or matrix.dtype), (matrix.shape[0], matrix.shape[1]), self)


class WrongForward(ScaledMatrix):
    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return 1.03 * super().forward(x, bias)


class NoBias(ScaledMatrix):
    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return super().forward(x)


class WrongRows(ScaledMatrix):
    def rows(self, ids: Tensor) -> Tensor:
        return super().rows(ids) + 1


class NoGradient(ScaledMatrix):
    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = x @ self.dense().detach().T
        return y if bias is None else y + bias


class Coy(ScaledMatrix):
    """Says that it rounds what it does not."""

    @property
    def exact(self) -> bool:
        return False


class Hoarder(ScaledMatrix):
    """Keeps a view of something larger."""

    def __init__(self, scale: Tensor, shape: Shape, form: Form):
        super().__init__(scale, shape, form)
        self.scale.data = scale.detach().expand(10).clone()[0]


class Hungry(ScaledMatrix):
    def flops(self, tokens: int) -> int:
        return tokens**2


class Casting(ScaledMatrix):
    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return super().forward(x, bias).float()


class Cheap(Scaled):
    def nbytes(self, shape: Shape, dtype: torch.dtype) -> int:
        return 1


class Moody(Scaled):
    def fit(self, matrix: Tensor, weighting: Weighting = PLAIN, *, dtype: torch.dtype | None = None) -> ScaledMatrix:
        return super().fit(matrix + torch.rand(()), weighting, dtype=dtype)


class Vandal(Scaled):
    def fit(self, matrix: Tensor, weighting: Weighting = PLAIN, *, dtype: torch.dtype | None = None) -> ScaledMatrix:
        found = super().fit(matrix, weighting, dtype=dtype)
        matrix.zero_()
        return found


class Fragile(Scaled):
    def fit(self, matrix: Tensor, weighting: Weighting = PLAIN, *, dtype: torch.dtype | None = None) -> ScaledMatrix:
        return super().fit(matrix / matrix.abs().max(), weighting, dtype=dtype)


class Stubborn(Scaled):
    """Stores float32 whatever is asked for."""

    def fit(self, matrix: Tensor, weighting: Weighting = PLAIN, *, dtype: torch.dtype | None = None) -> ScaledMatrix:
        return super().fit(matrix, weighting, dtype=torch.float32)


@dataclass(frozen=True)
class Forgetful(Scaled):
    secret: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return "scaled(power=2)"


def of(module: type[ScaledMatrix]) -> Form:
    return type("Scaled", (Scaled,), {"module": module})()


@pytest.fixture(autouse=True)
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMS.words, "scaled", Scaled)
    monkeypatch.setitem(METRICS.words, "given", Given)
    monkeypatch.setitem(ALLOCATORS.words, "greedy", Thrifty)


def run(contract: Any, name: str, **known: Any) -> None:
    """One test of a contract, its fixtures given by hand."""
    test: Callable[..., None] = getattr(contract, name)
    test(**{parameter: known[parameter] for parameter in inspect.signature(test).parameters})


FORM_TESTS = [name for name in vars(FormContract) if name.startswith("test_")]


@pytest.mark.parametrize("name", [name for name in FORM_TESTS if "new_process" not in name])
def test_a_stranger_s_form_passes(name: str, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        known = {"dtype": dtype, "stored": dtype, "tmp_path": tmp_path, "weighting": "definite"}
        run(FormContract(), name, form=Scaled(), shape=SHAPE, **known)


@pytest.mark.parametrize(
    ("form", "name"),
    [
        (of(WrongForward), "test_forward_and_rows_are_those_of_the_dense_matrix"),
        (of(NoBias), "test_forward_and_rows_are_those_of_the_dense_matrix"),
        (of(WrongRows), "test_forward_and_rows_are_those_of_the_dense_matrix"),
        (of(Casting), "test_forward_and_rows_are_those_of_the_dense_matrix"),
        (of(NoGradient), "test_gradients_are_those_of_the_dense_matrix"),
        (of(WrongForward), "test_says_whether_it_rounds_its_inputs"),
        (of(Coy), "test_says_whether_it_rounds_its_inputs"),
        (of(WrongForward), "test_odd_shapes_compute_or_are_refused"),
        (of(Hoarder), "test_bytes_are_what_is_stored"),
        (Cheap(), "test_bytes_are_what_is_stored"),
        (of(Hungry), "test_flops_grow_with_tokens"),
        (Forgetful(), "test_text_and_back"),
        (Stubborn(), "test_an_empty_module_has_the_layout_of_a_fitted_one"),
        (Moody(), "test_fits_twice_to_the_same_bits"),
        (Vandal(), "test_fits_twice_to_the_same_bits"),
        (Fragile(), "test_fits_under_any_weighting"),
    ],
)
def test_a_broken_promise_of_a_form_is_caught(form: Form, name: str, tmp_path: Path) -> None:
    known = {"dtype": torch.float16, "stored": torch.float16, "tmp_path": tmp_path, "weighting": "of nothing"}
    with pytest.raises(AssertionError):
        run(FormContract(), name, form=form, shape=SHAPE, **known)


@dataclass(frozen=True)
class Given(Metric):
    """Weighs inputs by their mean square."""

    word: ClassVar[str] = "given"
    needs: ClassVar[frozenset[str]] = frozenset({"square"})

    def weighting(self, statistics: Statistics, where: str = "") -> Weighting:
        square = statistics.mean("square", where)
        if not bool(torch.isfinite(square).all()):
            raise ValueError(f"{where} holds NaN or infinity")
        return Weighting(right=DiagonalRoot(square.clamp_min(1e-12).sqrt()))


class Crude(Given):
    """Divides by what may be nothing."""

    def weighting(self, statistics: Statistics, where: str = "") -> Weighting:
        square = statistics.mean("square", where)
        return Weighting(right=DiagonalRoot((square / square.min()).sqrt()))


class Anonymous(Given):
    def weighting(self, statistics: Statistics, where: str = "") -> Weighting:
        return super().weighting(statistics)


class Average(Given):
    """Takes the sum of one shard for the mean of all."""

    def weighting(self, statistics: Statistics, where: str = "") -> Weighting:
        statistics.sums["square"] /= statistics.tokens
        return Weighting(right=DiagonalRoot(statistics.sums["square"].clamp_min(1e-12)))


class Lying(Given):
    def weighting(self, statistics: Statistics, where: str = "") -> Weighting:
        class Root(IdentityRoot):
            def times(self, M: Tensor) -> Tensor:
                return 2 * M

        return Weighting(right=Root())


class Needy(Given):
    needs: ClassVar[frozenset[str]] = frozenset({"cube"})


METRIC_TESTS = [name for name in vars(MetricContract) if name.startswith("test_") and "definition" not in name]


@pytest.mark.parametrize("name", METRIC_TESTS)
def test_a_stranger_s_metric_passes(name: str) -> None:
    for poverty, value in (("dead inputs", float("nan")), ("all zero", float("inf"))):
        run(MetricContract(), name, metric=Given(), poverty=poverty, value=value)


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        (Crude(), "test_poor_data_gives_finite_weights"),
        (Anonymous(), "test_missing_statistics_name_the_layer"),
        (Average(), "test_reads_its_statistics_only"),
        (Lying(), "test_norm_is_that_of_its_weights"),
        (Needy(), "test_needs_only_what_is_collected"),
    ],
)
def test_a_broken_promise_of_a_metric_is_caught(metric: Metric, name: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        run(MetricContract(), name, metric=metric, poverty="dead inputs", value=float("nan"))


def test_a_metric_is_compared_with_its_definition() -> None:
    class Defined(MetricContract):
        def definition(self, metric: Metric, x: Tensor, g: Tensor, delta: Tensor) -> float | None:
            return float((delta * x.square().mean((0, 1)).sqrt()).square().sum())

    Defined().test_norm_is_the_definition(Given())
    with pytest.raises(AssertionError):
        Defined().test_norm_is_the_definition(Lying())
    with pytest.raises(pytest.skip.Exception, match=r"no definition of given\(\)"):
        MetricContract().test_norm_is_the_definition(Given())


class Thrifty(Uniform):
    """Uniform, under another name."""

    word: ClassVar[str] = "greedy"


class Spendthrift(Thrifty):
    def choose(self, problem: Problem) -> dict[str, int]:
        return {name: len(curve) - 1 for name, curve in problem.curves.items()}


class Dicing(Thrifty):
    def allocate(self, problem: Problem) -> dict[str, int]:
        return {name: int(torch.randint(len(c) // 4, ())) for name, c in problem.curves.items()}


class Contrary(Thrifty):
    def allocate(self, problem: Problem) -> dict[str, int]:
        total = sum(c.nbytes[-1] for c in problem.curves.values())
        generous = problem.budget < 0.7 * total
        return {name: (len(c) // 4 if generous else 0) for name, c in problem.curves.items()}


class Omitting(Thrifty):
    def allocate(self, problem: Problem) -> dict[str, int]:
        return dict(list(super().allocate(problem).items())[1:])


ALLOCATOR_TESTS = [name for name in vars(AllocatorContract) if name.startswith("test_")]


@pytest.mark.parametrize("name", ALLOCATOR_TESTS)
def test_a_stranger_s_allocator_passes(name: str) -> None:
    run(AllocatorContract(), name, allocator=Thrifty(), share=0.7)


@pytest.mark.parametrize(
    ("allocator", "name"),
    [
        (Spendthrift(), "test_keeps_within_the_budget"),
        (Spendthrift(), "test_keeps_within_a_tight_budget_or_says_that_it_cannot"),
        (Omitting(), "test_keeps_within_the_budget"),
        (Dicing(), "test_chooses_the_same_twice"),
        (Dicing(), "test_enough_for_everything_costs_nothing"),
        (Contrary(), "test_more_budget_is_never_more_damage"),
    ],
)
def test_a_broken_promise_of_an_allocator_is_caught(allocator: Allocator, name: str) -> None:
    with pytest.raises(AssertionError):
        run(AllocatorContract(), name, allocator=allocator, share=0.7)


def test_an_impossible_budget_that_is_granted_is_caught() -> None:
    with pytest.raises(pytest.fail.Exception):
        AllocatorContract().test_an_impossible_budget_is_refused(Spendthrift())


def test_what_promises_nothing_is_not_held_to_it() -> None:
    class Unpromised(AllocatorContract):
        monotone = False

    with pytest.raises(pytest.skip.Exception, match="not promised"):
        Unpromised().test_more_budget_is_never_more_damage(Contrary())


def test_error_ratio() -> None:
    wanted = gaussian(4, 3)
    assert error_ratio(wanted, wanted) == 0
    assert error_ratio(1.1 * wanted, wanted) == pytest.approx(0.1, rel=1e-5)
    assert error_ratio(wanted, torch.zeros(4, 3)) == pytest.approx(float(wanted.norm()))
    assert error_ratio(torch.full((4, 3), torch.nan), wanted) == float("inf")
    with pytest.raises(ValueError, match=r"shape \(3,\) was found, \(4, 3\) is wanted"):
        error_ratio(wanted[0], wanted)


def test_numbers_are_the_same_at_every_dtype() -> None:
    assert torch.equal(gaussian(5, seed=1, dtype=torch.float16), gaussian(5, seed=1).half())
    assert not torch.equal(gaussian(5, seed=1), gaussian(5, seed=2))
