"""The main job on disk: from a model folder to a compressed one, resumable at any moment and written all at once."""

from __future__ import annotations

import hashlib
import json
import platform
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import eckart
from eckart.allocation import Budget
from eckart.calibration.store import OUTSIDE
from eckart.calibration.stream import Batch
from eckart.checkpoint.folder import Folder, Output, part_state, read_config
from eckart.checkpoint.hf import FORMAT, METHOD, describe, reconfigure
from eckart.checkpoint.layout import save_json
from eckart.checkpoint.source import Source
from eckart.compression.card import model_card
from eckart.compression.engine import Engine, Persistence, tied_names
from eckart.compression.plan import Layer, Plan, layers_from_json
from eckart.compression.recipe import Method
from eckart.compression.result import Result
from eckart.compression.solve import Executor
from eckart.downloads import Progress, silent


class Disk(Persistence):
    """Keeps the plan and every finished part in a working folder, each in a file that is whole or not there."""

    def __init__(self, work: Path, folder: Folder, method: Method, blocks: int):
        self.work, self.folder = work, folder
        self.output = Output(work, blocks + 1)
        self.stand_ins: dict[str, Any] = {}
        self.names: dict[int, list[str]] = {}

    def load_plan(self) -> tuple[Plan, list[float]] | None:
        path = self.work / "plan.json"
        if not path.exists():
            return None
        data = json.loads(path.read_text(encoding="utf-8"))
        return Plan.from_json(data["plan"]), data["influence"]

    def save_plan(self, plan: Plan, influence: list[float]) -> None:
        save_json({"plan": plan.to_json(), "influence": influence}, self.work / "plan.json")

    def _record(self, part: int) -> Path:
        return self.work / f"part-{self._index(part):05d}.json"

    def _index(self, part: int) -> int:
        return self.output.parts - 1 if part == OUTSIDE else part

    def done(self, part: int) -> list[Layer] | None:
        if not self._record(part).exists():
            return None
        data = json.loads(self._record(part).read_text(encoding="utf-8"))
        self.stand_ins.update(data["modules"])
        return layers_from_json(data["layers"])

    def finish_part(self, part: int, layers: list[Layer]) -> None:
        model, names = self.folder.model, self.names[part]
        state = part_state(model, names, tied_names(model), self.folder.storage_dtype)
        self.output.write(self._index(part), state)
        modules = {f"{n}.{k}".rstrip("."): v for n in names for k, v in describe(model.get_submodule(n)).items()}
        self.stand_ins.update(modules)
        save_json({"modules": modules, "layers": [asdict(layer) for layer in layers]}, self._record(part))
        for name in names:
            release(model.get_submodule(name))


def release(module: nn.Module) -> None:
    """Let go of all weights; the module keeps its shape."""
    for inner in module.modules():
        for key, value in inner._parameters.items():
            if value is not None:
                inner._parameters[key] = nn.Parameter(value.to("meta"), requires_grad=False)


def compress_folder(
    source: Source, out: Path, method: Method, budget: Budget, batches: Sequence[Batch], *,
    settings: dict[str, Any], seed: int = 0, resume: bool = False, overwrite: bool = False, dry_run: bool = False,
    executor: Executor | None = None, statistics: Path | None = None, progress: Progress = silent,
) -> Result:  # fmt: skip
    """Compress the model in `source` into the new folder `out`.

    All work is done in `<out>.partial`, which stays when the run is cut off; the same call with `resume` goes on from
    there and ends with the same bytes. `out` appears at the end, whole.

    Raises:
        FileExistsError: `out` is there already (and `overwrite` was not asked for), or an unfinished run is.
        ValueError: the model, the data or the budget do not allow it.
    """
    started = time.perf_counter()
    work = out.with_name(out.name + ".partial")
    if out.exists() and not overwrite and not dry_run:
        raise FileExistsError(f"{out} exists already: choose another folder, or pass --overwrite")
    _enter(work, settings | {"batches": fingerprint(batches), "source": source_print(source)}, resume)
    folder = Folder(source)
    engine_settings: dict[str, Any] = {
        "seed": seed,
        "executor": executor,
        "progress": progress,
        "statistics": statistics,
    }
    disk = Disk(work, folder, method, 0)
    engine = Engine(folder, method, budget, batches, work, persistence=disk, **engine_settings)
    disk.output.parts = len(engine.blocks) + 1
    disk.names = {part: engine.job.module_names(part) for part in engine.job.parts}
    plan = engine.plan()
    if dry_run:
        return Result.of_plan(plan, settings)
    changes = method.config_changes(plan)
    reconfigure(folder.model, changes)
    run = engine.fit(plan)
    result = Result.of_run(run, settings)
    config = _config(source, folder, disk.stand_ins, settings) | changes
    files = {
        "eckart.json": json.dumps(record(result, source, config), indent=1, ensure_ascii=False) + "\n",
        "README.md": model_card(result, source, config),
    }
    with _replacing(out, overwrite):
        disk.output.finish(out, source.folder, config, files)
    shutil.rmtree(work)
    result.folder = out
    result.peak_memory = peak_resident()
    result.seconds["total"] = time.perf_counter() - started
    save_json(_timings(result), out.with_name(out.name + ".run.json"))
    return result


def _timings(result: Result) -> dict[str, Any]:
    """What differs between two runs of one job, kept beside the folder so that the folder does not."""
    return {
        "seconds": result.seconds,
        "predicted": {"seconds": result.predicted_seconds, "peak_memory": result.predicted_memory},
        "peak_memory": result.peak_memory,
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
    }


def peak_resident() -> int:
    """Most bytes that this process ever held in memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _enter(work: Path, job: dict[str, Any], resume: bool) -> None:
    """Make the working folder, or see that the one there belongs to this very job."""
    path = work / "job.json"
    job = json.loads(json.dumps(job | {"versions": versions()}))
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found != job and resume:
            differ = sorted(k for k in job.keys() | found.keys() if job.get(k) != found.get(k))
            raise ValueError(f"{work} holds an unfinished run with other settings ({', '.join(differ)}): repeat those, or delete the folder")  # fmt: skip # noqa: E501
        if not resume and found != job:
            shutil.rmtree(work)
        elif not resume and any(work.glob("part-*.json")):
            raise FileExistsError(f"{work} holds an unfinished run of this very job: pass --resume to go on, or delete the folder")  # fmt: skip # noqa: E501
    elif work.exists() and any(work.iterdir()):
        raise FileExistsError(f"{work} is in the way and was not made by eckart: move it")
    work.mkdir(parents=True, exist_ok=True)
    save_json(job, path)


@contextmanager
def _replacing(out: Path, overwrite: bool) -> Any:
    """Within the context, `out` is free; an earlier one is brought back if anything fails."""
    aside = out.with_name(out.name + ".replaced")
    if out.exists() and overwrite:
        out.rename(aside)
    try:
        yield
    except BaseException:
        if aside.exists() and not out.exists():
            aside.rename(out)
        raise
    if aside.exists():
        shutil.rmtree(aside)


def _config(source: Source, folder: Folder, modules: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    config = read_config(source.folder)
    config["dtype"] = str(folder.storage_dtype).removeprefix("torch.")
    config.pop("torch_dtype", None)
    history = [{**settings, "versions": versions()}]
    ordered = {name: modules[name] for name in sorted(modules)}
    config["quantization_config"] = {"quant_method": METHOD, "format": FORMAT, "modules": ordered, "history": history}
    return config


def record(result: Result, source: Source, config: dict[str, Any]) -> dict[str, Any]:
    """What eckart.json holds: everything about the job that is the same whenever it is repeated."""
    return {
        "eckart": eckart.__version__,
        "versions": versions(),
        "model": {
            "source": source.spec,
            "note": source.note,
            "model_type": config.get("model_type"),
            "bytes": source.bytes,
            "dtype": str(source.dtype).removeprefix("torch."),
        },
        "job": result.settings,
        "budget": {"asked": result.settings.get("budget"), "bytes": result.budget},
        "layers": [layer.to_json() for layer in result.layers],
        "totals": result.totals(),
    }


def versions() -> dict[str, str]:
    """Of what decides the bytes of a result."""
    return {
        "eckart": eckart.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def fingerprint(batches: Sequence[Batch]) -> str:
    """A hash of the calibration data."""
    digest = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            value = batch[key]
            digest.update(key.encode())
            digest.update(value.cpu().numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
    return digest.hexdigest()[:16]


def source_print(source: Source) -> str:
    """A hash of the config and of the sizes and times of the weight files."""
    digest = hashlib.sha256((source.folder / "config.json").read_bytes())
    for path in sorted(source.folder.glob("*.safetensors")):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]
