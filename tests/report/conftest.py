"""A small fabricated model folder, shaped as `eckart compress` and `eckart evaluate` write it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.v_proj": (16, 64),
    "mlp.up_proj": (160, 64),
    "mlp.down_proj": (64, 160),
}


def layer_records(blocks: int = 4, share: float = 0.8) -> list[dict[str, Any]]:
    """One embedding without a block, and four projections a block whose spectra and errors fit each other."""
    dense = 500 * 64 * 2
    embedding = {
        "name": "model.embed_tokens",
        "block": None,
        "kind": "embedding",
        "shape": [500, 64],
        "form": "dense()",
    }
    embedding |= {"rank": None, "dense_bytes": dense, "bytes": dense, "predicted_error": 0.0, "measured_error": 0.0}
    records = [embedding | {"energy": 10.0, "note": "kept dense: not in this method's scope", "spectrum": None}]
    for block in range(blocks):
        for kind, (out, into) in SHAPES.items():
            full = min(out, into)
            rank = int(share * out * into / (out + into))
            values = [math.exp(-index / (8 + block)) for index in range(full)]
            error = sum(value**2 for value in values[rank:])
            records.append(
                {
                    "name": f"model.layers.{block}.{kind}",
                    "block": block,
                    "kind": "linear",
                    "shape": [out, into],
                    "form": f"low_rank(rank={rank})",
                    "rank": rank,
                    "dense_bytes": 2 * out * into,
                    "bytes": 2 * rank * (out + into),
                    "predicted_error": error,
                    "measured_error": error * 1.01,
                    "energy": sum(value**2 for value in values),
                    "note": None,
                    "spectrum": [values[round(index * (full - 1) / 31)] for index in range(32)],
                }
            )
    return records


def model_record(records: list[dict[str, Any]]) -> dict[str, Any]:
    def total(key: str) -> float:
        return sum(record[key] for record in records)

    return {
        "eckart": "0.1.0",
        "versions": {"torch": "2.9.0", "transformers": "5.1.0"},
        "model": {
            "source": "tiny",
            "model_type": "llama",
            "parameters": 134515008,
            "bytes": 269060552,
            "dtype": "float16",
        },
        "job": {
            "method": "svd_llm",
            "form": "low_rank()",
            "budget": "0.8",
            "seed": 0,
            "samples": 64,
            "one_shot": True,
        },
        "budget": {"asked": "0.8", "bytes": 215248441},
        "remarks": ["two plans were tried"],
        "layers": records,
        "totals": {
            "bytes_before": total("dense_bytes"),
            "bytes_after": total("bytes"),
            "predicted_error": total("predicted_error"),
            "measured_error": total("measured_error"),
        },
    }


EVALUATION: dict[str, Any] = {
    "perplexity": 103.2,
    "perplexity_stderr": 1.9,
    "perplexity_original": 14.12,
    "kl": 1.83,
    "top1_agreement": 0.4127,
    "bytes_disk": 215301234,
    "bytes_memory": 214901234,
    "prefill_tokens_per_second": 812.3,
    "decode_tokens_per_second": 31.2,
    "bandwidth_fraction": 0.62,
    "flops_fraction": 0.71,
    "peak_memory": 611_000_000,
    "machine": {"bandwidth_gb_s": 14.2, "gflop_s": 96.3},
    "original": {"bytes_memory": 269060552, "prefill_tokens_per_second": 701.0, "decode_tokens_per_second": 26.8},
    "text": "wiki, held-out half",
}

RUN: dict[str, Any] = {
    "seconds": {"calibrate": 61.2, "plan": 3.4, "fit": 38.5, "save": 2.2, "total": 107.9},
    "predicted": {"seconds": 120, "peak_memory": 900_000_000},
    "peak_memory": 742_000_000,
    "machine": {"cpu": "Example 7", "threads": 2},
}


VOID = {"meta", "br", "hr", "img", "input", "link"}
CLOSED_ALONE = {"rect", "line", "circle", "path", "polyline"}


class Outline(HTMLParser):
    """Checks that tags nest, and keeps the tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], f"tags left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in CLOSED_ALONE, f"<{tag}/> does not close itself in HTML"
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(self.text)


@pytest.fixture
def outline() -> Callable[[str], Outline]:
    return Outline


@pytest.fixture
def records() -> list[dict[str, Any]]:
    return layer_records()


@pytest.fixture
def record(records: list[dict[str, Any]]) -> dict[str, Any]:
    return model_record(records)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model folder; evaluation and timings only where given."""

    def write(record: Any, evaluation: Any = None, run: Any = None) -> Path:
        folder = tmp_path / "small"
        folder.mkdir(exist_ok=True)
        (folder / "eckart.json").write_text(json.dumps(record), encoding="utf-8")
        if evaluation is not None:
            (folder / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
        if run is not None:
            (tmp_path / "small.run.json").write_text(json.dumps(run), encoding="utf-8")
        return folder

    return write


@pytest.fixture
def folder(save: Callable[..., Path], record: dict[str, Any]) -> Path:
    return save(record, EVALUATION, RUN)


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """The original and four methods at two budgets, with perplexities as far apart as real ones are."""
    rows: list[dict[str, Any]] = [
        {
            "method": "original",
            "budget": None,
            "bytes_disk": 269_000_000,
            "perplexity": 14.1,
            "top1_agreement": 1.0,
            "decode_tokens_per_second": 26.8,
            "prefill_tokens_per_second": 701,
        }
    ]
    for index, (method, perplexity) in enumerate((("svd", 3.7e7), ("asvd", 7e5), ("svd_llm", 103.0), ("auto", 98.0))):
        for budget, weight, power in (("0.8", 215_000_000, 1.0), ("0.6", 161_000_000, 1.2)):
            rows.append(
                {
                    "method": method,
                    "budget": budget,
                    "bytes_disk": weight + 1000 * index,
                    "perplexity": perplexity**power,
                    "kl": 1.0 + index,
                    "top1_agreement": 0.1 * (index + 1),
                    "decode_tokens_per_second": 30.0 + index,
                    "prefill_tokens_per_second": 800.0 - index,
                    "peak_memory": 700_000_000 + index,
                    "seconds": 60.0 * (index + 1),
                    "folder": f"demo/{method}",
                }
            )
    return rows
