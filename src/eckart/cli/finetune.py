"""The command that fine-tunes, and what it prints."""

from __future__ import annotations

from typing import Any

from rich.markup import escape

from eckart.cli.console import Bars, acting, megabytes, number, out, show_json, table
from eckart.cli.settings import parse_pairs, parse_settings


def run_finetune(
    model: str, adapter: str, data: str, output: str, settings: list[str] | None, columns: list[str] | None,
    as_json: bool, *, warmup: str, **options: Any,
) -> None:  # fmt: skip
    """Fine-tune, and print what came of it."""
    from eckart.runs import finetune

    with acting(as_json):
        words = parse_settings([f"warmup={warmup}"]) | options
        words |= {"settings": parse_settings(settings, nested=True), "columns": parse_pairs(columns)}
        with Bars() as bars:
            done = finetune(model, adapter, data, output, progress=bars, **words)
        if as_json:
            show_json(done.to_json() | {"next": next_command(done)})
            return
        rows = [
            ["task", done.task],
            ["rows trained on", f"{done.rows:,}"],
            ["steps", f"{done.steps:,}"],
            ["loss, nats", number(done.loss)],
            *_judged(done),
            ["trained numbers", f"{done.trained:,}"],
            ["adapter on disk", megabytes(done.bytes)],
            ["seconds a step", number(done.seconds_per_step)],
        ]
        out.print(table(f"{adapter} on {model}", ["figure", "value"], rows))
        for line in done.notes:
            out.print(f"[yellow]note:[/] {escape(line)}", soft_wrap=True)
        out.print(f"saved to [bold]{escape(done.folder)}[/]; next: {escape(next_command(done))}", soft_wrap=True)


def _judged(done: Any) -> list[list[str]]:
    """Rows on what was held out."""
    if done.before is None:
        return []
    names = [name for name in ("loss", "accuracy") if done.after[name] is not None]
    return [[f"held-out {name}, before and after", f"{number(done.before[name])} → {number(done.after[name])}"] for name in names]  # fmt: skip # noqa: E501


def next_command(done: Any) -> str:
    """What a user may want to do with the folder."""
    folder = done.folder.rstrip("/")
    if done.exports is None:
        return f"python -c \"import eckart, peft; peft.AutoPeftModel.from_pretrained('{folder}')\""
    rank = "" if done.exports == "exactly" else " --rank 16"
    return f"eckart export {folder} --to lora{rank} --output {folder}-lora"
