"""What a solver has to say about its input: a warning, or where somebody is noting, a note; thread by thread."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

_notes: ContextVar[Notes | None] = ContextVar("notes", default=None)


@dataclass
class Notes:
    """Remarks made while somebody was noting."""

    remarks: list[str] = field(default_factory=list)

    @property
    def text(self) -> str | None:
        """All different ones in order; None where there is none."""
        return "; ".join(dict.fromkeys(self.remarks)) or None


def remark(text: str, category: type[Warning]) -> None:
    """Say something about the input that is no error."""
    notes = _notes.get()
    if notes is None:
        warnings.warn(text, category, stacklevel=3)
    else:
        notes.remarks.append(text)


@contextmanager
def noting() -> Iterator[Notes]:
    """Within the context, remarks of this thread are kept as notes and are no warnings."""
    notes = Notes()
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)
