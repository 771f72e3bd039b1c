"""Which parameters are projected, what each optimiser would keep, and the optimisers inside of others' loops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import tiny
from eckart.optimizers import Frugal, GaLore, int8_linears, memory, memory_table, param_groups
from eckart.registry import entries


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "opt"])
def test_linear_weights_of_blocks_are_projected_and_all_parameters_are_there_once(name: str) -> None:
    model = tiny.build(name)
    projected, others = param_groups(model, rank=4, interval=50)
    names = [n for n, _ in projected["params"]]
    wanted = {"llama": 21, "llama-tied": 21, "gpt2": 12, "opt": 18}[name]
    assert len(names) == wanted
    assert all(n.endswith("weight") and not any(word in n for word in ("embed", "head", "norm", "wte")) for n in names)
    assert (projected["rank"], projected["interval"]) == (4, 50)
    found = {id(p) for group in (projected, others) for _, p in group["params"]}
    assert found == {id(p) for p in model.parameters()}
    assert sum(len(group["params"]) for group in (projected, others)) == len(found)
    assert "rank" not in others


def test_the_choice_can_be_narrowed_and_widened() -> None:
    model = tiny.build("llama")
    (attention, _) = param_groups(model, rank=4, include="self_attn")
    assert len(attention["params"]) == 12
    (some, _) = param_groups(model, rank=4, exclude="down_proj")
    assert len(some["params"]) == 18
    (embeddings, _) = param_groups(model, density=0.5, include="embed_tokens")
    assert [n for n, _ in embeddings["params"]] == ["model.embed_tokens.weight"]
    model.model.layers[0].requires_grad_(False)
    (trained, _) = param_groups(model, rank=4)
    assert len(trained["params"]) == 14
    # key and value projections of 16 rows have no rank above 16
    (wide, _) = param_groups(model, rank=16)
    assert not any("k_proj" in n for n, _ in wide["params"])


def test_what_cannot_be_chosen_is_said() -> None:
    model = tiny.build("llama")
    with pytest.raises(ValueError, match="a rank or a density"):
        param_groups(model)
    with pytest.raises(ValueError, match="no weight of LlamaForCausalLM can be projected"):
        param_groups(model, rank=500)
    with pytest.raises(ValueError, match="no weight of LlamaForCausalLM can be projected"):
        param_groups(model, rank=4, include="nothing_like_it")


def test_memory_is_what_the_optimisers_then_hold(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.build("llama")
    groups = param_groups(model, rank=4, verbose=True)
    printed = capsys.readouterr().out
    found = memory(groups)
    assert found["adamw"] == 8 * sum(p.numel() for p in model.parameters())
    assert set(found) == {"adamw", *(e.key for e in entries("optimizers") if issubclass(e.cls, torch.optim.Optimizer))}
    assert found["q_galore"] < found["galore"] < found["fira"] < found["adamw"]
    assert found["dct_adamw"] < found["galore"]
    assert all(key in printed for key in found)
    assert printed.strip() == memory_table(param_groups(model, rank=4))
    optimizer = GaLore(param_groups(model, rank=4))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert optimizer.state_bytes() == found["galore"]
    frugal = Frugal(param_groups(model, density=0.5))
    assert memory(param_groups(model, density=0.5))["frugal"] == frugal.expected_state_bytes()


def test_8_bit_layers_are_projected_like_others() -> None:
    model = tiny.build("llama")
    names = [n for n, _ in param_groups(model, rank=4)[0]["params"]]
    assert len(int8_linears(model)) == 21
    assert [n for n, _ in param_groups(model, rank=4)[0]["params"]] == names
    weights = sum(p.untyped_storage().nbytes() for n, p in model.named_parameters() if n in set(names))
    assert weights == 21 * 4
    ids = tiny.batches()[0]["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.layers[0].mlp.down_proj.weight.grad.shape == (32, 48)


def test_the_trainer_takes_it(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = tiny.build("llama")
    ids = tiny.batches((4,))[0]["input_ids"]
    rows = [{"input_ids": row, "labels": row} for row in ids]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], save_steps=2, use_cpu=True,
        disable_tqdm=True, logging_steps=1, max_grad_norm=1.0,
    )  # fmt: skip

    def trainer(model: nn.Module) -> Trainer:
        chosen = (GaLore, {"params": param_groups(model, rank=4), "lr": 1e-2, "interval": 2})
        return Trainer(model, arguments, train_dataset=rows, optimizer_cls_and_kwargs=chosen)

    first = trainer(model)
    first.train()
    assert isinstance(first.optimizer.optimizer, GaLore)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").is_file()
    other = tiny.build("llama", seed=1)
    trainer(other).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
