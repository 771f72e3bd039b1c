"""Merging the experts of a mixture, beside leaving out those that are asked least, at equal bytes.

    python benchmarks/experts.py [--ratios 0.75 0.5] [--methods ...] [--steps 300] [--samples 32] [--threads 1]
                                 [--json FILE] [--quick]

The mixture is made by this script: a Mixtral of 8 experts, 2 for a token, grown out of the decoder of `models/`. Every
expert starts as the decoder's MLP with half of its hidden units drawn anew, so that experts differ, and the whole is
trained on the texts of corpora.py. It is kept in eckart's cache folder. A ratio is of the bytes of the experts;
perplexity and KL to the whole mixture are on the windows of quality.py's decoder task.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

import eckart
from common import machine, table, write_json
from corpora import corpora
from eckart.calibration.data import load_texts, token_batches
from eckart.calibration.wikipedia import articles
from eckart.downloads import build_once
from eckart.evaluation import agreement
from models import decoder, load
from pretrain_decoder import split
from tasks import UNSEEN

EXPERTS, ASKED, ANEW = 8, 2, 0.5
BATCH, LENGTH, RATE = 16, 128, 1e-3
WINDOWS, SIZE = 256, 64
"""Tokens of a window that is judged on, and how many."""

Cut = Callable[[nn.Module, float, list[dict[str, Tensor]]], nn.Module]


def mixture(steps: int) -> MixtralForCausalLM:
    """The trained mixture, made if it is not there."""
    folder = build_once(f"models/mixture-1-{steps}", lambda target: grown(steps).half().save_pretrained(target))
    return MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def grown(steps: int) -> MixtralForCausalLM:
    """A mixture whose experts start from the decoder's MLPs, after so many steps."""
    torch.manual_seed(0)
    small: Any = load("decoder", torch.float32)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
             "bos_token_id", "eos_token_id")  # fmt: skip
    config = {name: getattr(small.config, name) for name in names}
    model = MixtralForCausalLM(MixtralConfig(**config, num_local_experts=EXPERTS, num_experts_per_tok=ASKED))
    trained = small.state_dict()
    model.load_state_dict({n: t for n, t in trained.items() if ".mlp." not in n}, strict=False)
    for block, old in zip(model.model.layers, small.model.layers, strict=True):
        for e in range(EXPERTS):
            new = torch.rand(old.mlp.gate_proj.out_features) < ANEW
            parts = [_redrawn(m.weight.detach(), new) for m in (old.mlp.gate_proj, old.mlp.up_proj)]
            block.mlp.experts.gate_up_proj.data[e] = torch.cat(parts)
            block.mlp.experts.down_proj.data[e] = _redrawn(old.mlp.down_proj.weight.detach().T, new).T
    tokenizer = AutoTokenizer.from_pretrained(decoder())
    ids = token_batches(split(corpora())[0], tokenizer, samples=None, length=LENGTH).ids
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, cycle_momentum=False)
    for _ in range(steps):
        rows = ids[torch.randint(len(ids), (BATCH,))]
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=rows, labels=rows, output_router_logits=True).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


def _redrawn(rows: Tensor, new: Tensor) -> Tensor:
    """Some rows drawn from a normal distribution of the matrix's own mean and deviation."""
    return torch.where(new[:, None], rows.mean() + rows.std() * torch.randn(rows.shape), rows)


def merged(model: nn.Module, ratio: float, data: list[dict[str, Tensor]], **settings: Any) -> nn.Module:
    """By submoe."""
    held = sum(2 * p.numel() for p in model.parameters())
    budget = f"{int(held - (1 - ratio) * stacked(model))}B"
    return eckart.compress(deepcopy(model).half(), "submoe", budget=budget, data=data, **settings).model.float()


def dropped(model: Any, ratio: float, data: list[dict[str, Tensor]]) -> nn.Module:
    """Without the experts of every layer that calibration data ask for least."""
    model = deepcopy(model)
    count = int(ratio * EXPERTS)
    for block in model.model.layers:
        asked: Tensor = torch.zeros(EXPERTS)

        def note(router: nn.Module, args: Any, output: Any, asked: Tensor = asked) -> None:
            logits = F.linear(args[0].reshape(-1, args[0].shape[-1]), router.weight)  # type: ignore[arg-type]
            asked += F.one_hot(logits.topk(ASKED).indices, EXPERTS).sum((0, 1))

        hook = block.mlp.gate.register_forward_hook(note)
        with torch.no_grad():
            for batch in data:
                model(**batch)
        hook.remove()
        keep = asked.topk(count).indices.sort().values
        mlp = block.mlp
        for parent, name in ((mlp.gate, "weight"), (mlp.experts, "gate_up_proj"), (mlp.experts, "down_proj")):
            setattr(parent, name, nn.Parameter(getattr(parent, name).detach()[keep]))
        mlp.gate.num_experts = mlp.experts.num_experts = count
    return model


def stacked(model: nn.Module) -> int:
    """Bytes of all experts in float16."""
    return sum(2 * p.numel() for n, p in model.named_parameters() if ".experts." in n)


WAYS: dict[str, Cut] = {
    "left out, the least asked": dropped,
    "submoe": merged,
    "submoe, units as they lie": partial(merged, align=False),
    "submoe, each layer by itself": partial(merged, window=1),
    "submoe with a low rank": partial(merged, form="low_rank()"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.75, 0.5], help="of the experts' bytes")
    parser.add_argument("--methods", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--steps", type=int, default=300, help="that the mixture is trained (default 300)")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 128 tokens (default 32)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="two steps, a few windows")
    a = parser.parse_args()
    if min(a.ratios) * EXPERTS < ASKED:
        parser.error(f"--ratios: a token is sent to {ASKED} of {EXPERTS} experts, so at least {ASKED / EXPERTS:g} stay")
    if a.quick:
        a.steps, a.samples = 2, 4
    torch.set_num_threads(a.threads)
    console, model = Console(), mixture(a.steps)
    tokenizer, text = AutoTokenizer.from_pretrained(decoder()), "\n".join(articles())
    tokens = token_batches(load_texts("builtin"), tokenizer, samples=a.samples, length=LENGTH, seed=0)
    size = 4 if a.quick else SIZE
    judged = token_batches([text[-int(UNSEEN * len(text)) :]], tokenizer, samples=size, length=WINDOWS, seed=0)
    whole = agreement(model, model, judged).original.value
    settings = {k: getattr(a, k) for k in ("ratios", "steps", "samples")}
    report: dict[str, Any] = {"machine": machine(), "settings": settings, "original": whole, "rows": []}
    made = table(f"{EXPERTS} experts, {ASKED} for a token; perplexity {whole:.2f}",
                 ["ratio", "method"], ["bytes of experts", "perplexity", "KL", "top-1", "CPU s"])  # fmt: skip
    for ratio in a.ratios:
        for name in a.methods:
            begin = time.process_time()
            cut = WAYS[name](model, ratio, list(tokens.batches(4)))
            seconds = time.process_time() - begin
            found = agreement(model, cut, judged)
            kept = sum(t.numel() * 2 for n, t in cut.state_dict().items() if ".experts." in n and t.is_floating_point())
            row = {"ratio": ratio, "method": name, "kept": kept / stacked(model), "perplexity": found.compressed.value,
                   "KL": found.kl, "top-1": found.top1, "seconds": seconds}  # fmt: skip
            report["rows"].append(row)
            if a.json:
                write_json(report, a.json)
            made.add_row(f"{ratio:g}", name, f"{row['kept']:.3f}", f"{row['perplexity']:.2f}", f"{row['KL']:.4f}",
                         f"{row['top-1']:.1%}", f"{seconds:.0f}")  # fmt: skip
    console.print(made)


if __name__ == "__main__":
    main()
