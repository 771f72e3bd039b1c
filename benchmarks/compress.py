"""Compressing a language model: eckart's svd_llm beside a straightforward implementation of the same method.

    python benchmarks/compress.py [--quick] [--blocks N] [--ratios 0.8 0.6] [--threads N] [--json FILE] [--resume]

The reference does what published code does: the whole model in float32, one hook on every linear layer, each with its
own sum of x xᵀ (float64; `--products float64` multiplies in float64, too), whole sequences through the head, all sums
and roots in memory, Cholesky in float64 (where it fails, with the least eigenvalue and 1e-6 added to the diagonal), a
full SVD of W S, S inverted, the square root of the spectrum in both factors. Both get the same windows and the same
ranks, r = ratio * out * in / (out + in) for every linear layer but the head, and store float16.

Every row is a process of its own. "seconds" and "CPU s" run from the loaded libraries to the saved model, "peak MB" is
the most that the process held in memory, libraries (about 400 MB) included. Perplexity is measured afterwards, by one
and the same code. Rows are written to the JSON file as they come; `--resume` skips those that it holds already.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import eckart
from common import load, machine, table, write_json
from eckart.calibration.data import load_texts, token_batches
from eckart.calibration.tokens import Tokens
from eckart.checkpoint.source import resolve
from eckart.evaluation.memory import peak_so_far, resident
from eckart.evaluation.perplexity import perplexity

METHODS = ("eckart", "reference")
BATCH = 4


def ours(model: Path, ids: Tensor, ratio: float, out: Path, products: str) -> None:
    eckart.compress_to(
        out, model, "svd_llm", budget=f"{ratio} linears", data=Tokens(ids, torch.ones_like(ids, dtype=torch.bool)),
        batch_size=BATCH,
    )  # fmt: skip


@torch.no_grad()
def reference(folder: Path, ids: Tensor, ratio: float, out: Path, products: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    head = model.get_output_embeddings()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    dtype = torch.float64 if products == "float64" else torch.float32
    sums = {n: torch.zeros(m.in_features, m.in_features, dtype=torch.float64) for n, m in layers.items()}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).to(dtype)
            sums[name] += x.T @ x

        return add

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in layers.items()]
    for batch in ids.split(BATCH):
        model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    roots = {n: cholesky(sums.pop(n)) for n in list(sums)}
    for name, layer in layers.items():
        S, W = roots[name], layer.weight
        rank = int(ratio * W.numel() / sum(W.shape))
        U, values, Vh = torch.linalg.svd(W @ S.float(), full_matrices=False)
        root = values[:rank].sqrt()
        right = root[:, None] * (Vh[:rank] @ torch.linalg.inv(S).float())
        model.set_submodule(name, pair(U[:, :rank] * root, right, layer.bias))
    out.mkdir()
    skip = set(model.all_tied_weights_keys)
    state = {k: v.half().contiguous() for k, v in model.state_dict().items() if k not in skip}
    save_file(state, out / "model.safetensors")


def cholesky(C: Tensor) -> Tensor:
    try:
        return torch.linalg.cholesky(C)
    except torch.linalg.LinAlgError:
        C.diagonal().add_(1e-6 - float(torch.linalg.eigvalsh(C)[0]))
        return torch.linalg.cholesky(C)


def pair(left: Tensor, right: Tensor, bias: nn.Parameter | None) -> nn.Sequential:
    first = nn.Linear(right.shape[1], right.shape[0], bias=False)
    second = nn.Linear(left.shape[1], left.shape[0], bias=bias is not None)
    first.weight, second.weight = nn.Parameter(right), nn.Parameter(left)
    if bias is not None:
        second.bias = bias
    return nn.Sequential(first, second)


def evaluated(folder: Path, source: Path) -> nn.Module:
    """What was saved, in float32; the reference's folder holds weights only, which go into the source's model."""
    if (folder / "config.json").exists():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    state = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
    for name in [k.removesuffix(".0.weight") for k in state if k.endswith(".0.weight")]:
        layer = model.get_submodule(name)
        model.set_submodule(name, pair(state[f"{name}.1.weight"], state[f"{name}.0.weight"], layer.bias))
    _, unexpected = model.load_state_dict(state, strict=False)
    if unexpected:
        raise ValueError(f"the reference saved tensors that no layer takes: {unexpected[:3]}")
    return model


def child(job: dict[str, Any]) -> dict[str, Any]:
    """One row's work, in a process of its own."""
    torch.set_num_threads(job["threads"])
    tokens = load_file(job["tokens"])
    source, out = Path(job["source"]), Path(job["out"])
    if job["task"] == "evaluate":
        ids = tokens["heldout"]
        model: Any = evaluated(out, source)
        return {"perplexity": perplexity(model, Tokens(ids, torch.ones_like(ids, dtype=torch.bool)), BATCH).value}
    before, wall, cpu = resident(), time.perf_counter(), time.process_time()
    run = ours if job["task"] == "eckart" else reference
    run(source, tokens["calibration"], job["ratio"], out, job["products"])
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_memory": peak_so_far(),
        "memory_before": before,
        "bytes": weight_bytes(out),
    }


def weight_bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def spawn(job: dict[str, Any], work: Path) -> dict[str, Any]:
    """Run `child` in a fresh process."""
    asked, answer = work / "job.json", work / "answer.json"
    write_json(job | {"answer": str(answer)}, asked)
    environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"]), "MKL_NUM_THREADS": str(job["threads"])}
    done = subprocess.run([sys.executable, __file__, "--job", str(asked)], env=environment, capture_output=True)
    if done.returncode != 0:
        raise SystemExit(f"{job['task']} at {job.get('ratio')} failed:\n{done.stderr.decode()}")
    return json.loads(answer.read_text(encoding="utf-8"))


def cut(source: Path, blocks: int, target: Path) -> Path:
    """The model with its first blocks only: nonsense as a model, but as fast as a smaller one."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config |= {"num_hidden_layers": blocks}
    config.pop("layer_types", None)
    target.mkdir()
    state: dict[str, Tensor] = {}
    for file in source.glob("*.safetensors"):
        state |= load_file(file)
    beyond = tuple(f"model.layers.{i}." for i in range(blocks, 1000))
    save_file({k: v for k, v in state.items() if not k.startswith(beyond)}, target / "model.safetensors", {"format": "pt"})  # fmt: skip # noqa: E501
    write_json(config, target / "config.json")
    return target


def save_tokens(folder: Path, samples: int, length: int, windows: int, path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    calibration = token_batches(load_texts("builtin"), tokenizer, samples=samples, length=length)
    heldout = token_batches(load_texts("builtin", split="heldout"), tokenizer, samples=None, length=length)
    save_file({"calibration": calibration.ids, "heldout": heldout.ids[:windows].contiguous()}, path)


def measure(report: dict[str, Any], ratios: list[float], model: str, save: Callable[[], None], console: Console) -> None:  # fmt: skip # noqa: E501
    """Add the rows that `report` lacks."""
    settings, rows = report["settings"], report["rows"]
    done = {(row["method"], row["ratio"]) for row in rows}
    todo: list[tuple[str, float]] = [("dense", 1.0), *((m, r) for r in ratios for m in METHODS)]
    with tempfile.TemporaryDirectory(prefix="eckart-benchmark-") as name:
        work = Path(name)
        folder = source = resolve(model).folder
        save_tokens(folder, settings["samples"], settings["length"], settings["windows"], work / "tokens.safetensors")
        if settings["blocks"]:
            source = cut(folder, settings["blocks"], work / "cut")
        common = {"source": str(source), "tokens": str(work / "tokens.safetensors"), "products": settings["products"],
                  "threads": settings["threads"]}  # fmt: skip
        for index, (method, ratio) in enumerate(todo):
            if (method, ratio) in done:
                continue
            out = source if method == "dense" else work / f"{method}-{ratio}"
            row: dict[str, Any] = {"method": method, "ratio": ratio, "load": load()}
            with console.status(f"{method} at {ratio:g} ({index + 1} of {len(todo)})"):
                if method == "dense":
                    row["bytes"] = weight_bytes(out)
                else:
                    row |= spawn(common | {"task": method, "ratio": ratio, "out": str(out)}, work)
                row |= spawn(common | {"task": "evaluate", "out": str(out)}, work)
            rows.append(row)
            save()


def show(report: dict[str, Any], console: Console) -> None:
    rows = {(row["method"], row["ratio"]): row for row in report["rows"]}
    s = report["settings"]
    what = f"the first {s['blocks']} blocks of {s['model']}" if s["blocks"] else s["model"]
    title = f"svd_llm of {what} on {s['samples']} x {s['length']} tokens, {s['threads']} thread(s)"
    shown = table(title, ["method"], ["ratio", "seconds", "CPU s", "peak MB", "perplexity", "MB", "load"])
    for row in rows.values():
        timed = "seconds" in row
        shown.add_row(
            row["method"],
            f"{row['ratio']:g}",
            f"{row['seconds']:.1f}" if timed else "",
            f"{row['cpu_seconds']:.1f}" if timed else "",
            f"{row['peak_memory'] / 1e6:.0f}" if timed else "",
            f"{row['perplexity']:.6g}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['load']:.1f}",
        )
    console.print(shown)
    for ratio in dict.fromkeys(row["ratio"] for row in rows.values() if row["method"] in METHODS):
        a, b = rows.get(("eckart", ratio)), rows.get(("reference", ratio))
        if a and b:
            console.print(f"at {ratio:g}: {compared(a, b)}", highlight=False)


def compared(row: dict[str, Any], peer: dict[str, Any]) -> str:
    wall, cpu = peer["seconds"] / row["seconds"], peer["cpu_seconds"] / row["cpu_seconds"]
    memory, size = row["peak_memory"] / peer["peak_memory"], row["bytes"] / peer["bytes"]
    return (
        f"{wall:.2f} times as fast ({cpu:.2f} in CPU time), {memory:.2f} of the memory, "
        f"{row['perplexity'] / peer['perplexity']:.4f} of the perplexity, {size:.4f} of the bytes"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="eckart's svd_llm beside a straightforward implementation of it.")
    parser.add_argument("--quick", action="store_true", help="the first 6 blocks, 8 x 256 tokens, 0.8 only")
    parser.add_argument("--model", default="builtin", help="hub id, folder or GGUF file (default: builtin)")
    parser.add_argument("--ratios", type=float, nargs="+", help="of the linear layers' parameters (default 0.8 0.6)")
    parser.add_argument(
        "--blocks", type=int, default=0, help="only the model's first blocks: a quick look at the times"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of both (default: all)")
    parser.add_argument("--products", choices=("float32", "float64"), default="float32", help="of the reference's sums")
    parser.add_argument("--json", type=Path, help="write the figures to this file, row by row")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the JSON file holds")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    if arguments.job:
        job = json.loads(arguments.job.read_text(encoding="utf-8"))
        write_json(child(job), Path(job["answer"]))
        return
    quick = arguments.quick
    settings = {
        "model": arguments.model, "blocks": arguments.blocks or (6 if quick else 0), "samples": 8 if quick else 64,
        "length": 256 if quick else 512, "windows": 4 if quick else 16, "threads": arguments.threads,
        "products": arguments.products,
    }  # fmt: skip
    report: dict[str, Any] = {"settings": settings, "machine": machine(), "rows": []}
    if arguments.resume:
        if not arguments.json:
            raise SystemExit("--resume goes on with a JSON file: name it with --json")
        if arguments.json.exists():
            before = json.loads(arguments.json.read_text(encoding="utf-8"))
            if before["settings"] != settings:
                raise SystemExit(
                    f"{arguments.json} was made with other settings, {before['settings']}: name another file"
                )
            report["rows"] = before["rows"]

    def save() -> None:
        if arguments.json:
            write_json(report, arguments.json)

    console = Console()
    measure(report, arguments.ratios or ([0.8] if quick else [0.8, 0.6]), arguments.model, save, console)
    show(report, console)


if __name__ == "__main__":
    main()
