from __future__ import annotations

import base64
import hashlib
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eckart.report import model_report
from eckart.report.layers import projection, short_names
from eckart.report.numbers import MISSING
from eckart.report.provenance import command


def test_page_holds_every_layer_and_the_headline(
    folder: Path, records: list[dict[str, Any]], outline: Callable[[str], Any]
) -> None:
    path = model_report(folder)
    assert path == folder / "report.html"
    html = path.read_text(encoding="utf-8")
    page = outline(html)
    body = html[html.index("<tbody>", html.index("Every layer")) :]
    for record in records:
        assert f">{record['name']}<" in body
    text = page.words
    for figure in (
        "103",
        "41.3%",
        "215 MB",
        "31.2",
        "62.0%",
        "from 14.1",
        "2 min 0 s",
        "1 min 48 s",
        "742 MB",
        "Example 7",
        "two plans were tried",
    ):
        assert figure in text, figure
    assert page.tags.count("tr") == 1 + 4 + 1 + len(records)
    assert text.count(MISSING) == 0


def test_page_loads_nothing(folder: Path, outline: Callable[[str], Any]) -> None:
    html = model_report(folder).read_text(encoding="utf-8")
    assert "default-src 'none'" in html
    assert not re.search(r"https?://|//[a-z]|\bsrc=|@import|url\(", html.replace("http://www.w3.org/2000/svg", ""))
    assert {name for name, _ in outline(html).attributes} & {"src", "href", "srcset", "action", "data"} == set()


def test_only_eckart_json_is_needed(
    save: Callable[..., Path], record: dict[str, Any], outline: Callable[[str], Any]
) -> None:
    html = model_report(save(record)).read_text(encoding="utf-8")
    assert outline(html).words.count(MISSING) >= 9
    assert "eckart evaluate" in html


@pytest.mark.parametrize(
    "content", [{}, {"layers": []}, {"layers": [{}]}, {"model": "x", "job": 3, "totals": [], "layers": [{"name": "a"}]}]
)
def test_missing_and_odd_keys_are_tolerated(
    save: Callable[..., Path], content: dict[str, Any], outline: Callable[[str], Any]
) -> None:
    text = outline(model_report(save(content, {}, {})).read_text(encoding="utf-8")).words
    assert MISSING in text


def test_each_optional_key_may_be_missing(
    save: Callable[..., Path], record: dict[str, Any], outline: Callable[[str], Any]
) -> None:
    keys = list(record["layers"][1])
    for key, layer in zip(keys, record["layers"][1:], strict=False):
        del layer[key]
    outline(model_report(save(record)).read_text(encoding="utf-8"))


def test_absurd_values_are_drawn_or_left_out(
    save: Callable[..., Path], record: dict[str, Any], outline: Callable[[str], Any]
) -> None:
    values: list[Any] = [float("nan"), float("inf"), -1, 1e308, 1e-308, 10**300, "x", None, [], {}, True, 0, 1e99]
    numeric = ["block", "rank", "dense_bytes", "bytes", "predicted_error", "measured_error", "energy"]
    for index, layer in enumerate(record["layers"][1:]):
        layer |= {key: values[(index + shift) % len(values)] for shift, key in enumerate(numeric)}
        layer["spectrum"] = values[index % len(values) :]
        layer["shape"] = values[: index % 5]
    evaluation = {
        key: values[index % len(values)] for index, key in enumerate(("perplexity", "kl", "bytes_disk", "original"))
    }
    outline(
        model_report(save(record, evaluation, {"seconds": {"fit": 1e308, "total": -1}})).read_text(encoding="utf-8")
    )


def test_hostile_names_stay_text(
    save: Callable[..., Path], record: dict[str, Any], outline: Callable[[str], Any]
) -> None:
    hostile = "\"'><script>document.title='owned'</script><img src=x onerror=alert(1)></svg></style>\ud800"
    record["model"]["source"] = record["job"]["method"] = record["budget"]["asked"] = record["eckart"] = hostile
    record["versions"][hostile] = record["job"][hostile] = hostile
    for layer in record["layers"]:
        layer["name"] += hostile
        layer["form"] = layer["note"] = hostile
    evaluation, run = {"perplexity": 3, "text": hostile}, {"seconds": {hostile: 2}, "machine": {"cpu": hostile}}
    parsed = outline(model_report(save(record, evaluation, run)).read_text(encoding="utf-8"))
    assert parsed.tags.count("script") == 1
    assert "img" not in parsed.tags
    assert not any(name.startswith("on") or name == "src" for name, _ in parsed.attributes)
    assert "<script>document.title='owned'</script>" in parsed.words


def test_only_the_page_s_own_script_may_run(folder: Path) -> None:
    html = model_report(folder).read_text(encoding="utf-8")
    script = html[html.index("<script>") + 8 : html.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html
    assert "unsafe-inline" not in html[html.index("script-src") : html.index("script-src") + 80]


def test_command_repeats_the_job() -> None:
    job = {
        "method": "svd",
        "form": "low_rank() + sparse()",
        "one_shot": True,
        "targets": "",
        "rank": None,
        "power": 0.5,
    }
    job |= {"budget": "0.8 linears", "batch_size": 4, "seed": 0, "data": None}
    words = shlex.split(command({"model": {"source": "my models/x; rm -rf ~"}, "job": job}, "out").replace("\\\n", " "))
    assert words[:5] == ["eckart", "compress", "my models/x; rm -rf ~", "--output", "out"]
    assert words[5:15] == shlex.split(
        "--method svd --form 'low_rank() + sparse()' --budget '0.8 linears' --batch-size 4 --seed 0"
    )
    assert words[15:] == ["--set", "one_shot=true", "--set", "targets=", "--set", "rank=none", "--set", "power=0.5"]


def test_mean_error_counts_layers_alike(
    save: Callable[..., Path], record: dict[str, Any], outline: Callable[[str], Any]
) -> None:
    for index, layer in enumerate(record["layers"]):
        layer |= {"energy": 10.0**index, "predicted_error": 0.09 * 10.0**index, "measured_error": 0.25 * 10.0**index}
    words = outline(model_report(save(record)).read_text(encoding="utf-8")).words
    assert "Relative error 0.300 0.500 ×1.67" in " ".join(words.split())


def test_errors_say_what_to_do(tmp_path: Path, save: Callable[..., Path]) -> None:
    with pytest.raises(FileNotFoundError, match="give a folder that `eckart compress` wrote"):
        model_report(tmp_path)
    folder = save([])
    with pytest.raises(ValueError, match=r"eckart.json must hold a JSON object, but holds a list"):
        model_report(folder)
    (folder / "eckart.json").write_text('{"layers": [')
    with pytest.raises(ValueError, match="is not valid JSON"):
        model_report(folder)
    (folder / "eckart.json").write_text('{"layers": [3]}')
    with pytest.raises(ValueError, match="list of objects"):
        model_report(folder)


def test_a_failed_write_leaves_the_earlier_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = model_report(folder)
    before = page.read_bytes()

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        model_report(folder)
    assert page.read_bytes() == before
    assert [path.name for path in folder.iterdir() if path.suffix == ".tmp"] == []


def test_other_place_and_same_bytes(folder: Path, tmp_path: Path) -> None:
    first = model_report(folder, tmp_path / "new" / "page.html")
    assert first == tmp_path / "new" / "page.html"
    assert first.read_bytes() == model_report(folder).read_bytes()


@pytest.mark.parametrize(
    ("name", "block", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", 3, "self_attn.q_proj"),
        ("model.layers.1.mlp.experts.1.up_proj", 1, "mlp.experts.*.up_proj"),
        ("transformer.h.0.attn.c_attn", 0, "attn.c_attn"),
        ("odd", 2, "odd"),
    ],
)
def test_projection_types(name: str, block: int, expected: str) -> None:
    assert projection(name, block) == expected


def test_short_names_stay_distinct() -> None:
    assert short_names(["self_attn.q_proj", "mlp.up_proj"]) == {"self_attn.q_proj": "q_proj", "mlp.up_proj": "up_proj"}
    assert short_names(["attn.c_proj", "mlp.c_proj"]) == {"attn.c_proj": "attn.c_proj", "mlp.c_proj": "mlp.c_proj"}
