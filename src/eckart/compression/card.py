"""The model card that a saved folder carries."""

from __future__ import annotations

from typing import Any

from eckart.checkpoint.source import Source
from eckart.compression.result import Result

LOAD = """```python
import eckart
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
```"""


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
            rows.append((f"mean relative squared error, {label}", f"{totals[name]:.6f}"))
    lines = ["---", "library_name: transformers", "tags:", "- eckart", "- compressed"]
    if source.kind == "hub":
        lines.append(f"base_model: {source.spec}")
    lines += ["---", "", f"# {source.spec}, compressed by eckart", ""]
    if source.note:
        lines += [source.note, ""]
    lines += ["| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in rows), ""]
    lines += ["## How it was made", "", *(f"- {k}: `{v}`" for k, v in settings.items()), ""]
    lines += ["## How to load it", "", LOAD.format(folder="path/to/this/folder"), ""]
    return "\n".join(lines)
