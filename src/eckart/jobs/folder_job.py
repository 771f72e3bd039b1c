"""The main job on disk: from a model folder to a compressed one, resumable at any moment and written all at once."""

from __future__ import annotations

import ctypes
import hashlib
import json
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from eckart.allocation import Budget
from eckart.calibration.store import OUTSIDE, fingerprint
from eckart.calibration.stream import Batch
from eckart.calibration.subject import block_names, outside
from eckart.checkpoint.folder import Folder, Output, part_state, read_config
from eckart.checkpoint.hf import FORMAT, METHOD, describe, reconfigure
from eckart.checkpoint.layout import save_json
from eckart.checkpoint.source import Source
from eckart.checkpoint.ties import shared, tied_keys
from eckart.downloads import Progress, silent
from eckart.jobs.card import model_card
from eckart.jobs.engine import Engine, Persistence
from eckart.jobs.method import Method
from eckart.jobs.place import MODEL, Place
from eckart.jobs.plan import Layer, Plan, layers_from_json
from eckart.jobs.result import Result
from eckart.jobs.solve import Executor

M_MMAP_THRESHOLD = -3
"""glibc's number for the size from which memory is mapped for one allocation, and unmapped when that is freed."""


class Disk(Persistence):
    """Keeps the plan and every finished part in a working folder, each in a file that is whole or not there."""

    def __init__(self, work: Path, folder: Folder):
        self.work, self.folder = work, folder
        blocks = block_names(folder.model)
        self.names = [*([block] for block in blocks), outside(folder.model, blocks)]
        self.output = Output(work / MODEL, len(self.names))
        self.stand_ins: dict[str, Any] = {}
        self.tied: dict[str, str] = {}

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
        return len(self.names) - 1 if part == OUTSIDE else part

    def done(self, part: int) -> list[Layer] | None:
        if not self._record(part).exists():
            return None
        data = json.loads(self._record(part).read_text(encoding="utf-8"))
        self.stand_ins.update(data["modules"])
        self.tied.update(data["tied"])
        return layers_from_json(data["layers"])

    def finish_part(self, part: int, layers: list[Layer]) -> None:
        model, names = self.folder.model, self.names[self._index(part)]
        state = part_state(model, names, tied_keys(model), self.folder.storage_dtype)
        self.output.write(self._index(part), state)
        modules = {f"{n}.{k}".rstrip("."): v for n in names for k, v in describe(model.get_submodule(n)).items()}
        self.stand_ins.update(modules)
        tied = shared(model)
        self.tied.update(tied)
        save_json({"modules": modules, "tied": tied, "layers": [asdict(layer) for layer in layers]}, self._record(part))
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
    there and ends with the same bytes. `out` appears at the end, whole. A dry run leaves nothing behind.

    Raises:
        FileExistsError: `out` is there already, or an unfinished run is, and `overwrite` was not asked for.
        ValueError: the model, the data or the budget do not allow it.
        OSError: something could not be written; what is done is kept for `resume`.
    """
    started = time.perf_counter()
    target = out.resolve()
    if target == source.folder.resolve():
        raise ValueError(f"{out} is the folder of the model itself: choose another one")
    give_back_from(1 << 17)  # all weights that making the skeleton allocates for a moment
    folder = Folder(source)
    give_back_from(1 << 20)  # mapping costs time, too
    made: dict[str, Any] = {"seed": seed, "executor": executor, "progress": progress}
    made["statistics"] = None if statistics is None else statistics / source_print(source)
    if dry_run:
        with tempfile.TemporaryDirectory(prefix=f"{target.name}.dry-run-", dir=_existing(target.parent)) as scratch:
            return Result.of_plan(Engine(folder, method, budget, batches, Path(scratch), **made).plan(), settings)
    place = Place(target)
    words = {"batches": fingerprint(batches), "source": source_print(source), "versions": versions()}
    place.enter(settings | words, resume, overwrite)
    try:
        disk = Disk(place.work, folder)
        engine = Engine(folder, method, budget, batches, place.work, persistence=disk, **made)
        plan = engine.plan()
        changes = method.config_changes(plan)
        reconfigure(folder.model, changes)
        run = engine.fit(plan)
        result = Result.of_run(run, settings)
        config = _config(source, folder, disk, settings) | changes
        files = {
            "eckart.json": json.dumps(record(result, source, config), indent=1, ensure_ascii=False) + "\n",
            "README.md": model_card(result, source, config),
        }
        if not place.moved:
            disk.output.complete(source.folder, config, files)
            place.move()
    except (OSError, MemoryError, RuntimeError, KeyboardInterrupt) as e:  # another attempt may do better
        e.add_note(f"nothing that was there before is changed, and --resume goes on with what is done in {place.work}")
        raise
    except Exception:
        place.forget()
        raise
    result.folder = out
    result.peak_memory = peak_resident()
    result.seconds["total"] = time.perf_counter() - started
    save_json(_timings(result), place.work / "run.json")
    (place.work / "run.json").replace(target.with_name(target.name + ".run.json"))
    place.leave()
    return result


def give_back_from(size: int) -> None:
    """Let glibc give freed tensors of this many bytes back at once, instead of keeping ever more of them in pieces."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, size)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return folder if folder.is_dir() else _existing(folder.parent)


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


def _config(source: Source, folder: Folder, disk: Disk, settings: dict[str, Any]) -> dict[str, Any]:
    config = read_config(source.folder)
    config["dtype"] = str(folder.storage_dtype).removeprefix("torch.")
    config.pop("torch_dtype", None)
    history = [{**settings, "versions": versions()}]
    ordered = {name: disk.stand_ins[name] for name in sorted(disk.stand_ins)}
    described = {"modules": ordered, "tied": disk.tied, "history": history}
    config["quantization_config"] = {"quant_method": METHOD, "format": FORMAT, **described}
    return config


def record(result: Result, source: Source, config: dict[str, Any]) -> dict[str, Any]:
    """What eckart.json holds: everything about the job that is the same whenever it is repeated."""
    return {
        "eckart": version("eckart"),
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
        "extra": result.extra,
        "remarks": result.remarks,
        "totals": result.totals(),
    }


def versions() -> dict[str, str]:
    """Of what decides the bytes of a result."""
    return {
        "eckart": version("eckart"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def source_print(source: Source) -> str:
    """A hash of the config and of the sizes and times of the weight files."""
    digest = hashlib.sha256((source.folder / "config.json").read_bytes())
    for path in sorted(source.folder.glob("*.safetensors")):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]
