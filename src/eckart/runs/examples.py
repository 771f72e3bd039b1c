"""Rows of a file, by their columns: text, instructions with responses, or texts with labels; and their tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from eckart.calibration.data import FILES, TextFile, load_texts
from eckart.checkpoint.source import HUB_ID
from eckart.downloads import Progress, silent
from eckart.registry import suggest
from eckart.runs.batches import NOTHING, Example, judged

Task = Literal["text", "instruction", "classification"]
PAIRS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
"""Columns of an instruction and what is to be answered."""
COLUMNS: dict[Task, tuple[tuple[str, ...], ...]] = {
    "instruction": (("messages",), *PAIRS),
    "classification": (("text", "label"),),
    "text": (("text",),),
}
"""task -> the sets of columns that it can be learned from, any of which will do; tasks are guessed in this order."""


@dataclass(frozen=True)
class Table:
    """Rows of data.

    Attributes:
        source: what a user calls it.
        rows: where each one is, and its columns.
    """

    source: str
    rows: list[tuple[str, dict[str, Any]]]

    @property
    def columns(self) -> list[str]:
        """Of the first row."""
        return [str(name) for name in self.rows[0][1]]


def read_table(data: str | Path, columns: Mapping[str, str] | None = None, progress: Progress = silent) -> Table:
    """The rows of `builtin` text, of a .txt, .jsonl or .csv file, or of a data set that the package `datasets` finds.

    Args:
        data: a data set is called by its name, or by `name:configuration`; its split `train` is taken.
        columns: the name that a task knows -> the column of the data that is taken for it.

    Raises:
        ValueError: there is no such file, or nothing in it, or it lacks a column.
        ImportError: a data set is named, and `datasets` is not installed.
        RuntimeError: `datasets` could not find it.
    """
    rows = list(_rows(data, progress))
    if not rows:
        raise ValueError(f"{data} is empty: there is not one row in it")
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where} is no object with columns, but {str(row)[:40]!r}")
    table = Table(str(data), rows)
    for name, column in (columns or {}).items():
        if column not in table.columns:
            raise ValueError(f"{data} has no column {column!r}{suggest(column, table.columns)}")
        table = replace(table, rows=[(where, row | {name: row.get(column)}) for where, row in table.rows])
    return table


def _rows(data: str | Path, progress: Progress) -> Iterator[tuple[str, Any]]:
    if data == "builtin":
        for number, text in enumerate(load_texts("builtin", progress=progress), 1):
            yield f"article {number}", {"text": text}
        return
    path = Path(data).expanduser()
    if path.is_file() or path.suffix in FILES or not HUB_ID.fullmatch(str(data).partition(":")[0]):
        for number, row in TextFile(path).rows():
            yield f"{path}, line {number},", row
        return
    for number, row in enumerate(_data_set(str(data)), 1):
        yield f"{data}, row {number},", dict(row)


def _data_set(name: str) -> Any:
    """The rows of a data set by name."""
    try:
        import datasets
    except ImportError as e:
        raise ImportError(f"there is no file {name!r}, and data sets by name need the package `datasets`, which is not installed: install it, or give a {', '.join(FILES)} file") from e  # fmt: skip # noqa: E501
    found, _, configuration = name.partition(":")
    try:
        return datasets.load_dataset(found, configuration or None, split="train")
    except Exception as e:  # it raises whatever the hub and the files make it stumble over
        reason = str(e).partition("\n")[0]
        raise RuntimeError(f"`datasets` could not load the split train of {name!r} ({type(e).__name__}: {reason}): check the spelling and the connection, or give a {', '.join(FILES)} file") from e  # fmt: skip # noqa: E501


def task_of(table: Table, asked: Task | None) -> tuple[Task, tuple[str, ...]]:
    """The task, guessed from the columns where none is asked for, and the columns that it takes.

    Raises `ValueError` where the columns do not do for it.
    """
    for task, sets in COLUMNS.items():
        for columns in sets:
            if asked in (None, task) and set(columns) <= set(table.columns):
                return task, columns
    wanted = COLUMNS[asked] if asked else [s for sets in COLUMNS.values() for s in sets]
    needs = ", or ".join(" and ".join(columns) for columns in wanted)
    what = f"the task {asked} needs" if asked else "a task is guessed from"
    raise ValueError(f"{table.source} has the columns {', '.join(table.columns)}; {what} {needs}. Say which column is which: --column {wanted[0][0]}=NAME")  # fmt: skip # noqa: E501


def text_of(where: str, row: dict[str, Any], column: str) -> str:
    """A text in a row. Raises `ValueError` where there is none."""
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where} has no text in {column!r}: it holds {str(value)[:40]!r}. Fill it, or leave the row out")  # fmt: skip # noqa: E501
    return value


def labels_of(table: Table) -> list[str]:
    """The names of all labels: whole numbers in their order, other words in that of the alphabet.

    Raises `ValueError` where a row has none, or all have the same.
    """
    found: set[Any] = set()
    for where, row in table.rows:
        label = row.get("label")
        if not isinstance(label, str | int) or label == "":
            raise ValueError(f"{where} has no class in 'label': it holds {str(label)[:40]!r}, where a word or a whole number belongs")  # fmt: skip # noqa: E501
        found.add(str(label))
    if len(found) < 2:
        raise ValueError(f"all rows of {table.source} have the label {found.pop()!r}: there is nothing to tell apart")
    if all(label.lstrip("-").isdecimal() for label in found):
        return sorted(found, key=int)
    return sorted(found)


@dataclass(frozen=True)
class Encoded:
    """Examples, and what became of rows that are too long.

    Attributes:
        cut: examples whose end was cut off.
        dropped: examples of which nothing was left to learn.
    """

    examples: list[Example]
    cut: int
    dropped: int


def classes(table: Table, tokenizer: Any, labels: list[str], length: int, progress: Progress = silent) -> Encoded:
    """Texts with the number of their label."""

    def encode(where: str, row: dict[str, Any]) -> list[Example]:
        ids = tokenizer(text_of(where, row, "text"), verbose=False)["input_ids"]
        return [Example(ids, labels.index(str(row["label"])))]

    def shorten(row: dict[str, Any], example: Example) -> Example:  # what ends a sequence stays at its end
        ids = tokenizer(row["text"], truncation=True, max_length=length)["input_ids"]
        return Example(ids, example.labels)

    return _encoded(table, encode, length, progress, shorten)


def instructions(
    table: Table, columns: tuple[str, ...], tokenizer: Any, length: int, progress: Progress = silent
) -> Encoded:
    """Conversations of which only the responses are learned.

    A tokenizer's chat template writes them where it has one. Without, an instruction is followed by a line break, the
    response, and the token that ends a text.

    Raises `ValueError` where a row is no conversation, or there is no template for several turns.
    """
    templated = getattr(tokenizer, "chat_template", None) is not None
    if columns == ("messages",) and not templated:
        raise ValueError("the data hold conversations (messages), and this model's tokenizer has no chat template to write them with: give prompt and response columns, or a tokenizer with a template")  # fmt: skip # noqa: E501

    def encode(where: str, row: dict[str, Any]) -> list[Example]:
        if columns == ("messages",):
            return conversation(where, _messages(where, row["messages"]), tokenizer)
        prompt, response = (text_of(where, row, c) for c in columns)
        if columns == ("instruction", "output") and row.get("input"):
            prompt = f"{prompt}\n\n{row['input']}"
        if templated:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            return conversation(where, turns, tokenizer)
        return [answered(prompt, response, tokenizer)]

    def shorten(row: dict[str, Any], example: Example) -> Example:
        assert isinstance(example.labels, list)
        return Example(example.ids[:length], example.labels[:length])

    return _encoded(table, encode, length, progress, shorten)


def answered(prompt: str, response: str, tokenizer: Any) -> Example:
    """An instruction, a line break, and the response, of which the latter is learned."""
    asked = tokenizer(prompt.rstrip() + "\n", verbose=False)["input_ids"]
    if asked and asked[-1] == tokenizer.eos_token_id:
        asked = asked[:-1]
    said = tokenizer(response, add_special_tokens=False, verbose=False)["input_ids"]
    said = said if tokenizer.eos_token_id is None else [*said, tokenizer.eos_token_id]
    return Example([*asked, *said], [NOTHING] * len(asked) + said)


def conversation(where: str, messages: list[dict[str, str]], tokenizer: Any) -> list[Example]:
    """One example in which every turn of the assistant is learned; one for each of them where the template writes
    earlier turns otherwise than last ones.

    Raises `ValueError` where the template does not begin an answer as it asks for one.
    """

    def written(turns: list[dict[str, str]], asking: bool) -> list[int]:
        found = tokenizer.apply_chat_template(turns, add_generation_prompt=asking, tokenize=True, return_dict=False)
        return list(found)

    turns = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            asked, said = written(messages[:i], True), written(messages[: i + 1], False)
            if said[: len(asked)] != asked:
                raise ValueError(f"{where} cannot be written turn by turn: the tokenizer's chat template begins turn {i + 1} in another way than it asks for it")  # fmt: skip # noqa: E501
            turns.append((len(asked), said))
    whole = turns[-1][1]
    if any(whole[: len(said)] != said for _, said in turns):
        return [Example(said, [NOTHING] * begin + said[begin:]) for begin, said in turns]
    labels = [NOTHING] * len(whole)
    for begin, said in turns:
        labels[begin : len(said)] = said[begin:]
    return [Example(whole, labels)]


def _messages(where: str, value: Any) -> list[dict[str, str]]:
    """A conversation that was checked."""
    fits = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )
    if not fits:
        raise ValueError(f"{where} has no conversation in 'messages': it is a list of objects with role and content")
    if not any(m["role"] == "assistant" for m in value[1:]):
        raise ValueError(f"{where} has no turn of the role assistant that follows another one: there is nothing to learn in it")  # fmt: skip # noqa: E501
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _encoded(
    table: Table, encode: Callable[[str, dict[str, Any]], list[Example]], length: int, progress: Progress,
    shorten: Callable[[dict[str, Any], Example], Example],
) -> Encoded:  # fmt: skip
    """All rows, cut to a length. Raises `ValueError` where nothing is left."""
    examples: list[Example] = []
    cut = dropped = 0
    for number, (where, row) in enumerate(table.rows, 1):
        for example in encode(where, row):
            long = len(example.ids) > length
            kept = shorten(row, example) if long else example
            if judged(kept.labels):
                examples.append(kept)
                cut += long
            else:
                dropped += 1
        progress("tokenise", number, len(table.rows))
    if not examples:
        raise ValueError(f"no example of {table.source} has a response within {length} tokens: raise --length")
    return Encoded(examples, cut, dropped)
