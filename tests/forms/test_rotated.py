"""Rotated forms: the norm turns with the matrix, heavy tails go, inputs may be rounded after they were turned."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import scipy.stats
import torch
from torch import Tensor

from eckart.forms import Form, parse
from eckart.linalg.weighting import Weighting
from eckart.linalg.whitening import DiagonalRoot, psd_root
from eckart.testing import error_ratio, gaussian


def heavy(out: int, in_: int) -> Tensor:
    """Student's t with 3 degrees of freedom."""
    deviations = gaussian(3, out, in_, seed=1, dtype=torch.float64).square().mean(0).sqrt()
    return gaussian(out, in_, dtype=torch.float64) / deviations


def spiked(out: int, in_: int) -> Tensor:
    """One weight of a hundred is fifteen times as large."""
    some = torch.rand(out, in_, generator=torch.Generator().manual_seed(3)) < 0.01
    return torch.where(some, 15.0, 1.0) * gaussian(out, in_, dtype=torch.float64)


def covariance(n: int) -> Weighting:
    x = gaussian(4 * n, n, seed=8, dtype=torch.float64) @ gaussian(n, n, seed=9, dtype=torch.float64)
    return Weighting(right=psd_root(x.T @ x / (4 * n), 1e-9))


def lost(form: str | Form, W: Tensor, norm: Weighting) -> float:
    return norm.norm2(W - parse(str(form)).fit(W, norm).dense().detach().to(W))


@pytest.mark.parametrize("n", [64, 96])
@pytest.mark.parametrize("kind", ["covariance", "diagonal", "plain"])
def test_the_error_is_that_of_the_form_within(n: int, kind: str) -> None:
    W = gaussian(12, n, dtype=torch.float64)
    weights = gaussian(n, seed=4, dtype=torch.float64).square() + 0.1
    norm = {"covariance": covariance(n), "diagonal": Weighting(right=DiagonalRoot(weights)), "plain": Weighting()}[kind]
    form = parse("rotated(low_rank(rank=5))")
    own, turned = form.within(W, norm)
    found = form.wrapped.fit(own, turned).dense().detach()
    assert turned.norm2(own - found) == pytest.approx(norm.norm2(W - form.fit(W, norm).dense().detach()))
    assert lost(form, W, norm) == pytest.approx(lost("low_rank(rank=5)", W, norm))  # which no rotation changes
    over = turned.right.over(turned.right.times(own))
    torch.testing.assert_close(over, own, rtol=1e-6, atol=1e-8)


def test_lengths_of_groups_follow_the_beta_law_after_the_rotation_only() -> None:
    W = heavy(100, 256)
    law = scipy.stats.beta(8, 120)
    for x, passes in ((W, False), (parse("rotated()").within(W, Weighting())[0], True)):
        shares = x.unflatten(1, (16, 16)).square().sum(-1) / x.square().sum(-1, keepdim=True)
        pvalue = scipy.stats.kstest(shares.flatten().numpy(), law.cdf).pvalue
        assert pvalue > 0.01 if passes else pvalue < 1e-6


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    ("form", "matrix"),
    [
        ("quantized(bits=3, group=64)", heavy),
        ("quantized(bits=3, group=64, rounding=gptq())", heavy),
        ("pyramid(pulses=12)", spiked),
    ],
)
def test_codes_of_heavy_tails_lose_less(form: str, matrix: Callable[[int, int], Tensor], known: bool) -> None:
    W, norm = matrix(48, 256).float(), covariance(256) if known else Weighting()
    assert lost(f"rotated({form})", W, norm) < 0.7 * lost(form, W, norm)
    more = parse(f"rotated({form})").nbytes((48, 256), torch.float16) - parse(form).nbytes((48, 256), torch.float16)
    assert more == 256 / 8


def test_rounded_inputs_are_turned_first() -> None:
    """An input that stands out takes the others' digits, unless it is spread over all."""
    W, x = gaussian(32, 64), gaussian(200, 64, seed=1)
    W[:, 5] = 0  # what it is multiplied by does not count here
    wanted = x @ W.T
    x[:, 5] = 50
    rounding = "quantized_inputs(matrix=dense(), inputs=quantized(bits=4, group=None))"
    plain, turned = (parse(text).fit(W) for text in (rounding, f"rotated({rounding})"))
    assert error_ratio(turned(x), wanted) < 0.7 * error_ratio(plain(x), wanted)
    assert not turned.exact


def test_alternatives_within_and_single_weights() -> None:
    W = gaussian(16, 64)
    curve = parse("rotated(quantized(bits=2) | quantized(bits=4))").curve(W, covariance(64), torch.float16)
    assert [str(form)[:8] for form in curve.forms] == ["rotated("] * 2
    assert curve.errors[1] < curve.errors[0] < curve.energy
    each = Weighting(each=gaussian(16, 64, seed=3).square() + 0.1)
    form = parse("rotated(quantized(bits=3))")
    found = form.curve(W, each, torch.float32)
    assert found.errors[0] == pytest.approx(each.norm2(W - form.fit(W, each).dense().detach()))


@pytest.mark.parametrize("form", ["quantized(bits=4)", "pyramid(pulses=12)"])
def test_learning_goes_on_after_inference(form: str) -> None:
    """What was kept for inference is no hindrance to gradients of inputs, as adapters on top want them."""
    module, x = parse(f"rotated({form})").fit(gaussian(16, 64)).requires_grad_(False), gaussian(3, 64, seed=1)
    with torch.inference_mode():
        module(x)
    x.requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, module.dense().sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)


def test_the_seed_decides() -> None:
    W = gaussian(8, 64)
    one, same, other = (parse(f"rotated(seed={s}, form=quantized(bits=2))").fit(W) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), same.state_dict().values(), strict=True))
    assert not torch.equal(one.get_buffer("signs"), other.get_buffer("signs"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rotated(form=3)", r"rotated\(form=3\): that is no form"),
        ("rotated(seed=-1)", "a seed is an integer from 0 up"),
        ("rotated(seed=0.5)", "a seed is an integer from 0 up"),
        ("scaled(form=3)", r"scaled\(form=3\): that is no form"),
        ("quantized_inputs(matrix=3)", r"quantized_inputs\(matrix=3\): that is no form"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)
