"""The built-in text: 89 English Wikipedia articles, which lie in the test data of the package gensim.

The articles are by Wikipedia's contributors, under the Creative Commons Attribution-ShareAlike licence (CC BY-SA);
each keeps its title, which leads to its authors. The cleaning below is approximate: perplexities on it are
comparable with one another and not with published ones on WikiText.
"""

from __future__ import annotations

import bz2
import html
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from eckart.downloads import Progress, build_once, package_file, silent

PACKAGE = ("gensim", "4.4.0")
DUMP = "gensim/test/test_data/enwiki-latest-pages-articles1*-shortened.bz2"
# Only data are taken from the wheel, so the wheel of one platform serves all.
ANY_PLATFORM = (
    "--only-binary=:all:",
    "--platform=manylinux_2_24_x86_64",
    "--python-version=311",
    "--implementation=cp",
    "--abi=cp311",
)
SHORTEST = 2000  # characters; what is shorter is a stub or a list
CLEANING = 1  # counted up when the cleaning changes, so that no cache keeps the old text

INNERMOST = re.compile(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\||\|\}).)*\|\}", re.S)
UNSEEN = re.compile(r"<!--.*?-->|<(ref|math|gallery|timeline|imagemap)\b[^>]*?(?:/>|>.*?</\1\s*>)", re.S | re.I)
MEDIA = re.compile(r"\[\[\s*(?:File|Image|Category|[a-z]{2,3}(?:-[a-z-]+)?)\s*:(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", re.I)
LINK = re.compile(r"\[\[(?:[^\[\]]*\|)?([^\[\]|]*)\]\]")
OUTSIDE_LINK = re.compile(r"\[(?:https?:)?//\S+ ?([^\]]*)\]")
TAG_OR_QUOTES = re.compile(r"</?[a-z][^<>]*>|'{2,}", re.I)
LIST_LINE = re.compile(r"^[*#:;|!].*$", re.M)
APPENDIX = re.compile(
    r"^==+ ?(See also|References|External links|Further reading|Notes|Bibliography|Sources)\b.*", re.S | re.M
)
EMPTY_BRACKETS = re.compile(r" ?\([\s,;]*\)")


def articles(*, progress: Progress = silent) -> list[str]:
    """All articles in the order of the dump, cleaned of markup, headed ` = Title = `. Fetched and cleaned once.

    Raises:
        RuntimeError: the package cannot be downloaded.
    """

    def build(target: Path) -> None:
        progress("download text", 0, 1)
        instead = "Connect to a package index, or give a text file of your own (--data FILE) instead of 'builtin'."
        with package_file(*PACKAGE, DUMP, pip_options=ANY_PLATFORM, instead=instead) as dump:
            texts = list(read_dump(dump))
        (target / "articles.json").write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
        progress("download text", 1, 1)

    folder = build_once(f"texts/wikipedia-{'-'.join(PACKAGE)}-{CLEANING}", build)
    return list(json.loads((folder / "articles.json").read_text(encoding="utf-8")))


def read_dump(dump: Path) -> Iterator[str]:
    """The articles of a MediaWiki XML dump (.bz2) that are long enough once they are cleaned."""
    with bz2.open(dump) as file:
        title = ""
        for _, element in ElementTree.iterparse(file):
            tag = element.tag.rpartition("}")[2]
            if tag == "title":
                title = element.text or ""
            elif tag == "text" and not (element.text or "").lower().startswith("#redirect"):
                body = clean(element.text or "")
                if len(body) > SHORTEST:
                    yield f" = {title} = \n\n{body}\n"


def clean(markup: str) -> str:
    """Running text of an article: no templates, tables, references, media, lists or appendices."""
    text = UNSEEN.sub("", markup)
    previous = ""
    while text != previous:  # templates and tables nest: peel them from the inside
        previous, text = text, INNERMOST.sub("", text)
    text = OUTSIDE_LINK.sub(r"\1", LINK.sub(r"\1", MEDIA.sub("", text)))
    text = html.unescape(TAG_OR_QUOTES.sub("", text)).replace("\xa0", " ")
    text = EMPTY_BRACKETS.sub("", APPENDIX.sub("", LIST_LINE.sub("", text)))
    return re.sub(r"\n{3,}", "\n\n", text).strip()
