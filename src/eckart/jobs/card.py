"""The model card that a saved folder carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eckart.checkpoint.layout import save_json
from eckart.checkpoint.source import Source
from eckart.files import whole
from eckart.jobs.result import Result

LOAD = """```python
import eckart
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
```"""

BEGIN, END = "<!-- evaluation -->", "<!-- end of evaluation -->"


def model_card(result: Result, source: Source, config: dict[str, Any]) -> str:
    """Markdown with what was done, what was measured, and how to load the model."""
    settings = {k: v for k, v in result.settings.items() if v is not None}
    totals = result.totals()
    changed = [layer for layer in result.layers if layer.form != "dense()"]
    rows = [
        ("bytes of the weights before", f"{result.bytes_before:,}"),
        ("bytes of the weights after", f"{result.bytes_after:,} ({result.ratio:.3f})"),
        ("budget", f"{result.budget:,}"),
        ("layers changed", f"{len(changed)} of {len(result.layers)} targeted"),
    ]
    for name, label in (("predicted_error", "predicted"), ("measured_error", "measured")):
        if totals[name] is not None:
            rows.append((f"mean relative squared error, {label}", f"{totals[name]:.3g}"))
    lines = ["---", "library_name: transformers", "tags:", "- eckart", "- compressed"]
    if source.kind == "hub":
        lines.append(f"base_model: {source.spec}")
    lines += ["---", "", f"# {source.spec}, compressed by eckart", ""]
    if source.note:
        lines += [source.note, ""]
    for remark in result.remarks:
        lines += [f"{remark[:1].upper()}{remark[1:]}.", ""]
    lines += ["| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in rows), ""]
    lines += [BEGIN, END, ""]
    lines += ["## How it was made", "", *(f"- {k}: `{v}`" for k, v in settings.items()), ""]
    lines += ["## How to load it", "", LOAD.format(folder="path/to/this/folder"), ""]
    return "\n".join(lines)


def remember_evaluation(folder: Path, found: dict[str, Any]) -> None:
    """Keep what was measured beside the model, and show it in the model card."""
    save_json(found, folder / "evaluation.json")
    card = folder / "README.md"
    if not card.is_file():
        return
    before, begin, rest = card.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        with whole(card) as temporary:
            temporary.write_text(f"{before}{BEGIN}\n{_evaluation(found)}\n{END}{after}", encoding="utf-8")


def _evaluation(found: dict[str, Any]) -> str:
    original = found.get("original") or {}
    rows = [
        ("perplexity", found.get("perplexity"), found.get("perplexity_original")),
        ("KL from the original, nats a token", found.get("kl"), None),
        ("top-1 agreement", found.get("top1_agreement"), None),
        ("bytes on disk", found.get("bytes_disk"), original.get("bytes_disk")),
        *(
            (k.replace("_", " "), found.get(k), original.get(k))
            for k in ("prefill_tokens_per_second", "decode_tokens_per_second")
        ),
    ]
    lines = ["## Measured", "", "| | this model | original |", "| --- | --- | --- |"]
    lines += [f"| {name} | {_show(own)} | {_show(other)} |" for name, own, other in rows if own is not None]
    return "\n".join([*lines, "", f"On {found.get('text') or 'text of the user'}.", ""])


def _show(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
