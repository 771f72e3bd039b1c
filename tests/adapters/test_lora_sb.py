"""LoRA-SB: a core in the frame of the first step of full fine-tuning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lone import gaussian, layer_of, learning, lone, update_of
from torch import Tensor, nn

from eckart import adapters
from eckart.adapters.frames import Framed
from eckart.adapters.gradients import weight_gradients
from eckart.linalg.svd import truncated_svd
from eckart.testing.adapters import batches, layers, small_model


def data(seed: int = 1) -> list[dict[str, Tensor]]:
    return [{"input": gaussian(6, 8, seed=seed + i)} for i in range(2)]


def test_it_starts_as_the_best_rank_of_adams_first_step() -> None:
    W = gaussian(12, 8)
    layer = lone("lora_sb", W, data(), rank=3, learning_rate=0.2, warmup_steps=4)
    B, R, A = update_of(layer).left, update_of(layer).core.detach(), update_of(layer).right
    for frame in (B.T @ B, A @ A.T):
        torch.testing.assert_close(frame, torch.eye(3), rtol=0, atol=1e-5)
    gradient = weight_gradients(nn.Sequential(layer_of(W)), ["0"], data())["0"]
    weight = nn.Parameter(W.clone())
    weight.grad = gradient
    torch.optim.AdamW([weight], 0.2 / 4, weight_decay=0.0, eps=1e-12).step()
    first = weight.detach() - W
    tail = torch.linalg.svdvals(first.double())[3:].norm()
    assert float((first - B @ R @ A).norm()) == pytest.approx(float(tail), rel=1e-3)
    x = gaussian(5, 8, seed=9)
    torch.testing.assert_close(layer(x), x @ (W + B @ R @ A).T, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.base_layer.weight, W), "nothing is subtracted"


def test_a_step_on_the_core_is_the_projected_full_gradient() -> None:
    W, x, g = gaussian(12, 8), gaussian(20, 8, seed=5), gaussian(20, 12, seed=6)
    layer = lone("lora_sb", W, data(), rank=3)
    update = update_of(layer)
    before = update.delta(layer.host).detach()
    optimizer = torch.optim.SGD(learning(layer).values(), 0.01)
    (layer(x) * g).sum().backward()
    optimizer.step()
    B, A = update.left, update.right
    expected = -0.01 * B @ B.T @ (g.T @ x) @ A.T @ A
    torch.testing.assert_close(update.delta(layer.host).detach() - before, expected, rtol=1e-4, atol=1e-6)
    assert {n: p.numel() for n, p in learning(layer).items()} == {"core": 9}


def test_a_scale_cancels_with_its_squared_inverse() -> None:
    W, x, g = gaussian(12, 8), gaussian(20, 8, seed=5), gaussian(20, 12, seed=6)
    host: Any = lone("lora_sb", W, data(), rank=3).host
    svd, changes = truncated_svd(gaussian(12, 8, seed=7), 3), []
    for c in (1.0, 4.0):
        frame = Framed(svd.U, svd.S.diag() / c, svd.Vh, scale=c, subtracted=False)
        before = frame.delta(host).detach()
        (frame(x, x, host) * g).sum().backward()
        assert frame.core.grad is not None
        frame.core.data -= 0.01 * frame.core.grad / c**2
        changes.append(frame.delta(host).detach() - before)
    torch.testing.assert_close(changes[0], changes[1], rtol=1e-4, atol=1e-6)


def test_its_frame_learns_faster_than_that_of_the_weights() -> None:
    base = small_model()
    for p in base.parameters():
        p.data *= 1 if p.dim() < 2 else 8
    tokens = [{"input_ids": torch.arange(18).view(2, 9) % 7}]

    def trained(model: Any) -> float:
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
        for _ in range(25):
            optimizer.zero_grad()
            model(**tokens[0], labels=tokens[0]["input_ids"]).loss.backward()
            optimizer.step()
        return float(model(**tokens[0], labels=tokens[0]["input_ids"]).loss.detach())

    start = {n: p.clone() for n, p in base.named_parameters()}
    silver = trained(adapters.adapt(base, "lora_sb", data=tokens, rank=2, learning_rate=1e-3, warmup_steps=1))
    other = small_model()
    other.load_state_dict(start, strict=False)
    model = adapters.adapt(other, "lora_sb", data=tokens, rank=2)
    for layer in layers(model):
        svd = truncated_svd(layer.host.weight(), 2)
        layer.updates["default"] = Framed(svd.U, torch.zeros(2, 2), svd.Vh, subtracted=False)
    assert silver < 0.9 * trained(model)


def test_without_data_it_waits_for_saved_tensors() -> None:
    from peft import get_peft_model

    config = adapters.adapt(small_model(), "lora_sb", data=batches(1), rank=2).peft_config["default"]
    config.statistics = {}
    model = get_peft_model(small_model(), config)
    with pytest.raises(RuntimeError, match=r"starts from data, which it was not given"):
        model(**batches(1)[0])
    with pytest.raises(ValueError, match="lora_sb starts from data"):
        adapters.adapt(small_model(), "lora_sb", rank=2)


def test_bad_settings_are_named() -> None:
    for settings in ({"rank": 0}, {"warmup_steps": 0}, {"learning_rate": 0.0}, {"at_once": 0}):
        with pytest.raises(ValueError, match=rf"lora_sb\({next(iter(settings))}="):
            lone("lora_sb", gaussian(6, 6), data(), **settings)
    with pytest.raises(ValueError, match="0: rank 9 is more than a matrix of shape"):
        lone("lora_sb", gaussian(12, 8), data(), rank=9)
    with pytest.raises(ValueError, match="0: its gradient on the given data is zero everywhere"):
        lone("lora_sb", gaussian(12, 8), [{"input": torch.zeros(3, 8)}], rank=2)
