"""Tiny random models, a tokenizer and a text, in folders as users have them; and the command line in a process."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import distributed, nn

from eckart import compress_to
from eckart.jobs import Result

WORDS = 120
VOCABULARY = WORDS + 3

CORE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GATED = {**CORE, "intermediate_size": 48}
GQA = {**GATED, "num_key_value_heads": 2}
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip

CONFIGS: dict[str, tuple[type[tf.PreTrainedConfig], dict[str, Any]]] = {
    "llama": (tf.LlamaConfig, GQA),
    "llama-tied": (tf.LlamaConfig, {**GQA, "tie_word_embeddings": True}),
    "gpt2": (tf.GPT2Config, GPT2),
    "opt": (tf.OPTConfig, {**CORE, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gemma": (tf.GemmaConfig, {**GATED, "num_key_value_heads": 1, "head_dim": 16}),
    "gemma2": (tf.Gemma2Config, {**GATED, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 4}),
    "qwen3": (tf.Qwen3Config, {**GQA, "head_dim": 16}),
    "gpt_neox": (tf.GPTNeoXConfig, GATED),
    "phi": (tf.PhiConfig, GATED),
    "bert": (tf.BertConfig, GATED),
    "mpnet": (tf.MPNetConfig, {**GATED, "pad_token_id": 1, "max_position_embeddings": 80}),
    "vit": (tf.ViTConfig, {**GATED, "image_size": 12, "patch_size": 4}),
}
HEADS = {
    "bert": tf.AutoModelForMaskedLM,
    "mpnet": tf.AutoModelForMaskedLM,
    "vit": tf.AutoModelForImageClassification,
}


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A random model of that family, in evaluation mode, its weights large enough to matter."""
    cls, own = CONFIGS[name]
    torch.manual_seed(seed)
    return scattered(HEADS.get(name, tf.AutoModelForCausalLM).from_config(cls(**(own | settings))).eval(), seed).to(
        dtype
    )


def scattered(model: Any, seed: int = 0) -> Any:
    """The model with weights large enough to matter, and no norm or bias as it was initialised."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15, generator=generator)
        else:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def save_model(folder: Path, name: str = "llama", *, seed: int = 0, shard: str = "1GB", dtype: torch.dtype = torch.float16, **settings: Any) -> Path:  # fmt: skip # noqa: E501
    """A model and its tokenizer as a Hugging Face folder, in files of at most `shard`."""
    build(name, seed, dtype, **settings).save_pretrained(folder, max_shard_size=shard)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> tf.PreTrainedTokenizerFast:
    """One token a word."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(WORDS))])}
    made = Tokenizer(models.WordLevel(vocabulary, "<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<pad>", pad_token="<pad>", eos_token="</s>")


def save_text(path: Path, words: int = 4000, seed: int = 0) -> Path:
    """A text in which each word depends on the one before."""
    draw = random.Random(seed)
    text, at = [], 0
    for _ in range(words):
        at = (3 * at + draw.choice((1, 2, 5, 40))) % WORDS
        text.append(f"w{at}")
    path.write_text(" ".join(text), encoding="utf-8")
    return path


def batches(sizes: tuple[int, ...] = (2, 2, 1), length: int = 9, seed: int = 1, padded: bool = False) -> list[dict[str, Any]]:  # fmt: skip # noqa: E501
    """Random ids in batches of these sizes; where `padded`, rows end in padding of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for size in sizes:
        ids = torch.randint(3, VOCABULARY, (size, length), generator=generator)
        batch = {"input_ids": ids}
        if padded:
            lengths = torch.randint(3, length, (size, 1), generator=generator)
            mask = torch.arange(length) < lengths
            batch = {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}
        made.append(batch)
    return made


def compressed_twice(folder: Path, method: str, parts: int = 1, **job: Any) -> Result:
    """Compress the model `m` in a folder to `whole`, and to `cut`, which is interrupted once that many of its parts are
    written, and resumed; returns the result of the first."""

    def interrupt(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("fit", parts):
            raise KeyboardInterrupt

    result = compress_to(folder / "whole", folder / "m", method, **job)
    with pytest.raises(KeyboardInterrupt):
        compress_to(folder / "cut", folder / "m", method, progress=interrupt, **job)
    compress_to(folder / "cut", folder / "m", method, resume=True, **job)
    return result


def command(*words: Any) -> list[str]:
    """`eckart` with these words, as a command to start."""
    return [sys.executable, "-m", "eckart", *map(str, words)]


def environment(**more: str) -> dict[str, str]:
    """For a process that computes with one thread and stays off the network."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"} | more


def eckart(*words: Any, **more: str) -> subprocess.CompletedProcess[str]:
    """Run `eckart` in a process of its own."""
    return subprocess.run(command(*words), capture_output=True, text=True, env=environment(**more), check=False)


def hashes(folder: Path) -> dict[str, str]:
    """Name -> hash of every file below a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files in a folder."""
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def forks() -> Any:
    """A multiprocessing context whose processes start with everything imported, and none of this one's threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["eckart.cli", "eckart.compression", "transformers.models.llama.modeling_llama"])
    return context


@dataclass(frozen=True)
class Outcome:
    """How a process of `eckart` ended: its exit code (-9 when killed), how many times it changed something, and what
    it printed."""

    code: int | None
    steps: int
    printed: str


def run_forked(words: list[Any], watched: Path, kill_at: int | None = None) -> Outcome:
    """Run `eckart` in a forked process; kill it by SIGKILL before the `kill_at`th time that it makes, writes, renames
    or removes a file below `watched`."""
    log = watched / "log.txt"
    context = forks()
    steps = context.Value("i", 0)
    process = context.Process(target=_run, args=([str(w) for w in words], str(watched), str(log), kill_at, steps))
    process.start()
    process.join(300)
    return Outcome(process.exitcode, steps.value, log.read_text(encoding="utf-8"))


def _run(words: list[str], watched: str, log: str, kill_at: int | None, steps: Any) -> None:
    from eckart.cli import main

    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(log, "w", encoding="utf-8")  # noqa: SIM115

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if not _changes(event, args, watched):
            return
        steps.value += 1
        if steps.value == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    sys.argv = ["eckart", *words]
    main()


def _changes(event: str, args: tuple[Any, ...], watched: str) -> bool:
    """Whether an audit event is a change to a file below a folder."""
    if event == "open":
        writes = bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        return writes and isinstance(args[0], str) and args[0].startswith(watched)
    if event in ("os.rename", "os.mkdir"):
        return str(args[0]).startswith(watched)
    if event in ("os.remove", "os.rmdir"):  # rmtree names what it removes from within its folder
        return str(args[0]).startswith(watched) or args[1] != -1
    return False


def benchmark(name: str) -> Any:
    """A module of benchmarks/."""
    file = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def two_processes(work: Callable[..., None], *given: Any) -> Iterator[None]:
    """`work(rank, *given)` for ranks 0 and 1, each in a process of its own, while the body runs; both must end well."""
    with tempfile.TemporaryDirectory() as meeting:
        members = [forks().Process(target=_member, args=(meeting, work, rank, *given)) for rank in range(2)]
        for member in members:
            member.start()
        try:
            yield
            for member in members:
                member.join(120)
            assert [member.exitcode for member in members] == [0, 0]
        finally:
            for member in members:
                member.kill()
                member.join()


def _member(meeting: str, work: Callable[..., None], rank: int, *given: Any) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{meeting}/rendezvous", rank=rank, world_size=2)
    work(rank, *given)
    gc.collect()  # a parallel model that outlives its group destroys it under Python's lock, which can block for good
    distributed.destroy_process_group()
