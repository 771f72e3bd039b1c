"""How a model was made: settings, versions and the command that repeats it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from html import escape
from typing import Any

from eckart.report.numbers import MISSING, count, size
from eckart.report.page import facts, figure

OPTIONS = ("method", "form", "metric", "allocation", "budget", "data", "samples", "length", "batch_size", "seed")


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
        "Checkpoint": f"{size(model.get('bytes'))} as {_plain(model.get('dtype'))}",
        "Budget": f"{budget(record)}, {size(part(record, 'budget').get('bytes'))}",
    }
    if "parameters" in model:
        about["Parameters"] = count(model["parameters"])
    if model.get("note"):
        about["Note"] = _plain(model["note"])
    if isinstance(remarks := record.get("remarks"), list) and remarks:
        about["Plan"] = "; ".join(map(_plain, remarks))
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
    """The command line that repeats a job, quoted for a shell, one option a line.

    What `eckart compress` has no option for is a setting of the method.
    """
    model, job = part(record, "model"), part(record, "job")
    options = [("--output", name)]
    for key in OPTIONS:
        if job.get(key) is not None:
            options.append((f"--{key.replace('_', '-')}", str(job[key])))
    for key, value in job.items():
        if key not in OPTIONS:
            options.append(("--set", f"{key}={_plain(value, none='none')}"))
    first = shlex.join(["eckart", "compress", str(model.get("source") or "MODEL")])
    return " \\\n    ".join([first, *map(shlex.join, options)])


def _plain(value: object, none: str = "not recorded") -> str:
    if value is None:
        return none
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
