"""The other process of `FormContract`: rebuilds forms from their text and tensors, and writes what they compute."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from eckart.checkpoint.layout import save_tensors
from eckart.forms import parse


def main(folder: Path) -> None:
    """For every case of `cases.json`: from `<i>.state` and `<i>.x` to `<i>.found`, all safetensors."""
    job = json.loads((folder / "cases.json").read_text())
    for module in job["imports"]:
        importlib.import_module(module)
    for i, (text, (out, in_), dtype) in enumerate(job["cases"]):
        module = parse(text).build((out, in_), dtype=getattr(torch, dtype))
        module.load_state_dict(load_file(folder / f"{i}.state.safetensors"))
        x = load_file(folder / f"{i}.x.safetensors")["x"]
        with torch.no_grad():
            found = {"y": module(x), "dense": module.dense()}
        save_tensors(found, folder / f"{i}.found.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
