"""The settings of a method: replaced, checked by name and kind, and put into words."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from eckart.registry import suggest

T = TypeVar("T")


def with_settings(chosen: T, settings: dict[str, Any]) -> T:
    """A copy of a dataclass with these fields. Raises `ValueError` on a name it does not have, or another kind."""
    known = [f.name for f in dataclasses.fields(chosen)]  # type: ignore[arg-type]
    for name in settings:
        if name not in known:
            word = getattr(chosen, "key", "") or "this method"
            raise ValueError(f"{word} has no setting {name!r}{suggest(name, known)}")
    of_kind: dict[str, Any] = {k: _of_kind(k, v, getattr(chosen, k)) for k, v in settings.items()}
    return dataclasses.replace(chosen, **of_kind)  # type: ignore[type-var]


def _of_kind(name: str, value: Any, default: Any) -> Any:
    """The value, which must be of the default's kind where that is a truth value, a number or text."""
    if isinstance(default, str):
        return str(value)
    for kind, word in ((bool, "true or false"), (int, "a whole number"), (float, "a number")):
        if isinstance(default, kind):
            fits = isinstance(value, bool) if kind is bool else isinstance(value, kind | int) and not isinstance(value, bool)  # fmt: skip # noqa: E501
            if not fits:
                raise ValueError(f"{name} is {word}, not {value!r}")
            return value
    return value


def check_whole(method: Any, **least: int) -> None:
    """Raises `ValueError` where a setting of a method is no whole number from its least one up."""
    for name, smallest in least.items():
        value = getattr(method, name)
        if not isinstance(value, int) or value < smallest:
            raise ValueError(f"{method.key}({name}={value!r}): it is a whole number from {smallest} up")


def words_of(method: Any) -> dict[str, Any]:
    """The fields of a dataclass, as text and numbers."""
    plain = (int, float, str, bool, type(None))
    found = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    return {k: v if isinstance(v, plain) else str(v) for k, v in found.items()}
