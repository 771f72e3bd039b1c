"""PaCA: the columns that are trained learn as in the weight itself, and only their inputs are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import eckart
from eckart import adapters
from eckart.runs.counting import SavedBytes
from eckart.testing.adapters import answers, batches, layers, near, small_model, trained

IN, OUT, RANK = 24, 16, 4


def on_a_layer(module: nn.Module, train: bool = True, **settings: Any) -> Any:
    """The only layer of a model, with PaCA on it; its change is random."""
    model = adapters.adapt(nn.Sequential(module), "paca", target_modules=["0"], **{"rank": RANK, **settings})
    (layer,) = layers(model)
    if train:
        torch.manual_seed(3)
        layer.updates["default"].change.data.normal_()
    return layer


@pytest.mark.parametrize("size", [(7,), (2, 7), (2, 3, 7)])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_the_dense_weight_at_the_columns(size: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer = on_a_layer(nn.Linear(IN, OUT, bias=bias), alpha=6.0)
    update, c = layer.updates["default"], 6.0 / RANK
    x, upstream = torch.randn(*size, IN, requires_grad=True), torch.randn(*size, OUT)
    layer(x).backward(upstream)
    W = (layer.base_layer.weight + update.delta(layer.host)).detach().requires_grad_(True)
    plain = x.detach().clone().requires_grad_(True)
    expected = F.linear(plain, W, layer.base_layer.bias)
    assert near(layer(x), expected)
    expected.backward(upstream)
    assert near(x.grad, plain.grad)
    assert near(update.change.grad, c * W.grad[:, update.indices])
    assert layer.base_layer.weight.grad is None


def test_only_the_selected_inputs_are_kept_and_no_second_large_product_is_made() -> None:
    tokens, lora = 64, LoraConfig(r=RANK, target_modules=["0"])
    layer = on_a_layer(nn.Linear(IN, OUT))
    theirs = get_peft_model(nn.Sequential(nn.Linear(IN, OUT)), lora)
    x = torch.randn(tokens, IN, requires_grad=True)
    kept = []
    for model in (layer, theirs):
        with SavedBytes(model) as saved, FlopCounterMode(display=False) as flops:
            model(x)
        kept.append(saved.total)
        if model is layer:
            assert flops.get_total_flops() == 2 * tokens * (IN * OUT + RANK * OUT)
    assert kept == [4 * tokens * RANK, 4 * tokens * (IN + RANK)]


def test_training_is_masked_full_tuning() -> None:
    torch.manual_seed(0)
    module = nn.Linear(IN, OUT)
    full = nn.Parameter(module.weight.detach().clone())
    layer = on_a_layer(module, train=False, alpha=float(RANK))
    update = layer.updates["default"]
    mask = torch.zeros(IN).index_fill(0, update.indices, 1.0)
    data = [(torch.randn(9, IN), torch.randn(9, OUT)) for _ in range(6)]
    ours = torch.optim.AdamW([update.change], lr=1e-2, weight_decay=0.0)
    theirs = torch.optim.AdamW([full], lr=1e-2, weight_decay=0.0)
    for x, y in data:
        for optimizer, found in ((ours, layer(x)), (theirs, F.linear(x, full, module.bias))):
            F.mse_loss(found, y).backward()
            if optimizer is theirs:
                full.grad *= mask
            optimizer.step()
            optimizer.zero_grad()
    assert near(module.weight + update.delta(layer.host), full)
    assert not near(module.weight, full, 1e-3)


def test_as_a_lora_in_peft_it_answers_the_same() -> None:
    ours = trained(adapters.adapt(small_model(), "paca", rank=RANK))
    theirs = get_peft_model(small_model(), LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")).eval()
    for layer in layers(ours):
        B, A = layer.get_factors("default")
        assert A.shape == (RANK, layer.in_features)
        assert torch.equal(A.sum(1), torch.ones(RANK))
        lora = theirs.get_submodule(f"base_model.model.{layer.host.name}")
        lora.lora_B["default"].weight.data.copy_(B)
        lora.lora_A["default"].weight.data.copy_(A)
    assert near(answers(theirs), answers(ours))


def test_two_adapters_on_the_same_columns_do_not_touch_each_other() -> None:
    model = trained(adapters.adapt(small_model(), "paca", rank=12))
    before, weights = answers(model), [m.base_layer.weight.clone() for m in layers(model)]
    model = trained(adapters.adapt(model, "paca", adapter_name="other", rank=12, seed=1))
    model.merge_adapter(["other", "default"])
    model.unmerge_adapter()
    model.set_adapter("default")
    assert torch.equal(answers(model), before)
    assert all(torch.equal(m.base_layer.weight, w) for m, w in zip(layers(model), weights, strict=True))


@pytest.mark.parametrize("module", [Conv1D(OUT, IN), nn.Conv2d(6, OUT, (3, 2), stride=2, padding=1, padding_mode="reflect")])  # fmt: skip # noqa: E501
def test_other_layers_are_handled(module: nn.Module) -> None:
    layer = on_a_layer(module)
    update = layer.updates["default"]
    x: Tensor = torch.randn(5, IN) if isinstance(module, Conv1D) else torch.randn(2, 6, 8, 7)
    assert near(layer(x) - module(x), layer.host.apply(x, update.delta(layer.host)))
    left, right = update.factors(layer.host)
    assert near(left @ right, update.delta(layer.host))


def test_features_are_selected_once_each_and_by_norm_where_that_is_asked() -> None:
    module = nn.Linear(IN, OUT)
    module.weight.data.copy_(torch.arange(1.0, IN + 1).expand(OUT, IN))
    chosen = {s: on_a_layer(module, selection=s).updates["default"].indices.tolist() for s in ("random", "largest", "smallest")}  # fmt: skip # noqa: E501
    assert len(set(chosen["random"])) == RANK
    assert chosen["largest"] == list(range(IN - RANK, IN))
    assert chosen["smallest"] == list(range(RANK))
    assert on_a_layer(nn.Linear(IN, OUT), rank=IN).updates["default"].indices.tolist() == list(range(IN))


def test_on_a_quantised_base_it_is_qpaca() -> None:
    base = eckart.compress(small_model(), "rtn", budget="0.7", data=batches()).model
    plain = answers(base)
    model = adapters.adapt(base, "paca", rank=RANK)
    assert near(answers(model), plain)
    quantised = [m for m in layers(model) if type(m.host.module).__name__ == "FactoredLinear"]
    assert quantised
    trained(model)
    for layer in quantised:
        update = layer.updates["default"]
        x = torch.randn(64, layer.in_features, requires_grad=True)
        with SavedBytes(layer) as saved:
            y = layer(x)
        columns = layer.host.module.weight.clone()
        columns[:, update.indices] += update.scale * update.change
        assert near(y, F.linear(x, columns, layer.host.module.bias))
        assert saved.total == 4 * 64 * RANK


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"rank": 0}, "rank=0"), ({"rank": IN + 1}, r"0: paca\(rank=25\) .* the 24"), ({"alpha": 0.0}, "alpha"),
     ({"selection": "best"}, "random, largest, smallest")],
)  # fmt: skip
def test_settings_that_do_not_do(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        on_a_layer(nn.Linear(IN, OUT), **settings)
