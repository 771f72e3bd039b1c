"""Quantised leaves of every kind: the contract, the bytes to the bit, and what is refused."""

from __future__ import annotations

import pytest
import torch

from eckart.forms import Quantized, parse
from eckart.forms.grids import Uniform
from eckart.forms.quantized import LADDER
from eckart.testing import FormContract, error_ratio, gaussian
from eckart.testing.forms import Case

KINDS = [
    "quantized(bits=1, group=4)",
    "quantized(bits=3, group=4, grid=uniform(symmetric=True))",
    "quantized(bits=2, group=None, grid=uniform(zero='real', search=5))",
    "quantized(bits=4, group=7, grid=normal_float())",
    "quantized(bits=5, group=5, grid=shift(), rounding=stochastic(seed=3))",
    "quantized(bits=2, group=None, grid=learned(), rounding=gptq())",
    "quantized(bits=3, group=4, grid=uniform(zero='real'), rounding=alternate(steps=1))",
    "quantized(bits=3, group=3, rounding=gptq(order='given'), scales=quantized(bits=4, group=5))",
]
UNITS = "quantized(bits=3, group=16, grid=uniform(zero='real'))"


class TestQuantized(FormContract):
    def forms(self) -> list[Case]:
        return [(parse(text), (12, 10)) for text in KINDS]


def bits_per_weight(text: str, out: int = 64, in_: int = 256) -> float:
    """As stored at 16 bits."""
    return 8 * parse(text).nbytes((out, in_), torch.float16) / (out * in_)


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("quantized(bits=3, group=32)", 3 + (16 + 3) / 32),
        ("quantized(bits=3, group=32, grid=uniform(zero='real'))", 3 + 32 / 32),
        ("quantized(bits=3, group=32, grid=uniform(symmetric=True))", 3 + 16 / 32),
        ("quantized(bits=4, group=64, grid=normal_float())", 4 + 16 / 64),
        ("quantized(bits=3, group=None, grid=learned())", 3 + 16 * 8 / 256),
        (f"quantized(bits=4, group=16, grid=uniform(zero='real'), scales={UNITS})", 4 + 6 / 16 + 4 * 16 / 256),
    ],
)
def test_bits_are_counted_with_all_overhead(text: str, bits: float) -> None:
    assert bits_per_weight(text) == pytest.approx(bits)


@pytest.mark.parametrize("width", [1, 5, 31, 33, 64, 65])
def test_groups_need_not_divide_the_width(width: int) -> None:
    W = gaussian(6, width)
    found = Quantized(8, 32).fit(W).dense().detach()
    assert float((found - W).abs().max()) <= float(W.abs().max()) * 2 / 255
    last = W[:, 32 * ((width - 1) // 32) :]  # what is left of the row has a grid of its own
    alone = Quantized(3, 32).fit(last).dense().detach()
    assert torch.equal(Quantized(3, 32).fit(W).dense().detach()[:, -last.shape[1] :], alone)


def test_more_bits_and_smaller_groups_are_better_and_dearer() -> None:
    W = gaussian(32, 128, seed=1) ** 3
    for forms in (Quantized().ladder((32, 128)), [Quantized(3, g) for g in (None, 64, 32, 16)]):
        errors = [error_ratio(form.fit(W).dense(), W) for form in forms]
        nbytes = [form.nbytes((32, 128), torch.float16) for form in forms]
        assert errors == sorted(errors, reverse=True)
        assert nbytes == sorted(set(nbytes))
    assert len(Quantized().ladder((32, 128))) == len(LADDER)


def test_scales_may_be_quantised_themselves() -> None:
    W = gaussian(64, 128, seed=2) * torch.linspace(0.5, 1.5, 64)[:, None]
    one = Quantized(4, 16, Uniform(zero="real"))
    two = parse(f"quantized(bits=4, group=16, grid=uniform(zero='real'), scales={UNITS.replace('bits=3', 'bits=6')})")
    plain, double = one.fit(W, dtype=torch.float16), two.fit(W, dtype=torch.float16)
    assert double.nbytes < 0.85 * plain.nbytes
    assert error_ratio(double.dense(), W) < 1.1 * error_ratio(plain.dense(), W)


def test_codes_were_chosen_for_the_scales_as_they_are_stored() -> None:
    """Rounding W again on the stored grid changes nothing, though the scales lost most of their bits."""
    W = gaussian(32, 64, seed=2)
    for dtype in (torch.float32, torch.bfloat16):
        form = parse("quantized(bits=3, group=16, scales=quantized(bits=3, group=16))")
        module = form.fit(W, dtype=dtype)
        numbers = module.dense().detach().float()
        scale = module.floats["scale"].dense().detach().float().T.repeat_interleave(16, 1)
        inside = (numbers > numbers.view(32, 4, 16).amin(-1).repeat_interleave(16, 1)) & (
            numbers < numbers.view(32, 4, 16).amax(-1).repeat_interleave(16, 1)
        )
        assert bool(((numbers - W).abs() <= 0.51 * scale + 0.02)[inside].all())


def test_an_embedding_looks_up_rows() -> None:
    module = Quantized(3, 16, Uniform(), scales=Quantized(8, 8)).fit(gaussian(20, 40))
    ids = torch.tensor([[3, 19], [0, 3]])
    assert torch.equal(module.rows(ids), module.dense()[ids])


def test_zero_rows_stay_zero() -> None:
    W = gaussian(6, 32)
    W[2] = 0
    for text in KINDS:
        form = parse(text)
        found = form.fit(W, dtype=torch.float16).dense()[2]
        assert float(found.detach().abs().max()) <= 1e-6 or "scales" in text, text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantized(bits=0)", "1 to 8 bits"),
        ("quantized(bits=9)", "1 to 8 bits"),
        ("quantized(bits=2.5)", "1 to 8 bits"),
        ("quantized(group=0)", "positive number of columns"),
        ("quantized(grid=dense())", "that is no grid"),
        ("quantized(scales=uniform())", "that is no form"),
        ("quantized(rounding=uniform())", "that is no rounding"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)
