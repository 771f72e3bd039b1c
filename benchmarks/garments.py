"""Pictures to learn from: Fashion-MNIST (Xiao et al. 2017, MIT), 70,000 garments of ten kinds, grey, 28 x 28.

Out of the Debian package dataset-fashion-mnist, which needs apt-get and dpkg on the path, but no administrator.
"""

from __future__ import annotations

import gzip
import shutil
import tempfile
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from corpora import run
from eckart.downloads import build_once

PACKAGE = "dataset-fashion-mnist"
FOLDER = "usr/share/datasets/fashion-mnist"
SIDE, KINDS = 28, 10


class Garments(NamedTuple):
    """Pictures, their pixels from 0 to 255, and their kinds."""

    pictures: Float[Tensor, "n 1 28 28"]
    kinds: Int[Tensor, " n"]

    def rows(self, chosen: slice | Tensor) -> Garments:
        """Some of them."""
        return Garments(self.pictures[chosen], self.kinds[chosen])


def garments(part: Literal["train", "t10k"]) -> Garments:
    """The 60,000 to learn from, or the 10,000 to be judged on, in the order of the files."""

    def build(target: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            run("apt-get", "download", PACKAGE, cwd=work)
            run("dpkg", "-x", next(work.glob(f"{PACKAGE}*.deb")).name, "unpacked", cwd=work)
            for file in (work / "unpacked" / FOLDER).glob("*-ubyte.gz"):
                shutil.copy(file, target)

    folder = build_once("pictures/fashion-mnist-1", build)
    pixels = _read(folder / f"{part}-images-idx3-ubyte.gz", 16).view(-1, 1, SIDE, SIDE)
    return Garments(pixels.float(), _read(folder / f"{part}-labels-idx1-ubyte.gz", 8).long())


def _read(file: Path, header: int) -> Int[Tensor, " bytes"]:
    return torch.frombuffer(bytearray(gzip.decompress(file.read_bytes())[header:]), dtype=torch.uint8)
