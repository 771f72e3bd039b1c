"""The cache holds whole folders only, and packages are read without being installed or imported."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from eckart import downloads
from eckart.downloads import build_once, cache_folder, package_file


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("ECKART_CACHE", str(folder))
    return folder


def test_the_folder_is_the_users_unless_said_otherwise(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == cache
    monkeypatch.delenv("ECKART_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "eckart"


def test_it_is_built_once(cache: Path) -> None:
    builds = []

    def build(folder: Path) -> None:
        builds.append(folder)
        (folder / "x").write_text("whole")

    assert build_once("a/b", build) == build_once("a/b", build) == cache / "a" / "b"
    assert len(builds) == 1
    assert (cache / "a" / "b" / "x").read_text() == "whole"


def test_an_interrupted_build_leaves_nothing(cache: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("...")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once("a", build)
    assert list(cache.iterdir()) == []


def test_of_racing_builds_one_wins_and_both_get_it(cache: Path) -> None:
    both, found = threading.Barrier(2, timeout=10), []

    def build(folder: Path) -> None:
        (folder / "x").write_text(folder.name)
        both.wait()

    threads = [threading.Thread(target=lambda: found.append(build_once("a", build))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache / "a"] * 2
    assert [path.name for path in cache.iterdir()] == ["a"]
    assert (cache / "a" / "x").read_text().startswith(".a-")


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ECKART_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="file"):
        build_once("a", lambda folder: None)


def test_a_file_of_an_installed_package_needs_no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import version

    monkeypatch.setattr(downloads.subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    with package_file("hypothesis", version("hypothesis"), "hypothesis/vendor/tlds-*.txt", instead="") as file:
        assert "ACADEMY" in file.read_text()


def test_a_file_of_a_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        with ZipFile(Path(command[command.index("--dest") + 1]) / "hypothesis-0.0.1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("hypothesis/data.txt", "from the wheel")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(downloads.subprocess, "run", run)
    with package_file("hypothesis", "0.0.1", "*/data.txt", pip_options=["--option"], instead="") as file:
        assert file.read_text() == "from the wheel"
    assert not file.exists()
    assert commands[0][-2:] == ["--option", "hypothesis==0.0.1"]
    with (
        pytest.raises(RuntimeError, match=r"holds no file '\*/other.txt'. Do that."),
        package_file("hypothesis", "0.0.1", "*/other.txt", instead="Do that."),
    ):
        pass
