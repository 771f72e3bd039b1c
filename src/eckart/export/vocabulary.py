"""A Hugging Face tokenizer in the words of GGUF, so that llama.cpp cuts texts into the same tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType as Kind

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS: dict[tuple[str, ...], str] = {
    ("ByteLevel regex",): "gpt-2",
    ("Digits single", "ByteLevel regex"): "smollm",
    ("Split " + _CONTRACTIONS + r"\p{N}" + _REST, "ByteLevel"): "qwen2",
    ("Split " + _CONTRACTIONS + r"\p{N}{1,3}" + _REST, "ByteLevel"): "llama-bpe",
}
"""How a byte-level tokenizer cuts a text before merging -> llama.cpp's name of that way."""


class NoVocabulary(Exception):
    """The tokenizer cannot be written as GGUF; says why."""


def add_vocabulary(writer: gguf.GGUFWriter, folder: Path, size: int) -> None:
    """Write the folder's tokenizer into a GGUF file of a model whose table has `size` rows. Raises `NoVocabulary`."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        described = json.loads(tokenizer.backend_tokenizer.to_str())
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise NoVocabulary(f"no tokenizer.json that transformers can load ({str(e).splitlines()[0]})") from e
    model = described["model"]
    if model["type"] != "BPE":
        raise NoVocabulary(f"a tokenizer of type {model['type']}, not BPE")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    tokens, kinds = token_table(described, size)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(scores(tokens, merges))
        writer.add_add_space_prefix(_adds_space(described))
    else:
        cut = tuple(cuts(described["pre_tokenizer"]))
        if cut not in CUTS:
            raise NoVocabulary(f"a byte-level tokenizer that cuts by {' then '.join(cut) or 'nothing'}")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(CUTS[cut])
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    _add_special(writer, tokenizer)


def token_table(described: dict[str, Any], size: int) -> tuple[list[str], list[Kind]]:
    """Texts and kinds of all tokens by id; rows of the model's table that no token has are filled up."""
    model = described["model"]
    added = {token["id"]: token for token in described["added_tokens"]}
    by_id = {i: text for text, i in model["vocab"].items()} | {i: token["content"] for i, token in added.items()}
    if max(by_id, default=-1) >= size:
        raise NoVocabulary(f"a tokenizer with {max(by_id) + 1} tokens for a table of {size} rows")
    tokens, kinds = [], []
    for i in range(size):
        text = by_id.get(i)
        if text is None:
            text, kind = f"[PAD{i}]", Kind.UNUSED
        elif i in added:
            kind = Kind.CONTROL if added[i]["special"] else Kind.USER_DEFINED
        else:
            kind = Kind.NORMAL
        if text == model.get("unk_token"):
            kind = Kind.UNKNOWN
        elif model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x"):
            kind = Kind.BYTE
        tokens.append(text)
        kinds.append(kind)
    return tokens, kinds


def scores(tokens: list[str], merges: list[str]) -> list[float]:
    """For every token, minus the place of the first merge that makes it: llama.cpp joins what scores highest."""
    place: dict[str, int] = {}
    for i, pair in enumerate(merges):
        place.setdefault(pair.replace(" ", ""), i)
    return [-float(place.get(token, len(merges))) for token in tokens]


def cuts(described: dict[str, Any] | None) -> Iterator[str]:
    """The steps of a pre-tokenizer, each with what matters of its settings."""
    if described is None:
        return
    kind = described["type"]
    if kind == "Sequence":
        for step in described["pretokenizers"]:
            yield from cuts(step)
    elif kind == "ByteLevel":
        spaced = " after a space is put first" if described["add_prefix_space"] else ""
        yield f"ByteLevel{' regex' if described['use_regex'] else ''}{spaced}"
    elif kind == "Digits":
        yield f"Digits{' single' if described['individual_digits'] else ''}"
    elif kind == "Split":
        yield f"Split {described['pattern'].get('Regex', described['pattern'])}"
    else:
        yield kind


def _adds_space(described: dict[str, Any]) -> bool:
    """Whether a SentencePiece-like tokenizer puts a space before the text."""
    normal, pre = described["normalizer"], described["pre_tokenizer"] or {}
    steps = [] if normal is None else normal.get("normalizers", [normal])
    return any(s["type"] == "Prepend" for s in steps) or pre.get("prepend_scheme") in ("always", "first")


def _add_special(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    ids = tokenizer("a").input_ids
    for name, at in (("bos", 0), ("eos", -1)):
        number = getattr(tokenizer, f"{name}_token_id")
        getattr(writer, f"add_add_{name}_token")(number is not None and bool(ids) and ids[at] == number)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
