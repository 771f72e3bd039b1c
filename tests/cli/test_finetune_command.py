"""`eckart finetune` and `eckart export` of what it wrote: what they print, and how they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tiny
from eckart.cli import app
from eckart.cli.settings import parse_settings

SHORT = ["--steps", 3, "--batch-size", 4, "--length", 16]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model `m`, mails `mail.csv` in two kinds, and `out`, an adapter that the command line made of them."""
    made = tmp_path_factory.mktemp("cli")
    tiny.save_model(made / "m")
    rows = [f'"w{i} w{i + 1}",{("ham", "spam")[i % 2]}' for i in range(3, 43)]
    (made / "mail.csv").write_text("body,kind\n" + "\n".join(rows))
    done = invoke(*tune(made, "out"), "--json")
    assert done.exit_code == 0, done.output
    (made / "out.json").write_text(done.stdout)
    return made


def tune(folder: Path, out: str, *more: Any) -> list[Any]:
    data = ["--data", folder / "mail.csv", "--column", "text=body", "--column", "label=kind"]
    words = ["--adapter", "svfit", "--set", "rank=3", "--set", "target_modules=q_proj,v_proj"]
    return ["finetune", folder / "m", *words, *data, *SHORT, "--output", folder / out, *more]


def invoke(*words: Any) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(w) for w in words])


def test_json_holds_the_result_and_the_next_command(folder: Path) -> None:
    told = json.loads((folder / "out.json").read_text())
    assert told["task"] == "classification"
    assert told["labels"] == ["ham", "spam"]
    assert told["trained"] == 6 * 3 + 2 * 32
    assert set(told["before"]) == {"loss", "accuracy"}
    assert told["next"] == f"eckart export {folder}/out --to lora --output {folder}/out-lora"
    assert tiny.read_json(folder / "out/finetune.json")["settings"]["settings"] == {
        "rank": 3, "target_modules": ["q_proj", "v_proj"]
    }  # fmt: skip


def test_a_table_says_what_came_of_it_and_nothing_is_replaced_unasked(folder: Path) -> None:
    refused = invoke(*tune(folder, "out"), "--json")
    assert refused.exit_code == 4
    assert "exists already" in json.loads(refused.stdout)["error"]
    shown = invoke(*tune(folder, "out"), "--overwrite")
    assert shown.exit_code == 0, shown.output
    for words in ("held-out accuracy, before and after", "trained numbers", "the task is classification, guessed", "next: eckart export"):  # fmt: skip # noqa: E501
        assert words in shown.stdout


def test_the_adapter_is_exported(folder: Path) -> None:
    shown = invoke("export", folder / "out", "--to", "lora", "-o", folder / "lora", "--rank", 2)
    assert shown.exit_code == 0, shown.output
    assert "rank 2, relative error" in shown.stdout
    assert "saved whole beside the LoRA: score" in shown.stdout
    refused = invoke("export", folder / "out", "--to", "gguf", "-o", folder / "gguf", "--json")
    assert refused.exit_code == 1
    assert "holds modules that were trained whole (score)" in json.loads(refused.stdout)["error"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--adapter", "svfitt"], "did you mean 'svfit'"),
        (["--column", "text=bdy"], "has no column 'bdy'; did you mean 'body'"),
        (["--set", "rank"], "cannot read the setting 'rank': write NAME=VALUE"),
        (["--set", "rank=40"], "rank 40 is more than a matrix of shape"),
        (["--task", "text"], "has no text in 'text'"),
        (["--warmup", "soon"], "warmup"),
        (["--data", "no.jsonl"], "There is no text file"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, more: list[Any], message: str) -> None:
    words = tune(folder, "wrong")
    if more[:2] == ["--task", "text"]:
        (folder / "empty.csv").write_text("text\n \nw1\n")
        more = [*more, "--data", folder / "empty.csv", "--column", "label=text"]
        words = [w for w in words if w not in ("--column", "text=body", "label=kind")]
    told = invoke(*words, *more, "--json")
    assert told.exit_code == 1, told.output
    assert message in json.loads(told.stdout)["error"]
    assert not (folder / "wrong").exists()
    assert not (folder / "wrong.partial").exists()


def test_settings_are_read_as_what_they_are() -> None:
    pairs = ["a=3", "b=0.5", "c=true", "d=none", "e=q_proj,v_proj", "f=[qv]_proj", 'g={"x": 1}', "h=[1, 2]", "i=word"]
    found = parse_settings(pairs, nested=True)
    assert list(found.values()) == [
        3, 0.5, True, None, ["q_proj", "v_proj"], "[qv]_proj", {"x": 1}, [1, 2], "word"
    ]  # fmt: skip
    assert parse_settings(["e=q_proj,v_proj", 'g={"x": 1}']) == {"e": "q_proj,v_proj", "g": '{"x": 1}'}
    with pytest.raises(ValueError, match="seed is an option of its own: write --seed 3"):
        parse_settings(["seed=3"], ["seed"])
