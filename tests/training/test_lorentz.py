"""The Lorentz model by its own identities, and the layer whose outputs are points whatever its weights are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eckart.testing import gaussian
from eckart.training.lorentz import Lorentz, LorentzLinear

KS = (0.25, 1.0, 3.0)


def off(space: Lorentz, x: Tensor) -> float:
    """How far points miss the hyperboloid, of the largest terms that cancel there."""
    x = x.detach()
    return float((space.curvature * space.inner(x, x) + 1).abs().div(space.curvature * x[..., 0] ** 2).max())


def points(space: Lorentz, *size: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return space.exp0(gaussian(*size, seed=seed, dtype=dtype))


@pytest.mark.parametrize("K", KS)
def test_maps_at_the_origin_are_inverse_and_keep_lengths(K: float) -> None:
    space, v = Lorentz(K), gaussian(5, 4, 3, seed=1, dtype=torch.float64)
    x = space.exp0(v)
    assert x.shape == (5, 4, 4)
    assert bool((x[..., 0] > 0).all())
    torch.testing.assert_close(space.inner(x, x), torch.full((5, 4), -1 / K, dtype=torch.float64))
    torch.testing.assert_close(space.log0(x), v)
    origin = space.lift(torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(space.distance(origin, x), v.norm(dim=-1))
    torch.testing.assert_close(space.project(x + torch.eye(4, dtype=torch.float64)[0]), x)


@pytest.mark.parametrize("K", KS)
def test_distances_are_the_models(K: float) -> None:
    space = Lorentz(K)
    x, y = points(space, 6, 1, 3), points(space, 1, 7, 3, seed=2)
    found = space.distance(x, y)
    torch.testing.assert_close(found, (-K * space.inner(x, y)).acosh() / math.sqrt(K))
    z = points(space, 6, 7, 3, seed=3)
    assert bool((found <= space.distance(x, z) + space.distance(z, y) + 1e-12).all())
    angle, boost = torch.tensor(0.7, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    boost[:2, :2] = torch.stack([torch.stack([angle.cosh(), angle.sinh()]), torch.stack([angle.sinh(), angle.cosh()])])
    torch.testing.assert_close(space.distance(x @ boost, y @ boost), found)


def test_the_flat_limit_is_euclidean() -> None:
    space, v, w = Lorentz(1e-8), gaussian(5, 3, seed=1, dtype=torch.float64), gaussian(5, 3, seed=2, dtype=torch.float64)  # fmt: skip # noqa: E501
    torch.testing.assert_close(space.distance(space.exp0(v), space.exp0(w)), (v - w).norm(dim=-1), rtol=1e-6, atol=1e-6)


def test_small_distances_are_exact_and_gradients_at_the_origin_are_finite() -> None:
    space = Lorentz()
    v = gaussian(4, 3, seed=1)
    near = space.distance(space.lift(torch.zeros(4, 3)), space.exp0(1e-5 * v))
    torch.testing.assert_close(near, 1e-5 * v.norm(dim=-1), rtol=1e-4, atol=0)
    for start in (torch.zeros(2, 3), torch.ones(2, 3)):
        start.requires_grad_()
        x = space.exp0(start)
        (grad,) = torch.autograd.grad(space.distance(x, x.detach()).sum(), start)
        assert torch.equal(grad, torch.zeros(2, 3))
    zero = torch.zeros(2, 3, requires_grad=True)
    (grad,) = torch.autograd.grad((space.log0(space.exp0(zero)) * v[:2]).sum(), zero)
    torch.testing.assert_close(grad, v[:2])


def test_gradients_of_the_maps_are_autograds_of_differences() -> None:
    space = Lorentz(0.5)
    v, y = gaussian(3, 3, seed=1, dtype=torch.float64).requires_grad_(), points(space, 3, 3, seed=2)
    assert torch.autograd.gradcheck(lambda t: space.distance(space.exp0(t), y), v)
    assert torch.autograd.gradcheck(lambda t: space.log0(space.exp0(t)), v)


@pytest.mark.parametrize("scale", [10.0, None])
@pytest.mark.parametrize("K", KS)
def test_points_stay_points_through_layers(K: float, scale: float | None) -> None:
    space = Lorentz(K)
    net = nn.Sequential(
        LorentzLinear(5, 9, curvature=K, scale=scale),
        LorentzLinear(9, 2, curvature=K, scale=scale, activation=nn.ReLU(), bias=False),
        LorentzLinear(2, 6, curvature=K, scale=scale),
    )
    x = points(space, 3, 7, 4, dtype=torch.float32)
    for layer in net:
        x = layer(x)
        assert x.dtype == torch.float32
        assert off(space, x) < 1e-6
    assert x.shape == (3, 7, 6)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(gaussian(*p.shape, seed=p.numel()))
    assert off(space, net(points(space, 3, 4, dtype=torch.float32))) < 1e-6


def test_the_layer_is_the_papers_formula() -> None:
    layer = LorentzLinear(4, 6, curvature=2.0, scale=3.0, activation=nn.Tanh()).double()
    x = points(Lorentz(2.0), 5, 3)
    gate, W, b = layer.linear.weight[0], layer.linear.weight[1:], layer.linear.bias
    z = x.tanh() @ W.T + b[1:]
    space = 3.0 * torch.sigmoid(x.tanh() @ gate + b[0])[:, None] * z / z.norm(dim=-1, keepdim=True)
    wanted = torch.cat([(space.square().sum(-1, keepdim=True) + 0.5).sqrt(), space], -1)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-7, atol=1e-7)
    plain = LorentzLinear(4, 6, curvature=2.0, scale=None).double()
    torch.testing.assert_close(plain(x)[:, 1:], plain.linear(x))
    assert [n for n, _ in plain.named_parameters()] == ["linear.weight", "linear.bias"]


def test_outputs_of_zeros_do_not_blow_up_the_gradient() -> None:
    layer = LorentzLinear(4, 6, bias=False)
    layer.linear.weight.data.zero_()
    layer(points(Lorentz(), 5, 3, dtype=torch.float32)).sum().backward()
    for p in layer.parameters():
        assert p.grad is not None
        assert float(p.grad.abs().max()) < 1e6


def test_half_precision_and_autocast_leave_points_to_their_precision() -> None:
    layer, space = LorentzLinear(5, 7), Lorentz()
    x = points(space, 8, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float32
    assert off(space, y) < 1e-6
    half = layer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert off(space, half.float()) < 0.02
    torch.testing.assert_close(half.float(), y, rtol=0.1, atol=0.1)


def test_compiles_in_one_graph() -> None:
    layer, space = LorentzLinear(5, 7), Lorentz()
    x, y = points(space, 8, 4, dtype=torch.float32), points(space, 8, 6, seed=2, dtype=torch.float32)
    compiled = torch.compile(lambda t: space.distance(layer(t), y), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), space.distance(layer(x), y))


@pytest.mark.parametrize("K", [0, -1.0, math.inf, math.nan, "1", True])
def test_other_curvatures_are_refused(K: Any) -> None:
    with pytest.raises(ValueError, match=r"curvature=.*a number above 0"):
        Lorentz(K)
    with pytest.raises(ValueError, match=r"curvature=.*a number above 0"):
        LorentzLinear(3, 3, curvature=K)


def test_other_widths_and_scales_are_refused() -> None:
    with pytest.raises(ValueError, match=r"in_features=1.*at least 2"):
        LorentzLinear(1, 3)
    with pytest.raises(ValueError, match=r"out_features=1.*at least 2"):
        LorentzLinear(3, 1, scale=None)
    for scale in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"scale=.*above 0"):
            LorentzLinear(3, 3, scale=scale)
    with pytest.raises(ValueError, match=r"width 3, not of shape \(2, 4\)"):
        LorentzLinear(3, 3)(points(Lorentz(), 2, 3))
    with pytest.raises(ValueError, match=r"\(5, 1\).*at least 2"):
        Lorentz().log0(torch.ones(5, 1))


def test_what_is_no_point_is_refused() -> None:
    space, layer, x = Lorentz(), LorentzLinear(4, 3), points(Lorentz(), 5, 3, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"the input of LorentzLinear does not lie on the hyperboloid.*exp0"):
        layer(gaussian(5, 4, seed=1))
    past, far = x.clone(), x.clone()
    past[2] = -past[2]
    far[3] = torch.inf
    for wrong in (past, far, x + 0.01, points(Lorentz(2.0), 5, 3, dtype=torch.float32)):
        with pytest.raises(ValueError, match="does not lie on the hyperboloid"):
            space.log0(wrong)
        with pytest.raises(ValueError, match="does not lie on the hyperboloid"):
            space.distance(x, wrong)
    assert space.log0(x[:0]).shape == (0, 3)
