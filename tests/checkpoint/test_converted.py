"""Folders whose tensors transformers makes of several stored ones: read as it reads them, damage named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mixtures
from eckart.checkpoint.folder import Folder
from eckart.checkpoint.source import resolve

EXPERT = {"mixtral": "block_sparse_moe.experts.3.w2.weight", "qwen2_moe": "mlp.experts.3.up_proj.weight"}


def saved(folder: Path, name: str, **settings: Any) -> Any:
    model = mixtures.build(name, **settings)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", mixtures.CONFIGS)
def test_stacked_experts_are_read(name: str, tmp_path: Path) -> None:
    """Twelve of them, whose numbers do not sort as text does."""
    many = {"num_local_experts": 12} if name == "mixtral" else {"num_experts": 12}
    model = saved(tmp_path, name, dtype=torch.float16, **many)
    assert not any(t.dim() == 3 for t in load_file(tmp_path / "model.safetensors").values())
    folder = Folder(resolve(tmp_path))
    for key, value in model.state_dict().items():
        assert torch.equal(folder.read(key), value)
    block = "model.layers.1"
    with folder.loaded(block):
        for key, parameter in folder.model.get_submodule(block).named_parameters():
            assert torch.equal(parameter, model.state_dict()[f"{block}.{key}"].float())
    assert all(p.is_meta for p in folder.model.get_submodule(block).parameters())


@pytest.mark.parametrize("name", EXPERT)
@pytest.mark.parametrize("damage", ["missing", "narrow"])
def test_an_expert_that_is_missing_or_of_another_shape(name: str, damage: str, tmp_path: Path) -> None:
    saved(tmp_path, name)
    file = tmp_path / "model.safetensors"
    tensors, key = load_file(file), f"model.layers.1.{EXPERT[name]}"
    if damage == "missing":
        del tensors[key]
    else:
        tensors[key] = tensors[key][:, :-1].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts\.(down|gate_up)_proj") as refused:
        Folder(resolve(tmp_path))
    assert str(tmp_path) in str(refused.value)
