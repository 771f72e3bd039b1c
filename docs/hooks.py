"""Pages that are made from the code each time the docs are built: the catalogue and the rooms."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from peft import PeftConfig

ROOMS = {
    "linalg": "Numerics that know nothing of networks.",
    "forms": "What a compressed matrix looks like, the modules that hold its numbers, and the solvers.",
    "metrics": "Which error a fit minimises.",
    "anatomy": "Where things are in a model.",
    "calibration": "Statistics from data, block by block, in bounded memory.",
    "allocation": "One byte budget spent over all weights.",
    "checkpoint": "Where models come from, how results are stored, and how transformers loads them.",
    "jobs": "What the main job is made of: recipes, plans, the engine, solves, trials, resuming.",
    "schedules": "What changes as training goes on: one protocol for bare loops and for Trainer.",
    "compression": "The published methods, and the main job's verbs.",
    "optimizers": "Optimisers whose state lies in a subspace of each gradient.",
    "adapters": "Parameter-efficient fine-tuning, as tuners for PEFT.",
    "training": "Weights that are low-rank, sparse or both while they are trained.",
    "evaluation": "Quality, size and speed, measured.",
    "export": "Compressed models as other programs read them: PEFT, llama.cpp, ONNX.",
    "report": "One self-contained HTML page.",
    "cli": "The command line.",
    "testing": "Contract tests for forms, metrics and allocators of your own.",
}


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def on_files(files: Files, config: Any) -> Files:
    files.append(File.generated(config, "catalogue.md", content=catalogue()))
    files.append(File.generated(config, "pretrain.html", content=pretrain_page()))
    for room, lead in ROOMS.items():
        files.append(File.generated(config, f"rooms/{room}.md", content=room_page(room, lead)))
    return files


def pretrain_page() -> str:
    """The plot beside the table of benchmarks/pretrain.py."""
    sys.path.insert(0, str(BENCHMARKS))
    pretrain: Any = importlib.import_module("pretrain")
    content: str = pretrain.page(json.loads((BENCHMARKS / "results" / "pretrain.json").read_text(encoding="utf-8")))
    return content


def catalogue() -> str:
    """All methods, with their papers and settings, then the words of the expression language."""
    import eckart  # noqa: F401
    from eckart.allocation import ALLOCATORS
    from eckart.forms import FORMS
    from eckart.metrics import METRICS
    from eckart.registry import entries

    lines = ["# Catalogue", "", "Generated from the code's own registry.", ""]
    for entry in entries():
        text, meanings = described(entry.cls)
        lines += [f"## {entry.key}", "", f"*{entry.wing}, {entry.family}.* {entry.paper}", "", text, ""]
        settings = settings_of(entry.cls)
        if settings:
            lines += ["| setting | default | meaning |", "| --- | --- | --- |"]
        for name, default in settings.items():
            lines.append(f"| `{name}` | `{default if default != '' else '(empty)'}` | {meanings.get(name, '')} |")
        lines.append("")
    for words in (FORMS, *FORMS.settings, METRICS, ALLOCATORS):
        lines += [f"## {words.kind.capitalize()}s", "", "| word | settings | what it is |", "| --- | --- | --- |"]
        for name, cls in sorted(words.words.items()):
            settings = ", ".join(f"{f.name}={default_of(f)}" for f in dataclasses.fields(cls) if has_default(f))
            lines.append(
                f"| `{name}` | {settings} | {(cls.__doc__ or '').strip().splitlines()[0]} |".replace(
                    "||", "&#124;&#124;"
                )
            )
        lines.append("")
    return "\n".join(lines)


def has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def default_of(field: dataclasses.Field[Any]) -> str:
    """As it is written in an expression."""
    made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return str(made) if dataclasses.is_dataclass(made) else repr(made)


def settings_of(cls: type) -> dict[str, Any]:
    """What can be set, with its default: the fields of a dataclass, or the arguments of another class."""
    if dataclasses.is_dataclass(cls):
        made = cls()
        of_peft = {f.name for f in dataclasses.fields(PeftConfig)}  # which version, which task: PEFT fills these in
        return {f.name: getattr(made, f.name) for f in dataclasses.fields(made) if f.name not in of_peft}
    arguments = inspect.signature(cls).parameters.values()
    return {a.name: a.default for a in arguments if a.default is not inspect.Parameter.empty}


def described(cls: type) -> tuple[str, dict[str, str]]:
    """A class's docstring without its list of settings, and what its settings and those it inherits mean."""
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, listed = inspect.cleandoc(base.__doc__ or "").partition("\nArgs:\n")
        for line in re.split(r"\n {4}(?=\w)", "\n" + listed):
            name, colon, meaning = line.strip().partition(": ")
            if colon:
                meanings |= {n.strip(): " ".join(meaning.split()) for n in name.split(",")}
    return inspect.cleandoc(cls.__doc__ or "").partition("\nArgs:\n")[0], meanings


def room_page(room: str, lead: str) -> str:
    """Every module of a room, by its docstrings."""
    package = importlib.import_module(f"eckart.{room}")
    lines = [f"# {room}", "", lead, "", f"::: eckart.{room}", "    options:", "      members: false", ""]
    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")):
        lines += [f"## {room}.{module}", "", f"::: eckart.{room}.{module}", ""]
    return "\n".join(lines)
