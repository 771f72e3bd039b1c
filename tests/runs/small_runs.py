"""Settings of runs that take a second, as a YAML file beside a text and a model with a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

import tiny

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def settings(folder: Path, **sections: Any) -> dict[str, Any]:
    """A Llama of two blocks and the word tokenizer of `tiny`, eight steps; `sections` are merged in."""
    if not (folder / "m").exists():
        tiny.save_model(folder / "m")
        tiny.save_text(folder / "t.txt", words=1500)
    made: dict[str, Any] = {
        "output": str(folder / "out"),
        "model": {"tokenizer": str(folder / "m"), "num_key_value_heads": 2, **SIZES},
        "data": {"texts": str(folder / "t.txt"), "length": 16, "held_out": 0.1},
        "training": {"steps": 8, "batch": 4, "warmup": 2, "save_every": 3},
        "optimizer": {"name": "adamw", "lr": 3e-3},
    }
    for name, section in sections.items():
        made[name] = {**made.get(name, {}), **section} if isinstance(section, dict) else section
    return made


def write(folder: Path, **sections: Any) -> Path:
    """The same as a file."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings(folder, **sections)), encoding="utf-8")
    return path


def weights(folder: Path) -> dict[str, str]:
    """Hashes of the files that a run's settings decide."""
    return {k: v for k, v in tiny.hashes(folder).items() if k.endswith((".safetensors", "config.json"))}
