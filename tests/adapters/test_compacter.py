"""Compacter: sums of Kronecker products that are never formed, one rule for all layers, and norms that learn, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lone import gaussian, lone, update_of
from safetensors.torch import load_file
from torch import nn

from eckart import adapters
from eckart.adapters.compacter import RULES, Hypercomplex
from eckart.adapters.host import Shared
from eckart.testing.adapters import adapted, answers, batches, layers, near, small_model, trained

PLACES = ["o_proj", "down_proj"]


def rules_of(model: Any) -> nn.Parameter:
    found: nn.Parameter = update_of(layers(model)[0]).of_all[0].get(RULES)
    return found


@pytest.mark.parametrize("rank", [1, 3])
def test_a_projection_is_a_sum_of_kronecker_products_that_is_never_formed(rank: int) -> None:
    layer = Hypercomplex(32, 16, 4, rank, torch.Generator().manual_seed(0))
    layer.bias.data = gaussian(16)
    rules, x = gaussian(4, 4, 4, seed=1), gaussian(5, 3, 32, seed=2)
    H = torch.stack([torch.kron(rules[i], layer.s[i] @ layer.t[i]) for i in range(4)]).sum(0)
    assert near(layer.matrix(rules), H, 1e-6)
    assert near(layer(x, rules), x @ H + layer.bias)
    assert torch.linalg.matrix_rank(H.detach()) == 16


def test_one_adapter_behind_a_layer_is_a_bottleneck_of_its_output() -> None:
    layer = lone("compacter", nn.Linear(6, 16), terms=2, reduction=4, norms=False)
    update, x = update_of(layer), gaussian(5, 6)
    rules = update.of_all[0].get(RULES)
    rules.data = gaussian(2, 2, 2, seed=1)
    y = layer.base_layer(x)
    inner = nn.functional.gelu(y @ update.down.matrix(rules) + update.down.bias, approximate="tanh")
    assert near(layer(x), y + inner @ update.up.matrix(rules) + update.up.bias)


def test_it_trains_as_many_numbers_as_the_formula_says_and_saves_the_rule_once(tmp_path: Path) -> None:
    n, m, k, d = 2, 3, 16, 4
    model = adapted("compacter", target_modules=PLACES, rank=m, terms=n, norms=False)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == 2 * 2 * (2 * n * m * (k // n + d // n) + k + d) + n**3
    assert [name for name, _ in model.named_parameters() if name.endswith(RULES)] != []
    assert len([name for name, _ in model.named_parameters() if name.endswith(RULES)]) == 1
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert [tuple(v.shape) for name, v in saved.items() if name.endswith(RULES)] == [(n, n, n)]
    assert sum(v.numel() for v in saved.values()) == count


def test_the_rules_gradient_is_the_sum_of_all_layers() -> None:
    model = adapted("compacter", target_modules=PLACES, norms=False)
    shared = rules_of(model)
    shared.data = 0.3 * gaussian(*shared.shape)
    batch = batches(1)[0]
    model(**batch, labels=batch["input_ids"]).loss.backward()
    own = []
    for layer in layers(model):
        alone = Shared()
        alone.parameter(RULES, lambda: shared.detach().clone())
        update_of(layer).of_all[0] = alone
        own.append(alone)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    parts = [alone.get(RULES).grad for alone in own]
    assert len(parts) == 4
    assert shared.grad is not None
    assert all(p is not None and not near(p, shared.grad) for p in parts)
    assert near(torch.stack([p for p in parts if p is not None]).sum(0), shared.grad)


def test_without_a_rule_the_model_is_the_base_to_the_bit() -> None:
    model, plain = adapted("compacter", target_modules=PLACES), answers(small_model())
    assert near(answers(model), plain, 1e-6)
    rules_of(model).data.zero_()
    assert torch.equal(answers(model), plain)


def test_norms_learn_are_saved_and_go_when_it_is_disabled(tmp_path: Path) -> None:
    model, plain = adapted("compacter", target_modules=PLACES), answers(small_model())
    norms = [n for n, p in model.named_parameters() if p.requires_grad and "norm" in n]
    assert len(norms) == 5
    model = trained(model)
    with model.disable_adapter():
        assert torch.equal(answers(model), plain)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len([n for n in saved if "norm" in n]) == 5
    assert not any((v == 1).all() for n, v in saved.items() if "norm" in n)
    assert not [n for n, p in adapted("compacter", norms=False).named_parameters() if p.requires_grad and "norm" in n]


def test_norms_that_peft_cannot_tell_from_other_layers_are_refused() -> None:
    rows = [m for _ in range(6) for m in (nn.LayerNorm(8), nn.Linear(8, 8))]
    model = adapters.adapt(nn.Sequential(*rows[:10]), "compacter", terms=2, reduction=2)
    wrapped = {n for n, m in model.named_modules() if type(m).__name__ == "ModulesToSaveWrapper"}
    assert wrapped == {f"base_model.model.{k}" for k in range(0, 10, 2)}
    with pytest.raises(ValueError, match="normalisation layer '0' from '10'"):
        adapters.adapt(nn.Sequential(*rows[:10], nn.Linear(8, 8)), "compacter", terms=2, reduction=2)


def test_widths_that_do_not_divide_are_refused_before_anything_is_replaced() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 9))
    with pytest.raises(ValueError, match="2: terms=2 does not divide its 9 outputs"):
        adapters.adapt(model, "compacter", terms=2, reduction=2)
    assert [type(m) for m in model] == [nn.Linear, nn.LayerNorm, nn.Linear]
    with pytest.raises(ValueError, match=r"reduction=8 of 16 outputs leaves 2.*take reduction=4"):
        lone("compacter", nn.Linear(6, 16), terms=4, reduction=8)
    lone("compacter", nn.Linear(6, 16), terms=4, reduction=4)
    for name in ("terms", "rank", "reduction"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            lone("compacter", nn.Linear(6, 16), **{name: 0})
