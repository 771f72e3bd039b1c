"""llama.cpp itself, where it is installed, loads the files and answers as the model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import made
import pytest
import torch

from eckart.export import export

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytestmark = pytest.mark.slow

FOUR = "quantized(bits=4, group=32, grid=uniform(symmetric=True))"
REAL = "quantized(bits=4, group=32, grid=uniform(zero='real'))"
ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
TEXT = "the norm of the inputs that the matrix is near to, in the other norm: Zürich 42!"


def opened(out: Path, **more: Any) -> Any:
    """The model in a folder that `export` wrote, with its adapter where there is one."""
    adapter = out / "adapter.gguf"
    lora = {"lora_path": str(adapter)} if adapter.exists() else {}
    return llama_cpp.Llama(
        str(out / "model.gguf"), n_ctx=64, n_threads=1, logits_all=True, verbose=False, **(lora | more)
    )  # fmt: skip


def computed(model: Any, ids: list[int]) -> torch.Tensor:
    model.reset()
    model.eval(ids)
    return torch.from_numpy(model.scores[: len(ids)].copy())


@pytest.mark.parametrize(
    ("family", "form", "more"),
    [
        ("llama", FOUR, {}),
        ("llama-tied", f"{FOUR} + low_rank(rank=4)", {"attention_bias": True, "mlp_bias": True}),
        ("llama", f"{FOUR.replace('4', '3')} + low_rank(rank=4)", {"rope_parameters": ROPE, "head_dim": 32}),
        ("llama", REAL, {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
        ("qwen2", f"{REAL} + low_rank(rank=4)", {"vocab_size": 320}),
        ("qwen3", f"{FOUR.replace('4', '5')} + low_rank(rank=3)", {"vocab_size": 320, "head_dim": 32}),
        ("llama", "low_rank(rank=9)", {}),
    ],
)
def test_llama_cpp_computes_the_same_logits(tmp_path: Path, family: str, form: str, more: dict[str, Any]) -> None:
    tokenizer = made.byte_tokenizer()
    model = made.factor(made.decoder(family, tokenizer, **more), form, dtype=torch.float16)
    folder = made.save(model, tmp_path / "m", tokenizer)
    found = export(folder, "gguf", tmp_path / "out")
    assert ("adapter.gguf" in found.files) == ("+" in form)
    read = opened(tmp_path / "out")
    ids = tokenizer(TEXT).input_ids
    assert read.tokenize(TEXT.encode(), add_bos=True, special=True) == ids
    wanted = made.logits(model.float(), torch.tensor([ids]))[0]
    got = computed(read, ids)
    # llama.cpp rounds what goes into a quantised product to 8 bits
    error = (got - wanted).norm() / wanted.norm()
    assert error < 0.03
    top = wanted.topk(2).values
    clear = top[:, 0] - top[:, 1] > 0.1 * wanted.std()
    assert clear.sum() > len(ids) / 2
    assert torch.equal(got.argmax(1)[clear], wanted.argmax(1)[clear])
    if "adapter.gguf" in found.files:
        alone = computed(opened(tmp_path / "out", lora_path=None), ids)
        assert (alone - wanted).norm() / wanted.norm() > 2 * error, "the adapter carries nothing"


def test_pieces_are_cut_as_by_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = made.piece_tokenizer()
    export(made.save(made.decoder("llama", tokenizer), tmp_path / "m", tokenizer), "gguf", tmp_path / "out")
    read = opened(tmp_path / "out", vocab_only=True)
    text = "then the norm of the matrix: Zürich"
    assert read.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text).input_ids


def test_a_file_without_vocabulary_takes_ids(tmp_path: Path) -> None:
    import tiny

    model = made.factor(made.decoder("llama", tiny.tokenizer()), FOUR, dtype=torch.float16)
    export(made.save(model, tmp_path / "m"), "gguf", tmp_path / "out")
    ids = made.ids(1, 9)
    got, wanted = computed(opened(tmp_path / "out"), ids[0].tolist()), made.logits(model.float(), ids)[0]
    assert (got - wanted).norm() / wanted.norm() < 0.03
