"""Fine-tuning on disk: any model, any adapter, text, instructions or classes, to a PEFT folder; resumable."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from eckart.adapters import adapt, schedule
from eckart.adapters.layer import AdapterLayer
from eckart.checkpoint.layout import save_json
from eckart.checkpoint.source import Source, no_bars, resolve
from eckart.downloads import Progress, silent
from eckart.jobs.folder_job import source_print, versions
from eckart.jobs.place import MODEL
from eckart.registry import find
from eckart.runs.base import CAUSAL, CLASSES, Base, check_length, classifier, decoder, device_of
from eckart.runs.batches import Batches, on
from eckart.runs.build import optimizer_for
from eckart.runs.examples import Task
from eckart.runs.finetuning import Finetuning
from eckart.runs.judge import Judged, judge
from eckart.runs.loop import Loop
from eckart.runs.prepare import Prepared, prepare
from eckart.runs.record import METRICS, TENSORBOARD, last_loss, on_disk, read_metrics, read_state, run_steps
from eckart.settings import with_settings

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
RECORD, START = "finetune.json", "start"


@dataclass(frozen=True)
class Finetuned:
    """What came of fine-tuning.

    Attributes:
        folder: with the adapter, the tokenizer, `metrics.jsonl` and `finetune.json`.
        model: what was fine-tuned.
        adapter: key of the method.
        task: `text`, `instruction` or `classification`.
        rows: windows or examples that were trained on.
        labels: names of the classes; None where there are none.
        steps: of the optimiser.
        loss: mean of the last twentieth of the steps, in nats.
        before, after: loss (and accuracy) on the held-out rows, of the model alone and with the adapter; None where
            none were held out.
        trained: numbers that were trained, those of a new head included.
        bytes: of the adapter's weights on disk.
        seconds_per_step: the median.
        exports: `exactly` where `eckart export` writes it as a LoRA at its own ranks, `nearly` where that needs to be
            told a rank, None where it is no matrix.
        notes: what a user should know, one sentence each.
    """

    folder: str
    model: str
    adapter: str
    task: Task
    rows: int
    labels: list[str] | None
    steps: int
    loss: float
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    trained: int
    bytes: int
    seconds_per_step: float
    exports: Literal["exactly", "nearly"] | None
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class AdapterLoop(Loop):
    """A loop whose states hold what is trained, and not the frozen model.

    Args:
        frozen: names of the tensors that no step changes.
    """

    def __init__(self, *args: Any, frozen: frozenset[str], **settings: Any):
        super().__init__(*args, **settings)
        self.frozen = frozen

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in super().weights().items() if name not in self.frozen}

    def put(self, weights: dict[str, Tensor]) -> None:
        found = self.model.load_state_dict(weights, strict=False)
        lost = sorted({*found.missing_keys} - self.frozen) + sorted(found.unexpected_keys)
        if lost:
            raise RuntimeError(f"the checkpoint of this run does not fit its adapter: {lost[0]} is in one of them only; begin anew with --overwrite")  # fmt: skip # noqa: E501

    def state(self) -> dict[str, Any]:
        return super().state() | {"ranks": ranks_of(self.model)}


def finetune(
    model: str | Path, adapter: str, data: str | Path, output: str | Path, *, resume: bool = False,
    overwrite: bool = False, progress: Progress = silent, **options: Any,
) -> Finetuned:  # fmt: skip
    """Train an adapter on a frozen model, and save it as a folder that PEFT loads after `import eckart`.

    All work is done in `<output>.partial`, which stays when the run is cut off; the same call with `resume` goes on
    from its last checkpoint, and ends with the same bits as a run that was not cut. `output` appears at the end.
    The first Ctrl-C lets the step end and saves it; a second one does not wait.

    Args:
        model, adapter, data, output: see `eckart.runs.Finetuning`.
        options: its other fields, such as `steps=100, settings={"rank": 8}`.

    Raises:
        ValueError: a setting, a model, or data that do not do; the message names the layer, the row or the word.
        FileExistsError: `output` is there already, or an unfinished run is, and `overwrite` was not asked for.
        ImportError: a data set is called by name, and `datasets` is not installed.
        RuntimeError: the loss is not finite.
        OSError: something could not be written.
    """
    words = Finetuning(str(model), adapter, str(data), str(output))
    job = with_settings(words, options)
    with_settings(find(job.adapter, "adapters").cls(), _plain(job.settings))
    out = Path(job.output).expanduser().resolve()
    source = resolve(job.model, progress=progress)
    if out == source.folder.resolve():
        raise ValueError(f"output: {job.output} is the folder of the model itself: choose another one")
    check_length(source, job.length)
    asked = {**job.to_json(), "source": source_print(source), "versions": versions()}
    on_disk(out, asked, lambda work: _finetune(job, source, work, progress), resume, overwrite)
    done = json.loads((out / RECORD).read_text(encoding="utf-8"))
    return Finetuned(job.output, **done["result"])


def _finetune(job: Finetuning, source: Source, work: Path, progress: Progress) -> None:
    """Train within a working folder until its folder `model` is finished."""
    device = device_of(job.device)
    tokenizer, data = prepare(job, source, progress)
    settings = job.training(len(data.train))
    dtype = getattr(torch, job.precision)
    if data.labels is None:
        base = decoder(source, dtype)
    else:
        base = classifier(source, data.labels, tokenizer, dtype, job.seed)
    base.model.to(device)
    before = _before(base, data, job, work, progress)
    state = read_state(work, torch.device(device))
    ranks = {} if state is None else state["ranks"]
    model, frozen = adapted(job, base, data, ranks, work / START)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    torch.manual_seed(job.seed)
    follows = schedule(model)
    loop = AdapterLoop(
        model, optimizer_for(model, job.optimizer(), job.seed), data.train, settings,
        schedule=follows, seed=job.seed, frozen=frozen,
    )  # fmt: skip
    if state is not None:
        loop.load(state)
    del state
    run_steps(loop, work, progress)
    follows.finish()
    after = None if data.held is None else judge(model, data.held, job.batch_size, job.precision, progress)
    form, target = exports(model), work / MODEL
    save(model, tokenizer, source, data.task, target, work / START)
    shutil.copy(work / METRICS, target / METRICS)
    if (work / TENSORBOARD).exists():
        shutil.copytree(work / TENSORBOARD, target / TENSORBOARD, dirs_exist_ok=True)
    lines = read_metrics(work)
    seconds = sorted(line["seconds"] for line in lines)
    result = {
        "model": job.model, "adapter": job.adapter, "task": data.task, "rows": len(data.train), "labels": data.labels,
        "steps": loop.steps, "loss": last_loss(lines), "before": before and before.to_json(),
        "after": after and after.to_json(), "trained": trained, "bytes": (target / WEIGHTS).stat().st_size,
        "seconds_per_step": seconds[len(seconds) // 2], "exports": form, "notes": data.notes,
    }  # fmt: skip
    save_json({"settings": job.to_json(), "versions": versions(), "result": result}, target / RECORD)


def _before(base: Base, data: Prepared, job: Finetuning, work: Path, progress: Progress) -> Judged | None:
    """Figures of the model without an adapter, kept for a run that is resumed."""
    kept = work / "before.json"
    if data.held is None:
        return None
    if not kept.exists():
        found = judge(base.model, data.held, job.batch_size, job.precision, progress)
        save_json(found.to_json(), kept)
    return Judged(**json.loads(kept.read_text(encoding="utf-8")))


def adapted(
    job: Finetuning, base: Base, data: Prepared, ranks: dict[str, int], start: Path
) -> tuple[Any, frozenset[str]]:
    """The model with its adapter, trained tensors in float32, and the names of the tensors that stay as they are.

    A method that takes a part out of the frozen weights keeps its start in the folder `start`.

    Raises `ValueError` where the adapter does not fit: the message names the layer.
    """
    cls = find(job.adapter, "adapters").cls
    words = _plain(job.settings)
    known = {f.name for f in dataclasses.fields(cls)}
    if base.fresh:
        words["modules_to_save"] = sorted({*(words.get("modules_to_save") or []), *base.fresh})
    if "task_type" in known:
        words["task_type"] = CAUSAL if data.labels is None else CLASSES
    if "seed" in known:
        words.setdefault("seed", job.seed)
    if "start_folder" in known:
        words["start_folder"] = str(start)
    if ranks and "rank_pattern" in known:
        words["rank_pattern"] = ranks
    own = {id(p) for p in base.model.parameters()}
    model = adapt(base.model, job.adapter, data=shown(data.train, job, base.model.device), **words)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    frozen = {n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in own and not p.requires_grad}
    return model, frozenset(frozen)


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """A copy, of which nothing that PEFT changes is ours."""
    return json.loads(json.dumps(settings))


def shown(data: Batches, job: Finetuning, device: torch.device) -> list[dict[str, Any]]:
    """Batches of the rows that an adapter starts from, which the seed draws."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(job.seed))
    batches = [on(device, data.batch(rows)) for rows in order[: job.samples].split(job.batch_size)]
    return [{key: value for key, value in batch.items() if key != "use_cache"} for batch in batches]


def ranks_of(model: Any) -> dict[str, int]:
    """layer -> its own rank, where the method changed it."""
    return dict(getattr(model.peft_config[model.active_adapter], "rank_pattern", None) or {})


def save(model: Any, tokenizer: Any, source: Source, task: Task, target: Path, start: Path) -> None:
    """Write what PEFT loads, and the tokenizer. The base is called by its name on the hub, or by its folder.

    Where there is a `start`, the adapter is written relative to the base as it was before.
    """
    config = model.peft_config[model.active_adapter]
    config.base_model_name_or_path = source.spec if source.kind == "hub" else str(source.folder.resolve())
    config.task_type = CLASSES if task == "classification" else CAUSAL
    for name in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, name, None), set):
            setattr(config, name, sorted(getattr(config, name)))  # a set is written in another order each time
    words = {"path_initial_model_for_weight_conversion": str(start)} if start.exists() else {}
    with no_bars(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*have invalid shape")  # so PEFT calls layers whose rank came down to 0
        if words:  # PEFT warns of the start, which it loads as a second adapter for a moment
            warnings.filterwarnings("ignore", category=UserWarning, module=r"peft\.")
        model.save_pretrained(target, save_embedding_layers=False, **words)
        tokenizer.save_pretrained(target)
    written = json.loads((target / CONFIG).read_text(encoding="utf-8"))
    if written.get("corda_config"):  # of a start that is done with: PEFT would warn of it at each load
        save_json(written | {"corda_config": None}, target / CONFIG)


@torch.no_grad()
def exports(model: Any) -> Literal["exactly", "nearly"] | None:
    """How a plain LoRA holds what the adapter puts on layers, if it can."""
    name = model.active_adapter
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    if not layers or not all(isinstance(x, LoraLayer) or x.supports_lora_conversion(name) for x in layers):
        return None
    factored = [
        x.get_factors(name) is not None if isinstance(x, AdapterLayer) else isinstance(x, LoraLayer)
        for x in layers if not isinstance(x, AdapterLayer) or name in x.updates
    ]  # fmt: skip
    return "exactly" if all(factored) else "nearly"
