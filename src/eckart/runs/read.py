"""YAML into frozen dataclasses, with errors that name the key, what is wrong with it, and the way out."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Hashable
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from eckart.registry import suggest

T = TypeVar("T")
REST = "settings"
"""The field of a dataclass that takes up keys which it does not know."""

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "nothing"}


class Loader(yaml.SafeLoader):
    """YAML's plain types; 1e-3 is a number, and a key that is given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((k for k in keys if keys.count(k) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: Path, cls: type[T]) -> T:
    """The dataclass that a YAML file describes.

    Raises `ValueError` where there is no such file, or it is no YAML, or a key or a value does not fit.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}: give a YAML file with the settings of a run")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text: {e}") from e
    except yaml.YAMLError as e:
        raise ValueError(f"{path} is not YAML: {' '.join(str(e).split())}") from e
    try:
        return read(cls, {} if data is None else data)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


def read(cls: type[T], data: Any, where: str = "") -> T:
    """The dataclass of these values; `where` is the key of all of them. Raises `ValueError` where one does not fit."""
    if not isinstance(data, dict):
        raise ValueError(f"{where or 'the file'} holds {data!r}, where keys and values belong")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls) if f.name != REST]  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{where}.{key}".lstrip(".")
        if key in known:
            found[key] = _value(hints[key], value, name)
        elif REST in hints and isinstance(key, str):
            rest[key] = _plain(value, name)
        else:
            raise ValueError(f"unknown key {name!r}{suggest(str(key), known)}")
    missing = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING and f.name not in found]  # type: ignore[arg-type]  # fmt: skip # noqa: E501
    if missing:
        raise ValueError(f"the key {f'{where}.{missing[0]}'.lstrip('.')!r} is missing: add it")
    return cls(**found, **({REST: rest} if rest else {}))


def _value(kind: Any, value: Any, where: str) -> Any:
    """The value as one of this type."""
    if dataclasses.is_dataclass(kind):
        return read(typing.cast(type, kind), value, where)
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in parts:
            raise ValueError(f"{where}: {value!r} is not one of {', '.join(map(str, parts))}")
        return value
    if origin is tuple:
        values = value if isinstance(value, list) else [value]
        return tuple(_value(parts[0], v, where) for v in values)
    kinds = parts if origin in (Union, types.UnionType) else (kind,)
    sections = [k for k in kinds if dataclasses.is_dataclass(k)]
    if sections and value is not None:
        return _value(sections[0], value, where)
    if type(value) in kinds:
        return value
    if float in kinds and type(value) is int:
        return float(value)
    raise ValueError(f"{where}: {value!r} is not {' or '.join(KINDS[k] for k in kinds if k is not type(None))}")


def _plain(value: Any, where: str) -> Any:
    """A setting that somebody else checks: a number, text, a truth value, nothing, or a list of these."""
    if isinstance(value, list):
        return tuple(_plain(v, where) for v in value)
    if type(value) not in KINDS:
        raise ValueError(f"{where}: {value!r} is not a number, text, or a list of them")
    return value
