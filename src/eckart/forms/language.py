"""The little language of forms, metrics and allocators: `name(key=value, ...)`, `a + b`, `a @ b`, `a | b`.

Text is parsed with Python's own grammar, of which only calls of registered names, literals and the three operators are
accepted; nothing is ever executed. Printing and parsing round-trip.
"""

from __future__ import annotations

import ast
import dataclasses
import operator
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from eckart.registry import suggest

T = TypeVar("T")
MAX_LENGTH, MAX_DEPTH = 4096, 32
OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.MatMult: operator.matmul, ast.BitOr: operator.or_
}  # fmt: skip


class Vocabulary(Generic[T]):
    """The words of one kind (forms, metrics, allocators): name -> dataclass.

    Args:
        kind: what a word names, for messages.
        within: the vocabulary in whose texts these words may stand as settings, as grids do in those of forms.
    """

    def __init__(self, kind: str, within: Vocabulary[Any] | None = None):
        self.kind = kind
        self.words: dict[str, type[T]] = {}
        self.settings: list[Vocabulary[Any]] = []
        if within is not None:
            within.settings.append(self)

    def word(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: enter a frozen dataclass under `name`."""

        def enter(cls: type[T]) -> type[T]:
            if name in self.words:
                raise ValueError(f"two {self.kind}s are called {name!r}")
            self.words[name] = cls
            cls.word = name  # type: ignore[attr-defined]
            return cls

        return enter

    def parse(self, text: str) -> T:
        """The object that `text` describes. Raises `ValueError` that says what is wrong and where."""
        if len(text) > MAX_LENGTH:
            raise ValueError(f"this {self.kind} is {len(text)} characters long; the limit is {MAX_LENGTH}")
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
            raise ValueError(f"cannot read {self.kind} {text!r}: {e.args[0] if e.args else e}") from None
        found: T = self._build(tree, text, 0)
        for vocabulary in self.settings:
            if isinstance(found, tuple(vocabulary.words.values())):
                raise ValueError(f"{text!r} is a {vocabulary.kind}, and stands only as a setting of a {self.kind}")
        return found

    def _build(self, node: ast.expr, text: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError(f"this {self.kind} nests more than {MAX_DEPTH} deep")
        if isinstance(node, ast.Name):
            node = ast.Call(func=node, args=[], keywords=[])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return self._call(node, node.func.id, text, depth)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            combine = OPERATORS[type(node.op)]
            left, right = (self._build(side, text, depth + 1) for side in (node.left, node.right))
            try:
                return combine(left, right)
            except TypeError:
                raise ValueError(f"{self.kind}s cannot be combined with operators: {text!r}") from None
        raise ValueError(f"cannot read {self.kind} {text!r}: expected name(key=value) terms joined by +, @ or |")

    def _call(self, node: ast.Call, name: str, text: str, depth: int) -> T:
        known = {word: cls for vocabulary in (self, *self.settings) for word, cls in vocabulary.words.items()}
        if name not in known:
            raise ValueError(f"unknown {self.kind} {name!r}{suggest(name, list(known))}")
        cls = known[name]
        names = [f.name for f in dataclasses.fields(cls)]
        if len(node.args) > len(names):
            raise ValueError(f"{name}() takes at most {len(names)} settings ({', '.join(names)})")
        settings = dict(zip(names, node.args, strict=False))
        for keyword in node.keywords:
            if keyword.arg is None or keyword.arg not in names:
                raise ValueError(f"{name}() has no setting {keyword.arg!r}{suggest(str(keyword.arg), names)}")
            if keyword.arg in settings:
                raise ValueError(f"{name}() is given {keyword.arg!r} twice")
            settings[keyword.arg] = keyword.value
        try:
            return cls(**{k: self._value(v, text, depth + 1) for k, v in settings.items()})
        except TypeError as e:
            raise ValueError(f"{name}(): {e}") from None

    def _value(self, node: ast.expr, text: str, depth: int) -> Any:
        try:
            value = ast.literal_eval(node)
        except (ValueError, TypeError, RecursionError, MemoryError):
            return self._build(node, text, depth)
        if not isinstance(value, int | float | str | tuple | None):
            raise ValueError(f"cannot read {self.kind} {text!r}: {value!r} is not a number, text or tuple")
        return value

    def print(self, thing: Any) -> str:
        """The text that parses back to `thing`; settings at their defaults are left out."""
        parts = []
        for f in dataclasses.fields(thing):
            value = getattr(thing, f.name)
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            if value != default:
                plain = isinstance(value, int | float | str | tuple | None)  # all else is a word, a sum or a product
                parts.append(f"{f.name}={value!r}" if plain else f"{f.name}={value!s}")
        return f"{thing.word}({', '.join(parts)})"
