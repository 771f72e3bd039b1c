"""The contract of adapters: every registered one keeps it, and so does one of your own that subclasses `Adapter`."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from eckart import adapters
from eckart.adapters import Adapter
from eckart.adapters.layer import AdapterLayer
from eckart.registry import entries, find

SMALL: dict[str, dict[str, Any]] = {
    "compacter": {"terms": 2, "reduction": 4},
    "compress_then_prompt": {"tokens": 4},
    "increlora": {"rank": 2, "warmup": 1, "every": 1, "top": 20},
}
"""Settings for small layers, where a method needs others than `rank=4`."""
RELOAD = """
import sys, torch, transformers, eckart
from peft import PeftModel
from safetensors.torch import save_file
base = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
save_file({"logits": model(input_ids=torch.tensor([[3, 1, 4, 1, 5]])).logits.detach().contiguous()}, sys.argv[3])
"""


def registered_adapters() -> list[str]:
    """Keys of the adapters that sit on layers; those that PEFT has itself are PEFT's to test."""
    return [e.key for e in entries("adapters") if inspect.isclass(e.cls) and issubclass(e.cls, Adapter)]


def small_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A Llama with widths 24, 16 and 12."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def convolution() -> nn.Module:
    """A convolution of which nothing is as usual: its matrix is (8, 24)."""
    torch.manual_seed(0)
    unusual: dict[str, Any] = {"stride": (2, 1), "padding": (1, 2), "dilation": (2, 1), "padding_mode": "circular"}
    return nn.Sequential(nn.Conv2d(4, 8, (3, 2), **unusual)).eval()


def batches(count: int = 3, seed: int = 1) -> list[dict[str, Tensor]]:
    """Token windows, as keyword arguments."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 32, (2, 9), generator=generator)} for _ in range(count)]


def settings_of(key: str) -> dict[str, Any]:
    """What the battery makes an adapter with."""
    if key in SMALL:
        return SMALL[key]
    fields = {f.name for f in dataclasses.fields(find(key, "adapters").cls)}
    return {"rank": 4} if "rank" in fields else {}


def adapted(key: str, model: Any = None, name: str = "default", **settings: Any) -> Any:
    """A small model with an adapter on it, made with the battery's settings."""
    cls = find(key, "adapters").cls
    data = batches() if cls.needs_data else None
    model = small_model() if model is None else model
    return adapters.adapt(model, key, data=data, adapter_name=name, **{**settings_of(key), **settings}).eval()


def trained(model: Any, steps: int = 3, lr: float = 2e-2) -> Any:
    """The model after some steps of AdamW, with the adapter's schedule."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, schedule = torch.optim.AdamW(parameters, lr, weight_decay=0.0), adapters.schedule(model)
    model.train()
    schedule.begin(optimizer, steps)
    for step in range(steps):
        batch = batches(1, seed=step)[0]
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    schedule.finish()
    return model.eval()


def answers(model: nn.Module) -> Tensor:
    """Logits on a fixed batch."""
    with torch.no_grad():
        logits: Tensor = model(**batches(1, seed=9)[0]).logits
    return logits


def near(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """Equal up to this share of the largest number."""
    a, b = a.detach(), b.detach()
    return bool((a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())))


class AdapterContract:
    """What every adapter owes. Subclass it, and let pytest give `key`."""

    def test_it_starts_where_the_model_is_and_learns(self, key: str) -> None:
        cls, plain = find(key, "adapters").cls, answers(small_model())
        model = adapted(key)
        if cls.exact_start:
            assert near(answers(model), plain)
        after = answers(trained(model))
        assert not near(after, plain)
        assert after.isfinite().all()
        with model.disable_adapter():
            assert torch.equal(answers(model), plain)

    def test_only_its_own_tensors_are_trained(self, key: str) -> None:
        model = adapted(key)
        learning = {n for n, p in model.named_parameters() if p.requires_grad}
        assert learning
        own = (".updates.", ".of_all_layers.", ".modules_to_save.")
        assert all(any(part in n for part in own) for n in learning)

    def test_merged_it_answers_the_same_and_unmerged_it_is_as_before(self, key: str) -> None:
        model = trained(adapted(key))
        before, weights = answers(model), [m.base_layer.weight.clone() for m in layers(model)]
        if not all(m.supports_lora_conversion() for m in layers(model)):
            with pytest.raises(ValueError, match="is not a matrix"):
                model.merge_adapter()
            return
        model.merge_adapter(safe_merge=True)
        assert near(answers(model), before)
        model.unmerge_adapter()
        assert torch.equal(answers(model), before)
        assert all(torch.equal(m.base_layer.weight, w) for m, w in zip(layers(model), weights, strict=True))
        assert near(answers(model.merge_and_unload()), before)

    def test_saved_and_loaded_it_is_the_same_to_the_bit(self, key: str, tmp_path: Path) -> None:
        model = trained(adapted(key))
        model.save_pretrained(tmp_path)
        other = PeftModel.from_pretrained(small_model(), tmp_path, adapter_name="again").eval()
        assert torch.equal(answers(other), answers(model))
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert not any("default" in name for name in saved)
        json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))

    def test_in_a_new_process_it_is_the_same_to_the_bit(self, key: str, tmp_path: Path) -> None:
        if key != registered_adapters()[0]:
            pytest.skip("one process start is enough: the others load in this one")
        model = trained(adapted(key))
        model.save_pretrained(tmp_path / "adapter")
        model.unload().save_pretrained(tmp_path / "base")
        again = adapted(key, small_model())
        expected = answers_to_five(PeftModel.from_pretrained(again.unload(), tmp_path / "adapter").eval())
        words = [sys.executable, "-c", RELOAD, *(str(tmp_path / n) for n in ("base", "adapter", "out.safetensors"))]
        subprocess.run(words, check=True, capture_output=True)
        assert torch.equal(load_file(tmp_path / "out.safetensors")["logits"], expected)

    def test_the_same_seed_gives_the_same_tensors(self, key: str) -> None:
        first = state(adapted(key, seed=5))
        model = small_model()
        torch.manual_seed(2)
        before = torch.get_rng_state()
        second = state(adapted(key, model, seed=5))
        assert torch.equal(torch.get_rng_state(), before)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[n], second[n]) for n in first)

    def test_two_adapters_live_on_one_model(self, key: str) -> None:
        model = trained(adapted(key))
        first = answers(model)
        model = trained(adapted(key, model, "second", seed=3), steps=5)
        second = answers(model)
        assert not near(first, second)
        model.set_adapter("default")
        assert torch.equal(answers(model), first)
        model.set_adapter("second")
        assert torch.equal(answers(model), second)
        model.delete_adapter("default")
        assert torch.equal(answers(model), second)

    def test_it_sits_on_models_in_half_precision(self, key: str) -> None:
        model = adapted(key, small_model(torch.bfloat16))
        own = {p.dtype for n, p in model.named_parameters() if p.requires_grad and ".modules_to_save." not in n}
        assert own == {torch.float32}
        found = answers(trained(model))
        assert found.dtype == torch.bfloat16
        assert found.isfinite().all()

    def test_gradients_reach_all_that_learns(self, key: str) -> None:
        model = trained(adapted(key), steps=4)
        batch = batches(1)[0]
        model.train()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        for name, p in model.named_parameters():
            assert not p.requires_grad or p.grad is not None, name
            assert p.requires_grad or p.grad is None, name

    def test_on_a_convolution_it_starts_and_merges_as_on_a_matrix(self, key: str) -> None:
        cls, x = find(key, "adapters").cls, torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(1))
        if cls.needs_data:
            pytest.skip("its start is made from the tokens of a language model here")
        try:
            model = adapters.adapt(convolution(), key, target_modules=["0"], **settings_of(key)).eval()
        except ValueError as e:
            assert "convolution" in str(e)  # noqa: PT017
            return
        with torch.no_grad():
            plain = convolution()(x)
            if cls.exact_start:
                assert near(model(x), plain)
            generator = torch.Generator().manual_seed(2)
            for p in model.parameters():
                if p.requires_grad:
                    p += 0.2 * torch.randn(p.shape, generator=generator)
            after = model(x)
            assert not near(after, plain)
            if layers(model)[0].supports_lora_conversion():
                model.merge_adapter()
                assert near(model(x), after)
                model.unmerge_adapter()
                assert torch.equal(model(x), after)

    def test_as_a_lora_it_is_the_same_matrix(self, key: str) -> None:
        model = trained(adapted(key))
        for layer in layers(model):
            update = layer.updates["default"]
            factors = update.factors(layer.host) if update.linear else None
            if factors is not None:
                assert near(factors[0] @ factors[1], update.delta(layer.host))

    def test_targets_that_match_nothing_are_answered_with_names(self, key: str) -> None:
        with pytest.raises(ValueError, match="q_proj"):
            adapted(key, target_modules=["q_prj"])


def layers(model: nn.Module) -> list[Any]:
    """The adapted layers of a model."""
    return [m for m in model.modules() if isinstance(m, AdapterLayer)]


def state(model: nn.Module) -> dict[str, Tensor]:
    """What an adapter would save."""
    return {n: v.clone() for n, v in model.state_dict().items() if ".updates." in n or ".of_all_layers." in n}


def answers_to_five(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([[3, 1, 4, 1, 5]])).logits
    return logits
