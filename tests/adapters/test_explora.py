"""ExPLoRA: what is trained, merging, and two stages on a small vision transformer."""

from __future__ import annotations

import copy
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from eckart import adapters
from eckart.adapters.explora import ExPLoRA, extend, pretrain
from eckart.testing.adapters import near

SMALL: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4, "num_channels": 1, "encoder_stride": 4, "num_labels": 3,
}  # fmt: skip
SETTINGS: dict[str, Any] = {"rank": 4, "blocks": [-1]}


def vit(cls: Any = transformers.ViTForMaskedImageModeling, seed: int = 0, **words: Any) -> Any:
    torch.manual_seed(seed)
    return cls(transformers.ViTConfig(**{**SMALL, **words}, attn_implementation="eager")).eval()


def pictures(rows: int, seed: int, target: bool = True) -> tuple[Tensor, Tensor]:
    """Stripes in one of three directions, of any phase and width; of the target domain, inverted, bright and noisy."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, 3, (rows,), generator=generator)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    along = torch.stack([x, y, (x + y) / math.sqrt(2)])[kinds]
    width = 0.8 + 0.6 * torch.rand(rows, 1, 1, generator=generator)
    phase = 2 * math.pi * torch.rand(rows, 1, 1, generator=generator)
    seen = torch.sin(along * width + phase)
    if target:
        seen = 1 - 2 * seen.abs() + 0.3 * torch.randn(rows, 16, 16, generator=generator)
    return seen[:, None], kinds


def masked(rows: int, seed: int, target: bool = True) -> list[dict[str, Tensor]]:
    """Batches of pictures with half of their patches hidden."""
    seen, _ = pictures(rows, seed, target)
    hidden = torch.rand(rows, 16, generator=torch.Generator().manual_seed(seed)) < 0.5
    return [{"pixel_values": p, "bool_masked_pos": h} for p, h in zip(seen.split(32), hidden.split(32), strict=True)]


def objective(model: Any, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def trained_numbers(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@cache
def pretrained() -> Any:
    """Of the source domain."""
    model = vit()
    pretrain(model, masked(256, 1, target=False), objective, steps=120, learning_rate=3e-3)
    return model


def domain_loss(model: Any, target: bool = True) -> float:
    with torch.no_grad():
        return sum(float(objective(model.eval(), batch)) for batch in masked(64, 77, target)) / 2


def test_the_number_of_trained_parameters_is_the_formula() -> None:
    d, wide, r, blocks = 24, 32, 4, 3
    block = 4 * (d * d + d) + 2 * 2 * d + d * wide + wide + wide * d + d
    model = adapters.adapt(vit(), "explora", **SETTINGS)
    assert trained_numbers(model) == block + (blocks - 1) * (2 * r * (d + d) + 4 * d) + 2 * d + d
    two = adapters.adapt(vit(), "explora", rank=4, blocks=[0, -1], norms=False, class_token=False)
    assert trained_numbers(two) == 2 * block + (blocks - 2) * 2 * r * (d + d)
    with torch.device("meta"):
        large = vit(transformers.ViTModel, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224, patch_size=16, num_channels=3)  # fmt: skip # noqa: E501
    whole = sum(p.numel() for p in large.parameters())
    d, wide = 1024, 4096
    block = 4 * (d * d + d) + 2 * 2 * d + d * wide + wide + wide * d + d
    share = trained_numbers(ExPLoRA().put(large, None, "default")) / whole
    assert share == pytest.approx((block + 23 * (2 * 64 * 2 * d + 4 * d) + 2 * d + d) / whole, rel=1e-12)
    assert share < 0.15


def test_it_is_peft_s_lora_that_starts_where_the_model_is() -> None:
    model, batch = adapters.adapt(vit(), "explora", **SETTINGS).eval(), masked(32, 5)[0]
    config = model.peft_config["default"]
    assert type(config) is LoraConfig
    assert config.lora_alpha == config.r == 4
    names = [n for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)]
    assert names == [f"vit.layers.{i}.attention.{n}_proj" for i in (0, 1) for n in "qv"]
    assert near(model(**batch).reconstruction, vit()(**batch).reconstruction)
    other = adapters.adapt(vit(), "explora", rank=2, target_modules=["fc1"], blocks=[0])
    names = [n for n, m in other.get_base_model().named_modules() if isinstance(m, LoraLayer)]
    assert names == ["vit.layers.1.mlp.fc1", "vit.layers.2.mlp.fc1"]
    again = [adapters.adapt(vit(), "explora", seed=s, **SETTINGS).state_dict() for s in (1, 1, 2)]
    assert all(torch.equal(again[0][n], again[1][n]) for n in again[0])
    assert not all(torch.equal(again[0][n], again[2][n]) for n in again[0])


def test_only_what_is_free_moves_and_merged_it_is_an_ordinary_model(tmp_path: Path) -> None:
    base, batch = vit(), masked(32, 5)[0]
    before = copy.deepcopy(base.state_dict())
    adapted = adapters.adapt(base, "explora", **SETTINGS)
    followed: list[int] = []
    pretrain(adapted, masked(64, 2), objective, steps=50, learning_rate=3e-3, after=followed.append)
    assert followed == list(range(1, 51))
    answer = adapted.eval()(**batch).reconstruction
    adapted.save_pretrained(tmp_path / "difference")
    merged = adapted.merge_and_unload(safe_merge=True)
    after = merged.state_dict()
    assert after.keys() == before.keys()
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    lora = {f"vit.layers.{i}.attention.{n}_proj.weight" for i in (0, 1) for n in "qv"}
    free = {n for n in after if n.startswith("vit.layers.2.") or "layernorm" in n or n.endswith("cls_token")}
    # a bias of keys shifts all scores of a query alike, and has no gradient but for rounding
    assert moved | {"vit.layers.2.attention.k_proj.bias"} == lora | free
    assert near(merged(**batch).reconstruction, answer)
    again = PeftModel.from_pretrained(vit(), tmp_path / "difference").merge_and_unload().state_dict()
    assert all(torch.equal(again[n], after[n]) for n in after), "the difference and the base give all"


def test_weight_decay_leaves_lora_and_norms_alone() -> None:
    model = adapters.adapt(vit(), "explora", **SETTINGS)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    pretrain(model, masked(32, 2), lambda m, b: 0 * objective(m, b), steps=3, weight_decay=0.5, learning_rate=0.1)
    moved = {n.rpartition(".modules_to_save.default.")[2] for n, p in model.named_parameters() if not torch.equal(p, before[n])}  # fmt: skip # noqa: E501
    parts = [f"attention.{n}_proj" for n in "qkvo"] + ["mlp.fc1", "mlp.fc2"]
    assert moved == {f"{part}.weight" for part in parts}


def test_a_new_domain_is_learned_with_a_free_block_better_than_with_lora_alone() -> None:
    frozen = domain_loss(pretrained())
    words: dict[str, Any] = {"steps": 60, "learning_rate": 3e-3}
    ours = extend(copy.deepcopy(pretrained()), masked(256, 2), objective, settings=ExPLoRA(**SETTINGS), **words)
    alone = adapters.adapt(copy.deepcopy(pretrained()), "explora", rank=4, blocks=())
    pretrain(alone, masked(256, 2), objective, **words)
    assert domain_loss(ours) < domain_loss(alone) < frozen
    assert all(p.requires_grad for p in ours.parameters())

    second = vit(transformers.ViTForImageClassification)
    found = second.vit.load_state_dict(ours.vit.state_dict(), strict=False)
    assert found == ([], ["embeddings.mask_token"])
    plain = copy.deepcopy(second)
    tuned = adapters.adapt(second, "explora", rank=2, blocks=(), modules_to_save=["classifier"])
    assert trained_numbers(tuned) == 3 * 2 * 2 * (24 + 24) + 24 * 3 + 3
    seen, kinds = pictures(256, 3)
    assert near(tuned.eval()(pixel_values=seen[:8]).logits, plain(pixel_values=seen[:8]).logits)
    data = [{"pixel_values": p, "labels": k} for p, k in zip(seen.split(32), kinds.split(32), strict=True)]
    losses = pretrain(tuned, data, objective, steps=40, learning_rate=1e-2)
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]


def test_what_does_not_fit_is_named() -> None:
    for settings, words in (
        ({"blocks": [3]}, "has 3 blocks, from 0 to 2, and none is 3"),
        ({"blocks": [-4]}, "none is -4"),
        ({"blocks": [0, 1, 2]}, "leaves no block for LoRA"),
        ({"blocks": ["last"]}, "whole numbers, such as"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 25}, "rank 25 is more than a matrix of shape"),
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"rank": 2, "target_modules": ["qkv"]}, "target_modules="),
    ):
        model = vit()
        with pytest.raises(ValueError, match=words):
            adapters.adapt(model, "explora", **settings)
        assert model.state_dict().keys() == vit().state_dict().keys()
    with pytest.raises(ValueError, match="no list of blocks"):
        adapters.adapt(nn.Sequential(nn.Linear(4, 4)), "explora", rank=2)
    unnamed = vit()
    for block in unnamed.vit.layers:
        attention = block.attention
        attention.queries, attention.values = attention.q_proj, attention.v_proj
        del attention.q_proj, attention.v_proj
    with pytest.raises(ValueError, match="no layers in its blocks that are called as queries and values"):
        adapters.adapt(unnamed, "explora", rank=2)
    model = adapters.adapt(vit(), "explora", **SETTINGS)
    with pytest.raises(ValueError, match="this one carries default"):
        adapters.adapt(model, "explora", adapter_name="two", **SETTINGS)
    with pytest.raises(ValueError, match="pretrain needs data"):
        pretrain(model, [], objective, steps=1)
    with pytest.raises(RuntimeError, match="the loss at step 1 is not finite"):
        pretrain(model, masked(32, 1), lambda m, b: objective(m, b) / 0, steps=1)
    with pytest.raises(ValueError, match="nothing of this model learns"):
        pretrain(vit().requires_grad_(False), masked(32, 1), objective, steps=1)
