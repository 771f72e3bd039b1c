"""Compress a model that does not fit into the memory it is given.

Makes a random Llama of about 3 GB on disk, block by block, then runs `eckart compress` on it in a process that the
kernel holds to 1.5 GB, Python and torch included: by a memory cgroup where one may be made, which counts everything
resident, else by RLIMIT_DATA, which counts all that is allocated, touched or not. Prints a table; `--json FILE` keeps
it. `--small` does a fifth of it, and fits only the down projections, to be quick.

    python benchmarks/larger_than_memory.py [--small] [--folder DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor


@dataclass(frozen=True)
class Size:
    """Of the model, of the calibration data, and of the memory for the job, in bytes; and which layers are fitted."""

    hidden: int
    intermediate: int
    blocks: int
    samples: int
    length: int
    limit: int
    budget: str = "0.8"
    targets: str = ""
    vocabulary: int = 4096
    head: int = 64

    def config(self) -> transformers.LlamaConfig:
        return transformers.LlamaConfig(
            hidden_size=self.hidden, intermediate_size=self.intermediate, num_hidden_layers=self.blocks,
            num_attention_heads=self.hidden // self.head, vocab_size=self.vocabulary, tie_word_embeddings=True,
            max_position_embeddings=2048, architectures=["LlamaForCausalLM"], dtype="float16",
        )  # fmt: skip


FULL = Size(hidden=2048, intermediate=5632, blocks=28, samples=16, length=512, limit=1_500_000_000)
SMALL = Size(
    hidden=768, intermediate=2048, blocks=40, samples=4, length=128, limit=700_000_000, budget="0.95",
    targets=r".*\.down_proj",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tenth of the size")
    parser.add_argument("--folder", type=Path, help="where the models go (a temporary folder, removed, by default)")
    parser.add_argument("--limit", type=int, help="bytes of memory")
    parser.add_argument("--method", default="svd_llm")
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    size = SMALL if given.small else FULL
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        figures = measure(Path(scratch), size, given.limit or size.limit, given.method)
    print(table(figures))
    if given.json:
        given.json.write_text(json.dumps({"size": asdict(size), **figures}, indent=1) + "\n", encoding="utf-8")
    if figures["exit code"]:
        sys.exit(f"the job failed: {figures['said']}")


def measure(folder: Path, size: Size, limit: int, method: str) -> dict[str, Any]:
    """Make the model, compress it under the limit, and return the figures."""
    begin = time.perf_counter()
    source = write_model(folder / "model", size)
    text = write_text(folder / "text.txt", size)
    made = time.perf_counter() - begin
    out = folder / "out"
    words = [
        sys.executable, "-m", "eckart", "compress", str(source), "-o", str(out), "--method", method,
        "--budget", size.budget, "--set", f"targets={size.targets}", "--data", str(text),
        "--samples", str(size.samples), "--length", str(size.length), "--batch-size", "1", "--json",
    ]  # fmt: skip
    begin = time.perf_counter()
    code, said, peaks, how = run_limited(words, limit)
    stored = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    dense = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    return {
        "method": method,
        "budget": size.budget,
        "model on disk": dense,
        "model in float32": 2 * dense,
        "limit": limit,
        "held by": how,
        "peak resident": peaks["VmHWM"],
        "peak allocated": peaks["VmData"],
        "seconds to make the model": made,
        "seconds to compress it": time.perf_counter() - begin,
        "result on disk": stored,
        "exit code": code,
        "said": said[-400:] if code else "",
    }


def write_model(folder: Path, size: Size) -> Path:
    """A random Llama in float16, one file a block, of which one is in memory at a time."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for part in range(size.blocks + 1):
        name = f"model-{part + 1:05d}-of-{size.blocks + 1:05d}.safetensors"
        tensors = dict(part_tensors(size, part, generator))
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    total = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    size.config().save_pretrained(folder)
    tokenizer(size).save_pretrained(folder)
    return folder


def part_tensors(size: Size, part: int, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one block; after the last one, those outside."""
    d, m = size.hidden, size.intermediate

    def drawn(rows: int, columns: int) -> Tensor:
        # a falling spectrum, as trained weights have
        scale = torch.linspace(1, 0.05, columns).square()
        return (torch.randn(rows, columns, generator=generator) * scale * (3 / columns) ** 0.5).half()

    if part == size.blocks:
        yield "model.embed_tokens.weight", torch.randn(size.vocabulary, d, generator=generator).half()
        yield "model.norm.weight", torch.ones(d).half()
        return
    shapes = {
        "self_attn.q_proj": (d, d), "self_attn.k_proj": (d, d), "self_attn.v_proj": (d, d), "self_attn.o_proj": (d, d),
        "mlp.gate_proj": (m, d), "mlp.up_proj": (m, d), "mlp.down_proj": (d, m),
    }  # fmt: skip
    for name, (rows, columns) in shapes.items():
        yield f"model.layers.{part}.{name}.weight", drawn(rows, columns)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"model.layers.{part}.{name}.weight", torch.ones(d).half()


def tokenizer(size: Size) -> transformers.PreTrainedTokenizerFast:
    """One token a word: w0, w1, ..."""
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size.vocabulary)}, "w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", pad_token="w0")


def write_text(path: Path, size: Size) -> Path:
    draw = random.Random(0)
    words = (f"w{draw.randrange(size.vocabulary)}" for _ in range(2 * size.samples * size.length))
    path.write_text(" ".join(words), encoding="utf-8")
    return path


def run_limited(words: list[str], limit: int) -> tuple[int, str, dict[str, int], str]:
    """Exit code, what was printed, the peaks of memory in bytes, and what held the command to the limit."""
    group = cgroup(limit)

    def restrict() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))
        else:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    # one arena: what is reserved for threads and never touched counts, too
    few = {"MALLOC_ARENA_MAX": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        words, env=os.environ | few, preexec_fn=restrict, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    peaks = {"VmHWM": 0, "VmData": 0}

    def watch() -> None:
        while process.poll() is None:
            for name, value in status(process.pid).items():
                peaks[name] = max(peaks[name], value)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    printed, _ = process.communicate()
    watcher.join()
    if group is not None:
        group.rmdir()
    return process.returncode, printed, peaks, "RLIMIT_DATA" if group is None else "memory cgroup"


def cgroup(limit: int) -> Path | None:
    """A new memory cgroup (version 2 or 1) with this limit and no swap; None where none may be made."""
    kinds = {"": ("memory.max", "memory.swap.max", "0"), "memory": ("memory.limit_in_bytes", "memory.swappiness", "0")}
    for root, (most, swap, none) in kinds.items():
        group = Path("/sys/fs/cgroup") / root / f"eckart-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        if (group / most).exists() and (group / swap).exists():
            (group / most).write_text(str(limit))
            (group / swap).write_text(none)
            return group
        group.rmdir()
    return None


def status(pid: int) -> dict[str, int]:
    """The peak resident and the allocated bytes of a process; nothing where it is gone or the system has no /proc."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: 1024 * int(found[name].split()[0]) for name in ("VmHWM", "VmData") if name in found}


def table(figures: dict[str, Any]) -> str:
    lines = ["| | |", "| --- | --- |"]
    for name, value in figures.items():
        if name == "said":
            continue
        shown = f"{value / 1e6:,.0f} MB" if isinstance(value, int) and value > 10_000 else str(value)
        lines.append(f"| {name} | {f'{value:.0f} s' if isinstance(value, float) else shown} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
