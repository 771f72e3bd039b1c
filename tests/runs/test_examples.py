"""Rows of files by their columns, and the tokens and labels that are made of them."""

from __future__ import annotations

import csv
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import small_examples
import torch

import tiny
from eckart.calibration.tokens import Tokens
from eckart.runs.batches import NOTHING, Example, Examples, Windows
from eckart.runs.examples import classes, conversation, instructions, labels_of, read_table, task_of


def table(path: Path, *rows: Any, **columns: str) -> Any:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_table(path, columns)


def talkative() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = small_examples.TEMPLATE
    return tokenizer


def words(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))


def test_the_columns_say_the_task(tmp_path: Path) -> None:
    for row, task, columns in (
        ({"messages": [], "text": "a"}, "instruction", ("messages",)),
        ({"prompt": "a", "response": "b"}, "instruction", ("prompt", "response")),
        ({"instruction": "a", "input": "", "output": "b"}, "instruction", ("instruction", "output")),
        ({"text": "a", "label": 1}, "classification", ("text", "label")),
        ({"text": "a", "other": 1}, "text", ("text",)),
    ):
        assert task_of(table(tmp_path / "t.jsonl", row), None) == (task, columns)
    both = table(tmp_path / "t.jsonl", {"text": "a", "label": 1})
    assert task_of(both, "text") == ("text", ("text",))
    renamed = table(tmp_path / "t.jsonl", {"body": "a", "kind": 1}, text="body", label="kind")
    assert task_of(renamed, None)[0] == "classification"
    with pytest.raises(ValueError, match=r"has the columns body, kind; a task is guessed from messages, or .*--column"):
        task_of(table(tmp_path / "t.jsonl", {"body": "a", "kind": 1}), None)


def test_files_of_every_kind_are_read(tmp_path: Path) -> None:
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], ["a, b\nc", "x"], ["d", "y"]])
    assert [row for _, row in read_table(tmp_path / "t.csv").rows] == [
        {"text": "a, b\nc", "label": "x"}, {"text": "d", "label": "y"}
    ]  # fmt: skip
    (tmp_path / "t.txt").write_text("one text\n\nof two parts")
    assert read_table(tmp_path / "t.txt").rows[0][1] == {"text": "one text\n\nof two parts"}
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n\n[1, 2]\n')
    with pytest.raises(ValueError, match=r"t\.jsonl, line 3, is no object with columns, but '\[1, 2\]'"):
        read_table(tmp_path / "t.jsonl")
    (tmp_path / "t.jsonl").write_text('{"text": "a"\n')
    with pytest.raises(ValueError, match=r"line 1, is not JSON"):
        read_table(tmp_path / "t.jsonl")
    with pytest.raises(ValueError, match=r"There is no text file '.*no\.csv'"):
        read_table(tmp_path / "no.csv")


def test_a_data_set_is_found_by_name_where_the_package_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(name: str, configuration: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((name, configuration, split))
        if name == "org/none":
            raise FileNotFoundError("no such data set\nand more")
        return [{"text": "a", "label": 0}]

    module = types.ModuleType("datasets")
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert read_table("org/mail:plain").rows == [("org/mail:plain, row 1,", {"text": "a", "label": 0})]
    read_table("mail")
    assert asked == [("org/mail", "plain", "train"), ("mail", None, "train")]
    with pytest.raises(
        RuntimeError, match=r"could not load the split train of 'org/none' \(FileNotFoundError: no such"
    ):
        read_table("org/none")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="there is no file 'mail', and data sets by name need the package `datasets`"):
        read_table("mail")


def test_labels_are_ordered_and_checked(tmp_path: Path) -> None:
    def labels(*values: Any) -> list[str]:
        return labels_of(table(tmp_path / "t.jsonl", *({"text": "a", "label": v} for v in values)))

    assert labels("b", "a", "b") == ["a", "b"]
    assert labels(10, 9, -1) == ["-1", "9", "10"]
    assert labels(True, False) == ["False", "True"]
    with pytest.raises(ValueError, match=r"all rows of .* have the label '3'"):
        labels(3, 3)
    for value in (0.5, None, ""):
        with pytest.raises(ValueError, match=r"line 2, has no class in 'label'"):
            labels(1, value)


def test_a_response_is_learned_and_its_prompt_is_not(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    found = instructions(
        table(tmp_path / "t.jsonl", {"prompt": "w1 w2", "response": "w3 w4"}), ("prompt", "response"), tokenizer, 9
    )
    [example] = found.examples
    assert words(tokenizer, example.ids) == "w1 w2 w3 w4 </s>"
    assert example.labels == [NOTHING, NOTHING, *example.ids[2:]]
    row = {"instruction": "w1", "input": "w5", "output": "w3"}
    [example] = instructions(table(tmp_path / "t.jsonl", row), ("instruction", "output"), tokenizer, 9).examples
    assert words(tokenizer, example.ids) == "w1 w5 w3 </s>"


def test_a_conversation_is_written_by_the_template_and_every_answer_is_learned() -> None:
    tokenizer = talkative()
    turns = [("system", "w9"), ("user", "w5"), ("assistant", "w6"), ("user", "w7"), ("assistant", "w8 w8")]
    [example] = conversation("row 1", [{"role": r, "content": c} for r, c in turns], tokenizer)
    assert words(tokenizer, example.ids) == "w2 w9 </s> w1 w5 </s> w2 w6 </s> w1 w7 </s> w2 w8 w8 </s>"
    assert isinstance(example.labels, list)
    learned = [i for i, label in zip(example.ids, example.labels, strict=True) if label != NOTHING]
    assert words(tokenizer, learned) == "w6 </s> w8 w8 </s>"


def test_where_earlier_turns_are_written_otherwise_each_answer_is_an_example() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}w2 {{ 'w3 ' if loop.last else '' }}{% endif %}"
        "{{ m.content }} {% endfor %}{% if add_generation_prompt %}w2 {% endif %}"
    )
    turns = [("user", "w5"), ("assistant", "w6"), ("user", "w7"), ("assistant", "w8")]
    found = conversation("row 1", [{"role": r, "content": c} for r, c in turns], tokenizer)
    assert [words(tokenizer, e.ids) for e in found] == ["w5 w2 w3 w6", "w5 w2 w6 w7 w2 w3 w8"]
    assert [sum(label != NOTHING for label in e.labels) for e in found] == [2, 2]  # type: ignore[union-attr]
    tokenizer.chat_template = "{{ 'w4' if add_generation_prompt else 'w5 w6' }}"
    with pytest.raises(ValueError, match=r"row 1 cannot be written turn by turn: .* begins turn 2 in another way"):
        conversation("row 1", [{"role": r, "content": c} for r, c in turns], tokenizer)


def test_what_is_no_conversation_is_named(tmp_path: Path) -> None:
    for value, message in (
        ("hello", r"line 1, has no conversation in 'messages'"),
        ([{"role": "user"}], r"line 1, has no conversation in 'messages'"),
        ([{"role": "user", "content": "w1"}], "has no turn of the role assistant that follows another one"),
    ):
        rows = table(tmp_path / "t.jsonl", {"messages": value})
        with pytest.raises(ValueError, match=message):
            instructions(rows, ("messages",), talkative(), 9)
        with pytest.raises(ValueError, match="this model's tokenizer has no chat template"):
            instructions(rows, ("messages",), tiny.tokenizer(), 9)
    rows = table(tmp_path / "t.jsonl", {"prompt": "w1", "response": " "})
    with pytest.raises(ValueError, match=r"line 1, has no text in 'response': it holds ' '"):
        instructions(rows, ("prompt", "response"), tiny.tokenizer(), 9)


def test_what_is_too_long_is_cut_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "w1 " * n, "response": "w2 w3"} for n in (1, 3, 9)]
    found = instructions(table(tmp_path / "t.jsonl", *rows), ("prompt", "response"), tiny.tokenizer(), 5)
    assert [len(e.ids) for e in found.examples] == [4, 5]
    assert (found.cut, found.dropped) == (1, 1)
    with pytest.raises(ValueError, match=r"has a response within 2 tokens: raise --length"):
        instructions(table(tmp_path / "t.jsonl", rows[2]), ("prompt", "response"), tiny.tokenizer(), 2)
    texts = table(tmp_path / "t.jsonl", {"text": "w1 w2 w3", "label": "x"}, {"text": "w1", "label": "y"})
    labelled = classes(texts, tiny.tokenizer(), ["x", "y"], 2)
    assert [(len(e.ids), e.labels) for e in labelled.examples] == [(2, 0), (1, 1)]
    assert labelled.cut == 1


def test_a_batch_is_filled_up_and_what_fills_it_is_neither_seen_nor_judged() -> None:
    data = Examples([Example([5, 6, 7], [NOTHING, 6, 7]), Example([8, 9], [8, 9])], pad=0)
    batch = data.batch(torch.tensor([1, 0]))
    assert batch["input_ids"].tolist() == [[8, 9, 0], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[8, 9, NOTHING], [NOTHING, 6, 7]]
    assert batch["use_cache"] is False
    assert data.targets(torch.tensor([0, 1])) == 3
    labelled = Examples([Example([5, 6], 1), Example([7], 0)], pad=0)
    assert labelled.batch(torch.tensor([0, 1]))["labels"].tolist() == [1, 0]
    assert labelled.targets(torch.tensor([0, 1])) == 2
    first, second = Examples([Example([i], 0) for i in range(9)], pad=0).split(2, seed=1)
    assert (len(first), len(second)) == (7, 2)
    assert sorted(e.ids[0] for e in [*first.examples, *second.examples]) == list(range(9))
    assert first.fingerprint() != second.fingerprint() == Examples(second.examples, pad=0).fingerprint()
    windows = Windows(Tokens(torch.tensor([[5, 6, 0]]), torch.tensor([[True, True, False]])))
    assert windows.targets(torch.tensor([0])) == 1
