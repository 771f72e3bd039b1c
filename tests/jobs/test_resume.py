"""A job killed at any moment goes on with --resume, and ends with the bytes of one that nobody touched.

Processes are killed by SIGKILL right before they make, write, rename or remove a file, which the test watches from
within them by an audit hook of Python's. The slowest test kills real commands once they have made so many files.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import tiny

RECIPES: dict[str, list[str]] = {
    "one-shot": ["--method", "svd_llm"],
    "sequential": ["--method", "svd_llm", "--set", "one_shot=false"],
    "gradients": ["--method", "fwsvd"],
}
MORE: dict[str, list[str]] = {
    "sequential-gradients": ["--method", "lord", "--metric", "kronecker()", "--set", "one_shot=false"],
    "data-free": ["--method", "welore"],
    "tried": ["--method", "auto"],
    "width": ["--method", "modegpt"],
    "rotated": ["--method", "slicegpt"],
}


def quick(*names: str, slow: tuple[str, ...]) -> list[Any]:
    """Names to try always, and those to try where there is time."""
    return [*names, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]


class Case:
    """A folder with a model, a text, and what an untouched run makes of them."""

    def __init__(self, folder: Path, recipe: list[str], **model: Any):
        self.folder = folder
        tiny.save_model(folder / "m", **model)
        tiny.save_text(folder / "t.txt")
        settings = ["--budget", 0.8, "--data", folder / "t.txt", "--samples", 6, "--length", 12, "--batch-size", 2]
        self.words = ["compress", folder / "m", *recipe, *settings, "--json"]

    def run(self, out: str, *more: Any, kill_at: int | None = None) -> tiny.Outcome:
        return tiny.run_forked([*self.words, "--output", self.folder / out, *more], self.folder, kill_at)

    def untouched(self) -> tuple[dict[str, str], int]:
        done = self.run("untouched")
        assert done.code == 0, done.printed
        return tiny.hashes(self.folder / "untouched"), done.steps

    def left(self) -> set[str]:
        """What lies beside the model and the finished folders."""
        return {p.name for p in self.folder.iterdir()} - {"m", "t.txt", "log.txt", "untouched", "untouched.run.json"}


@pytest.mark.parametrize("recipe", quick("sequential", slow=("one-shot", "gradients")))
def test_killed_five_times_and_resumed_it_ends_with_the_same_bytes(recipe: str, tmp_path: Path) -> None:
    case = Case(tmp_path, RECIPES[recipe])
    expected, steps = case.untouched()
    draw = random.Random(recipe)
    killed_at = 0
    for attempt in range(5):
        at = draw.randrange(steps // 8, steps // 5)
        done = case.run("out", *(["--resume"] if attempt else []), kill_at=at)
        assert done.code == -signal.SIGKILL, (attempt, done.printed)
        killed_at += done.steps
        assert not (tmp_path / "out").exists() or killed_at > steps // 2
    refused = case.run("out")
    assert refused.code == 4
    assert "--resume" in json.loads(refused.printed)["error"]
    finished = case.run("out", "--resume")
    assert finished.code == 0, finished.printed
    assert tiny.hashes(tmp_path / "out") == expected
    assert case.left() == {"out", "out.run.json"}


def assert_resumes(case: Case, expected: dict[str, str], at: int, *more: Any) -> None:
    """Killed at a step and resumed, the folder is as expected and nothing else is left."""
    killed = case.run("out", *more, kill_at=at)
    assert killed.code == -signal.SIGKILL, (at, killed.printed)
    done = case.left() == {"out", "out.run.json", ".out.eckart-old"}  # only rubbish was still to be removed
    finished = case.run("out", *more, "--resume")
    assert finished.code == (4 if done else 0), (at, finished.printed)
    assert tiny.hashes(case.folder / "out") == expected, at
    assert case.left() == {"out", "out.run.json"}, at


def test_killed_within_its_last_steps_it_is_finished(tmp_path: Path) -> None:
    """From the model card on: the exchange of folders, the record of times, the removal of the working folder."""
    case = Case(tmp_path, ["--method", "svd"])
    expected, steps = case.untouched()
    for at in range(steps - 22, steps + 1, 5):
        assert_resumes(case, expected, at)
        shutil.rmtree(tmp_path / "out")
        (tmp_path / "out.run.json").unlink()


def test_what_is_overwritten_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    case = Case(tmp_path, ["--method", "svd"])
    expected, _ = case.untouched()
    old = {"notes.txt": "kept"}
    steps = _with_old(case, old).steps
    for at in range(steps - 24, steps + 1, 8):
        _make(tmp_path / "out", old)
        killed = case.run("out", "--overwrite", kill_at=at)
        assert killed.code == -signal.SIGKILL
        beside = tmp_path / ".out.eckart-replaced"
        there = tmp_path / "out" if (tmp_path / "out").exists() else beside
        whole = tiny.hashes(there) == expected or {p.name: p.read_text() for p in there.iterdir()} == old
        assert whole, at
        finished = case.run("out", "--overwrite", "--resume")
        assert finished.code == 0, (at, finished.printed)
        assert tiny.hashes(tmp_path / "out") == expected
        assert case.left() == {"out", "out.run.json"}, at
        shutil.rmtree(tmp_path / "out")


def _with_old(case: Case, old: dict[str, str]) -> tiny.Outcome:
    _make(case.folder / "out", old)
    done = case.run("out", "--overwrite")
    assert done.code == 0, done.printed
    shutil.rmtree(case.folder / "out")
    return done


def _make(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def test_an_unfinished_run_is_neither_lost_nor_mixed_with_another(tmp_path: Path) -> None:
    case = Case(tmp_path, ["--method", "svd_llm"])
    expected, steps = case.untouched()
    assert case.run("out", kill_at=3 * steps // 4).code == -signal.SIGKILL
    unfinished = tiny.hashes(tmp_path / "out.partial")
    other = case.run("out", "--resume", "--seed", 1)
    assert other.code == 1
    assert "an unfinished run with other settings (batches, seed)" in json.loads(other.printed)["error"]
    refused = case.run("out", "--seed", 1)
    assert refused.code == 4
    assert "--overwrite to throw it away" in json.loads(refused.printed)["error"]
    assert case.run("out", "--dry-run", "--seed", 1).code == 0
    tiny.save_text(tmp_path / "t.txt", seed=5)
    changed = case.run("out", "--resume")
    assert "(batches)" in json.loads(changed.printed)["error"]
    tiny.save_text(tmp_path / "t.txt")
    assert tiny.hashes(tmp_path / "out.partial") == unfinished
    assert case.run("out", "--resume").code == 0
    assert tiny.hashes(tmp_path / "out") == expected


@pytest.mark.parametrize("recipe", quick("one-shot", slow=("gradients", "sequential-gradients", "width")))
def test_statistics_that_are_gone_are_collected_again(recipe: str, tmp_path: Path) -> None:
    """A run that kept them in a folder of its own goes on without that folder."""
    case = Case(tmp_path, (RECIPES | MORE)[recipe])
    expected, steps = case.untouched()
    killed = case.run("out", "--statistics", tmp_path / "statistics", kill_at=7 * steps // 10)
    assert killed.code == -signal.SIGKILL
    assert (tmp_path / "out.partial" / "part-00000.json").exists()
    shutil.rmtree(tmp_path / "statistics")
    finished = case.run("out", "--resume")
    assert finished.code == 0, finished.printed
    assert tiny.hashes(tmp_path / "out") == expected


def test_overwrite_without_resume_begins_anew(tmp_path: Path) -> None:
    case = Case(tmp_path, ["--method", "svd_llm"])
    expected, steps = case.untouched()
    assert case.run("out", "--seed", 1, kill_at=steps // 2).code == -signal.SIGKILL
    assert case.run("out", "--overwrite").code == 0
    assert tiny.hashes(tmp_path / "out") == expected
    assert case.left() == {"out", "out.run.json"}


def test_resume_without_anything_to_resume_is_a_run(tmp_path: Path) -> None:
    case = Case(tmp_path, ["--method", "svd"])
    expected, _ = case.untouched()
    assert case.run("out", "--resume").code == 0
    assert tiny.hashes(tmp_path / "out") == expected
    again = case.run("out", "--resume")
    assert again.code == 4
    assert "exists already" in json.loads(again.printed)["error"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES | MORE)
def test_killed_at_many_steps_it_ends_with_the_same_bytes(recipe: str, tmp_path: Path) -> None:
    """Every ninth step or so: the beginning, calibration, the plan, each block, the end."""
    case = Case(tmp_path, (RECIPES | MORE)[recipe], shard="20KB")
    expected, steps = case.untouched()
    draw = random.Random(recipe)
    for first in range(1, steps + 1, 9):
        assert_resumes(case, expected, min(steps, first + draw.randrange(9)))
        shutil.rmtree(tmp_path / "out")
        (tmp_path / "out.run.json").unlink()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_real_commands_killed_at_random_moments(recipe: str, tmp_path: Path) -> None:
    """Processes that know nothing of the test; each makes up to a fifth of the files before it is killed."""
    case = Case(tmp_path, RECIPES[recipe], name="llama", hidden_size=192, intermediate_size=512, num_hidden_layers=6)
    words = [*case.words, "--samples", 48, "--length", 48]
    code, made = started([*words, "--output", tmp_path / "untouched"], tmp_path / "untouched.partial")
    assert code == 0
    expected, draw, out = tiny.hashes(tmp_path / "untouched"), random.Random(recipe), tmp_path / "out"
    partial, killed = tmp_path / "out.partial", 0
    while killed < 5:
        more = ["--resume"] if partial.exists() else []
        at, delay = draw.randint(1, made // 5), draw.uniform(0, 0.05)
        code, _ = started([*words, "--output", out, *more], partial, at, delay)
        if out.exists():  # too late
            assert tiny.hashes(out) == expected
            shutil.rmtree(out)
            shutil.rmtree(partial, ignore_errors=True)
            continue
        assert code == -signal.SIGKILL
        killed += 1
    finished = tiny.eckart(*words, "--output", out, "--resume")
    assert finished.returncode == 0, finished.stdout
    assert tiny.hashes(out) == expected
    assert case.left() == {"out", "out.run.json"}


def started(words: list[Any], folder: Path, kill_at: int | None = None, delay: float = 0) -> tuple[int, int]:
    """Run a command, and kill it so many seconds after it has made `kill_at` files below a folder.

    Returns its exit code, and how many files were seen that it made; some may be gone before they are seen.
    """
    before, seen = files(folder), set[tuple[str, int]]()
    with subprocess.Popen(tiny.command(*words), env=tiny.environment(), stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            time.sleep(0.002)
            seen |= files(folder) - before
            if kill_at is not None and len(seen) >= kill_at:
                time.sleep(delay)
                process.kill()
                break
    return process.returncode, len(seen)


def files(folder: Path) -> set[tuple[str, int]]:
    """Paths and inodes of all files below a folder, some of which may come and go meanwhile."""
    found = set()
    for below, _, names in os.walk(folder):
        for path in (os.path.join(below, name) for name in names):
            with contextlib.suppress(FileNotFoundError):
                found.add((path, os.stat(path).st_ino))
    return found
