"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eckart.files import whole


def test_what_is_written_may_be_read_by_whoever_may_read_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbour").touch()
    with whole(tmp_path / "weights.safetensors") as temporary:
        save_file({"a": torch.zeros(2)}, temporary)
    modes = {os.stat(tmp_path / name).st_mode for name in ("neighbour", "weights.safetensors")}
    assert len(modes) == 1


def test_what_breaks_off_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(RuntimeError):
        _killed_half_way(path)
    assert path.read_text() == "before"
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def _killed_half_way(path: Path) -> None:
    with whole(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("killed")


def test_where_nothing_can_be_written_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent/file'$"), whole(tmp_path / "absent" / "file") as temporary:
        temporary.write_text("never")
