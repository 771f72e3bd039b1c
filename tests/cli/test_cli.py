"""Every command runs, prints what it says, and with --json one object and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

import tiny
from eckart.cli import app
from eckart.registry import entries

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model `m`, a text `t.txt`, and `out`, the model compressed by the command line."""
    made = tmp_path_factory.mktemp("cli")
    tiny.save_model(made / "m")
    tiny.save_text(made / "t.txt")
    done = invoke("compress", made / "m", "-o", made / "out", "-m", "svd_llm", "-b", 0.8, *data(made), "--json")
    assert done.exit_code == 0, done.output
    (made / "out.json").write_text(done.stdout)
    return made


def invoke(*words: Any) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(w) for w in words])


def data(folder: Path) -> list[Any]:
    return ["--data", folder / "t.txt", "--samples", 4, "--length", 12]


def test_methods_lists_the_catalogue() -> None:
    shown, told = invoke("methods"), invoke("methods", "--json")
    assert shown.exit_code == told.exit_code == 0
    listed = json.loads(told.stdout)["methods"]
    assert {m["key"] for m in listed} == {e.key for e in entries()} >= {"svd", "svd_llm", "lord", "fwsvd", "auto"}
    for m in listed:
        assert m["paper"]
        assert m["summary"]
        assert m["key"] in shown.stdout


def test_inspect_describes_every_layer(folder: Path) -> None:
    shown, told = invoke("inspect", folder / "m"), invoke("inspect", folder / "m", "--json")
    assert shown.exit_code == told.exit_code == 0
    found = json.loads(told.stdout)
    assert found["model_type"] == "llama"
    assert found["bytes"] == tiny.weight_bytes(folder / "m")
    assert len(found["layers"]) == 21
    for layer in found["layers"]:
        out, in_ = layer["shape"]
        assert layer["bytes"] == 2 * out * in_
        assert layer["break_even_rank"] == out * in_ // (out + in_)
        assert 1 <= layer["rank_90"] <= layer["rank_99"] <= min(out, in_)
        assert 1 < layer["effective_rank"] <= min(out, in_)
        assert layer["name"] in shown.stdout
    assert found["layer_bytes"] == sum(layer["bytes"] for layer in found["layers"])


def test_compress_reports_what_is_on_disk(folder: Path) -> None:
    found = json.loads((folder / "out.json").read_text())
    assert found["planned"] is False
    assert found["folder"] == str(folder / "out")
    assert found["totals"]["bytes_after"] == tiny.weight_bytes(folder / "out")
    assert found["settings"]["method"] == "svd_llm"
    assert len(found["layers"]) == 21
    assert found["seconds"]["total"] > 0
    assert tiny.read_json(folder / "out.run.json")["seconds"] == found["seconds"]


def test_compress_shows_layers_and_the_next_step(folder: Path, tmp_path: Path) -> None:
    done = invoke("compress", folder / "m", "-o", tmp_path / "x", "--form", "low_rank(8)", "-b", "0.9", *data(folder))
    assert done.exit_code == 0, done.output
    assert "model.layers.2.mlp.down_proj" in done.stdout
    assert f"eckart evaluate {tmp_path / 'x'}" in done.stdout.replace("\n", "")
    assert tiny.read_json(tmp_path / "x" / "eckart.json")["job"]["form"] == "low_rank(rank=8)"


def test_dry_run_prints_the_plan_and_changes_nothing(folder: Path, tmp_path: Path) -> None:
    words = ["compress", folder / "m", "-o", tmp_path / "x", "-m", "lord", "-b", "0.8", *data(folder), "--dry-run"]
    shown, told = invoke(*words), invoke(*words, "--json")
    assert shown.exit_code == told.exit_code == 0
    plan = json.loads(told.stdout)
    assert plan["planned"] is True
    assert plan["folder"] is None
    assert plan["totals"]["bytes_after"] <= plan["budget_bytes"]
    for layer in plan["layers"]:
        assert layer["name"] in shown.stdout
        assert layer["form"] in shown.stdout
    assert "expected:" in shown.stdout
    assert not list(tmp_path.iterdir())


def test_settings_reach_the_method(folder: Path, tmp_path: Path) -> None:
    words = ["compress", folder / "m", "-o", tmp_path / "x", "-m", "svd_llm", "-b", "0.95", *data(folder), "--dry-run", "--json"]  # fmt: skip # noqa: E501
    more = ["--metric", "output_covariance(damping=0.001)", "--allocation", "optimal()", "--set", "one_shot=false", "--set", "targets=.*up_proj"]  # fmt: skip # noqa: E501
    done = invoke(*words, *more)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    expected = {"metric": "output_covariance(damping=0.001)", "allocation": "optimal()", "one_shot": False, "targets": ".*up_proj"}  # fmt: skip # noqa: E501
    assert expected.items() <= found["settings"].items()
    assert {layer["name"].rpartition(".")[2] for layer in found["layers"]} == {"up_proj"}


def test_evaluate_measures_and_the_card_tells(folder: Path) -> None:
    words = ["evaluate", folder / "out", "--against", folder / "m", "--data", folder / "t.txt", "--samples", 2, "--length", 16]  # fmt: skip # noqa: E501
    told, shown = invoke(*words, "--no-speed", "--json"), invoke(*words, "--no-speed")
    assert told.exit_code == shown.exit_code == 0
    found = json.loads(told.stdout)
    assert found["tokens"] == 30
    assert found["bytes_disk"] == tiny.weight_bytes(folder / "out")
    assert found["kl"] > 0
    assert 0 <= found["top1_agreement"] <= 1
    assert found["perplexity"] != found["perplexity_original"]
    kept = tiny.read_json(folder / "out" / "evaluation.json")
    assert kept.keys() == found.keys()
    assert kept["perplexity"] == found["perplexity"]
    assert f"{found['perplexity']:.4g}" in (folder / "out" / "README.md").read_text()
    assert "perplexity" in shown.stdout


def test_report_writes_one_page(folder: Path, tmp_path: Path) -> None:
    done = invoke("report", folder / "out", "-o", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    assert str(tmp_path / "page.html") in done.stdout
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<html" in page
    assert "svd_llm" in page


def test_progress_is_never_on_standard_output(folder: Path) -> None:
    done = tiny.run_forked(["inspect", folder / "m", "--json"], folder)
    assert done.code == 0
    last = done.printed.strip().splitlines()[-1]
    assert json.loads(last)["model_type"] == "llama"


@pytest.mark.parametrize("words", [["--bogus"], ["-b", "0.5", "--samples", "0"], []])
def test_a_wrong_command_line_is_json_too(words: list[str], folder: Path, tmp_path: Path) -> None:
    done = tiny.run_forked(["compress", folder / "m", "-o", tmp_path / "x", *words, "--json"], tmp_path)
    assert done.code == 2
    found = json.loads(done.printed)
    assert found["exit_code"] == 2
    assert any(word in found["error"] for word in ("--bogus", "--samples", "-b", "--budget"))
    plain = tiny.run_forked(["compress", folder / "m", "-o", tmp_path / "x", *words], tmp_path)
    assert plain.code == 2
    assert "Usage" in plain.printed


def test_python_dash_m_and_the_help_are_the_command_line() -> None:
    done = tiny.eckart("--help")
    assert done.returncode == 0
    for command in ("methods", "inspect", "compress", "evaluate", "report", "demo"):
        assert command in done.stdout
