"""Settings of methods, as texts on the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

WORDS: dict[str, Any] = {"true": True, "false": False, "none": None}
NAMES = re.compile(r"[\w.-]+(,[\w.-]+)+")


def parse_pairs(pairs: list[str] | None) -> dict[str, str]:
    """`name=value` texts. Raises `ValueError` where one is none."""
    found = {}
    for pair in pairs or []:
        name, sign, value = pair.partition("=")
        if not sign or not name.strip():
            raise ValueError(f"cannot read the setting {pair!r}: write NAME=VALUE")
        found[name.strip()] = value.strip()
    return found


def parse_settings(pairs: list[str] | None, options: Collection[str] = (), *, nested: bool = False) -> dict[str, Any]:
    """`name=value` texts as keyword arguments: numbers, true/false and none are read, other values stay text.

    Args:
        options: names that are options of the command itself.
        nested: whether JSON, and lists of names with commas between them, are read, too.

    Raises `ValueError` where a text is no pair, or names one of the options.
    """
    found: dict[str, Any] = {}
    for name, value in parse_pairs(pairs).items():
        if name in options:
            raise ValueError(f"{name} is an option of its own: write --{name.replace('_', '-')} {value}")
        found[name] = _value(value, nested)
    return found


def _value(text: str, nested: bool) -> Any:
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    if nested and NAMES.fullmatch(text):
        return text.split(",")
    if nested and text.startswith(("[", "{")):
        try:
            return json.loads(text)
        except json.JSONDecodeError:  # a regular expression may begin so
            return text
    return text
