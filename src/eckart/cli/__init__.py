"""The command line: it parses, calls the library, prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from eckart.cli.console import EXIT_USAGE, Bars, acting, err, megabytes, number, out, show_json, table
from eckart.cli.settings import parse_settings

app = typer.Typer(
    name="eckart",
    help="Make neural networks small by decomposition: one algebra, one byte budget, one checkpoint format.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

USAGE_ERROR: Any = typer.BadParameter.__base__
"""What a command line is refused with, whichever click typer carries."""

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local folder, GGUF file, or 'builtin'.")]
FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `eckart compress` wrote.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
DataOption = Annotated[str, typer.Option("--data", help="'builtin', or a .txt, .jsonl or .csv file.")]
SamplesOption = Annotated[int, typer.Option(help="Windows of text.", min=1)]
LengthOption = Annotated[int, typer.Option(help="Tokens in a window.", min=2)]
SeedOption = Annotated[int, typer.Option(help="Of every random choice.")]


@app.command()
def methods(as_json: JsonOption = False) -> None:
    """List the catalogue: every method, its paper, and what it is."""
    from eckart.registry import entries

    found = entries()
    if as_json:
        names = ("key", "wing", "family", "paper", "summary")
        show_json({"methods": [{n: getattr(e, n) for n in names} for e in found]})
        return
    rows = [[e.key, e.wing, e.family, e.summary] for e in found]
    out.print(table("Methods", ["key", "wing", "family", "what it does"], rows, left=4))


@app.command()
def inspect(model: ModelArgument, as_json: JsonOption = False) -> None:
    """Show what each layer is made of: bytes, spectrum, effective rank."""
    from eckart.compression.inspect import inspect_model

    with acting(as_json), Bars() as bars:
        report = inspect_model(model, progress=bars)
    if as_json:
        show_json(report)
        return
    rows = [
        [r["name"], "x".join(map(str, r["shape"])), megabytes(r["bytes"]), number(r["effective_rank"], 3),
         str(r["rank_90"]), str(r["rank_99"]), str(r["break_even_rank"])]
        for r in report["layers"]
    ]  # fmt: skip
    columns = ["layer", "out x in", "bytes", "effective rank", "rank for 90% energy", "for 99%", "break-even rank"]
    out.print(table(f"{report['source']}: {megabytes(report['bytes'])}, {report['dtype']}", columns, rows))
    out.print(f"{len(rows)} layers that can be factored hold {megabytes(report['layer_bytes'])}; a rank above the break-even one saves nothing.")  # fmt: skip # noqa: E501


@app.command()
def compress(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The new folder.")],
    budget: Annotated[str, typer.Option("--budget", "-b", help="0.8, 80MB, 3.0bpw, or '0.8 linears'.")],
    method: Annotated[str | None, typer.Option("--method", "-m", metavar="KEY", help="See `eckart methods`.")] = None,
    form: Annotated[str | None, typer.Option(metavar="EXPR", help="Such as 'low_rank() + diagonal()'.")] = None,
    metric: Annotated[str | None, typer.Option(help="Such as 'input_covariance()'.")] = None,
    allocation: Annotated[str | None, typer.Option(help="Such as 'optimal()'.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting of the method.")
    ] = None,
    data: DataOption = "builtin",
    samples: SamplesOption = 64,
    length: LengthOption = 512,
    batch_size: Annotated[int, typer.Option(help="Windows in a batch.", min=1)] = 4,
    seed: SeedOption = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DIR, once the new one is whole, and an unfinished run.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and stop; keep nothing but --statistics.")
    ] = False,
    statistics: Annotated[
        Path | None, typer.Option(help="Folder that keeps calibration statistics for other runs.")
    ] = None,
    workers: Annotated[str | None, typer.Option(help="Ray workers: a number, or a cluster's address.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compress MODEL into DIR under a byte budget."""
    from inspect import signature

    from eckart.compression import compress_to
    from eckart.jobs.workers import executor_for

    with acting(as_json):
        words = parse_settings(settings, signature(compress_to).parameters)
        with Bars() as bars, executor_for(workers) as executor:
            result = compress_to(
                output, model, method, form=form, metric=metric, allocation=allocation, budget=budget, data=data,
                samples=samples, length=length, batch_size=batch_size, seed=seed, resume=resume, overwrite=overwrite,
                dry_run=dry_run, statistics=statistics, executor=executor, progress=bars, **words,
            )  # fmt: skip
        if as_json:
            show_json(result.to_json())
            return
    _show_plan(result)
    if result.planned:
        out.print(f"expected: {result.predicted_seconds / 60:.1f} minutes for the fit, {megabytes(result.predicted_memory)} of memory above what Python takes")  # fmt: skip # noqa: E501
    else:
        out.print(f"saved to [bold]{result.folder}[/]; next: eckart evaluate {result.folder} --against {model}")


def _show_plan(result: Any) -> None:
    rows = [
        [x.name, x.form, f"{x.bytes:,}", _relative(x.predicted_error, x.energy), _relative(x.measured_error, x.energy)]
        for x in result.layers
    ]
    out.print(table("Layers", ["layer", "form", "bytes", "predicted error", "measured error"], rows, left=2))
    out.print(str(result))
    for line in result.advice():
        out.print(f"[yellow]note:[/] {line}")


def _relative(error: float | None, energy: float | None) -> str:
    return "-" if error is None or not energy else f"{(max(error, 0.0) / energy) ** 0.5:.4f}"


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A compressed folder, or any MODEL.")],
    against: Annotated[str | None, typer.Option(metavar="MODEL", help="The original to compare with.")] = None,
    data: DataOption = "builtin",
    samples: SamplesOption = 16,
    length: LengthOption = 512,
    seed: SeedOption = 0,
    speed: Annotated[bool, typer.Option(help="Time the model, too.")] = True,
    tasks: Annotated[list[str] | None, typer.Option("--task", help="A task of lm-eval, too; may be repeated.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity, agreement with the original, speed and size on held-out text."""
    from eckart.evaluation import evaluate as measure
    from eckart.evaluation import heldout_tokens
    from eckart.jobs.card import remember_evaluation

    with acting(as_json):
        with Bars() as bars:
            tokens, text = heldout_tokens(model, data, samples=samples, length=length, seed=seed, progress=bars)
            found = measure(model, against, tokens=tokens, text=text, speed=speed, progress=bars)
        if (Path(model) / "eckart.json").is_file():
            remember_evaluation(Path(model), found.to_json())
        results = task_results(model, tasks)
        if as_json:
            show_json(found.to_json() | ({"tasks": results} if tasks else {}))
            return
    shown = {k: v for k, v in found.to_json().items() if not isinstance(v, dict)}
    rows = [[k.replace("_", " "), number(v) if isinstance(v, float) else str(v)] for k, v in shown.items()]
    rows += [
        [f"{t} {k}", number(v) if isinstance(v, float) else str(v)] for t, r in results.items() for k, v in r.items()
    ]
    out.print(table(f"{model}", ["figure", "value"], [r for r in rows if r[1] != "None"]))


def task_results(model: str, tasks: list[str] | None) -> dict[str, dict[str, Any]]:
    """lm-eval's results on `tasks`; empty where there are none."""
    if not tasks:
        return {}
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from eckart.checkpoint.source import resolve
    from eckart.evaluation import run_lm_eval

    folder = resolve(model).folder
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    return run_lm_eval(loaded, AutoTokenizer.from_pretrained(folder), tasks)


@app.command()
def export(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A compressed folder, any MODEL, or an adapter.")],
    to: Annotated[str, typer.Option("--to", metavar="TARGET", help="peft, gguf or onnx; of an adapter lora or gguf.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The new folder.")],
    rank: Annotated[int | None, typer.Option(help="Of an adapter's layers, at most.")] = None,
    base: Annotated[str | None, typer.Option(metavar="MODEL", help="Of an adapter, if it is not its own.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse what the format cannot hold exactly.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a model as PEFT, llama.cpp (GGUF) or onnxruntime read it; an adapter as PEFT's LoRA, or for llama.cpp."""
    from eckart.export import export as write

    with acting(as_json):
        with Bars() as bars:
            made = write(folder, to, output, strict=strict, rank=rank, base=base, progress=bars)
        if as_json:
            show_json(made.to_json())
            return
    out.print(
        table(f"{made.target} in {made.folder}", ["layer", "held as"], [[*x] for x in made.layers.items()], left=2)
    )
    out.print(", ".join(f"{name} ({megabytes(size)})" for name, size in made.files.items()))
    for line in made.notes:
        out.print(f"[yellow]note:[/] {line}")


@app.command()
def report(
    folder: FolderArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The HTML file; DIR/report.html by default.")
    ] = None,
) -> None:
    """Write one self-contained HTML page about a compressed model."""
    from eckart.report import model_report

    with acting():
        out.print(f"report: [bold]{model_report(folder, output).resolve()}[/]", soft_wrap=True)


@app.command()
def resize(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `compress -m bitstack` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The new folder.")],
    budget: Annotated[str, typer.Option("--budget", "-b", help="0.8 of the folder as it is, 80MB, or 3.0bpw.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the new folder if it is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Drop blocks of a stacked model until it meets a smaller budget; nothing is fitted again."""
    from eckart.compression.bitstack import resize as shorten

    with acting(as_json):
        result = shorten(folder, output, budget, overwrite=overwrite)
        if as_json:
            show_json(result.to_json())
            return
    _show_plan(result)
    out.print(f"saved to [bold]{result.folder}[/]")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The settings of the run.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output, once the new one is whole, and an unfinished run.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a decoder with any optimiser and any structure of its weights."""
    from eckart.cli.train import run_train

    run_train(config, resume, overwrite, as_json)


@app.command()
def finetune(
    model: ModelArgument,
    adapter: Annotated[str, typer.Option("--adapter", "-a", metavar="KEY", help="See `eckart methods`.")],
    data: Annotated[
        str, typer.Option("--data", help="'builtin', a .txt, .jsonl or .csv file, or a data set of `datasets`.")
    ],
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="The new folder.")],
    task: Annotated[str, typer.Option(help="text, instruction or classification; auto goes by the columns.")] = "auto",
    columns: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="NAME=COLUMN", help="The column taken for text, label, prompt, ..."),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting of the adapter.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Of the optimiser; instead of --epochs.", min=1)] = None,
    epochs: Annotated[float, typer.Option(help="How often each row is seen.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Rows in a batch.", min=1)] = 8,
    accumulate: Annotated[int, typer.Option(help="Batches in a step.", min=1)] = 1,
    length: LengthOption = 512,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 5e-4,
    warmup: Annotated[
        str, typer.Option(help="Steps (100) or share of the run (0.1) over which the rate rises.")
    ] = "0.1",
    weight_decay: Annotated[float, typer.Option(help="Of the trained tensors.")] = 0.0,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradients; 0 does not clip.")] = 1.0,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.", min=1)] = 100,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: SeedOption = 0,
    samples: Annotated[int, typer.Option(help="Rows shown to an adapter that starts from data.", min=1)] = 32,
    held_out: Annotated[float, typer.Option(help="Share of the rows that is judged on.")] = 0.1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DIR, once the new one is whole, and an unfinished run.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train any adapter on text, instructions or classes, and save it for PEFT."""
    from eckart.cli.finetune import run_finetune

    run_finetune(
        model, adapter, data, output, settings, columns, as_json, task=task, steps=steps, epochs=epochs,
        batch_size=batch_size, accumulate=accumulate, length=length, lr=lr, warmup=warmup, weight_decay=weight_decay,
        clip=clip, precision=precision, save_every=save_every, device=device, seed=seed, samples=samples,
        held_out=held_out, resume=resume, overwrite=overwrite,
    )  # fmt: skip


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for models and report.")] = Path("demo"),
    model: Annotated[str, typer.Option(help="Hub id, local folder, GGUF file, or 'builtin'.")] = "builtin",
    budget: Annotated[str, typer.Option("--budget", "-b", help="The same for all methods.")] = "0.9",
    samples: SamplesOption = 12,
    keep: Annotated[bool, typer.Option("--keep", help="Use what an earlier demo left.")] = False,
) -> None:
    """Compress the built-in model with several methods at one budget, and compare them."""
    from eckart.cli.demo import run_demo

    with acting():
        run_demo(output, model, budget, samples, keep)


def main() -> None:
    """Entry point of the `eckart` command. What it is given wrongly is JSON, too, where that was asked for."""
    if "--json" not in sys.argv:
        app()
        return
    try:
        code = app(standalone_mode=False)
    except USAGE_ERROR as e:
        show_json({"error": e.format_message(), "exit_code": EXIT_USAGE})
        code = EXIT_USAGE
    sys.exit(code or 0)


__all__ = ["app", "err", "main"]
