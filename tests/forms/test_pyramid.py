"""Shape and gain: bits, distortion, the law of lengths, and feedback."""

from __future__ import annotations

import pytest
import scipy.stats
import torch

from eckart.forms import Pyramid, Quantized, kernels, parse
from eckart.forms.pyramid import gain_levels
from eckart.forms.quantized import QuantizedMatrix
from eckart.linalg.pyramid import counts
from eckart.linalg.weighting import Weighting
from eckart.linalg.whitening import psd_root
from eckart.testing import error_ratio, gaussian


@pytest.mark.parametrize(("pulses", "group"), [(20, 16), (5, 16), (60, 8), (1, 4)])
def test_bits_are_counted_with_all_overhead(pulses: int, group: int) -> None:
    number = (counts(group, pulses)[group][pulses] - 1).bit_length()
    stored = 8 * Pyramid(pulses, group).nbytes((64, 256), torch.float16) / (64 * 256)
    assert stored == pytest.approx((number + 4) / group + 16 / 256)


@pytest.mark.parametrize(("pulses", "group", "bits"), [(24, 16, 3), (8, 16, 2)])
def test_half_the_error_of_rounding_at_equal_bits(pulses: int, group: int, bits: int) -> None:
    W = gaussian(64, 512)
    ours, theirs = Pyramid(pulses, group), Quantized(bits, 128)
    assert ours.nbytes(W.shape, torch.float16) <= 1.03 * theirs.nbytes(W.shape, torch.float16)
    errors = [error_ratio(form.fit(W, dtype=torch.float16).dense(), W) ** 2 for form in (ours, theirs)]
    assert errors[0] < 0.62 * errors[1]


def test_lengths_follow_the_beta_law_and_levels_suit_it() -> None:
    W = gaussian(100, 256, dtype=torch.float64)
    lengths = W.unflatten(1, (16, 16)).norm(dim=-1) / W.norm(dim=-1, keepdim=True)
    law = scipy.stats.beta(8, 120)
    assert scipy.stats.kstest(lengths.square().flatten().numpy(), law.cdf).pvalue > 0.01
    heavy = W**5
    shares = heavy.unflatten(1, (16, 16)).square().sum(-1) / heavy.square().sum(-1, keepdim=True)
    assert scipy.stats.kstest(shares.flatten().numpy(), law.cdf).pvalue < 1e-6
    for bits in (2, 4):
        levels = gain_levels(bits, 16, 256)
        assert len(levels) == 2**bits
        assert float(levels[0]) == 0
        even = torch.linspace(float(lengths.min()), float(lengths.max()), 2**bits - 1, dtype=torch.float64)
        lost = [(lengths[..., None] - a).square().amin(-1).mean() for a in (levels, even)]
        assert float(lost[0]) < float(lost[1])


def test_the_best_length_is_not_the_norm() -> None:
    """What a point does not reach of a direction is not asked for."""
    W = gaussian(40, 64, dtype=torch.float64)
    module = Pyramid(4, 16, gain_bits=8).fit(W)
    found = module.dense().detach()
    directions = found.unflatten(1, (4, 16))
    directions = directions / directions.norm(dim=-1, keepdim=True)
    as_long = (directions * W.unflatten(1, (4, 16)).norm(dim=-1, keepdim=True)).flatten(1)
    assert error_ratio(found, W) < error_ratio(as_long, W)


@pytest.mark.parametrize("seed", range(3))
def test_feedback_is_better_on_correlated_inputs(seed: int) -> None:
    W = gaussian(48, 80, seed=seed)
    x = gaussian(800, 80, seed=8, dtype=torch.float64) @ gaussian(80, 80, seed=9, dtype=torch.float64)
    norm = Weighting(right=psd_root(x.T @ x / 800, 1e-9))
    plain, own = (Pyramid(16).fit(W, n).dense().detach() for n in (Weighting(), norm))
    assert norm.norm2(W - own) < 0.85 * norm.norm2(W - plain)


def test_odd_widths_zero_groups_and_zero_rows() -> None:
    W = gaussian(5, 37)
    W[1] = 0
    W[2, :16] = 0
    found = Pyramid(30, 16).fit(W).dense().detach()
    assert float(found[1].abs().max()) == 0
    assert float(found[2, :16].abs().max()) == 0
    assert error_ratio(found, W) < 0.2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pyramid(pulses=0)", "1 to 255 pulses"),
        ("pyramid(group=0)", "1 to 64 columns"),
        ("pyramid(gain_bits=9)", "1 to 8 bits"),
        ("pyramid(damping=-1.0)", "damping"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)
    with pytest.raises(ValueError, match="take fewer pulses or smaller groups"):
        Pyramid(200, 32).build((4, 64))


@pytest.mark.parametrize(("pulses", "group", "bits"), [(5, 16, 4), (24, 16, 6), (60, 8, 7), (3, 64, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_served_as_codes_of_the_same_numbers(pulses: int, group: int, bits: int, dtype: torch.dtype) -> None:
    W = gaussian(48, 150)
    W[3, :64] = 0
    W[3, 5] = 9  # all pulses on one weight
    module = Pyramid(pulses, group).fit(W, dtype=dtype)
    with torch.no_grad():
        dense = module.dense()
        for rows in (1, 2, 40):
            x = gaussian(rows, 150, seed=1, dtype=dtype)
            found, wanted = module(x, dense[:, 0]), x.double() @ dense.double().T + dense[:, 0].double()
            assert error_ratio(found, wanted) < (1e-6 if dtype == torch.float32 else 0.01)
    codes = module.codes()
    assert isinstance(codes, QuantizedMatrix)
    assert codes.form.bits == bits
    assert error_ratio(codes.dense(), dense) < (1e-6 if dtype == torch.float32 else 0.01)


def test_the_codes_lie_beside_the_module_and_follow_it() -> None:
    module = Pyramid(8).fit(gaussian(32, 64))
    x, stored = gaussian(2, 64, seed=1), module.nbytes
    assert kernels.cached_bytes(module) == 0
    with torch.no_grad():
        before = module(x)
        assert kernels.cached_bytes(module) > 0
        assert module.nbytes == stored
        assert set(module.state_dict()) == {"points", "gains", "norms"}
        module.norms *= 2
        torch.testing.assert_close(module(x), 2 * before)
        module.load_state_dict(Pyramid(8).fit(gaussian(32, 64, seed=4)).state_dict())
        torch.testing.assert_close(module(x), x @ module.dense().T)
    kernels.forget(module)
    assert kernels.cached_bytes(module) == 0


def test_points_beyond_8_bits_and_learning_take_the_walk() -> None:
    W = torch.zeros(4, 2)
    W[:, 0] = 1
    with torch.no_grad():
        module = Pyramid(200, 2).fit(W)
        assert module.codes() is None
        assert error_ratio(module(torch.ones(3, 2)), torch.ones(3, 4)) < 0.1
    module = Pyramid(8).fit(gaussian(32, 64))
    module(gaussian(3, 64)).sum().backward()
    assert module.norms.grad is not None
    assert kernels.cached_bytes(module) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_curves_take_the_matrix_of_the_fit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where rows come in several parts."""
    W, x = gaussian(20, 50), gaussian(200, 50, seed=8, dtype=torch.float64)
    norm = Weighting(right=psd_root(x.T @ x, 1e-9))
    whole = Pyramid(12).fit(W, norm, dtype=dtype)
    monkeypatch.setattr("eckart.forms.pyramid.CHUNK", 350)
    parts = Pyramid(12).fit(W, norm, dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True))
    assert torch.equal(Pyramid(12).approximation(W, norm, dtype), parts.dense().detach().to(W.dtype))
