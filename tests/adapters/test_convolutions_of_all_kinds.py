"""Adapters on convolutions of any dimension, padding and number of groups, on Conv1D and on embeddings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from lone import gaussian
from peft import PeftModel
from test_hydra import stirred
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from eckart import adapters
from eckart.adapters.kinds import as_matrix, is_convolution, laid_out, matrix_shape
from eckart.registry import find
from eckart.testing.adapters import layers, near, registered_adapters, settings_of

KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 12), (2, 5, 8)),
    "Conv1D": (lambda: Conv1D(12, 8), (2, 5, 8)),
    "plain": (lambda: nn.Conv2d(8, 12, 3), (2, 8, 7, 6)),
    "strided": (lambda: nn.Conv2d(8, 12, (3, 2), stride=(2, 1), bias=False), (2, 8, 7, 6)),
    "dilated": (lambda: nn.Conv2d(8, 12, 3, dilation=(2, 1), padding="same"), (2, 8, 7, 6)),
    "circular": (lambda: nn.Conv2d(8, 12, 3, padding=(1, 2), padding_mode="circular"), (2, 8, 7, 6)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=2, padding=1), (2, 8, 7, 6)),
    "depthwise": (lambda: nn.Conv2d(8, 16, 3, groups=8, padding=1, padding_mode="reflect"), (2, 8, 7, 6)),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, stride=2, padding=1), (2, 8, 9)),
    "grouped1d": (lambda: nn.Conv1d(16, 12, 4, groups=4, padding="same", padding_mode="replicate"), (2, 16, 9)),
    "conv3d": (lambda: nn.Conv3d(4, 8, (2, 1, 3), padding=(1, 0, 1), dilation=(1, 1, 2)), (2, 4, 4, 5, 7)),
    "grouped3d": (lambda: nn.Conv3d(8, 12, 2, groups=2, stride=(1, 2, 1)), (2, 8, 4, 5, 4)),
}
CONVOLUTIONS = [kind for kind in KINDS if kind not in ("linear", "Conv1D")]
GROUPED = ["grouped", "depthwise", "grouped1d", "grouped3d"]
SETTINGS: dict[str, dict[str, Any]] = {
    "block_lora": {"blocks": 2},
    "compacter": {"reduction": 2},
    "hydra": {"sequential_rank": 2, "biases": True},
    "nola": {"bases": 8},
}
"""Beside rank 2, where a method needs others for so small layers."""
REFUSED = {
    **{("block_affine", kind): "whose inputs have no blocks.*exclude_modules" for kind in CONVOLUTIONS},
    **{("hydra", kind): "is a grouped convolution, whose groups.*sequential_rank=0" for kind in GROUPED},
    **{("paca", kind): "is a grouped convolution, of which no column.*take lora_c" for kind in GROUPED},
    ("flora", "depthwise"): r"rank 2 is more than a side of 1.*ranks=\[...\], or leave the layer out",
    ("tlora", "depthwise"): "its width 1 is no product.*leave the layer out, or give some",
}
"""What does not go together, and what is said then."""
KEYS = registered_adapters()


class Layers(nn.Module):
    """Layers of these kinds, each with an input of its own, and a loss as Hugging Face models have it."""

    def __init__(self, *kinds: str):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({kind: KINDS[kind][0]() for kind in kinds})
        for layer in self.layers.values():
            if isinstance(layer, Conv1D):
                nn.init.normal_(layer.weight, std=0.3)  # its own start is so small that all else hides it

    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> SimpleNamespace:
        found = {kind: layer(inputs[kind]) for kind, layer in self.layers.items()}
        loss = None if labels is None else torch.stack([y.sin().square().mean() for y in found.values()]).sum()
        return SimpleNamespace(found=found, loss=loss)


def inputs(*kinds: str, seed: int = 1) -> dict[str, Tensor]:
    return {kind: gaussian(*KINDS[kind][1], seed=seed) for kind in kinds}


def settings(key: str) -> dict[str, Any]:
    given = {**settings_of(key), **SETTINGS.get(key, {}), "dropout": 0.0}
    return {**given, "rank": 2} if "rank" in given else given


def adapted(key: str, *kinds: str, **more: Any) -> Any:
    """Layers of these kinds with an adapter on each."""
    data = [{**inputs(*kinds, seed=5), "labels": torch.zeros(2)}] if find(key, "adapters").cls.needs_data else None
    given = {**settings(key), **more, "data": data, "target_modules": list(kinds)}
    return adapters.adapt(Layers(*kinds).eval(), key, **given).eval()


@torch.no_grad()
def answers(model: nn.Module, *kinds: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = model(**inputs(*kinds)).found
    return found


def alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """To the bit."""
    return all(torch.equal(found[kind], y) for kind, y in expected.items())


def can(key: str) -> list[str]:
    """The kinds on which an adapter sits."""
    return [kind for kind in KINDS if (key, kind) not in REFUSED]


def test_every_refusal_is_of_an_adapter_and_a_layer_that_there_are() -> None:
    assert {key for key, _ in REFUSED} <= set(KEYS)
    assert {kind for _, kind in REFUSED} <= set(KINDS)
    assert sum(len(can(key)) == len(KINDS) for key in KEYS) > 20


@pytest.mark.parametrize("key", KEYS)
def test_it_starts_merges_unmerges_and_is_loaded_on_all_kinds(key: str, tmp_path: Path) -> None:
    kinds = can(key)
    plain, model = answers(Layers(*kinds), *kinds), adapted(key, *kinds)
    if find(key, "adapters").cls.exact_start:
        first = answers(model, *kinds)
        assert all(near(first[kind], y) for kind, y in plain.items())
    after, hosts = answers(stirred(model), *kinds), {m.host.name.rpartition(".")[2]: m for m in layers(model)}
    assert not any(near(after[kind], y) for kind, y in plain.items())
    with model.disable_adapter():
        assert alike(answers(model, *kinds), plain)
    if layers(model)[0].supports_lora_conversion():
        before = {kind: copy.deepcopy(m.base_layer.state_dict()) for kind, m in hosts.items()}
        model.merge_adapter(safe_merge=True)
        for kind, y in answers(model, *kinds).items():
            assert near(y, after[kind]), kind
            change = hosts[kind].base_layer.weight - before[kind]["weight"]
            assert near(change, hosts[kind].get_delta_weight("default")), kind
        model.unmerge_adapter()
        assert alike(answers(model, *kinds), after)
        assert all(alike(m.base_layer.state_dict(), before[kind]) for kind, m in hosts.items())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Layers(*kinds), tmp_path).eval()
    assert alike(answers(again, *kinds), after)


@pytest.mark.parametrize("key", KEYS)
def test_gradients_are_those_of_the_merged_weight(key: str) -> None:
    kinds = can(key)
    model, given = stirred(adapted(key, *kinds)).train(), inputs(*kinds)
    for layer in layers(model):
        kind = layer.host.name.rpartition(".")[2]
        update, base, x = layer.updates["default"], layer.base_layer, given[kind].requires_grad_(True)
        learning = [x, *(p for p in model.parameters() if p.requires_grad)]  # what layers share, too
        y = layer(x)
        g = gaussian(*y.shape, seed=3)
        found = torch.autograd.grad(y, learning, g, allow_unused=True)
        own = {id(p) for p in update.parameters() if p.requires_grad}
        reached = [f is not None and bool(f.any()) for p, f in zip(learning, found, strict=True) if id(p) in own]
        assert any(reached), kind
        assert key in ("increlora", "snella") or all(reached), kind
        if update.linear:
            more = update.bias_delta(layer.host)
            y = functional_call(base, {"weight": base.weight + laid_out(base, update.delta(layer.host))}, (x,))
            y = y if more is None else layer.host.shift(y, more)
            expected = torch.autograd.grad(y, learning, g, allow_unused=True)
            for f, e in zip(found, expected, strict=True):
                assert (f is None) == (e is None)
                assert f is None or e is None or near(f, e, 2e-5), kind


@pytest.mark.parametrize(("key", "kind"), REFUSED)
def test_those_that_cannot_name_the_layer_the_cause_and_the_way_out(key: str, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"^layers\.{kind}.*{REFUSED[key, kind]}"):
        adapted(key, kind)


@pytest.mark.parametrize("kind", GROUPED)
def test_the_ways_out_lead_out(kind: str) -> None:
    for key, settings in (("hydra", {"sequential_rank": 0}), ("lora_c", {}), ("lift", {})):
        assert near(answers(adapted(key, kind, **settings), kind)[kind], answers(Layers(kind), kind)[kind])
    if kind == "depthwise":
        adapted("flora", kind, ranks=[2, 1, 2, 2])
        adapted("tlora", kind, sizes={"1": [1, 1]})


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_they_train_as_many_numbers_as_the_formulas_say(kind: str) -> None:
    conv: Any = Layers(kind).layers[kind]
    out, in_ = matrix_shape(conv)
    channels, sides = conv.in_channels // conv.groups, [n for n in conv.kernel_size if n > 1]
    expected = {
        "lora_c": 2 * (out + in_),
        "cp_lora": 2 * (out + channels + sum(sides)),
        "conv_dora": 2 * max(conv.kernel_size) * (out * conv.kernel_size[0] + in_ // conv.kernel_size[0]) + out,
        "svfit": 2,
        "lift": min(2 * (out + in_), out * in_),
    }
    for key, count in expected.items():
        assert sum(p.numel() for p in adapted(key, kind).parameters() if p.requires_grad) == count, key


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_is_laid_out_as_it_was(kind: str) -> None:
    layer: Any = Layers(kind).layers[kind]
    W = as_matrix(layer, layer.weight)
    assert tuple(W.shape) == matrix_shape(layer)
    assert torch.equal(laid_out(layer, W), layer.weight)


@pytest.mark.parametrize("key", ["lora_c", "conv_dora", "cp_lora", "salt", "lift", "snell", "tlora"])
def test_they_sit_on_half_precision_and_on_one_image_alone(key: str) -> None:
    kinds = ["grouped", "grouped1d", "conv3d"]
    model, given = stirred(adapted(key, *kinds)), inputs(*kinds)
    whole = answers(model, *kinds)
    with torch.no_grad():
        single = model(**{kind: x[1] for kind, x in given.items()}).found
        for layer in layers(model):
            layer.base_layer.bfloat16()
        half = model(**{kind: x.bfloat16() for kind, x in given.items()}).found
    for kind, y in whole.items():
        assert near(single[kind], y[1])
        assert half[kind].dtype == torch.bfloat16
        assert near(half[kind].float(), y, 3e-2)


NATIVE = {
    "lora": ["dilated", "circular", *GROUPED, "conv3d"],
    "adalora": ["circular", *GROUPED, "conv1d", "conv3d"],
    **dict.fromkeys(("bone", "randlora", "eva", "corda"), CONVOLUTIONS),
}
"""Of methods that are PEFT's own: where its layers fail, or would merge into something else."""


@pytest.mark.parametrize("key", NATIVE)
def test_what_peft_cannot_do_is_refused_before_the_model_is_changed(key: str) -> None:
    more = {"initial_rank": 3} if key == "adalora" else {}
    for kind in NATIVE[key]:
        model = Layers(kind)
        data = [inputs(kind)] if find(key, "adapters").cls.needs_data else None
        with pytest.raises(
            ValueError, match=rf"^layers.{kind} is a .*convolution.*exclude_modules, or take .*'lora_c'"
        ):
            adapters.adapt(model, key, rank=2, data=data, target_modules=[kind], **more)
        assert is_convolution(model.layers[kind])
    kinds = [kind for kind in KINDS if kind not in NATIVE[key] and kind != "Conv1D"]
    if find(key, "adapters").cls.needs_data:
        return
    found = stirred(adapters.adapt(Layers(*kinds).eval(), key, rank=2, target_modules=kinds, **more))
    before, plain = answers(found, *kinds), answers(Layers(*kinds), *kinds)
    found.merge_adapter()
    after = answers(found, *kinds)
    assert all(near(after[kind], y) and not near(y, plain[kind]) for kind, y in before.items())


class Words(nn.Module):
    """A table and a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head, self.back = nn.Embedding(11, 8), nn.Linear(8, 6), nn.ConvTranspose1d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.back(self.head(self.table(x)).mT)
        return y


@pytest.mark.parametrize("key", registered_adapters())
def test_embeddings_and_transposed_convolutions_are_refused(key: str) -> None:
    given = settings(key)
    if find(key, "adapters").cls.needs_data:
        given["data"] = [{"x": torch.arange(6)[None]}]
    for name, words in (("table", "an embedding .*'lora'"), ("back", "a transposed convolution")):
        with pytest.raises(ValueError, match=rf"^{name} is {words}.*modules_to_save=\['{name}'\]"):
            adapters.adapt(Words(), key, target_modules=[name], **given)


class Padded(nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (1, 0)))


def test_convolutions_with_a_forward_pass_of_their_own_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^0 is a Padded, whose forward pass is its own"):
        adapters.adapt(nn.Sequential(Padded(4, 4, 2)), "lora_c", rank=2, target_modules=["0"])


def test_embeddings_have_other_ways() -> None:
    x = torch.arange(6)[None]
    for model in (
        adapters.adapt(Words(), "lora_c", rank=2, target_modules=["head"], modules_to_save=["table"]),
        adapters.adapt(Words(), "lora", rank=2, target_modules=["table"]),
    ):
        model(x).square().sum().backward()
        assert any("table" in n and p.grad is not None and p.grad.any() for n, p in model.named_parameters())
    for key in ("adalora", "bone", "randlora"):
        with pytest.raises(ValueError, match=r"^table is an embedding.*'lora' for embeddings"):
            adapters.adapt(Words(), key, rank=2, target_modules=["table"])


def test_into_a_weight_that_is_computed_nothing_is_merged() -> None:
    base = Layers("grouped1d").eval()  # as the positions of Wav2Vec2
    torch.nn.utils.parametrizations.weight_norm(base.layers["grouped1d"])
    plain = answers(base, "grouped1d")
    model = adapters.adapt(base, "lora_c", rank=2, target_modules=["grouped1d"]).eval()
    assert alike(answers(model, "grouped1d"), plain)
    after = answers(stirred(model), "grouped1d")
    assert not near(after["grouped1d"], plain["grouped1d"])
    with pytest.raises(ValueError, match=r"^layers.grouped1d: its weight is computed.*remove_parametrizations"):
        model.merge_adapter()
    assert alike(answers(model, "grouped1d"), after)


def test_on_a_network_with_depthwise_convolutions_they_train_and_are_loaded(tmp_path: Path) -> None:
    def fresh() -> Any:
        torch.manual_seed(0)
        config = transformers.ConvNextConfig(
            hidden_sizes=[8, 12],
            depths=[1, 1],
            num_stages=2,
            image_size=8,
            patch_size=2,
            num_labels=3,
            layer_scale_init_value=1.0,
        )
        return transformers.ConvNextForImageClassification(config).eval()

    pixels, labels = gaussian(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    targets = {"target_modules": ["dwconv", "pwconv1"], "modules_to_save": ["classifier"]}
    model = adapters.adapt(fresh(), "lora_c", rank=2, alpha=4, **targets)
    kinds = {type(m.base_layer) for m in layers(model)}
    assert kinds == {nn.Conv2d, nn.Linear}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05)
    losses = []
    for _ in range(20):
        loss = model(pixel_values=pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert all(m.updates["default"].B.any() for m in layers(model))
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(fresh(), tmp_path).eval()
    with torch.no_grad():
        after = model(pixel_values=pixels).logits
        assert torch.equal(again(pixel_values=pixels).logits, after)
        assert near(model.merge_and_unload()(pixel_values=pixels).logits, after)


def test_a_model_that_asks_its_layers_for_their_stride_finds_it() -> None:
    config = transformers.WhisperConfig(
        vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_source_positions=6,
        max_target_positions=8, num_mel_bins=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    model = transformers.WhisperModel(config).eval()
    inputs = {"input_features": gaussian(1, 4, 12), "decoder_input_ids": torch.tensor([[1, 5, 6]])}
    before = model(**inputs).last_hidden_state
    model = adapters.adapt(model, "lora_c", rank=2, target_modules=["conv1", "conv2"])
    assert torch.equal(model(**inputs).last_hidden_state, before)
