"""LQ-LoRA's and EoRA's starts: a LoRA that takes over from, or repairs, what a compression left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM

import eckart
import tiny
from eckart import adapters
from eckart.checkpoint.hf import EckartConfig, describe
from eckart.forms import drop_in
from eckart.forms.layers import DropIn, matrix_of
from eckart.forms.quantized import QuantizedMatrix

IDS = torch.randint(3, tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": torch.randint(3, tiny.VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(1))}]
KEYS = ["lq_lora_start", "eora_start"]


def one_block(family: str = "llama", **settings: Any) -> Any:
    return tiny.build(family, num_hidden_layers=1, **settings)


def factored(form: str, family: str = "llama", which: tuple[str, ...] = ("_proj", "c_attn", "c_fc")) -> Any:
    model = one_block(family)
    for name, module in list(model.named_modules()):
        if name.endswith(which):
            bias = getattr(module, "bias", None)
            matrix = eckart.fit(form, matrix_of(module).detach())
            model.set_submodule(name, drop_in(module, matrix, None if bias is None else bias.detach()))
    model.config.quantization_config = EckartConfig(describe(model))
    return model


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


def lora_layers(model: Any) -> dict[str, Any]:
    return {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}


def step(model: Any, steps: int = 1) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("alpha", [None, 2.0, 16.0])
@pytest.mark.parametrize(("family", "key"), [("llama", "lq_lora_start"), ("gpt2", "eora_start")])
def test_the_low_rank_moves_into_the_lora_and_the_codes_stay(family: str, key: str, alpha: float | None) -> None:
    model = factored("quantized(bits=3, group=16) + low_rank(rank=4)", family)
    codes: dict[str, Any] = {n: m.matrix.terms[0] for n, m in model.named_modules() if isinstance(m, DropIn)}
    wanted = logits(model)
    kept = {n: {k: t.clone() for k, t in c.state_dict().items()} for n, c in codes.items()}
    model = adapters.adapt(model, key, alpha=alpha)
    assert near(logits(model), wanted)
    found = lora_layers(model)
    assert found.keys() == codes.keys()
    assert all(isinstance(m.base_layer.matrix, QuantizedMatrix) for m in found.values())
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_A" in n or "lora_B" in n for n in learning)
    assert len(learning) == 2 * len(found)
    with model.disable_adapter():
        assert not near(logits(model), wanted)
    step(model)
    assert not near(logits(model), wanted)
    for name, layer in found.items():
        after = layer.base_layer.matrix.state_dict()
        assert all(torch.equal(after[k], t) for k, t in kept[name].items() if t.dtype == torch.uint8)
        assert all(torch.equal(after[k], t) for k, t in kept[name].items())


def test_what_the_compressors_make_is_taken_over() -> None:
    for method, key in (("lq_lora", "lq_lora_start"), ("eora", "eora_start")):
        data = DATA if method == "eora" else None
        form = "quantized(bits=4, group=16)"
        model = eckart.compress(one_block(), method, budget=0.9, form=form, rank=2, data=data).model
        wanted = logits(model)
        model = adapters.adapt(model, key)
        assert near(logits(model), wanted)
        assert lora_layers(model)
        assert all(layer.r["default"] == 2 for layer in lora_layers(model).values())


def two_ranks() -> Any:
    """Two layers of rank 2, one of rank 5, and one without a low rank."""
    base = factored("quantized(bits=3) + low_rank(rank=2)", which=("up_proj", "down_proj"))
    attention = base.model.layers[0].self_attn
    for name, form in (("q_proj", "quantized(bits=3) + low_rank(rank=5)"), ("o_proj", "quantized(bits=3)")):
        module = attention.get_submodule(name)
        attention.set_submodule(name, drop_in(module, eckart.fit(form, matrix_of(module).detach())))
    base.config.quantization_config = EckartConfig(describe(base))
    return base


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_it_is_saved_for_the_compressed_folder(tmp_path: Path, alpha: float | None) -> None:
    two_ranks().save_pretrained(tmp_path / "compressed")
    start = str(tmp_path / "work/start")

    def loaded() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "compressed", dtype="auto").eval()

    words: dict[str, Any] = {"original": one_block(), "rank": 3, "alpha": alpha}
    model = adapters.adapt(loaded(), "lq_lora_start", start_folder=start, **words)
    step(model)
    wanted = logits(model.eval())
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=start)
    config = tiny.read_json(tmp_path / "adapter/adapter_config.json")
    assert config["base_model_name_or_path"] == str(tmp_path / "compressed")
    ranks = {"q_proj": 10, "o_proj": 6, "up_proj": 4, "down_proj": 4}
    again = PeftModel.from_pretrained(loaded(), tmp_path / "adapter").eval()
    assert {n.rpartition(".")[2]: m.r["default"] for n, m in lora_layers(again).items()} == ranks
    assert near(logits(again), wanted)


def test_without_a_start_folder_the_base_is_saved_with_it(tmp_path: Path) -> None:
    model = adapters.adapt(two_ranks(), "lq_lora_start")
    step(model)
    wanted = logits(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    assert tiny.read_json(tmp_path / "adapter/adapter_config.json")["base_model_name_or_path"] is None
    model.unload().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter").eval()), wanted)


def test_a_repair_fits_the_folder_as_it_is(tmp_path: Path) -> None:
    factored("quantized(bits=3)").save_pretrained(tmp_path / "compressed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "compressed", dtype="auto").eval()
    state = torch.get_rng_state()
    start = tmp_path / "start"
    model = adapters.adapt(loaded, "lq_lora_start", original=one_block(), rank=3, start_folder=str(start))
    assert torch.equal(torch.get_rng_state(), state)
    assert not start.exists()
    step(model)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype="auto").eval()
    assert torch.equal(logits(again), logits(model.eval()))


@pytest.mark.parametrize("key", KEYS)
def test_what_quantisation_lost_is_repaired_from_the_original(key: str, tmp_path: Path) -> None:
    original, coded = one_block(), factored("quantized(bits=2, group=16)")
    full = adapters.adapt(coded, key, rank=64, original=original, data=DATA)
    assert (logits(full) - logits(original)).abs().max() < 1e-3 * logits(original).abs().max()
    original.save_pretrained(tmp_path)
    errors = {}
    for rank in (1, 6):
        model = adapters.adapt(factored("quantized(bits=2, group=16)"), key, rank=rank, original=tmp_path, data=DATA)
        errors[rank] = float((logits(model) - logits(original)).square().mean())
    assert errors[6] < errors[1] < float((logits(factored("quantized(bits=2, group=16)")) - logits(original)).square().mean())  # fmt: skip # noqa: E501


def test_each_start_is_the_best_of_its_norm() -> None:
    original = one_block()
    name, rank = "model.layers.0.mlp.down_proj", 4
    seen: list[Tensor] = []
    coded = factored("quantized(bits=2, group=16)")
    hook = coded.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    coded(**DATA[0])
    hook.remove()
    X = seen[0].detach().double()
    plain, weighted = {}, {}
    for key in KEYS:
        model = adapters.adapt(factored("quantized(bits=2, group=16)"), key, rank=rank, original=original, data=DATA)
        layer = lora_layers(model)[name]
        lost = matrix_of(original.get_submodule(name)).detach() - layer.base_layer.matrix.dense()
        left = (lost - layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach().double()
        plain[key], weighted[key] = float(left.norm()), float((left @ X.T).norm())
        lost = lost.detach().double()
    lq, eora = KEYS
    assert plain[lq] == pytest.approx(float(torch.linalg.svdvals(lost)[rank:].norm()), rel=1e-3)
    assert weighted[eora] == pytest.approx(float(torch.linalg.svdvals(lost @ X.T)[rank:].norm()), rel=1e-3)
    assert plain[lq] < plain[eora]
    assert weighted[eora] < weighted[lq]


def test_bad_input_is_named() -> None:
    for settings in ({"rank": 0}, {"alpha": 0.0}):
        with pytest.raises(ValueError, match=rf"eora_start\({next(iter(settings))}="):
            adapters.adapt(factored("quantized(bits=4)"), "eora_start", **settings)
    with pytest.raises(ValueError, match=r"no targeted layer has a low-rank term.*original=\.\.\."):
        adapters.adapt(factored("quantized(bits=4)"), "lq_lora_start")
    with pytest.raises(ValueError, match="give batches of data"):
        adapters.adapt(factored("quantized(bits=4)"), "eora_start", original=one_block())
    with pytest.raises(ValueError, match=r"has shape \(32, 32\), and \(64, 64\) in the original"):
        adapters.adapt(factored("quantized(bits=4)"), "lq_lora_start", original=one_block(hidden_size=64))
    with pytest.raises(ValueError, match="the original has no layer model"):
        adapters.adapt(factored("quantized(bits=4)"), "lq_lora_start", original=one_block("gpt2"))
    model = adapters.adapt(factored("quantized(bits=4) + low_rank(rank=2)"), "lq_lora_start")
    with pytest.raises(ValueError, match="carries default: merge or unload"):
        adapters.adapt(model, "lq_lora_start", adapter_name="second")
