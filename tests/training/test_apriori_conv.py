"""A-priori compressed convolutions against their card: the same function as one kernel, counts, starts, exactness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

import tiny
from eckart.forms.stand_ins import STAND_INS
from eckart.testing import gaussian
from eckart.training import NoSaving, structure
from eckart.training.apriori_conv import AprioriConv
from eckart.training.chains import ConvChain

quiet = pytest.mark.filterwarnings("ignore::eckart.training.NoSaving")
GEOMETRIES: list[tuple[type[Any], Any, dict[str, Any]]] = [
    (nn.Conv2d, 3, {}),
    (nn.Conv2d, (3, 5), {"padding": (2, 1), "stride": (2, 1), "bias": False}),
    (nn.Conv2d, (4, 2), {"padding": 1, "stride": 2}),
    (nn.Conv2d, 3, {"dilation": (1, 2), "padding": (0, 2)}),
    (nn.Conv2d, (4, 3), {"padding": "same", "dilation": 2}),
    (nn.Conv2d, 3, {"padding": 1, "padding_mode": "circular"}),
    (nn.Conv2d, 3, {"groups": 2}),
    (nn.Conv3d, (2, 3, 3), {"padding": (1, 0, 1), "stride": (1, 2, 1)}),
    (nn.Conv1d, 5, {"padding": 2}),
]


def made(conv: nn.Module, **settings: Any) -> Any:
    model = nn.Sequential(conv)
    structure(model, "apriori_conv", **settings)
    return model[0]


@quiet
@pytest.mark.parametrize("scheme", ["cp", "separable", "depth_separable"])
@pytest.mark.parametrize(("cls", "kernel", "settings"), GEOMETRIES)
def test_a_chain_is_the_convolution_with_its_kernel(cls: Any, kernel: Any, settings: Any, scheme: str) -> None:
    torch.manual_seed(0)
    conv = cls(4, 6, kernel, **settings).double()
    if cls is nn.Conv1d and scheme == "separable":
        with pytest.raises(ValueError, match="0: a kernel of one dimension has no axes to separate"):
            made(conv, scheme=scheme, rank=4)
        return
    chain = made(conv, scheme=scheme, rank=4)
    assert isinstance(chain, ConvChain)
    sides = (9, 8, 7)[: chain.kernel().dim() - 2]
    x, y = (gaussian(2, 4, *sides, seed=1, dtype=torch.float64).requires_grad_() for _ in range(2))
    K = chain.kernel()
    assert K.shape == conv.weight.shape
    plain = chain.dense()
    assert str(plain) == str(conv)
    found, wanted = chain(x), plain(y)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-9)
    up = gaussian(*found.shape, seed=2, dtype=torch.float64)
    factors = [c.weight for c in chain.convolutions]
    got = torch.autograd.grad((found * up).sum(), [x, *factors])
    (dx,), dK = torch.autograd.grad((wanted * up).sum(), [y], retain_graph=True), torch.autograd.grad((wanted * up).sum(), plain.weight)[0]  # fmt: skip # noqa: E501
    torch.testing.assert_close(got[0], dx, rtol=1e-5, atol=1e-9)
    for mine, through in zip(got[1:], torch.autograd.grad((K * dK).sum(), factors), strict=True):
        torch.testing.assert_close(mine, through, rtol=1e-5, atol=1e-9)


@quiet
def test_counts_are_the_formulas() -> None:
    def count(chain: nn.Module) -> int:
        return sum(p.numel() for p in chain.parameters())

    assert count(made(nn.Conv2d(64, 64, 3, bias=False), rank=64)) == 8576
    assert count(made(nn.Conv2d(8, 12, (3, 5), bias=False), rank=7)) == 7 * (8 + 12 + 3 + 5)
    assert count(made(nn.Conv2d(8, 12, (3, 5)), rank=7, scheme="separable")) == 7 * (8 * 3 + 12 * 5) + 12
    assert count(made(nn.Conv2d(8, 12, (3, 5), bias=False), scheme="depth_separable")) == 8 * (3 + 5) + 8 * 12
    assert count(made(nn.Conv3d(8, 12, (2, 3, 5), bias=False), rank=4)) == 4 * (8 + 12 + 2 + 3 + 5)
    assert count(made(nn.Conv3d(8, 12, (2, 3, 5), bias=False), rank=4, scheme="separable")) == 4 * (16 + 12 + 60)
    chain = made(nn.Conv2d(64, 64, 3, bias=False), rank=64)
    seen = [0]
    for conv in chain.convolutions:
        conv.register_forward_hook(lambda c, x, y: seen.__setitem__(0, seen[0] + 2 * y[0, 0].numel() * c.weight.numel()))  # fmt: skip # noqa: E501
    chain(torch.zeros(1, 64, 10, 10))
    assert chain.flops([100, 80, 64, 64]) == seen[0] == 2 * (100 * 4096 + 80 * 192 + 64 * 192 + 64 * 4096)
    assert made(nn.Conv2d(6, 9, 3), rank=0.5).rank == 3
    assert made(nn.Conv2d(6, 9, 3, groups=3), rank=0.5).rank == 3
    assert made(nn.Conv2d(6, 9, 3, groups=3), rank=0.7).rank == 6


def one_way(out: int, in_: int) -> Tensor:
    """Kernels that are one vertical times one horizontal filter each: Gaussian and Sobel."""
    t = torch.tensor([-1.0, 0, 1], dtype=torch.float64)
    gauss, slope, mean = (-t.square()).exp(), t, torch.tensor([1.0, 2, 1], dtype=torch.float64)
    pairs = [(gauss, gauss), (slope, mean), (mean, slope)]
    return torch.stack([torch.stack([torch.outer(*pairs[(o + i) % 3]) * (1 + o) for i in range(in_)]) for o in range(out)])  # fmt: skip # noqa: E501


@quiet
def test_a_filter_of_its_own_for_every_pair_of_channels_is_had_at_as_many_ranks() -> None:
    conv = nn.Conv2d(2, 3, 3, padding=1).double()
    K = one_way(3, 2)
    conv.weight.data.copy_(K)
    chain, pairs = made(conv, rank=6), [(o, i) for o in range(3) for i in range(2)]
    U, S, Vh = torch.linalg.svd(K.view(6, 3, 3))
    A, B = (torch.eye(n, dtype=torch.float64)[[pair[at] for pair in pairs]] for at, n in ((0, 3), (1, 2)))
    chain.fill([B, U[:, :, 0] * S[:, :1], Vh[:, 0], A.T], conv.bias)
    x = gaussian(2, 2, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(chain(x), conv(x), rtol=1e-6, atol=1e-9)
    conv.weight.data.copy_(torch.einsum("iy,oix->oiyx", gaussian(2, 3, dtype=torch.float64), gaussian(3, 2, 3, seed=1, dtype=torch.float64)))  # fmt: skip # noqa: E501
    torch.testing.assert_close(made(conv, scheme="separable", rank=2, start="weight")(x), conv(x), rtol=1e-6, atol=1e-9)


@quiet
@pytest.mark.parametrize("scheme", ["cp", "separable"])
def test_gaussian_and_sobel_are_had_exactly_and_a_diagonal_is_not(scheme: str) -> None:
    single = nn.Conv2d(1, 1, 3, bias=False).double()
    for n in range(3):
        single.weight.data.copy_(one_way(3, 1)[n])
        exact = made(single, scheme=scheme, rank=1, start="weight").kernel()
        torch.testing.assert_close(exact, single.weight.detach(), rtol=1e-5, atol=1e-9)
    single.weight.data.copy_(torch.eye(3))
    for r in (1, 2, 3):
        found = made(single, scheme=scheme, rank=r, start="weight").kernel().detach()
        assert float((found - torch.eye(3)).square().sum()) == pytest.approx(3 - r, abs=1e-6)  # Eckart and Young


@quiet
def test_the_depth_separable_start_is_the_best_filter_of_each_channel() -> None:
    K = torch.einsum("oi,iy,ix->oiyx", *(gaussian(*s, seed=n, dtype=torch.float64) for n, s in enumerate([(5, 3), (3, 3), (3, 4)])))  # fmt: skip # noqa: E501
    conv = nn.Conv2d(3, 5, (3, 4)).double()
    conv.weight.data.copy_(K)
    chain = made(conv, scheme="depth_separable", start="weight")
    torch.testing.assert_close(chain.kernel(), K, rtol=1e-6, atol=1e-9)
    x = gaussian(1, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(chain(x), conv(x), rtol=1e-6, atol=1e-9)
    K[:, 1] += 0.3 * gaussian(5, 3, 4, seed=7, dtype=torch.float64)
    conv.weight.data.copy_(K)
    off = (made(conv, scheme="depth_separable", start="weight").kernel().detach() - K).square().sum((0, 2, 3))
    assert float(off[[0, 2]].sum()) < 1e-15 < 1e-3 < float(off[1])


@quiet
@pytest.mark.parametrize("scheme", ["cp", "separable", "depth_separable"])
@pytest.mark.parametrize("cls", [nn.Conv2d, nn.Conv3d])
def test_a_fresh_chain_puts_out_what_a_fresh_convolution_does(scheme: str, cls: Any) -> None:
    x = gaussian(2, 24, *((8, 8) if cls is nn.Conv2d else (5, 5, 5)))
    dense, chained = 0.0, 0.0
    for seed in range(20):
        torch.manual_seed(seed)
        conv = cls(24, 32, 3, bias=False)
        model = nn.Sequential(conv)
        structure(model, "apriori_conv", scheme=scheme, rank=0.5, seed=seed)
        with torch.no_grad():
            dense, chained = dense + float(conv(x).var()), chained + float(model(x).var())
    assert chained == pytest.approx(dense, rel=0.2)


def wave(samples: int, seed: int, size: int = 16, ahead: int = 4) -> tuple[Tensor, Tensor]:
    """Two frames of a wave on a grid, by finite differences from random bumps, and the field some steps later."""
    g = torch.Generator().manual_seed(seed)
    t = torch.arange(size) - torch.randint(3, size - 3, (2, samples, 1), generator=g)
    u = torch.exp(-t[0].square()[:, :, None] / 6) * torch.exp(-t[1].square()[:, None] / 6)
    now, before = u, u
    stencil = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    for _ in range(ahead):
        now, before = 2 * now - before + 0.25 * F.conv2d(now[:, None], stencil, padding=1)[:, 0], now
    first = 2 * u - u + 0.25 * F.conv2d(u[:, None], stencil, padding=1)[:, 0]
    return torch.stack([u, first], 1), now[:, None]


@quiet
def test_a_wave_is_predicted_as_well_with_a_third_of_the_parameters() -> None:
    """The card's stand-in, on 16 x 16 and 4 steps ahead: with many samples, and with few, where the gap counts."""
    unseen, losses, counts = wave(96, 1), {}, {}
    for name in ("dense", "cp"):
        for samples in (96, 4):
            torch.manual_seed(0)
            data = wave(samples, 0)
            model = nn.Sequential(nn.Conv2d(2, 16, 5, padding=2), nn.Tanh(), nn.Conv2d(16, 16, 5, padding=2), nn.Tanh(), nn.Conv2d(16, 1, 3, padding=1))  # fmt: skip # noqa: E501
            if name == "cp":
                structure(model, "apriori_conv", rank=24, layers="[02]")
            toys.train(model, None, data, 100, lr=1e-2, batch=min(samples, 16))
            losses[name, samples] = toys.loss(model, data), toys.loss(model, unseen)
        counts[name] = sum(p.numel() for p in model.parameters())
    assert counts["cp"] < counts["dense"] / 3
    assert losses["cp", 96][1] < 1.1 * losses["dense", 96][1]
    assert losses["cp", 96][1] < 0.1 * float(unseen[1].square().mean())
    gaps = {name: losses[name, 4][1] - losses[name, 4][0] for name in counts}
    assert 0 < gaps["cp"] < gaps["dense"]


@quiet
@pytest.mark.parametrize("settings", [{"scheme": "cp"}, {"scheme": "separable", "rank": 2}])
def test_is_saved_and_loaded_by_plain_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny.build("vit", num_hidden_layers=1)
    structure(model, "apriori_conv", layers=".*projection", **settings).finish()
    assert sum(isinstance(m, ConvChain) for m in model.modules()) == 1
    image = {"pixel_values": gaussian(2, 3, 12, 12)}
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**image).logits, model(**image).logits, rtol=1e-6, atol=1e-6)


@quiet
def test_a_chain_is_rebuilt_from_its_line_of_json_which_is_not_trusted() -> None:
    chain, again = made(nn.Conv2d(6, 16, 3, padding=1), rank=4), nn.Sequential(nn.Conv2d(6, 16, 3, padding=1))
    spec = json.loads(json.dumps(chain.spec()))
    new = STAND_INS[spec["kind"]].from_spec(again, "0", spec, torch.float32).to_empty(device="cpu")
    new.load_state_dict(chain.state_dict())
    x = gaussian(2, 6, 5, 5)
    assert torch.equal(new(x), chain(x))
    for change, message in (
        ({"rank": 0}, "0: 0 channels within a chain"),
        ({"rank": 10**9}, "0: a chain of 1000000000 channels"),
        ({"rank": 500}, "0: a chain of 500 channels would take more"),
        ({"rank": True}, "0: True channels"),
        ({"shape": [16, 6, 5, 5]}, "0: a chain of 4 channels"),
        ({"scheme": "folded"}, "0: 'folded' is no scheme"),
        ({"scheme": "depth_separable"}, "0: a depth-separable chain has its 6"),
    ):
        with pytest.raises(ValueError, match=message):
            STAND_INS[spec["kind"]].from_spec(again, "0", spec | change, torch.float32)
    with pytest.raises(ValueError, match="the model has Linear"):
        STAND_INS[spec["kind"]].from_spec(toys.mlp(4, 3), "0", spec, torch.float32)


def test_refusals() -> None:
    for settings, message in (
        ({"rank": 0}, "rank=0.*a whole number from 1 on"),
        ({"rank": -1}, "rank=-1.*a whole number from 1 on"),
        ({"rank": 1.5}, "rank=1.5.*or a share"),
        ({"scheme": "tucker"}, "scheme='tucker'.*one of cp, separable, depth_separable"),
        ({"start": "svd"}, "start='svd'.*one of draw, weight"),
    ):
        with pytest.raises(ValueError, match=message):
            AprioriConv(**settings)
    with pytest.raises(ValueError, match="0: 4 channels within a chain of 3 groups: give a positive multiple"):
        made(nn.Conv2d(6, 9, 3, groups=3), rank=4)
    with pytest.raises(ValueError, match="0: a kernel in groups is not fitted: set start='draw'"):
        made(nn.Conv2d(6, 9, 3, groups=3), rank=3, start="weight")
    with pytest.raises(ValueError, match=r"0: 30 channels between .* at most 18"):
        made(nn.Conv2d(6, 9, 3), rank=30, scheme="separable", start="weight")
    with pytest.raises(ValueError, match="0: only kernels of two dimensions"):
        made(nn.Conv3d(2, 2, 3), rank=2, scheme="separable", start="weight")
    for none in (nn.Conv2d(4, 4, 1), nn.Linear(4, 4), nn.ConvTranspose2d(4, 4, 3)):
        with pytest.raises(ValueError, match="no layer of Sequential is targeted"):
            made(none)
    zero = nn.Conv2d(4, 4, 3)
    nn.init.zeros_(zero.weight)
    with pytest.raises(ValueError, match="0: its weight is zero"):
        made(zero)
    with pytest.warns(NoSaving, match="which saves nothing"):
        made(nn.Conv2d(4, 4, 3), rank=50)
