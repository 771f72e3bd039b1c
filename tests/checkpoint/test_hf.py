"""A compressed model is an ordinary Hugging Face checkpoint: loaded, run, trained, adapted and saved again."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

import eckart
from eckart import EckartConfig
from eckart.checkpoint.hf import describe, install, tie
from eckart.forms import Factored, LowRank, drop_in
from eckart.forms.layers import DropIn, FactoredConv1D, FactoredLinear, matrix_of
from eckart.testing import error_ratio
from tiny import batches, build, hashes, read_json

BATCH = batches()[0]


def compressed(name: str = "llama", **settings: Any) -> Any:
    """A tiny model, its linear layers at 0.6 of their bytes."""
    return eckart.compress(build(name, **settings), "svd", budget="0.6 linears").model


@pytest.fixture(scope="module")
def model() -> Any:
    return compressed()


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "model"
    model.save_pretrained(path)
    return path


def load(folder: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **settings)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH).logits


def factored(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, DropIn)]


def refuse_to_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on forming any dense matrix is an error."""

    def refused(self: Factored) -> torch.Tensor:
        raise AssertionError(f"{self.form} was formed")

    kinds = [Factored]
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        monkeypatch.setattr(kind, "dense", refused)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "opt", "qwen3"])
def test_loading_gives_the_same_logits_and_never_forms_a_matrix(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compressed(name)
    model.save_pretrained(tmp_path)
    wanted = logits(model)
    with monkeypatch.context() as patch:
        refuse_to_form(patch)
        loaded = load(tmp_path)
        assert error_ratio(logits(loaded), wanted) <= 1e-5
    assert factored(loaded) == factored(model) != []
    assert describe(loaded) == describe(model) == loaded.config.quantization_config.modules
    assert {type(loaded.get_submodule(n)) for n in factored(loaded)} <= {FactoredLinear, FactoredConv1D}


def test_the_config_says_what_was_done(folder: Path, model: Any) -> None:
    written = read_json(folder / "config.json")["quantization_config"]
    assert (written["quant_method"], written["format"]) == ("eckart", 1)
    assert written["modules"] == describe(model)
    (applied,) = written["history"]
    assert (applied["method"], applied["budget"], applied["form"]) == ("svd", "0.6 linears", "low_rank()")
    assert {"eckart", "torch", "transformers"} <= applied["versions"].keys()
    config = AutoConfig.from_pretrained(folder)
    assert config.quantization_config["modules"] == describe(model)


def test_saved_again_it_is_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    load(folder).save_pretrained(tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(folder)


def test_shards_are_loaded_alike(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path)), logits(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_may_be_chosen(folder: Path, model: Any, dtype: torch.dtype) -> None:
    loaded = load(folder, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert error_ratio(logits(loaded), logits(model)) <= max(1e-5, 16 * torch.finfo(dtype).eps)


def test_half_precision_is_kept_on_disk(tmp_path: Path) -> None:
    model = compressed(dtype=torch.float16)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert value.dtype == torch.float16
        assert torch.equal(loaded.state_dict()[key], value)


def test_it_generates(folder: Path, model: Any) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    wanted = model.generate(**BATCH, **settings)
    assert wanted.shape == (2, 14)
    assert torch.equal(load(folder).generate(**BATCH, **settings), wanted)


def training_set() -> list[dict[str, torch.Tensor]]:
    ids = torch.cat([batch["input_ids"] for batch in batches((2, 2), seed=5)])
    return [{"input_ids": row, "labels": row} for row in ids]


def train(model: Any, folder: Path) -> None:
    """Two steps of transformers' Trainer."""
    settings = TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|accelerate|transformers)\.")
        Trainer(model=model, args=settings, train_dataset=training_set()).train()


def test_trainer_trains_the_factors_and_the_result_is_saved(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    name = f"{factored(model)[0]}.matrix.left.weight"
    before = model.state_dict()[name].clone()
    train(model, tmp_path / "run")
    assert not torch.equal(model.state_dict()[name], before)
    model.save_pretrained(tmp_path / "trained")
    again = load(tmp_path / "trained")
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


def test_lora_trains_on_top_and_leaves_the_factors_alone(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    train(adapted, tmp_path / "run")
    after = {key.replace("base_model.model.", "").replace(".base_layer", ""): value for key, value in adapted.state_dict().items()}  # fmt: skip # noqa: E501
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert any(value.any() for key, value in after.items() if "lora_B" in key)
    wanted = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = load(folder)
    fresh.load_adapter(tmp_path / "adapter")
    assert error_ratio(logits(fresh), wanted) <= 1e-5


def test_two_compressions_in_a_row_are_both_remembered(tmp_path: Path) -> None:
    model = eckart.compress(build("llama"), "svd", budget="0.6 linears", targets=r".*self_attn\..*").model
    attention = factored(model)
    model.save_pretrained(tmp_path / "one")
    for start in (model, load(tmp_path / "one")):
        twice = eckart.compress(start, "svd", budget="0.5 linears", targets=r".*mlp\..*").model
        history = twice.config.quantization_config.history
        assert [applied["targets"] for applied in history] == [r".*self_attn\..*", r".*mlp\..*"]
        assert set(attention) < set(factored(twice))
    model.save_pretrained(tmp_path / "two")
    loaded = load(tmp_path / "two")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.quantization_config.history == history


def test_densified_it_is_saved_as_an_ordinary_model_that_remembers(folder: Path, tmp_path: Path) -> None:
    model = eckart.densify(load(folder))
    assert factored(model) == []
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert factored(loaded) == []
    assert torch.equal(logits(loaded), logits(model))
    assert len(loaded.config.quantization_config.history) == 1


def test_dequantize_forgets_that_it_was_compressed(folder: Path, model: Any, tmp_path: Path) -> None:
    dense = load(folder).dequantize()
    assert factored(dense) == []
    assert error_ratio(logits(dense), logits(model)) <= 1e-5
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in read_json(tmp_path / "config.json")


def test_a_shared_matrix_stays_shared(tmp_path: Path) -> None:
    model = build("llama-tied")
    embedding, head = model.model.embed_tokens, model.lm_head
    matrix = LowRank(8).fit(matrix_of(embedding).detach())
    model.model.embed_tokens, model.lm_head = drop_in(embedding, matrix), drop_in(head, matrix)
    tie(model, "lm_head", "model.embed_tokens")
    config = EckartConfig(describe(model), tied={"lm_head": "model.embed_tokens"})
    model.config.quantization_config = config
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.lm_head.matrix is loaded.model.embed_tokens.matrix
    assert torch.equal(logits(loaded), logits(model))
    stored = sum(p.numel() for p in model.parameters())
    assert stored == sum(p.numel() for p in loaded.parameters())


def test_a_skeleton_is_filled_with_stand_ins_before_any_weight_is_there(model: Any) -> None:
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(model.config)
    install(skeleton, model.config.quantization_config, torch.bfloat16)
    layout = {key: value.shape for key, value in skeleton.state_dict().items()}
    assert layout == {key: value.shape for key, value in model.state_dict().items()}
    assert all(p.is_meta for p in skeleton.parameters())
    assert {skeleton.get_parameter(f"{name}.matrix.left.weight").dtype for name in factored(skeleton)} == {
        torch.bfloat16
    }


def test_it_is_trainable_and_serialisable(folder: Path) -> None:
    loaded = load(folder)
    assert loaded.hf_quantizer.is_trainable
    assert loaded.hf_quantizer.is_serializable()
    assert loaded.is_quantized
    assert str(loaded.quantization_method) == "eckart"
