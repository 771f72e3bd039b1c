"""S2-LoRA: factors that all layers of a shape share, and coefficients with exact zeros."""

from __future__ import annotations

from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from planted import Rows, fit, loss, teach
from safetensors.torch import load_file
from torch import Tensor

from eckart import adapters
from eckart.adapters.s2_lora import ranks
from eckart.testing.adapters import adapted, answers, layers, near, small_model, trained

SUPPORTS = [(0, 1), (1, 2), (2, 3), (0, 3), (0, 2), (1, 3)]


def rows(**settings: Any) -> Any:
    return adapters.adapt(Rows(6), "s2_lora", target_modules=r"layers\.\d", **{"rank": 4, **settings})


def coefficients(model: Any) -> list[Any]:
    return [layer.updates["default"].coefficients for layer in layers(model)]


def shared(model: Any) -> dict[str, Any]:
    return dict(model.base_model.of_all_layers["default"].named_parameters())


def pool() -> tuple[Any, Tensor]:
    """(a teacher whose changes are made of two out of four components each, its coefficients)."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(8, 8, generator=generator))[0][:, :4] for _ in range(2))
    C = torch.zeros(6, 4)
    for row, (first, second) in zip(C, SUPPORTS, strict=True):
        row[first], row[second] = 1.2, -0.8
    return teach([U * c @ V.T for c in C]), C


def follow(model: Any, teacher: Any, steps: int) -> float:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 4e-2, weight_decay=0.0)
    fit(model, teacher, steps, adapters.schedule(model), optimizer, 6)
    return loss(model, teacher, 6)


def test_it_starts_at_the_model_to_the_bit() -> None:
    assert torch.equal(answers(adapted("s2_lora")), answers(small_model()))


def test_it_trains_one_pair_for_each_shape_and_a_vector_for_each_layer() -> None:
    model = adapted("s2_lora", rank=3)
    shapes = {layer.host.shape for layer in layers(model)}
    assert len(shapes) == 4
    expected = sum(3 * sum(shape) for shape in shapes) + 3 * len(layers(model))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_the_pair_is_one_storage_and_one_entry_of_the_file_also_after_loading(tmp_path: Path) -> None:
    model = trained(adapted("s2_lora"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(small_model(), tmp_path)
    for each in (model, loaded):
        square = [u for u in (layer.updates["default"] for layer in layers(each)) if u.of_shape == "16x16"]
        assert len(square) > 2
        assert len({u.of_all[0].get("A_16x16").data_ptr() for u in square}) == 1
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * 4 + len(layers(model))
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(t.numel() for t in tensors.values()) == learning


def test_the_rank_of_an_update_is_the_number_of_its_coefficients() -> None:
    model = rows()
    for parameter in model.parameters():
        parameter.data.normal_() if parameter.requires_grad else None
    for count, c in enumerate(coefficients(model)[:5]):
        c.data[count:] = 0
    assert list(ranks(model).values()) == [0, 1, 2, 3, 4, 4]
    for layer, count in zip(layers(model), ranks(model).values(), strict=True):
        assert int(torch.linalg.matrix_rank(layer.get_delta_weight("default"))) == count


def test_gradients_of_the_pair_are_sums_over_layers() -> None:
    model, x = rows(scale=0.5), torch.randn(9, 6, 8)
    for c in coefficients(model):
        c.data.normal_()
    target = torch.randn(9, 6, 8)
    (model(x) - target).square().mean().backward()
    totals = {name: torch.zeros_like(p) for name, p in shared(model).items()}
    for i, layer in enumerate(layers(model)):
        own = {n: p.detach().clone().requires_grad_(True) for n, p in shared(model).items()}
        c = coefficients(model)[i].detach()
        y = layer.base_layer(x[:, i]) + 0.5 * x[:, i] @ own["A_8x8"].T * c @ own["B_8x8"].T
        ((y - target[:, i]).square().sum() / target.numel()).backward()
        for name, p in own.items():
            totals[name] += p.grad
    assert all(near(p.grad, totals[name], 1e-6) for name, p in shared(model).items())


def test_planted_supports_are_found_with_less_loss_than_single_ranks_of_as_many_parameters() -> None:
    teacher, C = pool()
    model = rows(sparsity=0.03, orthogonality=0.03)
    found = follow(model, teacher, 150)
    used = torch.stack([c.detach() != 0 for c in coefficients(model)])
    assert any(torch.equal(used[:, list(order)], C != 0) for order in permutations(range(4)))
    assert list(ranks(model).values()) == [2] * 6
    single = adapters.adapt(Rows(6), "block_lora", rank=1, blocks=1, target_modules=r"layers\.\d")
    sizes = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (model, single)]
    assert sizes == [4 * 16 + 6 * 4, 6 * 16]
    assert found < 0.1 * follow(single, teacher, 80)


def test_more_sparsity_leaves_fewer_coefficients_and_in_the_end_the_model() -> None:
    teacher, _ = pool()
    counts = []
    for sparsity in (0.0, 0.1, 1.0, 1e3):
        model = rows(sparsity=sparsity, orthogonality=0.03)
        follow(model, teacher, 40)
        counts.append(sum(ranks(model).values()))
    assert counts[0] == 24
    assert counts[-1] == 0
    assert all(a > b for a, b in pairwise(counts))
    x = torch.randn(3, 6, 8)
    assert torch.equal(model(x), Rows(6)(x))


def test_a_subgradient_is_added_to_the_gradient_and_gives_no_zeros() -> None:
    model = rows(sparsity=0.25, penalty="subgradient", orthogonality=0.0)
    for c in coefficients(model):
        c.data.copy_(torch.tensor([1.0, -1.0, 0.5, 0.0]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    schedule = adapters.schedule(model)
    schedule.begin(optimizer, 1)
    optimizer.step()
    schedule.step()
    assert all(c.tolist() == [0.75, -0.75, 0.25, 0.0] for c in coefficients(model))
    model = rows(sparsity=0.3, penalty="subgradient")
    follow(model, pool()[0], 15)
    assert sum(ranks(model).values()) == 24


def test_the_penalty_has_its_gradient_and_holds_the_factors_near_orthonormal() -> None:
    model = rows(orthogonality=0.2, sparsity=0.0)
    before = {n: p.detach().clone().requires_grad_(True) for n, p in shared(model).items()}
    A, B = before["A_8x8"], before["B_8x8"]
    penalty = torch.linalg.matrix_norm(A @ A.T - torch.eye(4)) + torch.linalg.matrix_norm(B.T @ B - torch.eye(4))
    (0.2 * penalty).backward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    schedule = adapters.schedule(model)
    schedule.begin(optimizer, 60)
    for step in range(60):
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step == 0:
            assert all(near(p, before[n] - 0.5 * before[n].grad, 1e-6) for n, p in shared(model).items())
    A = shared(model)["A_8x8"].detach()
    assert float((A @ A.T - torch.eye(4)).norm()) < 0.3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 0}, r"s2_lora\(rank=0"),
        ({"rank": 9}, "rank 9 is more than"),
        ({"sparsity": -1.0}, "sparsity=-1.0"),
        ({"orthogonality": -1.0}, "orthogonality=-1.0"),
        ({"penalty": "l2"}, "'proximal' or 'subgradient'"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rows(**settings)
