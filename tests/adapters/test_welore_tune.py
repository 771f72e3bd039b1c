"""WeLore's tuning: only what a compression made low-rank learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import eckart
import tiny
from eckart import adapters
from eckart.forms import drop_in
from eckart.forms.algebra import ProductMatrix
from eckart.forms.layers import DropIn

IDS = torch.randint(3, tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed model of which some layers are low-rank and others dense."""
    model = tiny.build("llama", tie_word_embeddings=False)
    for name, p in model.named_parameters():
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            U, S, Vh = torch.linalg.svd(p.data, full_matrices=False)
            p.data = U * (S * 0.6 ** torch.arange(len(S))) @ Vh
    where = tmp_path_factory.mktemp("welore")
    eckart.compress(model, "welore", budget=0.8).model.save_pretrained(where)
    return where


def compressed(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def trained(model: Any, steps: int = 10) -> Any:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model.eval()


def test_only_factors_and_gains_learn(folder: Path) -> None:
    base = compressed(folder)
    low = [m.matrix for m in base.modules() if isinstance(m, DropIn)]
    dense = [
        n for n, _ in base.named_modules() if n.endswith("_proj") and not isinstance(base.get_submodule(n), DropIn)
    ]
    assert low
    assert dense
    assert all(isinstance(m, ProductMatrix) for m in low)
    factors = sum(m.left.shape[1] * sum(m.shape) for m in low)
    before, wanted = {n: p.clone() for n, p in base.state_dict().items()}, logits(base)
    for norms, gains in ((False, 0), (True, 7 * 32)):
        model = adapters.adapt(compressed(folder), "welore_tune", norms=norms)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == factors + gains
        assert torch.equal(logits(model), wanted)
    after = trained(model).merge_and_unload().state_dict()
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    learning = {n for n in before if ".matrix." in n or "norm" in n}
    assert moved == learning


def test_it_is_saved_loaded_disabled_and_switched(folder: Path, tmp_path: Path) -> None:
    wanted = logits(compressed(folder))
    model = trained(adapters.adapt(compressed(folder), "welore_tune"))
    tuned = logits(model)
    assert (tuned - wanted).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(logits(model), wanted)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(compressed(folder), tmp_path / "adapter").eval()), tuned)
    model = adapters.adapt(model, "welore_tune", adapter_name="second", target_modules=["q_proj"])
    assert torch.equal(logits(model), wanted)
    again = trained(model)
    learning = [n for n, p in again.named_parameters() if p.requires_grad and ".matrix." in n]
    assert learning
    assert all(".q_proj." in n for n in learning)
    model.set_adapter("default")
    assert torch.equal(logits(model), tuned)


def test_merged_it_is_the_compressed_model_again(folder: Path, tmp_path: Path) -> None:
    model = trained(adapters.adapt(compressed(folder), "welore_tune"))
    tuned = logits(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = compressed(tmp_path)
    assert torch.equal(logits(again), tuned)
    forms = [[str(m.matrix.form) for m in x.modules() if isinstance(m, DropIn)] for x in (again, compressed(folder))]
    assert forms[0] == forms[1]


def test_biases_stay_and_convolutions_learn() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 2), nn.Flatten(), nn.Linear(8, 6), nn.LayerNorm(6)]
    for i in (0, 2):
        layer: Any = layers[i]
        matrix = eckart.fit("low_rank(rank=2)", layer.weight.detach().flatten(1))
        layers[i] = drop_in(layer, matrix, layer.bias.detach())
    model = adapters.adapt(nn.Sequential(*layers), "welore_tune", target_modules=["0", "2"])
    x = torch.randn(4, 3, 2, 2)
    before = model(x)
    before.square().sum().backward()
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in learning.values()) == 2 * (8 + 12) + 2 * (6 + 8) + 12
    assert all(p.grad is not None for p in learning.values())
    torch.optim.SGD(learning.values(), 0.1).step()
    after = model(x)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(model.merge_and_unload()(x), after)


def test_layers_that_peft_could_not_tell_apart_are_refused() -> None:
    layers = [
        drop_in(m, eckart.fit("low_rank(rank=2)", m.weight.detach())) for m in (nn.Linear(6, 6) for _ in range(11))
    ]
    with pytest.raises(ValueError, match=r"10\.matrix ends like one that was chosen"):
        adapters.adapt(nn.Sequential(*layers), "welore_tune", target_modules=["0"])


def test_a_model_without_low_rank_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"none of the targeted layers is low-rank: compress the model first"):
        adapters.adapt(tiny.build("llama"), "welore_tune")
    with pytest.raises(ValueError, match=r"q_prj.*did you mean 'q_proj'"):
        adapters.adapt(tiny.build("llama"), "welore_tune", target_modules=["q_prj"])
    with pytest.raises(ValueError, match=r"welore_tune\(dropout="):
        adapters.adapt(tiny.build("llama"), "welore_tune", dropout=0.1)
