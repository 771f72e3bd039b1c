"""The command that trains, and what it prints."""

from __future__ import annotations

from pathlib import Path

from eckart.cli.console import Bars, acting, megabytes, number, out, show_json, table


def run_train(config: Path, resume: bool, overwrite: bool, as_json: bool) -> None:
    """Train as a file of settings says, and print what came of it."""
    from eckart.runs import train

    with acting(as_json):
        with Bars() as bars:
            done = train(config, resume=resume, overwrite=overwrite, progress=bars)
        if as_json:
            show_json(done.to_json())
            return
        rows = [
            ["parameters", f"{done.parameters:,}"],
            ["steps", f"{done.steps:,}"],
            ["loss, nats a token", number(done.loss)],
            ["held-out perplexity", number(done.perplexity)],
            ["tokens a second", number(done.tokens_per_second)],
            *([name.replace("_bytes", "").replace("_", " "), megabytes(size)] for name, size in done.bytes.items()),
        ]
        out.print(table(str(config), ["figure", "value"], rows))
        page = (Path(done.folder) / "report.html").resolve()
        out.print(f"saved to [bold]{done.folder}[/]; report: [bold]{page}[/]", soft_wrap=True)
