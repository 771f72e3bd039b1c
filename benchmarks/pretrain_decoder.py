"""Pre-train a small English decoder in full precision: what quantisation is judged on, far from any grid.

    python benchmarks/pretrain_decoder.py OUT [--size 5m|11m] [--steps N] [--seed 0] [--resume] [--device cpu]

Llama architecture, a byte-level BPE of 4,096 tokens, windows of 256, on the texts of corpora.py, of each of which the
last twentieth is held out. A run that is killed goes on from its last checkpoint with `--resume` and then sees the
same batches as one that was not. The model is saved in float16 beside report.json: perplexity and bits per byte of the
held-out texts.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from common import write_json
from corpora import corpora
from eckart.runs import train_tokenizer
from eckart.runs.build import END

SIZES = {
    "5m": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4},
    "11m": {"hidden_size": 384, "intermediate_size": 1056, "num_hidden_layers": 6, "num_attention_heads": 6},
}
VOCABULARY, LENGTH, BATCH = 4096, 256, 32
HELD_OUT, JUDGED = 0.05, 60_000  # of each text; characters of that which are measured
PEAK, WARM_UP, FLOOR = 3e-3, 100, 0.05


def split(texts: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """The texts to train on, and name -> what is held out."""
    cuts = {name: int(len(text) * (1 - HELD_OUT)) for name, text in texts.items()}
    return [texts[n][:c] for n, c in cuts.items()], {n: texts[n][c:] for n, c in cuts.items()}


def new_model(size: str, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=2 * LENGTH, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=0, **SIZES[size],
        )
    )  # fmt: skip


def rate(step: int, steps: int) -> float:
    """A linear warm-up, then half a cosine down to a twentieth."""
    return PEAK * min(1, (step + 1) / WARM_UP) * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def one_step(model: nn.Module, optimizer: torch.optim.AdamW, ids: Tensor, step: int, a: argparse.Namespace) -> float:
    generator = torch.Generator().manual_seed((a.seed << 32) + step)  # its own, so that a resumed run draws the same
    starts = torch.randint(0, len(ids) - LENGTH - 1, (BATCH,), generator=generator)
    rows = torch.stack([ids[i : i + LENGTH + 1] for i in starts]).to(a.device)
    with torch.autocast(torch.device(a.device).type, torch.bfloat16):
        logits = model(rows[:, :-1]).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate(step, a.steps)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def save_state(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.AdamW) -> None:
    """Model and optimiser, replaced all at once: the step that is written last names the file."""
    state = {f"model.{k}": v.detach().cpu().clone() for k, v in model.named_parameters()}
    for i, moments in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{i}.{k}": v.detach().cpu().clone() for k, v in moments.items()}
    save_file(state, folder / f"step-{step}.safetensors")
    write_json({"step": step}, folder / "state.json")
    for old in folder.glob("step-*.safetensors"):
        if old.name != f"step-{step}.safetensors":
            old.unlink()


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.AdamW) -> int:
    """Steps that were done before."""
    if not (folder / "state.json").exists():
        return 0
    step = int(json.loads((folder / "state.json").read_text(encoding="utf-8"))["step"])
    state = load_file(folder / f"step-{step}.safetensors")
    for name, parameter in model.named_parameters():
        parameter.data.copy_(state[f"model.{name}"])
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in state.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    return step


@torch.no_grad()
def judge(model: LlamaForCausalLM, tokenizer: Any, held: dict[str, str]) -> dict[str, dict[str, float]]:
    """Perplexity, and bits per byte, of the held-out texts."""
    found: dict[str, dict[str, float]] = {"perplexity": {}, "bits_per_byte": {}}
    for name, text in held.items():
        ids = torch.tensor(tokenizer(text[:JUDGED], verbose=False)["input_ids"])
        rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
        logits = (model(row[None].to(model.device)).logits[0, :-1].float().cpu() for row in rows)
        nll = sum(float(F.cross_entropy(x, row[1:], reduction="sum")) for x, row in zip(logits, rows, strict=True))
        found["perplexity"][name] = round(math.exp(nll / (rows.numel() - len(rows))), 2)
        found["bits_per_byte"][name] = round(nll / math.log(2) / len(tokenizer.decode(rows.flatten()).encode()), 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=list(SIZES), default="5m")
    parser.add_argument("--steps", type=int, default=1136, help=f"batches of {BATCH} windows (default 1136)")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints (default 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resume", action="store_true")
    a = parser.parse_args()
    work = a.out.with_name(a.out.name + ".partial")
    if a.out.exists() or (work.exists() and not a.resume):
        raise SystemExit(f"{a.out if a.out.exists() else work} exists: remove it, or go on with --resume")
    work.mkdir(parents=True, exist_ok=True)

    console = Console()
    texts, held = split(corpora())
    tokenizer = train_tokenizer(texts, VOCABULARY, 2 * LENGTH)
    end = tokenizer.convert_tokens_to_ids(END)
    ids = torch.tensor([i for text in texts for i in [*tokenizer(text, verbose=False)["input_ids"], end]])
    model = new_model(a.size, a.seed).to(a.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.1)
    first = load_state(work, model, optimizer)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(f"{len(ids) / 1e6:.2f}M tokens to train on, {parameters / 1e6:.2f}M parameters, from step {first}")
    begin, losses = time.perf_counter(), []
    for step in range(first, a.steps):
        losses.append(one_step(model, optimizer, ids, step, a))
        if (step + 1) % a.every == 0 or step + 1 == a.steps:
            speed = BATCH * LENGTH * len(losses) / (time.perf_counter() - begin)
            console.print(f"step {step + 1}: loss {sum(losses[-50:]) / len(losses[-50:]):.3f}, {speed:.0f} tokens/s")
            save_state(work, step + 1, model, optimizer)
    report = {"parameters": parameters, "steps": a.steps, "seed": a.seed, **judge(model.eval(), tokenizer, held)}
    console.print(report)
    model.half().save_pretrained(work)
    tokenizer.save_pretrained(work)
    write_json(report, work / "report.json")
    for file in (*work.glob("step-*.safetensors"), work / "state.json"):
        file.unlink()
    shutil.move(work, a.out)


if __name__ == "__main__":
    main()
