"""The verbs that users call: `compress` a model in memory, `compress_to` a folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from eckart.allocation import Allocator, Budget, as_allocator
from eckart.calibration.data import Texts, load_texts, token_batches
from eckart.calibration.stream import Batch
from eckart.calibration.tokens import Tokens
from eckart.checkpoint.hf import reconfigure
from eckart.checkpoint.source import Source, resolve
from eckart.downloads import Progress, silent
from eckart.forms import Form, as_form
from eckart.jobs.engine import batches_aside, run_in_memory
from eckart.jobs.folder_job import compress_folder
from eckart.jobs.method import Method
from eckart.jobs.recipe import Recipe
from eckart.jobs.remember import remember
from eckart.jobs.result import Result
from eckart.jobs.solve import Executor
from eckart.metrics import Metric, as_metric
from eckart.registry import find
from eckart.settings import with_settings, words_of

Data = str | Path | Tokens | Texts | Sequence[Batch] | None


class Compressed(NamedTuple):
    """A model, changed, and what was done to it."""

    model: nn.Module
    result: Result


def method_for(
    method: str | Method | None = None, form: Form | str | None = None, metric: Metric | str | None = None,
    allocation: Allocator | str | None = None, **settings: Any,
) -> Method:  # fmt: skip
    """The method that these words ask for: a registered one, with parts replaced, or a form of the user's own.

    Raises `ValueError` on an unknown word (with the nearest ones), or a part that the method does not have.
    """
    if method is None and form is None:
        raise ValueError("say what to do: a method (see `eckart methods`) or a form such as 'low_rank()'")
    chosen = Recipe() if method is None else find(method, "compression").cls() if isinstance(method, str) else method
    parts: dict[str, Any] = dict(settings)
    if form is not None:
        parts["form"] = as_form(form)
    if metric is not None:
        parts["metric"] = as_metric(metric)
    if allocation is not None:
        parts["allocation"] = as_allocator(allocation)
    return with_settings(chosen, parts)


def compress(
    model: nn.Module, method: str | Method | None = None, *, budget: str | float, data: Data = None,
    form: Form | str | None = None, metric: Metric | str | None = None, allocation: Allocator | str | None = None,
    tokenizer: Any = None, samples: int = 64, length: int = 512, batch_size: int = 4, seed: int = 0,
    executor: Executor | None = None, progress: Progress = silent, **settings: Any,
) -> Compressed:  # fmt: skip
    """Compress a model in memory, in place.

    Args:
        model: any torch model; the blocks of transformers' models are found and worked on one by one.
        method: key of a method (`eckart methods` lists them), or a `Method`.
        budget: what the weights may take: 0.8 of their bytes, `"80MB"`, `"3.0bpw"`, or `"0.8 linears"`.
        data: calibration data: `"builtin"`, a text file, texts (these need `tokenizer`), `Tokens`, or a list of
            batches, each the keyword arguments of the model's forward pass.
        form, metric, allocation: what to use instead of the method's own.
        samples, length: how many windows of how many tokens are drawn from texts.
        settings: other fields of the method.

    Returns:
        (model, result); the model can be saved with `save_pretrained` if it is one of transformers'.
    """
    chosen = method_for(method, form, metric, allocation, **settings)
    batches = as_batches(
        data, tokenizer, samples=samples, length=length, batch_size=batch_size, seed=seed,
        aside=windows_aside(chosen, samples, batch_size),
    )  # fmt: skip
    run = run_in_memory(
        model, chosen, Budget.parse(budget), batches, seed=seed, executor=executor, progress=progress
    )  # fmt: skip
    words = {"method": chosen.key or None, **words_of(chosen), "budget": str(budget), "seed": seed}
    result = Result.of_run(run, words)
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        reconfigure(model, chosen.config_changes(run.plan))
        remember(model, words)
    return Compressed(model, result)


def compress_to(
    out: str | Path, model: str | Path | Source, method: str | Method | None = None, *, budget: str | float,
    data: Data = "builtin", form: Form | str | None = None, metric: Metric | str | None = None,
    allocation: Allocator | str | None = None, samples: int = 64, length: int = 512, batch_size: int = 4, seed: int = 0,
    resume: bool = False, overwrite: bool = False, dry_run: bool = False, executor: Executor | None = None,
    statistics: str | Path | None = None, progress: Progress = silent, **settings: Any,
) -> Result:  # fmt: skip
    """Compress a model on disk into the folder `out`, with one block of it in memory at a time.

    Args:
        out: the new folder; `<out>.partial` holds the work until it is done.
        model: a hub id, a local folder, a GGUF file, or the name of the built-in model.
        data: as for `compress`; the model's own tokenizer is used.
        resume: go on with an unfinished run of the very same job.
        overwrite: replace `out` if it exists, once the new one is whole.
        dry_run: stop at the plan.
        statistics: folder in which calibration statistics are kept for other jobs on the same model and data.

    Other arguments are those of `compress`.
    """
    chosen = method_for(method, form, metric, allocation, **settings)
    asked = Budget.parse(budget)
    source = model if isinstance(model, Source) else resolve(model, progress=progress)
    words: dict[str, Any] = {
        "method": chosen.key or None, **words_of(chosen), "budget": str(budget), "seed": seed,
        "data": str(data) if isinstance(data, str | Path) else None, "samples": samples, "length": length,
        "batch_size": batch_size,
    }  # fmt: skip
    tokenizer = _tokenizer(source) if needs_text(data) else None
    batches = as_batches(
        data, tokenizer, samples=samples, length=length, batch_size=batch_size, seed=seed,
        aside=windows_aside(chosen, samples, batch_size), progress=progress,
    )  # fmt: skip
    return compress_folder(
        source, Path(out), chosen, asked, batches, settings=words, seed=seed, resume=resume, overwrite=overwrite,
        dry_run=dry_run, executor=executor, statistics=None if statistics is None else Path(statistics),
        progress=progress,
    )  # fmt: skip


def windows_aside(method: Method, samples: int, batch_size: int) -> int:
    """Windows that the engine will not calibrate on but try plans on."""
    batches = -(-samples // batch_size)
    return samples - (batches - batches_aside(batches)) * batch_size if method.tries_plans else 0


def needs_text(data: Data) -> bool:
    return data is not None and not isinstance(data, Tokens) and not _is_batches(data)


def _is_batches(data: Any) -> bool:
    return isinstance(data, Sequence) and len(data) > 0 and isinstance(data[0], dict) and any(isinstance(v, Tensor) for v in data[0].values())  # fmt: skip # noqa: E501


def as_batches(
    data: Data, tokenizer: Any = None, *, samples: int, length: int, batch_size: int, seed: int, aside: int = 0,
    progress: Progress = silent,
) -> list[Batch]:  # fmt: skip
    """Calibration data as keyword arguments of a forward pass, batch by batch."""
    if data is None:
        return []
    if isinstance(data, Tokens):
        return list(data.batches(batch_size))
    if _is_batches(data):
        rows: Any = data
        return list(rows)
    if tokenizer is None:
        raise ValueError("texts need a tokenizer: pass tokenizer=..., or data as batches of input_ids")
    texts: str | Path | Iterable[Any] = data
    tokens = token_batches(
        load_texts(texts, progress=progress), tokenizer, samples=samples, length=length, seed=seed, aside=aside,
        progress=progress,
    )  # fmt: skip
    return list(tokens.batches(batch_size))


def _tokenizer(source: Source) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.folder)
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise ValueError(f"{source.folder} has no tokenizer that transformers can load ({str(e).splitlines()[0]}): add its files, or give batches of input_ids as data") from e  # fmt: skip # noqa: E501
