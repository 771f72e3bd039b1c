"""Fitted layers that are kept for other trials: what comes back multiplies as what was fitted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from eckart.forms import parse
from eckart.forms.pyramid import PyramidMatrix
from eckart.jobs.fits import Fits
from eckart.jobs.plan import Layer
from eckart.jobs.solve import Fitted
from eckart.testing.numbers import gaussian

FORMS = [
    "low_rank(rank=4, factors=quantized(bits=8)) + sparse(density=0.1)",
    "rotated(pyramid(pulses=4, group=12))",
    "pyramid(pulses=3)",
    "select(width=6) @ dense()",
    "dense() @ select(width=6)",
    "quantized(bits=3, group=7)",
    "quantized_inputs(quantized(bits=4), inputs=quantized(bits=4))",
]


def layer(form: str) -> Layer:
    return Layer(name="a", kind="linear", part=0, shape=(24, 36), form=form, dense_bytes=1, bytes=1)


@pytest.mark.parametrize("text", FORMS)
def test_what_comes_back_is_what_was_fitted(text: str, tmp_path: Path) -> None:
    fits, made, x = Fits(tmp_path), parse(text).fit(gaussian(24, 36)).requires_grad_(False), gaussian(3, 36, seed=1)
    wanted, product = made.dense().clone(), made(x)
    asked: list[str] = []

    def fitted(some: list[Layer]) -> list[Fitted]:
        asked.extend(one.form for one in some)
        return [Fitted(made, torch.ones(24), 0.5, "a note") for _ in some]

    found = [next(iter(fits.of([layer(text)], "plain()", fitted))) for _ in range(2)]
    assert asked == [text]
    for one in found:
        module = one.module.float()
        tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
        assert not any(t.is_meta for t in tensors)
        assert torch.allclose(module.dense(), wanted, atol=1e-6)
        assert torch.equal(module(x), product)
        assert (one.error, one.note) == (0.5, "a note")
        assert not any(isinstance(part, PyramidMatrix) for part in module.modules())
    first, second = ([*one.module.state_dict().values()] for one in found)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(first, second, strict=True))


def test_other_forms_and_metrics_are_fitted_anew(tmp_path: Path) -> None:
    fits, asked = Fits(tmp_path), []

    def fitted(some: list[Layer]) -> list[Fitted]:
        asked.extend(one.form for one in some)
        return [Fitted(parse(one.form).fit(gaussian(24, 36)), None, 0.0, None) for one in some]

    a, b = layer("low_rank(rank=2)"), layer("low_rank(rank=3)")
    for metric, layers in (("plain()", [a]), ("plain()", [a, b]), ("output_covariance()", [b])):
        shapes = [one.module.state_dict()["left.weight"].shape for one in fits.of(layers, metric, fitted)]
        assert shapes == [(24, int(one.form[-2])) for one in layers]
    assert asked == [a.form, b.form, b.form]
