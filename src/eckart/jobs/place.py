"""Where a job on disk works, and how its result takes its place: whatever is killed, no folder is ever half there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from eckart.checkpoint.layout import save_json

MODEL = "model"


class Place:
    """The folders around `out`, each made and removed by a rename.

    `<out>.partial` is the job's: it holds `job.json` and, until it is moved to `out`, the folder `model`. Hidden beside
    it are, for a moment each, what was at `out` before, a working folder in the making, and one on its way out.

    Attributes:
        moved: whether a run that was killed had moved its result to `out` already.
    """

    def __init__(self, out: Path):
        self.out = out
        self.work = out.with_name(f"{out.name}.partial")
        self.aside, self.new, self.old = (out.with_name(f".{out.name}.eckart-{x}") for x in ("replaced", "new", "old"))
        self.moved = False

    def enter(self, settings: dict[str, Any], resume: bool, overwrite: bool) -> None:
        """Make the working folder, or see that the one there belongs to this very job.

        Raises `FileExistsError` where `out` or an unfinished run is in the way, `ValueError` where the run to be
        resumed is another.
        """
        job = json.loads(json.dumps(settings))
        self._tidy()
        started = (self.work / "job.json").exists()
        self.moved = resume and started and self.out.exists() and not (self.work / MODEL).exists()
        if self.out.exists() and not (self.moved or overwrite):
            raise FileExistsError(f"{self.out} exists already: choose another folder, or pass --overwrite")
        if self.out.exists() and not self.out.is_dir():
            raise FileExistsError(f"{self.out} is a file: choose a folder")
        if started:
            started = self._ours(job, resume, overwrite)
        elif self.work.exists():
            raise FileExistsError(f"{self.work} is in the way and was not made by eckart: move it")
        if not started:
            self._make(job)

    def _tidy(self) -> None:
        """Finish what a killed run was about to do."""
        for left in (self.old, self.new):
            if left.exists():
                shutil.rmtree(left)
        if self.aside.exists() and not self.out.exists():
            self.aside.rename(self.out)
        elif self.aside.exists():
            shutil.rmtree(self.aside)

    def _ours(self, job: dict[str, Any], resume: bool, overwrite: bool) -> bool:
        """Whether the unfinished run that is there goes on; if not, it is thrown away."""
        found = json.loads((self.work / "job.json").read_text(encoding="utf-8"))
        differ = ", ".join(sorted(k for k in job.keys() | found.keys() if job.get(k) != found.get(k)))
        if resume and differ:
            raise ValueError(f"{self.work} holds an unfinished run with other settings ({differ}): repeat those, or pass --overwrite without --resume to begin anew")  # fmt: skip # noqa: E501
        if resume:
            return True
        if not overwrite:
            kind = f"with other settings ({differ})" if differ else "of this very job"
            raise FileExistsError(f"{self.work} holds an unfinished run {kind}: pass --resume to go on with it, or --overwrite to throw it away")  # fmt: skip # noqa: E501
        self.leave()
        return False

    def _make(self, job: dict[str, Any]) -> None:
        (self.new / MODEL).mkdir(parents=True)
        save_json(job, self.new / "job.json")
        self.new.rename(self.work)

    def move(self) -> None:
        """Let the finished model be at `out`; what was there is brought back if that fails."""
        if self.out.exists():
            self.out.rename(self.aside)
        try:
            (self.work / MODEL).rename(self.out)
        except BaseException:
            if self.aside.exists():
                self.aside.rename(self.out)
            raise

    def leave(self) -> None:
        """Remove the working folder, and what was replaced."""
        self.work.rename(self.old)
        shutil.rmtree(self.old)
        if self.aside.exists():
            shutil.rmtree(self.aside)

    def forget(self) -> None:
        """Remove the working folder of a job that cannot be done, unless some part of the model is."""
        if self.work.exists() and not any(self.work.glob("part-*.json")):
            self.leave()
