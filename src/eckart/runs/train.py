"""A training run on disk: from a file of settings to an ordinary model folder, resumable at any moment."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eckart.checkpoint.layout import save_json
from eckart.checkpoint.source import no_bars
from eckart.downloads import Progress, silent
from eckart.evaluation import perplexity
from eckart.jobs.folder_job import versions
from eckart.jobs.place import MODEL
from eckart.optimizers import plain_linears
from eckart.runs.build import (
    check_words,
    model_for,
    optimizer_for,
    structured,
    texts_of,
    tokenizer_for,
    windows_of,
)
from eckart.runs.config import Config
from eckart.runs.loop import Loop
from eckart.runs.page import training_report
from eckart.runs.read import read_yaml
from eckart.runs.record import METRICS, TENSORBOARD, last_loss, on_disk, read_metrics, restore, run_steps

FIGURES = ("weight_bytes", "gradient_bytes", "state_bytes", "activation_bytes", "peak_memory")


@dataclass(frozen=True)
class Trained:
    """What came of a run.

    Attributes:
        folder: with the model, its tokenizer, `metrics.jsonl`, `train.json` and `report.html`.
        parameters: of the model while it was trained.
        steps: of the optimiser.
        loss: mean of the last twentieth of the steps, in nats.
        perplexity: on the windows that were held out, of the model as it is saved; None where there are none.
        tokens_per_second: the median.
        bytes: at the last step, counted (see `eckart.runs.loop.Measured`).
    """

    folder: str
    parameters: int
    steps: int
    loss: float
    perplexity: float | None
    tokens_per_second: float
    bytes: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def train(
    config: Config | str | Path, *, resume: bool = False, overwrite: bool = False, progress: Progress = silent
) -> Trained:
    """Train a decoder as the settings say, and save it as a Hugging Face folder.

    All work is done in `<output>.partial`, which stays when the run is cut off; the same call with `resume` goes on
    from its last checkpoint, and ends with the same weights as a run that was not cut. `output` appears at the end.
    The first Ctrl-C lets the step end and saves it; a second one does not wait.

    Args:
        config: the settings, or the YAML file that holds them.

    Raises:
        ValueError: a setting, a model or a text that does not do.
        FileExistsError: `output` is there already, or an unfinished run is, and `overwrite` was not asked for.
        RuntimeError: the loss is not finite.
        OSError: something could not be written.
    """
    settings = config if isinstance(config, Config) else read_yaml(Path(config), Config)
    check_words(settings)
    out = Path(settings.output).expanduser().resolve()
    if settings.model.folder and Path(settings.model.folder).expanduser().resolve() == out:
        raise ValueError(f"output: {settings.output} is the folder of the model itself: choose another one")
    job = {**settings.to_json(), "versions": versions()}
    on_disk(out, job, lambda work: _train(settings, work, progress), resume, overwrite)
    done = json.loads((out / "train.json").read_text(encoding="utf-8"))
    return Trained(settings.output, **done["result"])


def _train(settings: Config, work: Path, progress: Progress) -> None:
    """Train within a working folder until its folder `model` is finished."""
    texts = texts_of(settings.data, progress)
    tokenizer = tokenizer_for(settings, texts, work / "tokenizer")
    windows, held = windows_of(texts, tokenizer, settings.data, progress)
    del texts
    model = model_for(settings, tokenizer)
    schedule = structured(model, settings)
    optimizer = optimizer_for(model, settings.optimizer, settings.seed)
    parameters = sum(p.numel() for p in model.parameters())
    loop = Loop(model, optimizer, windows, settings.training, schedule=schedule, seed=settings.seed)
    restore(loop, work)
    run_steps(loop, work, progress)
    finish(loop)
    found = perplexity(model, held, settings.training.batch, progress=progress).value if len(held) else None
    target = work / MODEL
    with no_bars():
        model.eval().save_pretrained(target)
        tokenizer.save_pretrained(target)
    shutil.copy(work / METRICS, target / METRICS)
    if (work / TENSORBOARD).exists():
        shutil.copytree(work / TENSORBOARD, target / TENSORBOARD, dirs_exist_ok=True)
    lines = read_metrics(work)
    speeds = sorted(line["tokens_per_second"] for line in lines)
    result = {
        "parameters": parameters, "steps": loop.steps, "loss": last_loss(lines), "perplexity": found,
        "tokens_per_second": speeds[len(speeds) // 2], "bytes": {name: lines[-1][name] for name in FIGURES},
    }  # fmt: skip
    save_json({"settings": settings.to_json(), "versions": versions(), "result": result}, target / "train.json")
    training_report(target)


def finish(loop: Loop) -> None:
    """Leave in the model of a loop what is to be saved: no stand-in that only training needs."""
    if loop.schedule is not None:
        loop.schedule.finish()
    plain_linears(loop.model)
