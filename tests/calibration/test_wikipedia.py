"""Wiki markup becomes running text, and the dump is fetched from its package once."""

from __future__ import annotations

import bz2
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from eckart import downloads
from eckart.calibration.wikipedia import articles, clean, read_dump

PAGE = "<page><title>{}</title><revision><text xml:space='preserve'>{}</text></revision></page>"
NAMESPACE = "http://www.mediawiki.org/xml/export-0.10/"


def write_dump(file: Path, pages: dict[str, str]) -> Path:
    body = "".join(PAGE.format(title, text) for title, text in pages.items())
    file.write_bytes(bz2.compress(f"<mediawiki xmlns='{NAMESPACE}'>{body}</mediawiki>".encode()))
    return file


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("'''Bold''' and ''slanted''", "Bold and slanted"),
        ("a [[link]], a [[target|shown]] one, [[two|#|three]]", "a link, a shown one, three"),
        ("see [http://x.org the site] or [//x.org]", "see the site or"),
        ("a{{one|{{two|{{three}}}}}}b", "ab"),
        ("a{| class=x\n| cell {{t}}\n{| inner |}\n|}b", "ab"),
        ("a<ref name=x/>b<ref>{{cite|[[x]]}}</ref>c<!-- no\nno -->d", "abcd"),
        ("x<math>\\frac{a}{b}</math>y<br />z<sub>2</sub>", "xyz2"),
        ("[[File:a.jpg|thumb|A [[cat]] and [[a|dog]].]]after", "after"),
        ("[[Category:Cats]][[de:Katze]][[Image:x.png]]end", "end"),
        ("1 &lt; 2&nbsp;km", "1 < 2 km"),
        ("text\n* item\n# item\n: indented\n; term\nmore", "text\n\nmore"),
        ("body\n==History==\nold\n== See also ==\n* x\n==Later==\ny", "body\n==History==\nold"),
        ("a ({{lang|el|x}}; {{IPA}}) b", "a b"),
    ],
)
def test_markup(markup: str, text: str) -> None:
    assert clean(markup) == text


def test_short_articles_and_redirects_are_left_out(tmp_path: Path) -> None:
    long = "word " * 500
    dump = write_dump(tmp_path / "d.bz2", {"Long": long, "Stub": "short", "Moved": "#REDIRECT [[Long]]" + long})
    assert list(read_dump(dump)) == [f" = Long = \n\n{long.strip()}\n"]


def test_the_dump_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECKART_CACHE", str(tmp_path / "cache"))
    commands: list[list[str]] = []
    dump = write_dump(tmp_path / "d.bz2", {"Long": "word " * 500, "Übung": "wörd " * 500})

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "gensim-4.4.0-x.whl", "w") as wheel:
            wheel.writestr("gensim/__init__.py", "")
            wheel.write(dump, "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p1p2-shortened.bz2")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(downloads.subprocess, "run", run)
    texts = articles()
    assert [text.split("\n")[0] for text in texts] == [" = Long = ", " = Übung = "]
    assert articles() == texts
    assert [command[-1] for command in commands] == ["gensim==4.4.0"]


def test_without_a_package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECKART_CACHE", str(tmp_path / "cache"))
    failed = subprocess.CompletedProcess([], 1, "", "no network")
    monkeypatch.setattr(downloads.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"gensim==4\.4\.0 \(no network\)\..* text file of your own"):
        articles()
