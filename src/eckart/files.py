"""Writing files so that no half of one is ever left under its name, and so that a full disk is called by its name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; what is there at the end is flushed and gets its name.

    Raises `OSError` that names the file where it cannot be written; nothing is left then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors writes files that nobody else may read
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as e:
        raise _named(e, path, temporary) from e
    finally:
        temporary.unlink(missing_ok=True)


def _named(error: Exception, path: Path, temporary: Path) -> OSError:
    """The same error with a number and the name of the file, not the temporary one."""
    if isinstance(error, OSError) and error.errno is not None:
        other = error.filename if error.filename != str(temporary) else None
        return OSError(error.errno, os.strerror(error.errno), other or str(path))
    number = re.search(r"os error (\d+)", str(error))
    if number is None:
        return OSError(f"{path} could not be written: {error}")
    return OSError(int(number[1]), os.strerror(int(number[1])), str(path))
