"""Drop-ins compute what the layer they replace would with the dense matrix, and go back to that layer."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from eckart.forms import Form, densify, drop_in, parse
from eckart.forms.layers import (
    DropIn,
    FactoredConv1D,
    FactoredConv2d,
    FactoredEmbedding,
    FactoredLinear,
    kind_of,
    matrix_of,
    matrix_shape,
)
from eckart.forms.stand_ins import STAND_INS, StandIn
from eckart.testing import error_ratio, gaussian

FORMS = [parse("low_rank(rank=3)"), parse("low_rank(rank=3) + diagonal()"), parse("dense() @ diagonal()")]
forms = pytest.mark.parametrize("form", FORMS, ids=str)


def conv2d(**settings: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(**({"in_channels": 3, "out_channels": 8, "kernel_size": 3} | settings))


def factored(module: nn.Module, form: Form) -> Any:
    """`module` with its weight replaced by a fit, and its own bias."""
    bias = getattr(module, "bias", None)
    return drop_in(module, form.fit(matrix_of(module).detach()), None if bias is None else bias.detach())


@forms
@pytest.mark.parametrize("bias", [True, False])
def test_linear(form: Form, bias: bool) -> None:
    module = nn.Linear(10, 12, bias=bias)
    layer, x = factored(module, form), gaussian(2, 3, 10)
    assert isinstance(layer, FactoredLinear)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (10, 12)
    assert error_ratio(layer(x), F.linear(x, layer.weight, module.bias)) <= 1e-5


@forms
def test_conv1d_of_transformers(form: Form) -> None:
    module = Conv1D(12, 10)
    layer, x = factored(module, form), gaussian(2, 3, 10)
    assert isinstance(layer, FactoredConv1D)
    assert isinstance(layer, Conv1D)
    assert layer.weight.shape == module.weight.shape == (10, 12)
    assert (layer.nx, layer.nf) == (10, 12)
    assert error_ratio(layer(x), x @ layer.weight + module.bias) <= 1e-5


@forms
@pytest.mark.parametrize("padding_idx", [None, 0, -1])
def test_embedding(form: Form, padding_idx: int | None) -> None:
    module = nn.Embedding(12, 10, padding_idx=padding_idx)
    layer, ids = factored(module, form), torch.tensor([[0, 3, 11], [11, 3, 0]])
    assert isinstance(layer, FactoredEmbedding)
    assert layer.padding_idx == module.padding_idx
    assert error_ratio(layer(ids), F.embedding(ids, layer.weight)) <= 1e-6
    assert layer(torch.tensor(3)).shape == (10,)


def test_padding_teaches_nothing() -> None:
    ids = torch.tensor([[5, 3, 3, 5]])
    with_padding = factored(nn.Embedding(12, 10, padding_idx=3), FORMS[0])
    without = drop_in(nn.Embedding(12, 10), copy.deepcopy(with_padding.matrix))
    with_padding(ids).square().sum().backward()
    without(ids[:, [0, 3]]).square().sum().backward()
    for found, wanted in zip(with_padding.parameters(), without.parameters(), strict=True):
        assert found.grad is not None
        torch.testing.assert_close(found.grad, wanted.grad)


def test_an_embedding_may_have_a_mean_and_a_scale() -> None:
    module = Gemma3TextScaledWordEmbedding(12, 10, 0, embed_scale=3.0)
    mean, ids = gaussian(10, seed=1), torch.arange(12)
    layer = drop_in(module, FORMS[0].fit(matrix_of(module).detach()), mean)
    wanted = 3.0 * (layer.matrix.dense() + mean)
    assert error_ratio(layer(ids), wanted) <= 1e-6
    assert error_ratio(3.0 * layer.weight, wanted) <= 1e-6
    assert error_ratio(densify(nn.Sequential(layer))(ids), wanted) <= 1e-6


CONVOLUTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"kernel_size": (3, 2)},
    {"kernel_size": 1},
    {"stride": (2, 3)},
    {"dilation": (2, 1)},
    {"padding": (2, 1)},
    {"padding": "same", "kernel_size": (3, 5)},
    {"padding": "same", "kernel_size": (3, 2), "dilation": 2},
    {"padding": "valid"},
    *({"padding": 2, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")),
    {"padding": "same", "padding_mode": "reflect"},
    {"padding": (2, 1), "padding_mode": "circular", "stride": 2, "dilation": (1, 2), "kernel_size": (2, 3)},
]


@forms
@pytest.mark.parametrize("settings", CONVOLUTIONS, ids=str)
def test_convolution(form: Form, settings: dict[str, Any]) -> None:
    module = conv2d(**settings)
    layer, x = factored(module, form), gaussian(2, 3, 9, 11, seed=1)
    assert isinstance(layer, FactoredConv2d)
    assert isinstance(layer, nn.Conv2d)
    plain = copy.deepcopy(module)
    plain.weight = nn.Parameter(layer.weight.as_subclass(Tensor).clone())
    assert plain.weight.shape == module.weight.shape
    wanted = plain(x)
    assert error_ratio(layer(x), wanted) <= 1e-5
    assert error_ratio(layer(x[0]), wanted[0]) <= 1e-5


@forms
def test_gradients_through_a_convolution(form: Form) -> None:
    layer, x = factored(conv2d(padding=1), form), gaussian(2, 3, 6, 5, seed=1).requires_grad_()
    weight = layer.matrix.dense().view(8, 3, 3, 3)
    inputs = [x, *layer.matrix.parameters()]
    found = torch.autograd.grad(layer(x).square().sum(), inputs)
    wanted = torch.autograd.grad(F.conv2d(x, weight, layer.bias, padding=1).square().sum(), inputs)
    assert all(error_ratio(f, w) <= 1e-5 for f, w in zip(found, wanted, strict=True))


def modules() -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Linear(10, 12), nn.Linear(10, 12, bias=False), Conv1D(12, 10), nn.Embedding(12, 10, 0),
        conv2d(), conv2d(bias=False, padding="same", padding_mode="reflect"),
    ]  # fmt: skip


def some_input(module: nn.Module) -> Tensor:
    if isinstance(module, nn.Embedding):
        return torch.arange(12)
    return gaussian(2, 3, 9, 9) if isinstance(module, nn.Conv2d) else gaussian(2, 10)


@pytest.mark.parametrize("module", modules(), ids=str)
def test_densify_gives_the_ordinary_layer_back(module: nn.Module) -> None:
    layer, x = factored(module, FORMS[1]), some_input(module)
    model = nn.Sequential(layer)
    wanted = layer(x).detach()
    assert densify(model) is model
    dense: Any = model[0]
    assert type(dense) is type(module)
    assert {k: v.shape for k, v in dense.state_dict().items()} == {k: v.shape for k, v in module.state_dict().items()}
    assert all(p.is_contiguous() and not p.is_meta for p in dense.parameters())
    assert error_ratio(dense(x), wanted) <= 1e-5


def test_densify_gives_conv1d_the_bias_it_needs() -> None:
    layer = FactoredConv1D(FORMS[0].fit(gaussian(12, 10)))
    x = gaussian(2, 10)
    assert error_ratio(densify(nn.Sequential(layer))(x), layer(x)) <= 1e-5


def test_densify_takes_the_layer_off_the_list_in_the_config() -> None:
    model: Any = nn.Sequential(factored(nn.Linear(10, 12), FORMS[0]), nn.Linear(12, 3))
    described = SimpleNamespace(modules={"0": model[0].spec(), "elsewhere": {}})
    model.config = SimpleNamespace(quantization_config=described)
    densify(model)
    assert described.modules == {"elsewhere": {}}


@pytest.mark.parametrize("module", modules(), ids=str)
def test_a_line_of_json_rebuilds_the_layer(module: nn.Module) -> None:
    layer = factored(module, FORMS[0])
    spec = layer.spec()
    again = STAND_INS[spec["kind"]].from_spec(nn.Sequential(module), "0", spec, torch.float32)
    assert all(tensor.is_meta for tensor in again.state_dict().values())
    again.load_state_dict(layer.state_dict(), assign=True)
    assert type(again) is type(layer)
    assert torch.equal(again(some_input(module)), layer(some_input(module)))


def spec(**changes: Any) -> dict[str, Any]:
    return {"kind": "linear", "form": "low_rank(rank=3)", "shape": [12, 10], "bias": True} | changes


NOT_SHAPES: list[Any] = [None, 12, [12], [12, 10, 1], [12, -1], [0, 10], [12, 1.5], "ab", [[12], 10]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "conv1d"}, "0: the checkpoint says conv1d, the model has Linear"),
        *(({"shape": shape}, "0: .* is not the shape of a matrix") for shape in NOT_SHAPES),
        ({"shape": [13, 10]}, r"0: the checkpoint's shape \(13, 10\) is larger than the model's \(12, 10\)"),
        ({"shape": [12, 10**12]}, "is larger than the model's"),
        ({"form": "low_rank(rank=11)"}, "0: .* the rank is at most 10"),
        ({"form": "low_rank()"}, "0: .* has no rank yet"),
        ({"form": "dense(width=1000000) @ dense()"}, "0: .* more than any compressed layer"),
        ({"form": "dense(width=1000000000000) @ dense()"}, "0: .* cannot have shape"),
        ({"form": None}, "0: cannot read form 'None'"),
        ({"form": {"low_rank": 3}}, "0: cannot read form"),
    ],
)  # fmt: skip
def test_a_bad_line_is_refused(changes: dict[str, Any], message: str) -> None:
    line = spec(**changes)
    with pytest.raises(ValueError, match=message):
        STAND_INS[line["kind"]].from_spec(nn.Sequential(nn.Linear(10, 12)), "0", line, torch.float32)


def test_what_holds_a_matrix_and_what_does_not() -> None:
    kinds = {type(module): kind_of(module) for module in modules()}
    assert kinds == {nn.Linear: "linear", Conv1D: "conv1d", nn.Embedding: "embedding", nn.Conv2d: "conv2d"}
    for module in modules():
        assert matrix_shape(module) == tuple(matrix_of(module).shape)
        assert kind_of(factored(module, FORMS[0])) == kind_of(module)
    assert kind_of(conv2d(in_channels=4, groups=2)) is None
    assert kind_of(nn.LayerNorm(3)) is None
    with pytest.raises(TypeError, match="LayerNorm holds no matrix"):
        matrix_shape(nn.LayerNorm(3))
    with pytest.raises(TypeError, match="LayerNorm has no drop-in"):
        drop_in(nn.LayerNorm(3), FORMS[0].fit(gaussian(12, 10)))


def test_an_embedding_with_its_own_ideas_is_left_alone() -> None:
    class Noisy(nn.Embedding):
        pass

    with pytest.raises(TypeError, match="Noisy adds something of its own"):
        drop_in(Noisy(12, 10), FORMS[0].fit(gaussian(12, 10)))


class Padded(nn.Conv2d):
    """Pads by itself, as those of TensorFlow do."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (0, 1, 0, 1)))


class Router(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).topk(2).values


class Named(nn.Linear):
    """Does nothing of its own."""


def test_layers_that_do_more_than_their_class_are_left_alone() -> None:
    assert kind_of(Padded(3, 8, 3)) is None
    assert kind_of(Router(4, 4)) is None
    assert kind_of(Named(4, 4)) == "linear"
    assert kind_of(FalconLinear(4, 4)) == "linear"
    assert kind_of(torch.nn.utils.parametrizations.weight_norm(conv2d())) == "conv2d"


def test_a_stand_in_of_no_known_kind_cannot_be_saved_or_loaded() -> None:
    with pytest.raises(TypeError, match="StandIn cannot be saved"):
        StandIn().spec()
    with pytest.raises(TypeError, match="StandIn cannot be loaded"):
        StandIn.from_spec(nn.Sequential(), "0", {}, torch.float32)


def test_printing_says_what_a_layer_is() -> None:
    layer = factored(nn.Linear(10, 12), FORMS[0])
    assert "FactoredLinear" in str(layer)
    assert "low_rank(rank=3), shape=(12, 10)" in str(layer)


def test_drop_ins_follow_dtype_and_keep_their_values_when_reset() -> None:
    for module, dtype in itertools.product(modules(), (torch.float64, torch.bfloat16)):
        layer: DropIn = factored(module, FORMS[0])
        layer.reset_parameters()
        x = some_input(module)
        before = layer(x)
        layer.to(dtype)
        after = layer(x.to(dtype) if x.is_floating_point() else x)
        assert after.dtype == dtype
        assert error_ratio(after, before) <= 0.05
