"""Bone: PEFT's MiSS in its three forms, and the block-affine form of the author's training code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lone import fitted, gaussian, lone, update_of
from peft import MissConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eckart import adapters
from eckart.testing.adapters import answers, small_model, trained

FORMS: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[int, int], int]]] = {
    "balance": ({}, {"init_weights": True}, lambda out, in_: 4 * out),
    "mini": ({"mini_rank": 2}, {"init_weights": "mini", "mini_r": 2}, lambda out, in_: 4 * 2),
    "bat": ({}, {"init_weights": "bat"}, lambda out, in_: 4 * out),
}


def one(out: int, in_: int, **settings: Any) -> Any:
    """A layer of PEFT's, with a drawn block."""
    layer = nn.Linear(in_, out)
    layer.weight.data = gaussian(out, in_)
    model = adapters.adapt(nn.Sequential(layer), "bone", target_modules=["0"], **settings)
    found: Any = model.base_model.model[0]
    found.miss_block["default"].data = gaussian(*found.miss_block["default"].shape, seed=1)
    return found


@pytest.mark.parametrize("mode", FORMS)
def test_it_is_peft_s_own(mode: str) -> None:
    own, theirs, numbers = FORMS[mode]
    ours = adapters.adapt(small_model(), "bone", rank=4, mode=mode, **own).eval()
    assert torch.equal(answers(ours), answers(small_model()))
    shapes = [m.weight.shape for m in small_model().modules() if isinstance(m, nn.Linear)][:-1]
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == sum(numbers(*s) for s in shapes)
    other = get_peft_model(small_model(), MissConfig(r=4, target_modules="all-linear", **theirs)).eval()
    other.load_state_dict(trained(ours).state_dict())
    assert torch.equal(answers(other), answers(ours))
    assert not torch.equal(answers(ours), answers(small_model()))


@pytest.mark.parametrize("in_", [12, 10])
def test_shared_shards_are_tiled_along_the_inputs(in_: int) -> None:
    layer = one(6, in_, rank=4)
    D = layer.miss_block["default"].detach()
    change = D.T.repeat(1, 3)[:, :in_]
    x = gaussian(5, in_, seed=2)
    assert torch.allclose(layer(x), layer.base_layer(x) + x @ change.T, atol=1e-5)


def test_mini_repeats_its_columns_too() -> None:
    layer = one(6, 8, rank=4, mode="mini", mini_rank=3)
    change = layer.miss_block["default"].detach().repeat(1, 2).T.repeat(1, 2)
    x = gaussian(5, 8, seed=2)
    assert torch.allclose(layer(x), layer.base_layer(x) + x @ change.T, atol=1e-5)


def blocks(W: Tensor, b: Tensor, columns: bool) -> Tensor:
    """W_ij b_g + b_g, block by block; g counts columns of blocks, or rows."""
    r, change = b.shape[-1], torch.zeros_like(W)
    for i in range(W.shape[0] // r):
        for j in range(W.shape[1] // r):
            own = b[j if columns else i]
            at = slice(i * r, (i + 1) * r), slice(j * r, (j + 1) * r)
            change[at] = W[at] @ own + own
    return change


def test_block_affine_by_rows_is_that_of_peft() -> None:
    layer = one(8, 12, rank=4, mode="bat")
    change = blocks(layer.base_layer.weight.detach(), layer.miss_block["default"].detach(), columns=False)
    x = gaussian(5, 12, seed=2)
    assert torch.allclose(layer(x), layer.base_layer(x) + x @ change.T, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_block_affine_by_columns_is_the_loop_over_blocks(kind: str) -> None:
    base = nn.Linear(12, 8) if kind == "linear" else Conv1D(8, 12)
    layer = lone("block_affine", base, rank=4)
    update, W = update_of(layer), layer.host.weight()
    assert update.b.numel() == 12 * 4
    x = gaussian(2, 5, 12, seed=2)
    assert torch.equal(layer(x), layer.base_layer(x))
    update.b.data = 0.3 * gaussian(3, 4, 4, seed=1)
    change = blocks(W, update.b.detach(), columns=True)
    assert torch.allclose(update.delta(layer.host), change, atol=1e-6)
    assert torch.allclose(layer(x), layer.base_layer(x) + F.linear(x, change), atol=1e-5)
    layer.merge()
    layer.unmerge()
    assert torch.equal(layer.host.weight(), W)


def test_each_form_fits_the_change_that_is_its_own() -> None:
    W = gaussian(8, 12)
    affine = W + blocks(W, 0.3 * gaussian(3, 4, 4, seed=3), columns=True)
    assert fitted(lone("block_affine", W, rank=4), affine) < 1e-6
    tiled = W + gaussian(8, 4, seed=4).repeat(1, 3)
    assert fitted(lone("block_affine", W, rank=4), tiled) > 0.05

    def shards(target: Tensor) -> float:
        D = (target - W).view(8, 3, 4).mean(1)  # the least squares solution
        return float((target - W - D.repeat(1, 3)).square().sum() / (target - W).square().sum())

    assert shards(tiled) < 1e-10
    assert shards(affine) > 0.05


def test_layers_that_do_not_fit_are_named_before_they_are_wrapped() -> None:
    for settings, words in (
        ({"rank": 5, "mode": "bat"}, r"q_proj: a matrix of shape \(16, 16\) cannot be cut into blocks of 5 x 5"),
        ({"rank": 4, "mode": "mini", "mini_rank": 5}, "q_proj: mini_rank 5 does not divide its 16 outputs"),
        ({"rank": 17}, "q_proj: rank 17 is more than its 16 inputs"),
        ({"mode": "bad"}, "mode='bad'"),
    ):  # fmt: skip
        model = small_model()
        with pytest.raises(ValueError, match=words):
            adapters.adapt(model, "bone", **settings)
        assert not any("miss" in n for n, _ in model.named_modules())
    with pytest.raises(ValueError, match=r"0: a matrix of shape \(8, 10\) cannot be cut into blocks of 4 x 4"):
        lone("block_affine", gaussian(8, 10), rank=4)
    for key in ("bone", "block_affine"):
        with pytest.raises(ValueError, match="0 is a "):
            adapters.adapt(nn.Sequential(nn.Conv2d(4, 4, 3)), key, rank=2, target_modules=["0"])


def test_loaded_by_peft_alone(tmp_path: Any) -> None:
    model = trained(adapters.adapt(small_model(), "bone", rank=4, mode="bat"))
    model.save_pretrained(tmp_path)
    assert torch.equal(answers(PeftModel.from_pretrained(small_model(), tmp_path).eval()), answers(model))
