"""How a model was made: settings, versions and the command that repeats it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from html import escape
from typing import Any

from eckart.report.numbers import MISSING, count, size
from eckart.report.page import facts, figure


def part(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def budget(record: Mapping[str, Any]) -> str:
    asked = part(record, "budget").get("asked") or part(record, "job").get("budget")
    return MISSING if asked is None else str(asked)


def provenance(record: Mapping[str, Any], evaluation: Mapping[str, Any], run: Mapping[str, Any], name: str) -> str:
    model, job, machine = part(record, "model"), part(record, "job"), part(run, "machine")
    about = {
        "Model": _plain(model.get("source")),
        "Type": _plain(model.get("model_type")),
        "Parameters": count(model.get("parameters")),
        "Checkpoint": f"{size(model.get('bytes'))} as {_plain(model.get('dtype'))}",
        "Budget": f"{budget(record)}, {size(part(record, 'budget').get('bytes'))}",
    }
    if machine:
        about["Machine"] = f"{_plain(machine.get('cpu'))}, {_plain(machine.get('threads'))} threads"
    if evaluation.get("text"):
        about["Evaluated on"] = _plain(evaluation["text"])
    settings = {str(key): _plain(value) for key, value in job.items()}
    versions = {"eckart": _plain(record.get("eckart"))}
    versions |= {str(key): _plain(value) for key, value in part(record, "versions").items()}
    columns = "".join(
        figure(heading, facts(pairs.items()))
        for heading, pairs in (("Model and budget", about), ("Settings", settings), ("Versions", versions))
        if pairs
    )
    again = f"<pre><code>{escape(command(record, name))}</code></pre>"
    return f'<div class="grid2">{columns}{figure("To run it again", again)}</div>'


def command(record: Mapping[str, Any], name: str) -> str:
    """The command line that repeats a job, quoted for a shell, one option a line."""
    model, job = part(record, "model"), part(record, "job")
    options = [("-o", name)]
    recipe = ("method",) if job.get("method") else ("form", "metric")
    for key in (*recipe, "budget", "data", "samples", "length", "seed"):
        if job.get(key) is not None:
            options.append((f"--{key}", str(job[key])))
    lines = [shlex.join(["eckart", "compress", str(model.get("source") or "MODEL")]), *map(shlex.join, options)]
    if job.get("sequential") is True:
        lines.append("--sequential")
    return " \\\n    ".join(lines)


def _plain(value: object) -> str:
    if value is None:
        return "not recorded"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
