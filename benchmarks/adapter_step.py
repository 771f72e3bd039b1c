"""A training step of LoRA-shaped adapters beside PEFT's LoRA of equal rank on the same model.

    python benchmarks/adapter_step.py [--quick] [--layers 4] [--width 256] [--rank 8 --rank 32] [--batch 4]
        [--tokens 64] [--pairs 60] [--threads 1] [--json FILE]

A Llama with random weights, an adapter on all linear layers but the head, and steps of forward, backward and AdamW on
one batch. Every adapter is measured step by step in turn with PEFT's LoRA, which of the two goes first changes from
pair to pair; CPU seconds of the process, so that waiting for a core does not count. The ratio is the median over
pairs, "spread" its quartiles. "lora" is the plain product of two trained factors, put on layers by this library:
what its methods of that shape are made of. "peft again" is PEFT's LoRA beside itself: how far from 1 chance alone goes.
"saved" is what autograd keeps of a forward pass, over PEFT's. The rank of PaCA is doubled, which gives it the number of
trained parameters of a LoRA on square layers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import nn

from common import machine, table, write_json
from eckart import adapters
from eckart.adapters import Adapter
from eckart.adapters.frames import Factors
from eckart.adapters.host import Site
from eckart.adapters.tuner import adapter
from eckart.runs.counting import SavedBytes


@adapter("plain_lora", family="low-rank", paper="LoRA, Hu et al., ICLR 2022, arXiv 2106.09685")
@dataclass
class PlainLoRA(Adapter):
    """LoRA as this library's layer does it."""

    rank: int = 8
    alpha: float = 16.0

    def update(self, site: Site) -> Factors:
        out, in_ = site.shape
        return Factors(torch.zeros(out, site.rank), site.uniform(site.rank, in_, bound=in_**-0.5), self.alpha / site.rank)  # fmt: skip # noqa: E501


def peft_lora(model: nn.Module, rank: int) -> Any:
    config = LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", init_lora_weights=True)
    return get_peft_model(model, config)


ADAPTERS: dict[str, Callable[[nn.Module, int], Any]] = {
    "peft again": peft_lora,
    "lora": lambda model, rank: adapters.adapt(model, PlainLoRA(rank=rank)),
    "svfit": lambda model, rank: adapters.adapt(model, "svfit", rank=rank),
    "s2_lora": lambda model, rank: adapters.adapt(model, "s2_lora", rank=rank),
    "paca": lambda model, rank: adapters.adapt(model, "paca", rank=2 * rank),
}
LORA_SHAPED = ("lora", "svfit", "s2_lora")


def llama(layers: int, width: int) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, max_position_embeddings=1024, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


class Step:
    """A model in training, and one step of it."""

    def __init__(self, model: Any, tokens: torch.Tensor):
        self.model, self.tokens = model.train(), tokens
        self.learning = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learning, lr=1e-4)

    def loss(self) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=self.tokens, labels=self.tokens).loss
        return loss

    def __call__(self) -> float:
        start = time.process_time()
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - start

    def saved(self) -> int:
        with SavedBytes(self.model) as kept:
            loss = self.loss()
        del loss
        return kept.total


def measure(name: str, rank: int, a: argparse.Namespace) -> dict[str, Any]:
    """One row: an adapter in turn with PEFT's LoRA."""
    tokens = torch.randint(0, 512, (a.batch, a.tokens), generator=torch.Generator().manual_seed(1))
    theirs = Step(peft_lora(llama(a.layers, a.width), rank), tokens)
    ours = Step(ADAPTERS[name](llama(a.layers, a.width), rank), tokens)
    for step in (theirs, ours):
        step()
    pairs = []
    for number in range(a.pairs):
        taken = {step: step() for step in ((ours, theirs) if number % 2 else (theirs, ours))}
        pairs.append((taken[ours], taken[theirs]))
    ratios = [x / y for x, y in pairs]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "adapter": name, "rank": rank, "trained": sum(p.numel() for p in ours.learning),
        "step_cpu_seconds": statistics.median(x for x, _ in pairs),
        "peft_lora_cpu_seconds": statistics.median(y for _, y in pairs),
        "ratio": statistics.median(ratios), "low": low, "high": high, "saved": ours.saved() / theirs.saved(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ten pairs at rank 8")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rank", type=int, action="append", help="may be repeated (default 8 and 32)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="of each sequence (default 64)")
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", action="append", choices=list(ADAPTERS), help="may be repeated")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    a = parser.parse_args()
    ranks = a.rank or [8, 32]
    if a.quick:
        a.pairs, ranks = 10, [8]
    torch.set_num_threads(a.threads)
    console, rows = Console(width=None if sys.stdout.isatty() else 140), []
    title = f"Llama of {a.layers} layers, width {a.width}, {a.batch} x {a.tokens} tokens, {a.threads} threads"
    columns = ["rank", "trained", "CPU ms", "PEFT LoRA ms", "ratio", "spread", "saved"]
    shown = table(title, ["adapter"], columns)
    for rank in ranks:
        for name in a.only or ADAPTERS:
            row = measure(name, rank, a)
            figures = [
                str(rank), f"{row['trained']:,}", f"{1e3 * row['step_cpu_seconds']:.1f}",
                f"{1e3 * row['peft_lora_cpu_seconds']:.1f}", f"{row['ratio']:.3f}",
                f"{row['low']:.3f}-{row['high']:.3f}", f"{row['saved']:.1%}",
            ]  # fmt: skip
            shown.add_row(name, *figures)
            console.print(f"{name}: {', '.join(figures)}", highlight=False)
            rows.append(row)
    console.print(shown)
    slower = sorted({r["adapter"] for r in rows if r["adapter"] in LORA_SHAPED and r["ratio"] > 1})
    console.print(f"At most PEFT's step: {'does not hold for ' + ', '.join(slower) if slower else 'holds'}.")
    if a.json:
        write_json({"machine": machine(), **{n: getattr(a, n) for n in ("layers", "width", "batch", "tokens", "pairs")}, "rows": rows}, a.json)  # fmt: skip # noqa: E501


if __name__ == "__main__":
    main()
