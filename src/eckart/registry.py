"""The catalogue: every published method registers itself here, and everything else reads it.

The registry feeds `eckart methods`, the command line's help, the docs' tables and the test matrix.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T", bound=type)


@dataclass(frozen=True)
class Entry:
    """One method of the catalogue.

    Args:
        key: the name users type.
        wing: the package that holds it (`compression`, `optimizers`, ...).
        family: what kind of structure it makes (`low-rank`, `width`, ...).
        paper: title, authors, venue and number of the source.
        summary: one line.
        cls: the class that does it; its dataclass fields are the hyperparameters.
    """

    key: str
    wing: str
    family: str
    paper: str
    summary: str
    cls: Any


_ENTRIES: dict[str, Entry] = {}


def discover(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that what they hold registers itself: a new file needs no list."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


def method(key: str, *, family: str, paper: str, wing: str = "") -> Callable[[T], T]:
    """Class decorator that enters a method in the catalogue under `key`.

    A package of your own says which `wing` its method belongs to; the files of a wing need not.
    """

    def enter(cls: T) -> T:
        if key in _ENTRIES:
            raise ValueError(f"two methods are called {key!r}: {_ENTRIES[key].cls.__module__} and {cls.__module__}")
        package, _, rest = cls.__module__.partition(".")
        home = wing or (rest.partition(".")[0] if package == "eckart" else "")
        if not home:
            raise ValueError(f"{key!r} of {cls.__module__} belongs to no wing: say which, @method({key!r}, wing='compression', ...)")  # fmt: skip # noqa: E501
        summary = (cls.__doc__ or "").strip().split("\n")[0]
        _ENTRIES[key] = Entry(key, home, family, paper, summary, cls)
        cls.key = key  # type: ignore[attr-defined]
        return cls

    return enter


def entries(wing: str | None = None) -> list[Entry]:
    """All registered methods, sorted by wing and key."""
    return sorted((e for e in _ENTRIES.values() if wing in (None, e.wing)), key=lambda e: (e.wing, e.key))


def find(key: str, wing: str | None = None) -> Entry:
    """The entry called `key`. Raises `ValueError` that names the nearest keys."""
    known = [e.key for e in entries(wing)]
    if key in _ENTRIES and key not in known:
        raise ValueError(f"{key!r} is one of eckart.{_ENTRIES[key].wing}, not of eckart.{wing}")
    if key not in known:
        raise ValueError(f"unknown method {key!r}{suggest(key, known)}")
    return _ENTRIES[key]


def suggest(name: str, known: list[str]) -> str:
    """The tail of an error message about an unknown name: the nearest ones, or all."""
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(repr(n) for n in near)}?"
    return f"; known: {', '.join(sorted(known))}"
