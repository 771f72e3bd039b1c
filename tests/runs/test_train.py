"""Whole runs: what lies in the folder, every optimiser and structure, and runs that are killed, cut and resumed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import small_runs
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from eckart.registry import entries
from eckart.runs import Config, read_yaml, train
from eckart.runs.record import read_metrics

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "galore": {"rank": 4, "interval": 3},
    "q_galore": {"rank": 4, "interval": 3, "int8": True},
    "fira": {"rank": 4, "interval": 3},
    "frugal": {"density": 0.25, "interval": 3},
    "dct_adamw": {"rank": 4},
    "lion_k": {"weight_decay": 0.1},
}
STRUCTURES: dict[str, dict[str, Any]] = {
    "sltrain": {"rank": 3, "density": 0.05},
    "lost": {"rank": 3, "density": 0.1},
    "trp": {"period": 2, "energy": 0.9},
    "maestro": {"shrink_every": 2},
    "sst": {"rank": 4, "every": 2, "warmup": 2},
    "gradual_pruning": {"begin": 0, "end": 0.6, "every": 2},
    "nm_gradient_flow": {"beta": 0.5},
    "weight_compander": {"learned": True},
    "pela": {"ratio": 2.0},
    "dsformer_stf": {"nonzeros": 2, "atoms": 8, "block": 8, "refresh": 2, "iterations": 2},
    "greenformers": {"rank": 0.5},
}
quiet = pytest.mark.filterwarnings("ignore")


def test_a_run_leaves_a_model_its_tokenizer_its_metrics_and_a_page(tmp_path: Path) -> None:
    done = train(small_runs.write(tmp_path))
    out = tmp_path / "out"
    assert done.folder == str(out)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert sum(p.numel() for p in model.parameters()) == done.parameters
    assert tokenizer("w1 w2")["input_ids"] == tiny.tokenizer()("w1 w2")["input_ids"]
    lines = read_metrics(out)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["state_bytes"] > line["gradient_bytes"] > 0 for line in lines)
    assert all(line["activation_bytes"] > 0 and line["peak_memory"] > 0 for line in lines)
    assert done.perplexity is not None
    assert 1 < done.perplexity < 2 * tiny.VOCABULARY
    record = json.loads((out / "train.json").read_text())
    assert record["settings"]["training"]["steps"] == 8
    page = (out / "report.html").read_text()
    assert page.count("<polyline") == 6
    assert "optimiser state" in page
    assert "<script src" not in page
    assert {p.name for p in tmp_path.iterdir()} == {"m", "t.txt", "run.yaml", "out"}


@quiet
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_every_optimiser_trains(name: str, tmp_path: Path) -> None:
    done = train(small_runs.write(tmp_path, optimizer={"name": name, **OPTIMIZERS[name]}))
    lines = read_metrics(tmp_path / "out")
    numbers = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "out").parameters())
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert done.bytes["state_bytes"] < 8 * numbers
    if name == "q_galore":
        assert done.bytes["weight_bytes"] < 3 * numbers


@quiet
@pytest.mark.parametrize("name", list(STRUCTURES))
def test_every_structure_trains_and_loads_without_its_scaffold(name: str, tmp_path: Path) -> None:
    done = train(small_runs.write(tmp_path, structure={"method": name, **STRUCTURES[name]}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert not any("parametrizations" in key for key in model.state_dict())
    assert done.perplexity is not None
    assert bool(torch.isfinite(model(**tiny.batches((2,))[0]).logits).all())


def test_all_registered_words_are_tried_here() -> None:
    assert {e.key for e in entries("optimizers") if issubclass(e.cls, torch.optim.Optimizer)} == set(OPTIMIZERS)
    assert {e.key for e in entries("training") if e.family != "convolution"} == set(STRUCTURES)


@quiet
def test_a_form_a_model_that_is_there_and_a_trained_tokenizer(tmp_path: Path) -> None:
    words = small_runs.settings(tmp_path, structure={"form": "low_rank(rank=4)"})
    started = Config(**{**vars(_config(tmp_path, words | {"model": {"folder": str(tmp_path / "m")}}))})
    done = train(started)
    assert AutoModelForCausalLM.from_pretrained(done.folder).config.num_hidden_layers == 3
    fresh = words | {"output": str(tmp_path / "new"), "model": {"vocabulary": 270, "num_key_value_heads": 2, **small_runs.SIZES}}  # fmt: skip # noqa: E501
    train(_config(tmp_path, fresh))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "new")) == 270


def _config(folder: Path, words: dict[str, Any]) -> Config:
    import yaml

    (folder / "own.yaml").write_text(yaml.safe_dump(words))
    return read_yaml(folder / "own.yaml", Config)


def test_the_seed_decides_every_bit(tmp_path: Path) -> None:
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(
            small_runs.write(
                tmp_path, output=str(tmp_path / out), seed=seed, structure={"method": "sltrain", "rank": 2}
            )
        )
    assert (
        small_runs.weights(tmp_path / "a") == small_runs.weights(tmp_path / "b") != small_runs.weights(tmp_path / "c")
    )


CUT: dict[str, dict[str, Any]] = {
    "sltrain with galore": {
        "structure": {"method": "sltrain", "rank": 3, "density": 0.05},
        "optimizer": {"name": "galore", "density": 0.5, "interval": 3, "include": r"layers.*(left|right)\.weight"},
        "model": {"attention_dropout": 0.2},
    },
    "q_galore": {"optimizer": {"name": "q_galore", **OPTIMIZERS["q_galore"]}},
    "sst": {"structure": {"method": "sst", **STRUCTURES["sst"]}},
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * bool(i)) for i, c in enumerate(CUT)])
def test_killed_at_any_change_of_a_file_and_resumed_it_ends_with_the_same_bits(case: str, tmp_path: Path) -> None:
    small_runs.write(tmp_path, output=str(tmp_path / "untouched"), **CUT[case]).rename(tmp_path / "untouched.yaml")
    path = small_runs.write(tmp_path, **CUT[case])
    done = tiny.run_forked(["train", tmp_path / "untouched.yaml", "--json"], tmp_path)
    assert done.code == 0, done.printed
    at = [done.steps * part // 10 for part in ((2, 4, 5) if case == "q_galore" else (3, 5))]
    had_begun = []
    for attempt, kill_at in enumerate(at):
        killed = tiny.run_forked(["train", path, "--json", *(["--resume"] if attempt else [])], tmp_path, kill_at)
        assert killed.code == -signal.SIGKILL, killed.printed
        had_begun.append((tmp_path / "out.partial" / "state.pt").exists())
    assert any(had_begun)
    refused = tiny.run_forked(["train", path, "--json"], tmp_path)
    assert refused.code == 4
    assert "--resume" in json.loads(refused.printed)["error"]
    finished = tiny.run_forked(["train", path, "--json", "--resume"], tmp_path)
    assert finished.code == 0, finished.printed
    assert small_runs.weights(tmp_path / "out") == small_runs.weights(tmp_path / "untouched")
    losses = [[line["loss"] for line in read_metrics(tmp_path / name)] for name in ("out", "untouched")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8
    assert not (tmp_path / "out.partial").exists()


def test_ctrl_c_ends_the_step_saves_it_and_resume_goes_on_there(tmp_path: Path) -> None:
    words = {"training": {"steps": 4000, "save_every": 4000}, "structure": {"method": "lost", "rank": 2}}
    path = small_runs.write(tmp_path, **words)
    process = subprocess.Popen(
        tiny.command("train", path, "--json"), stdout=subprocess.PIPE, text=True, env=tiny.environment()
    )
    metrics, begin = tmp_path / "out.partial" / "metrics.jsonl", time.monotonic()
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None
        assert time.monotonic() - begin < 120
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    told = json.loads(printed)
    assert "--resume goes on from there" in told["error"]
    saved = torch.load(tmp_path / "out.partial" / "state.pt", weights_only=True)["steps"]
    assert saved == len(read_metrics(tmp_path / "out.partial")) > 3


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("train", 5):
            signal.raise_signal(signal.SIGINT)

    train(small_runs.write(tmp_path, output=str(tmp_path / "whole"), **CUT["sst"]))
    path = small_runs.write(tmp_path, **CUT["sst"])
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="after step 5 of 8"):
        train(path, progress=interrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    begun: list[int] = []
    train(path, resume=True, progress=lambda stage, done, total: begun.append(done) if stage == "train" else None)
    assert begun == [5, 6, 7, 8]
    assert small_runs.weights(tmp_path / "out") == small_runs.weights(tmp_path / "whole")


def test_other_settings_other_texts_and_folders_in_the_way_are_refused(tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("train", 5):
            raise Enough

    path = small_runs.write(tmp_path)
    with pytest.raises(Enough):
        train(path, progress=stop)
    assert [line["step"] for line in read_metrics(tmp_path / "out.partial")] == [1, 2, 3, 4, 5]
    with pytest.raises(FileExistsError, match="pass --resume to go on with it, or --overwrite"):
        train(path)
    with pytest.raises(ValueError, match=r"other settings \(optimizer\): repeat those"):
        train(small_runs.write(tmp_path, optimizer={"lr": 1.0}), resume=True)
    tiny.save_text(tmp_path / "t.txt", words=1500, seed=3)
    with pytest.raises(ValueError, match="the texts are not those that this run began with"):
        train(small_runs.write(tmp_path), resume=True)
    done = train(small_runs.write(tmp_path), overwrite=True)
    assert done.steps == 8
    with pytest.raises(FileExistsError, match="exists already: choose another folder"):
        train(path)


def test_what_cannot_begin_leaves_nothing(tmp_path: Path) -> None:
    for words, message in (
        ({"data": {"texts": str(tmp_path / "no.txt")}}, "There is no text file"),
        ({"data": {"length": 5000}}, "there are 1501 tokens of text|tokens of text"),
        ({"data": {"held_out": 0.999}}, "of 93 windows of 16 tokens, 93 would be held out"),
        ({"structure": {"method": "sst", "rank": 40}}, "structure: model.layers.0.* does not fit a matrix"),
    ):
        with pytest.raises(ValueError, match=message):
            train(small_runs.write(tmp_path, **words))
        assert not (tmp_path / "out.partial").exists()
    words = small_runs.settings(tmp_path, output=str(tmp_path / "m"))
    before = tiny.hashes(tmp_path / "m")
    with pytest.raises(ValueError, match="is the folder of the model itself: choose another one"):
        train(_config(tmp_path, words | {"model": {"folder": str(tmp_path / "m")}}), overwrite=True)
    assert tiny.hashes(tmp_path / "m") == before
    with pytest.raises(RuntimeError, match=r"training has diverged; lower optimizer\.lr"):
        train(small_runs.write(tmp_path, optimizer={"lr": 1e30}, training={"clip": 0, "warmup": 0, "save_every": 1}))


def test_tensorboard_gets_every_figure_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int):
            Path(folder).mkdir(exist_ok=True)
            written.append(("purge", purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, step))

        def close(self) -> None:
            written.append(("closed", -1))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    train(small_runs.write(tmp_path))
    assert written[0] == ("purge", 1)
    assert written[-1] == ("closed", -1)
    assert [step for name, step in written if name == "loss"] == list(range(1, 9))
    assert (tmp_path / "out" / "tensorboard").is_dir()


def test_the_command_prints_a_table_or_json_and_errors_name_the_key(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from eckart.cli import app

    told = CliRunner().invoke(app, ["train", str(small_runs.write(tmp_path)), "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["steps"] == 8
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["train", str(tmp_path / "run.yaml"), "--overwrite"])
    assert shown.exit_code == 0, shown.output
    assert "held-out perplexity" in shown.stdout
    assert "report.html" in shown.stdout
    wrong = CliRunner().invoke(app, ["train", str(small_runs.write(tmp_path, optimizer={"name": "galor"})), "--json"])
    assert wrong.exit_code == 1
    assert "did you mean 'galore'" in json.loads(wrong.stdout)["error"]
