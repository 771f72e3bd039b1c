"""From text to batches of tokens: the built-in text, files, lists, or a loader's batches."""

from __future__ import annotations

import csv
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from eckart.calibration.tokens import Tokens
from eckart.calibration.wikipedia import articles
from eckart.downloads import Progress, silent

__all__ = ["TextFile", "Texts", "Tokens", "load_texts", "token_batches"]

Texts = Iterable[str] | Iterable[Mapping[str, Any]]
FILES = (".txt", ".jsonl", ".csv")


def load_texts(
    data: str | Path | Texts,
    *,
    split: Literal["calibration", "heldout", "all"] = "calibration",
    column: str = "text",
    progress: Progress = silent,
) -> Texts:
    """Documents to calibrate or evaluate on.

    Args:
        data: "builtin", which is a set of Wikipedia articles (by Wikipedia's contributors, CC BY-SA; see `wikipedia`);
            or the path of a .txt (one document), .jsonl (one object a line) or .csv file; or a list or another
            iterable of strings, or of batches with `input_ids`, which is returned as it is.
        split: which part of the built-in text: the first half of the articles is for calibration and the second is
            held out, so that an evaluation never sees calibration text. Other data are not split.
        column: the field of a .jsonl object or the column of a .csv file that holds the text.

    Raises:
        ValueError: there is no such file, or it is of another kind.
        RuntimeError: the built-in text could not be downloaded.
    """
    if split not in ("calibration", "heldout", "all"):
        raise ValueError(f"split must be 'calibration', 'heldout' or 'all', not {split!r}")
    if data == "builtin":
        texts = articles(progress=progress)
        half = len(texts) // 2
        return {"calibration": texts[:half], "heldout": texts[half:], "all": texts}[split]
    if isinstance(data, (str, Path)):
        return TextFile(Path(data).expanduser(), column)
    return data


@dataclass(frozen=True)
class TextFile:
    """The documents of a file, read as they are asked for, as often as they are asked for."""

    path: Path
    column: str = "text"

    def __post_init__(self) -> None:
        if not self.path.is_file():
            raise ValueError(
                f"There is no text file {str(self.path)!r}. Give 'builtin', a {', '.join(FILES)} file, or a list of "
                "strings."
            )
        if self.path.suffix not in FILES:
            raise ValueError(f"{self.path} is not one of the kinds that can be read: {', '.join(FILES)}.")

    def __iter__(self) -> Iterator[str]:
        for number, row in self.rows():
            yield self._text(row, number)

    def rows(self) -> Iterator[tuple[int, Any]]:
        """Line and content of every row: an object of JSON, or column -> value; of a .txt file, all text as one."""
        read = {".txt": self._txt, ".jsonl": self._jsonl, ".csv": self._csv}[self.path.suffix]
        try:
            yield from read()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not UTF-8 text: {error}") from error

    def _txt(self) -> Iterator[tuple[int, Any]]:
        yield 1, {self.column: self.path.read_text(encoding="utf-8-sig")}

    def _jsonl(self) -> Iterator[tuple[int, Any]]:
        with self.path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{self.path}, line {number}, is not JSON: {error}") from error
                yield number, row

    def _csv(self) -> Iterator[tuple[int, Any]]:
        limit = csv.field_size_limit(2**31 - 1)
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as lines:
                rows = csv.DictReader(lines)
                for row in rows:
                    yield rows.line_num, row
        except csv.Error as error:
            raise ValueError(f"{self.path} is not a CSV file: {error}") from error
        finally:
            csv.field_size_limit(limit)

    def _text(self, row: Any, number: int) -> str:
        if not isinstance(row, dict) or not isinstance(row.get(self.column), str):
            has = f"has {', '.join(map(str, row))}" if isinstance(row, dict) else "is not an object"
            raise ValueError(f"{self.path}, line {number}, has no text in {self.column!r}: it {has}.")
        return str(row[self.column])


def token_batches(
    texts: Texts,
    tokenizer: Any,
    *,
    samples: int | None = 64,
    length: int = 512,
    seed: int = 0,
    padding: Literal["error", "allow"] = "error",
    pool: int = 64,
    aside: int = 0,
    progress: Progress = silent,
) -> Tokens:
    """Cut text into windows of tokens, and draw some of them.

    Documents are put one behind the other, with an empty line between them, and cut into windows that do not overlap.
    Where the tokenizer begins or ends a sequence with special tokens, each window has them; none are added otherwise.

    Args:
        texts: what `load_texts` gives. Rows of batches with `input_ids` are taken as they are, in their order, without
            their padding, and cut after `length` tokens.
        samples: how many windows; None for all, in the order of the text.
        length: tokens in a window, special tokens included.
        seed: decides which windows are drawn.
        padding: "allow" takes what there is where there is less text than asked for, the last window filled up with
            padding.
        pool: windows are drawn from the beginning of the text, as much of it as holds `pool` times `samples`; the
            rest is not read.
        aside: so many of the windows, the last ones returned, are drawn from the last eighth of that text, and the
            others from before it: text to judge on is then not next to text that was fitted on.

    Raises:
        ValueError: there is no text, or less than asked for.
        TypeError: an entry is not a string (nor a batch).
    """
    if isinstance(texts, (str, bytes)):
        raise TypeError("texts must be a list of documents, not one string; use load_texts for a file")
    if length < 2 or (samples is not None and samples < 1):
        raise ValueError(f"at least one sample of at least two tokens is needed, not {samples} of {length}")
    if padding not in ("error", "allow"):
        raise ValueError(f"padding must be 'error' or 'allow', not {padding!r}")
    entries = iter(texts)
    head = list(islice(entries, 1))
    if not head:
        raise ValueError("the data are empty: there is not one document in them")
    entries = chain(head, entries)
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    if isinstance(head[0], Mapping):
        return _rows(entries, samples, length, pad, padding)
    before, after = _special_tokens(tokenizer)
    body = length - len(before) - len(after)
    if body < 1:
        raise ValueError(
            f"a window of {length} tokens has no room beside {length - body} special tokens; make it longer"
        )
    wanted = None if samples is None else samples * body
    stream = _stream(entries, tokenizer, None if wanted is None else pool * wanted, progress)
    full, rest = divmod(len(stream), body)
    if not len(stream):
        raise ValueError("the data are empty: their documents hold not one token")
    enough = full > 0 if samples is None else full >= samples
    if not enough and padding == "error":
        raise ValueError(
            f"there are {len(stream)} tokens of text, and {samples or 1} windows of {length} take {wanted or body}. "
            f"Give more text, ask for at most {full} samples or for shorter ones, or pass padding='allow' to take what "
            "there is."
        )
    if enough and samples is not None:
        chosen = _draw(full, samples, aside, torch.Generator().manual_seed(seed))
    else:
        chosen = list(range(full + (rest > 0 and padding == "allow")))
    return _pad([[*before, *stream[i * body : (i + 1) * body], *after] for i in chosen], length, pad)


def _draw(full: int, samples: int, aside: int, generator: torch.Generator) -> list[int]:
    """Numbers of `samples` of `full` windows, the last `aside` of them from the last eighth if it has as many."""
    order = torch.randperm(full, generator=generator).tolist()
    border = full - max(aside, full // 8) if aside else full
    fitted = [i for i in order if i < border][: samples - aside]
    judged = [i for i in order if i >= border]
    return fitted + judged[: samples - len(fitted)]


def _stream(texts: Iterable[Any], tokenizer: Any, enough: int | None, progress: Progress) -> array[int]:
    """The tokens of all documents in one row, which ends with the document that makes it `enough`."""
    stream = array("q")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"document {number} is a {type(text).__name__}, not a string")
        if text.strip():
            stream.extend(tokenizer(text.rstrip("\n") + "\n\n", add_special_tokens=False, verbose=False)["input_ids"])
        progress("tokenise", min(len(stream), enough or len(stream)), enough or len(stream))
        if enough is not None and len(stream) >= enough:
            break
    return stream


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after every sequence."""
    plain, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return list(whole[:start]), list(whole[start + len(plain) :])
    return [], []


def _rows(batches: Iterable[Any], samples: int | None, length: int, pad: int, padding: str) -> Tokens:
    """The rows of a loader's batches, without their padding."""
    rows: list[list[int]] = []
    for number, batch in enumerate(batches):
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise TypeError(f"batch {number} is not a mapping with input_ids, as the first one is")
        ids = torch.as_tensor(batch["input_ids"])
        mask = torch.as_tensor(batch.get("attention_mask", torch.ones_like(ids)))
        ids, mask = torch.atleast_2d(ids), torch.atleast_2d(mask).bool()
        if ids.ndim != 2 or ids.is_floating_point() or ids.shape != mask.shape:
            raise ValueError(
                f"batch {number} must have integer input_ids (rows, length) and an attention_mask of the same shape, "
                f"not {ids.dtype} {tuple(ids.shape)} and {tuple(mask.shape)}"
            )
        rows += [row[real].tolist()[:length] for row, real in zip(ids, mask, strict=True) if bool(real.any())]
        if samples is not None and len(rows) >= samples:
            break
    if not rows:
        raise ValueError("the data are empty: their batches hold not one token that is not padding")
    if samples is not None and len(rows) < samples and padding == "error":
        raise ValueError(
            f"the loader gave {len(rows)} rows and {samples} were asked for. Ask for fewer samples, or pass "
            "padding='allow' to take what there is."
        )
    return _pad(rows[:samples], max(map(len, rows[:samples])), pad)


def _pad(rows: list[list[int]], length: int, pad: int) -> Tokens:
    lengths = torch.tensor([len(row) for row in rows])
    ids: Tensor = torch.tensor([row + [pad] * (length - len(row)) for row in rows], dtype=torch.long)
    return Tokens(ids, torch.arange(length) < lengths[:, None])
