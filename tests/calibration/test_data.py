"""Text becomes windows of tokens: all of it, in order or drawn by the seed, and never silently less than asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from eckart.calibration import data
from eckart.calibration.data import Tokens, _draw, load_texts, token_batches

WORDS = [f"w{i}" for i in range(200)]
TEXTS = [" ".join(WORDS[i : i + 20]) for i in range(0, 200, 20)]  # ten documents of twenty tokens


def word_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a word: word w17 is token 17; 201 and 202 begin and end a sequence where the template says so."""
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate([*WORDS, "<unk>", "<s>", "</s>"])}, "<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 201), ("</s>", 202)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="</s>")


def test_all_windows_in_order_are_the_text() -> None:
    tokens = token_batches(TEXTS, word_tokenizer(), samples=None, length=8)
    assert tokens.ids.shape == (25, 8)
    assert tokens.ids.flatten().tolist() == list(range(200))
    assert bool(tokens.mask.all())
    assert tokens.count == 200


def test_the_seed_draws_windows_without_repetition() -> None:
    first = token_batches(TEXTS, word_tokenizer(), samples=6, length=8, seed=3)
    again = token_batches(iter(TEXTS), word_tokenizer(), samples=6, length=8, seed=3)
    other = token_batches(TEXTS, word_tokenizer(), samples=6, length=8, seed=4)
    assert torch.equal(first.ids, again.ids)
    assert not torch.equal(first.ids, other.ids)
    for row in first.ids:
        assert row.tolist() == list(range(int(row[0]), int(row[0]) + 8))
    assert len({int(row[0]) for row in first.ids}) == 6
    assert {int(row[0]) % 8 for row in first.ids} == {0}
    everything = token_batches(TEXTS, word_tokenizer(), samples=25, length=8, seed=0)
    assert sorted(everything.ids.flatten().tolist()) == list(range(200))


@pytest.mark.parametrize(("template", "before", "after"), [("<s> $A", [201], []), ("<s> $A </s>", [201], [202])])
def test_each_window_has_the_tokenizers_own_special_tokens(template: str, before: list[int], after: list[int]) -> None:
    tokens = token_batches(TEXTS, word_tokenizer(template), samples=None, length=12)
    body = 12 - len(before) - len(after)
    assert len(tokens) == 200 // body
    for i, row in enumerate(tokens.ids.tolist()):
        assert row == [*before, *range(i * body, (i + 1) * body), *after]


def test_documents_are_parted_by_an_empty_line() -> None:
    seen: list[str] = []

    class Spy:
        pad_token_id = None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            seen.append(text)
            return {"input_ids": [1] * len(text)}

    token_batches(["one\n", "", "  \n", "two"], Spy(), samples=1, length=4)
    assert [text for text in seen if text != "a"] == ["one\n\n", "two\n\n"]


def test_only_as_much_text_is_read_as_the_pool_takes() -> None:
    read = []

    def endless() -> Iterator[str]:
        while True:
            read.append(1)
            yield TEXTS[0]

    tokens = token_batches(endless(), word_tokenizer(), samples=2, length=10, pool=5)
    assert tokens.ids.shape == (2, 10)
    assert len(read) == 5


def test_padding_where_the_text_is_short() -> None:
    tokens = token_batches(TEXTS[:1], word_tokenizer(), samples=4, length=8, padding="allow")
    assert tokens.ids.tolist()[:2] == [list(range(8)), list(range(8, 16))]
    assert tokens.ids[2].tolist() == [16, 17, 18, 19, 202, 202, 202, 202]
    assert tokens.mask.sum(1).tolist() == [8, 8, 4]
    assert tokens.inputs()["attention_mask"].tolist() == tokens.mask.long().tolist()
    enough = token_batches(TEXTS[:1], word_tokenizer(), samples=2, length=8, padding="allow")
    assert bool(enough.mask.all())
    assert list(enough.inputs()) == ["input_ids"]


def test_too_little_text_says_how_much_there_was() -> None:
    with pytest.raises(ValueError, match=r"there are 200 tokens of text, and 64 windows of 512 take 32768.*at most 0"):
        token_batches(TEXTS, word_tokenizer())
    with pytest.raises(ValueError, match=r"ask for at most 25 samples.*padding='allow'"):
        token_batches(TEXTS, word_tokenizer(), samples=26, length=8)
    with pytest.raises(ValueError, match="1 windows of 512 take 512"):
        token_batches(TEXTS, word_tokenizer(), samples=None)


@pytest.mark.parametrize("texts", [[], [""], ["", " \n "], iter(())])
@pytest.mark.parametrize("padding", ["error", "allow"])
def test_no_text(texts: Any, padding: Any) -> None:
    with pytest.raises(ValueError, match="the data are empty"):
        token_batches(texts, word_tokenizer(), samples=1, length=4, padding=padding)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", 5], "document 1 is a int, not a string"),
        ([None], "document 0 is a NoneType"),
        ("some text", "not one string"),
        ([{"input_ids": [1, 2]}, "x"], "batch 1 is not a mapping"),
    ],
)
def test_entries_of_a_wrong_type(texts: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        token_batches(texts, word_tokenizer(), samples=3, length=4)


@pytest.mark.parametrize("options", [{"samples": 0}, {"length": 1}, {"padding": "maybe"}])
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"padding must be|at least one sample"):
        token_batches(TEXTS, word_tokenizer(), **{"samples": 1, "length": 4, **options})
    with pytest.raises(ValueError, match="no room"):
        token_batches(TEXTS, word_tokenizer("<s> $A </s>"), samples=1, length=2)


def test_a_loaders_batches_keep_their_rows() -> None:
    batches: list[dict[str, Any]] = [
        {
            "input_ids": torch.tensor([[0, 0, 5, 6], [7, 8, 9, 0]]),
            "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]),
        },
        {"input_ids": [[1, 2, 3, 4, 5, 6]]},
        {"input_ids": [3, 3], "labels": [3, 3]},
    ]
    tokens = token_batches(batches, word_tokenizer(), samples=4, length=5)
    assert [row[real].tolist() for row, real in zip(tokens.ids, tokens.mask, strict=True)] == [
        [5, 6],
        [7, 8, 9],
        [1, 2, 3, 4, 5],
        [3, 3],
    ]
    assert token_batches(batches, word_tokenizer(), samples=None, length=5).ids.shape == (4, 5)
    assert token_batches(batches, word_tokenizer(), samples=9, length=5, padding="allow").ids.shape == (4, 5)
    with pytest.raises(ValueError, match="gave 4 rows and 5 were asked for"):
        token_batches(batches, word_tokenizer(), samples=5, length=5)
    with pytest.raises(ValueError, match="integer input_ids"):
        token_batches([{"input_ids": torch.randn(2, 3)}], word_tokenizer(), samples=1)
    with pytest.raises(ValueError, match="integer input_ids"):
        token_batches([{"input_ids": [[1, 2]], "attention_mask": [[1]]}], word_tokenizer(), samples=1)
    with pytest.raises(ValueError, match="the data are empty"):
        token_batches([{"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}], word_tokenizer(), samples=1)


def test_progress_ends_where_it_should() -> None:
    steps: list[tuple[str, int, int]] = []
    token_batches(TEXTS, word_tokenizer(), samples=2, length=8, pool=4, progress=lambda *step: steps.append(step))
    assert steps[0] == ("tokenise", 20, 64)
    assert steps[-1] == ("tokenise", 64, 64)


def test_shards_share_the_windows_out() -> None:
    tokens = token_batches(TEXTS, word_tokenizer(), samples=None, length=8)
    shards = [tokens.shard(rank, 3) for rank in range(3)]
    assert [len(shard) for shard in shards] == [9, 8, 8]
    starts = [int(row[0]) for shard in shards for row in shard.ids]
    assert sorted(starts) == list(range(0, 200, 8))
    with pytest.raises(ValueError, match="rank 3"):
        tokens.shard(3, 3)
    with pytest.raises(ValueError, match="25 windows are too few for 26 workers"):
        tokens.shard(0, 26)


def test_batches_are_the_windows_in_order() -> None:
    tokens = token_batches(TEXTS, word_tokenizer(), samples=None, length=8)
    assert [len(part) for part in tokens.split(10)] == [10, 10, 5]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in tokens.batches(10)]), tokens.ids)
    with pytest.raises(ValueError, match="at least one window"):
        tokens.split(0)
    with pytest.raises(ValueError, match="length"):
        Tokens(torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="integers"):
        Tokens(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffone\ntwo\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "ünö"}\n\n{"text": "two", "n": 1}\n', encoding="utf-8")
    (tmp_path / "a.csv").write_text('n,text\n1,"a, ""b""\nc"\n2,' + "x" * 200_000 + "\n")
    assert list(load_texts(tmp_path / "a.txt")) == ["one\ntwo\n"]
    texts = load_texts(str(tmp_path / "a.jsonl"))
    assert list(texts) == list(texts) == ["ünö", "two"]
    assert list(load_texts(tmp_path / "a.csv")) == ['a, "b"\nc', "x" * 200_000]
    assert list(load_texts(tmp_path / "a.csv", column="n")) == ["1", "2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', r"a\.jsonl, line 2, is not JSON"),
        ("a.jsonl", b'{"words": "x"}\n', "line 1, has no text in 'text': it has words"),
        ("a.jsonl", b'{"text": 3}\n', "has no text in 'text'"),
        ("a.jsonl", b'"x"\n', "is not an object"),
        ("a.jsonl", b"[" * 100_000, "is not JSON"),
        ("a.csv", b"a,b\n1,2\n", "line 2, has no text in 'text': it has a, b"),
        ("a.txt", b"\xff\xff", "is not UTF-8"),
        ("a.csv", b"text\n\xff\xff\n", "is not UTF-8"),
        ("a.pdf", b"", r"is not one of the kinds that can be read: \.txt, \.jsonl, \.csv"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(load_texts(tmp_path / name))


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"no text file 'nowhere.txt'. Give 'builtin'"):
        load_texts("nowhere.txt")


def test_lists_are_returned_as_they_are() -> None:
    assert load_texts(TEXTS) is TEXTS


def test_the_builtin_text_is_halved_by_articles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "articles", lambda **_: TEXTS[:5])
    assert load_texts("builtin") == TEXTS[:2]
    assert load_texts("builtin", split="heldout") == TEXTS[2:5]
    assert load_texts("builtin", split="all") == TEXTS[:5]
    with pytest.raises(ValueError, match="split must be"):
        load_texts("builtin", split="test")  # type: ignore[arg-type]


@pytest.mark.model
def test_the_real_builtin_text() -> None:
    from eckart.checkpoint.source import resolve

    seen, held = list(map(str, load_texts("builtin"))), list(map(str, load_texts("builtin", split="heldout")))
    assert (len(seen), len(held)) == (44, 45)
    assert not set(seen) & set(held)
    tokenizer = AutoTokenizer.from_pretrained(resolve("builtin").folder)
    tokens = token_batches(seen, tokenizer)
    assert tokens.ids.shape == (64, 512)
    assert torch.equal(tokens.ids, token_batches(seen, tokenizer).ids)
    assert seen[0].startswith(" = Anarchism = \n\nAnarchism is a political philosophy")


@pytest.mark.parametrize(("full", "samples", "aside"), [(80, 16, 4), (20, 16, 4), (16, 16, 4), (8, 3, 1), (100, 5, 0)])
def test_windows_set_aside_stand_last_and_come_from_the_end(full: int, samples: int, aside: int) -> None:
    chosen = _draw(full, samples, aside, torch.Generator().manual_seed(3))
    assert len(set(chosen)) == samples
    fitted, judged = chosen[: samples - aside], chosen[samples - aside :]
    assert max(fitted) < min(judged, default=full)
    assert all(i >= full - max(aside, full // 8) for i in judged)
