"""What goes wrong for a known reason is one sentence that says what, where and what to do, and an exit code."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import eckart
import tiny
from eckart.cli import app
from eckart.compression import method_for

Damage = Callable[[Path], Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("errors")
    tiny.save_model(made / "m")
    tiny.save_text(made / "t.txt")
    (made / "empty.txt").write_text("")
    (made / "short.txt").write_text("w1 w2 w3")
    (made / "latin.txt").write_bytes(b"caf\xe9 " * 50)
    (made / "t.pdf").write_text("w1")
    (made / "exists").mkdir()
    return made


def failing(words: list[Any]) -> tuple[int, str]:
    """Exit code and message, the same with and without --json."""
    told = CliRunner().invoke(app, [*map(str, words), "--json"])
    shown = CliRunner(env={"COLUMNS": "400"}).invoke(app, [str(w) for w in words])
    assert told.exception is None or isinstance(told.exception, SystemExit), told.exception
    found = json.loads(told.stdout)
    assert found["exit_code"] == told.exit_code == shown.exit_code
    assert shown.stdout == ""
    assert shown.stderr.startswith("error: ")
    assert "Traceback" not in told.output + shown.output
    return told.exit_code, found["error"]


def compress(folder: Path, out: Path, *more: Any, model: Path | None = None, data: str = "t.txt") -> list[Any]:
    """A command line that works, but for what is added."""
    sizes = ["--samples", 4, "--length", 12]
    return ["compress", model or folder / "m", "-o", out, "--data", folder / data, *sizes, *more]


SVD = ("--method", "svd", "--budget", 0.8)
WORDS: dict[str, tuple[tuple[Any, ...], int, str]] = {
    "method": (("-m", "svd_lm", "-b", 0.8), 1, r"unknown method 'svd_lm'; did you mean .*'svd_llm'"),
    "strange method": (("-m", "xyzzy", "-b", 0.8), 1, r"unknown method 'xyzzy'; known: .*lord.*svd"),
    "form": (("--form", "low_rnk()", "-b", 0.8), 1, r"unknown form 'low_rnk'; did you mean 'low_rank'"),
    "broken form": (("--form", "low_rank(", "-b", 0.8), 1, r"cannot read form 'low_rank\('"),
    "form's setting": (("--form", "low_rank(rnk=3)", "-b", 0.8), 1, r"low_rank\(\) has no setting 'rnk'; .* 'rank'"),
    "code": (("--form", "__import__('os').system('x')", "-b", 0.8), 1, r"cannot read form"),
    "metric": ((*SVD, "--metric", "input_covarience()"), 1, r"unknown metric .*; did you mean 'input_covariance'"),
    "allocation": ((*SVD, "--allocation", "unifrm()"), 1, r"unknown allocation 'unifrm'; did you mean 'uniform'"),
    "nothing": (("-b", 0.8), 1, r"say what to do: a method .* or a form"),
    "budget": (("-m", "svd", "-b", "lots"), 1, r"cannot read the budget 'lots': give a ratio \(0\.8\)"),
    "ratio above one": (("-m", "svd", "-b", "1.5"), 1, r"cannot read the budget '1.5'"),
    "nothing left": (("-m", "svd", "-b", "0"), 1, r"cannot read the budget '0'"),
    "impossible budget": (("-m", "svd", "-b", 0.05), 3, r"the smallest possible is \d+ bytes"),
    "set": ((*SVD, "--set", "one_shot"), 1, r"cannot read the setting 'one_shot': write NAME=VALUE"),
    "unknown setting": ((*SVD, "--set", "oneshot=true"), 1, r"svd has no setting 'oneshot'; did you mean 'one_shot'"),
    "wrong kind": ((*SVD, "--set", "one_shot=maybe"), 1, r"one_shot is true or false, not 'maybe'"),
    "wrong number": (("-m", "modegpt", "-b", 0.8, "--set", "ridge=big"), 1, r"ridge is a number, not 'big'"),
    "option as setting": ((*SVD, "--set", "seed=3"), 1, r"seed is an option of its own: write --seed 3"),
    "targets": ((*SVD, "--set", "targets=nothing_.*"), 1, r"no layer of LlamaForCausalLM is targeted by 'nothing_"),
    "broken targets": ((*SVD, "--set", "targets=(("), 1, r"targets='\(\(' is not a regular expression"),
    "few batches": (("-m", "auto", "-b", 0.8, "--samples", 2), 1, r"auto sets .* aside: give at least two batches"),
    "workers": ((*SVD, "--workers", "some"), 1, r"cannot read --workers 'some': give a number of at least 1"),
    "no workers": ((*SVD, "--workers", "0"), 1, r"cannot read --workers '0'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WORDS)
def test_wrong_words(case: str, folder: Path, tmp_path: Path) -> None:
    words, expected, message = WORDS[case]
    code, said = failing(compress(folder, tmp_path / "out", *words))
    assert code == expected
    assert re.search(message, said), said
    assert not list(tmp_path.iterdir())


DATA = {
    "nothing.txt": r"There is no text file .*nothing.txt",
    "empty.txt": r"the data are empty: their documents hold not one token",
    "short.txt": r"there are 3 tokens of text, and 4 windows of 12 take 48. Give more text",
    "latin.txt": r"latin.txt is not UTF-8 text",
    "t.pdf": r"t.pdf is not one of the kinds that can be read: .txt",
}


@pytest.mark.parametrize("name", DATA)
def test_wrong_data(name: str, folder: Path, tmp_path: Path) -> None:
    code, said = failing(compress(folder, tmp_path / "out", "-m", "svd_llm", "-b", 0.8, data=name))
    assert code == 1
    assert re.search(DATA[name], said), said
    assert not list(tmp_path.iterdir())


def test_windows_longer_than_the_model_takes(folder: Path, tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "gpt2", "gpt2")
    words = compress(folder, tmp_path / "out", "-m", "svd_llm", "-b", 0.8, "--length", 100, model=tmp_path / "gpt2")
    code, said = failing(words)
    assert code == 1
    assert "GPT2LMHeadModel cannot run the calibration data" in said
    assert "(4, 100)" in said


def test_a_target_that_exists(folder: Path) -> None:
    code, said = failing(compress(folder, folder / "exists", *SVD))
    assert code == 4
    assert "exists already: choose another folder, or pass --overwrite" in said
    assert not list((folder / "exists").iterdir())


def test_a_method_that_needs_data_has_none(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="svd_llm needs calibration data: give texts or batches"):
        eckart.compress_to(tmp_path / "out", folder / "m", "svd_llm", budget=0.8, data=None)
    model = tiny.build("llama").train()
    with pytest.raises(ValueError, match="texts need a tokenizer: pass tokenizer="):
        eckart.compress(model, "svd_llm", budget=0.8, data=["w1 w2"])
    with pytest.raises(ValueError, match="the smallest possible"):
        eckart.compress(model, "svd", budget=0.01)
    assert model.training
    assert not list(tmp_path.iterdir())


def weights(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def remove(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names]


def change(**tensors: Any) -> Damage:
    """Other values for tensors, whose names are given with _ for dots; None takes one away."""

    def do(found: dict[str, Any]) -> None:
        for name in list(found):
            new = tensors.get(name.replace(".", "_"), found[name])
            found.update({name: torch.full_like(found[name], new) if isinstance(new, float) else new})
        for name in [n for n, value in found.items() if value is None]:
            del found[name]

    return lambda folder: weights(folder, do)


UP, UP_NAME = "model_layers_1_mlp_up_proj_weight", r"model\.layers\.1\.mlp\.up_proj\.weight"
QUANTISED = {"quant_method": "eckart"}
MODELS: dict[str, tuple[Damage, str]] = {
    "gone": (shutil.rmtree, r"There is no model at '/.*'. Give a Hugging Face folder, a .gguf file, a hub id"),
    "no config": (remove("config.json"), r"is not a Hugging Face model folder: it has no config.json"),
    "no weights": (remove("model.safetensors"), r"holds no weights: neither model.safetensors nor"),
    "cut short": (cut_short, r"model.safetensors is damaged or cut short"),
    "rubbish": (lambda f: (f / "model.safetensors").write_bytes(b"rubbish" * 9), r"is not a safetensors file"),
    "a tensor lacks": (change(**{UP: None}), rf"lacks 1 tensors of LlamaForCausalLM, the first of them {UP_NAME}"),
    "a wrong shape": (change(**{UP: torch.ones(3, 3)}), rf"{UP_NAME} has shape \(3, 3\), the model needs \(48, 32\)"),
    "NaN": (change(**{UP: float("nan")}), rf"{UP_NAME} holds NaN or infinity"),
    "infinity": (change(lm_head_weight=float("inf")), r"lm_head.weight holds NaN or infinity"),
    "an unknown class": (lambda f: config(f, architectures=["os.system"]), r"the config names \['os.system'\], which"),
    "already quantised": (lambda f: config(f, quantization_config=QUANTISED), r"is already compressed or quantised"),
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), r"no tokenizer that transformers can load"),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_wrong_models(case: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "m", tmp_path / "m")
    damage, message = MODELS[case]
    damage(tmp_path / "m")
    code, said = failing(compress(folder, tmp_path / "out", "-m", "svd_llm", "-b", 0.8, model=tmp_path / "m"))
    assert code == 1
    assert re.search(message, said), said
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("command", ["inspect", "evaluate"])
def test_other_commands_refuse_a_damaged_model(command: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "m", tmp_path / "m")
    cut_short(tmp_path / "m")
    more = [] if command == "inspect" else ["--data", folder / "t.txt", "--samples", 2, "--length", 12]
    code, said = failing([command, tmp_path / "m", *more])
    assert code == 1
    assert "damaged or cut short" in said


def test_report_of_a_folder_that_is_none(folder: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(folder / "m")])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert "eckart.json" in done.stderr.replace("\n", " ")


def test_an_unforeseen_error_is_json_too(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise AssertionError("something odd")

    monkeypatch.setattr("eckart.compression.compress_to", broken)
    done = CliRunner().invoke(app, [*map(str, compress(folder, tmp_path / "out", *SVD)), "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout) == {"error": "AssertionError: something odd", "exit_code": 1}
    assert "Traceback" in done.stderr


def test_an_interruption_says_how_to_go_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("eckart.jobs.engine.Engine.fit", interrupted)
    done = CliRunner().invoke(app, [*map(str, compress(folder, tmp_path / "out", *SVD)), "--json"])
    assert done.exit_code == 130
    assert "--resume goes on with what is done in" in json.loads(done.stdout)["error"]
    assert (tmp_path / "out.partial").exists()


def test_too_few_tokens_for_a_covariance_are_damped_and_said(folder: Path, tmp_path: Path) -> None:
    words = {"budget": 0.8, "data": folder / "t.txt", "samples": 2, "length": 4}
    result = eckart.compress_to(tmp_path / "out", folder / "m", "svd_llm", **words)
    assert all("saw 8 tokens for" in (layer.note or "") for layer in result.layers)
    assert all("rank-deficient and was damped" in (layer.note or "") for layer in result.layers)


def test_settings_are_kept_in_their_kind() -> None:
    assert method_for("modegpt", ridge=1).ridge == 1.0  # type: ignore[attr-defined]
    assert method_for("svd", targets="5").targets == "5"  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"multiple is a whole number, not 1\.5"):
        method_for("modegpt", multiple=1.5)
