"""A checkpoint that lies is refused in words: no crash, no hang, no large allocation, nothing executed.

What transformers itself refuses keeps transformers' own error; the tables below say which those are.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

import eckart
from eckart import EckartConfig
from eckart.checkpoint.hf import install
from eckart.forms.stand_ins import STAND_INS
from tiny import build, read_json

FIRST, SECOND = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
FILE = "model.safetensors"
MAX_BYTES = 200 * 2**20
SECONDS = 60

Config = dict[str, Any]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "honest"
    eckart.compress(build("llama"), "svd", budget="0.6 linears").model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(honest: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(honest, tmp_path / "hostile"))


@pytest.fixture(scope="module")
def config(honest: Path) -> Config:
    return read_json(honest / "config.json")


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def resident(field: str) -> int:
    """Bytes of this process's resident memory (VmRSS), or of their peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


@contextmanager
def frugal_and_quick() -> Iterator[None]:
    """Within the context, hanging is an error, and so is having used much memory."""

    def hung(*_: Any) -> None:
        raise AssertionError(f"took more than {SECONDS} seconds")

    linux = sys.platform == "linux"
    if linux:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident("VmRSS")
    earlier = signal.signal(signal.SIGALRM, hung)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)
    assert not linux or resident("VmHWM") - before < MAX_BYTES


def write(folder: Path, config: Any) -> None:
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")


def changed(config: Config, *path: str, value: Any) -> Config:
    """A copy of the config in which the entry at `path` below `quantization_config` is `value`."""
    copied = copy.deepcopy(config)
    at = copied
    keys = ["quantization_config", *path]
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    return copied


SOMETHING = r"."
NOWHERE = [
    "..",
    "__class__",
    "model.layers.0.__class__",
    "model..layers",
    ".model",
    "lm_head.weight",
    "model.layers.99",
]
ELSEWHERE = {"model": "LlamaModel", "model.layers": "ModuleList", "model.norm": "LlamaRMSNorm"}
NOT_SHAPES: list[Any] = [None, 3, [32], [32, -1], [0, 0], [1.0, 2.0], "32", [[1], [2]]]
NOT_FORMS: list[Any] = [None, 3, True, ["dense()"], {"dense": 1}, "", "\u0000", "lambda: 0"]

MODULES: list[tuple[Any, str]] = [
    (["a"], "modules is not a table of modules"),
    ("abc", "modules is not a table of modules"),
    (7, "modules is not a table of modules"),
    ({"a b": {}}, "modules\\['a b'\\] is not the description of a module"),
    ({"../../etc/passwd": {"kind": "linear"}}, "is not the description of a module"),
    ({"": {"kind": "linear"}}, "is not the description of a module"),
    ({FIRST: 7}, "is not the description of a module"),
    ({FIRST: None}, "is not the description of a module"),
    ({FIRST: {}}, f"{FIRST}: unknown kind None; known: .*conv1d"),
    ({FIRST: {"kind": "liner"}}, "unknown kind 'liner'; did you mean 'linear'"),
    ({FIRST: {"kind": ["linear"]}}, "unknown kind"),
    ({FIRST: {"kind": "__class__"}}, "unknown kind '__class__'"),
    ({FIRST: {"kind": "torch.nn.Linear"}}, "unknown kind 'torch.nn.Linear'"),
    *(({name: {"kind": "linear"}}, f"describes {name}, which LlamaForCausalLM does not have") for name in NOWHERE),
    *(({name: {"kind": "linear"}}, f"{name}: .* says linear, the model has {has}") for name, has in ELSEWHERE.items()),
    ({FIRST: {"kind": "embedding", "shape": [32, 32]}}, "the checkpoint says embedding, the model has Linear"),
]  # fmt: skip


@pytest.mark.parametrize(("modules", "message"), MODULES)
def test_a_table_that_is_none(folder: Path, config: Config, modules: Any, message: str) -> None:
    write(folder, changed(config, "modules", value=modules))
    with frugal_and_quick(), pytest.raises(ValueError, match=message):
        load(folder)


SPECS: list[tuple[str, Any, str]] = [
    *(("shape", shape, f"{FIRST}: .* is not the shape of a matrix") for shape in NOT_SHAPES),
    ("shape", [10**9, 10**9], "is larger than the model's"),
    ("shape", [33, 32], r"shape \(33, 32\) is larger than the model's \(32, 32\)"),
    ("form", "low_rank(rank=10000000000)", "the rank is at most 32"),
    ("form", "dense(width=1000000) @ dense()", "would take 256000000 bytes, more than any compressed layer"),
    ("form", "dense(width=100000000000) @ dense()", "cannot have shape"),
    ("form", " + ".join(["dense()"] * 30), "more than any compressed layer"),
    ("form", " + ".join(["dense()"] * 300), "nests more than 32 deep"),
    ("form", "low_rnak(rank=3)", f"{FIRST}: unknown form 'low_rnak'; did you mean 'low_rank'"),
    ("form", "(" * 3000 + "dense()" + ")" * 3000, "characters long; the limit is"),
    ("form", "(" * 1000 + "dense()" + ")" * 1000, "cannot read form"),
    *(("form", form, "cannot read form") for form in NOT_FORMS),
    ("bias", True, f"lacks {FIRST}.bias, or holds it in another shape"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "message"), SPECS)
def test_a_layer_that_is_none(folder: Path, config: Config, key: str, value: Any, message: str) -> None:
    write(folder, changed(config, "modules", FIRST, key, value=value))
    with frugal_and_quick(), pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize(
    "form",
    [
        "__import__('os').system('touch {0}')",
        "low_rank(rank=__import__('os').system('touch {0}'))",
        "open('{0}', 'w')",
        "dense().__class__.__base__.__subclasses__()[0]",
        "exec(\"open('{0}', 'w')\")",
    ],
)
def test_nothing_in_a_config_is_executed(folder: Path, config: Config, form: str) -> None:
    trace = folder / "trace"
    for path in (("modules", FIRST, "form"), ("modules", FIRST, "kind")):
        write(folder, changed(config, *path, value=form.format(trace)))
        with pytest.raises(ValueError, match=r"cannot read form|unknown form|unknown kind"):
            load(folder)
        assert not trace.exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tied", [1], "tied names a module that is not"),
        ("tied", "abc", "tied names a module that is not"),
        ("tied", {FIRST: []}, "tied names a module that is not"),
        ("tied", {FIRST: "model.norm"}, "tied names a module that is not"),
        ("tied", {"model.norm": FIRST}, "tied names a module that is not"),
        ("tied", {FIRST: SECOND}, f"{FIRST} cannot share the matrix of {SECOND}"),
        ("history", "abc", "history is not a list"),
        ("history", {"a": 1}, "history is not a list"),
        ("format", 2, "this checkpoint has format 2; this version of eckart reads 1"),
        ("format", "1", "has format '1'"),
        ("format", None, "has format None"),
        ("format", [1], r"has format \[1\]"),
    ],
)
def test_an_entry_that_is_none(folder: Path, config: Config, key: str, value: Any, message: str) -> None:
    write(folder, changed(config, key, value=value))
    with frugal_and_quick(), pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        *((value, AttributeError, "object has no attribute 'to_dict'") for value in ("x", 5, [], [1], True)),
        ({}, ValueError, "has no `quant_method` attribute"),
        ({"quant_method": ["eckart"]}, TypeError, "unhashable type: 'list'"),
        ({"quant_method": "eckart", "self": 1}, TypeError, "multiple values for argument 'self'"),
    ],
)
def test_what_transformers_refuses_by_itself(
    folder: Path, config: Config, value: Any, error: type[Exception], message: str
) -> None:
    write(folder, {**config, "quantization_config": value})
    with frugal_and_quick(), pytest.raises(error, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("text", "error"),
    [("{", OSError), ("[1]", ValueError), ("\x00", OSError), ('{"model_type": ' + "[" * 10**5, RecursionError)],
)
def test_a_config_that_is_no_table(folder: Path, text: str, error: type[Exception]) -> None:
    write(folder, text)
    with frugal_and_quick(), pytest.raises(error, match=SOMETHING):
        load(folder)


@pytest.mark.parametrize("modules", [[], {}, None])
def test_a_table_that_was_emptied_is_reported(
    folder: Path, config: Config, modules: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The factors then belong to nobody; transformers says which tensors are missing and which were not expected."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    write(folder, changed(config, "modules", value=modules))
    load(folder)
    assert "q_proj.matrix.left.weight" in caplog.text
    assert "UNEXPECTED" in caplog.text
    assert "MISSING" in caplog.text


def test_factors_of_another_rank_are_refused(folder: Path, config: Config) -> None:
    write(folder, changed(config, "modules", FIRST, "form", value="low_rank(rank=3)"))
    with frugal_and_quick(), pytest.raises(RuntimeError, match="`ignore_mismatched_sizes` to `False`"):
        load(folder)
    with pytest.raises(ValueError, match=f"lacks {FIRST}.matrix.left.weight, or holds it in another shape"):
        AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


def test_a_missing_factor_is_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(f"{FIRST}.matrix.right.weight"))
    with frugal_and_quick(), pytest.raises(ValueError, match=f"the checkpoint lacks {FIRST}.matrix.right.weight"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.1, 0.5, 0.99, -1])
def test_a_file_cut_short_is_refused(folder: Path, keep: float) -> None:
    data = (folder / FILE).read_bytes()
    size = int(keep * len(data)) if isinstance(keep, float) else keep % len(data)
    (folder / FILE).write_bytes(data[:size])
    with frugal_and_quick(), pytest.raises((SafetensorError, OSError, ValueError), match=SOMETHING):
        load(folder)


HEADERS: list[Callable[[Config], Any]] = [
    lambda header: {},
    lambda header: [],
    lambda header: {"w": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 2**63]}},
    lambda header: {**header, "w": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 4]}},
    lambda header: {**header, "w": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
    lambda header: {**header, "w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
    lambda header: {**header, "w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
]  # fmt: skip


@pytest.mark.parametrize("change", HEADERS)
def test_a_header_that_lies_is_refused(folder: Path, change: Callable[[Config], Any]) -> None:
    data = (folder / FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(change(json.loads(data[8 : 8 + length]))).encode()
    (folder / FILE).write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    with frugal_and_quick(), pytest.raises((SafetensorError, OSError, ValueError), match=SOMETHING):
        load(folder)


def test_a_pickle_is_not_opened(folder: Path) -> None:
    trace = folder / "trace"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {trace}",)

    (folder / FILE).unlink()
    torch.save({"w": Bomb()}, folder / "pytorch_model.bin")
    with frugal_and_quick(), pytest.raises(UnpicklingError, match="Weights only load failed"):
        load(folder)
    assert not trace.exists()


words = st.sampled_from(["linear", "conv2d", "narrow", "stream_norm", "low_rank(rank=3)", "__class__", "../x", FIRST])
numbers = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False)
keys = st.sampled_from(["kind", "form", "shape", "a"])
json_values = st.recursive(
    st.none() | st.booleans() | numbers | words | st.text(max_size=20),
    lambda v: st.lists(v, max_size=4) | st.dictionaries(keys, v, max_size=4),
    max_leaves=8,
)


FORMS = ["dense()", "diagonal()", "low_rank()", "select()", "dense() @ dense()", "low_rank(rank=2) + diagonal()"]
NAMES = [FIRST, SECOND, "lm_head", "model.embed_tokens", "model.norm", "model", "model.layers.1.mlp.up_proj", "x", ""]


@st.composite
def specs(draw: st.DrawFn) -> dict[str, Any]:
    """Something like the description of a layer, of a kind that exists."""
    sizes = st.integers(-1, 40) | st.sampled_from([2**31, 2**62, True, 3.0, None])
    spec: dict[str, Any] = {
        "kind": draw(st.sampled_from(list(STAND_INS))),
        "form": draw(st.sampled_from(FORMS) | st.integers(-2, 50).map("low_rank(rank={})".format)),
        "shape": draw(st.lists(sizes, min_size=1, max_size=3)),
        "bias": draw(st.booleans()),
    }  # fmt: skip
    if draw(st.booleans()):
        spec[draw(st.sampled_from([*spec, "norm", "width", "divisor", "eps", "other"]))] = draw(json_values)
    return spec


@given(st.dictionaries(st.sampled_from(NAMES), specs() | json_values, min_size=1, max_size=3), json_values, json_values)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_table_is_installed_or_refused(skeleton: Any, modules: dict[str, Any], tied: Any, history: Any) -> None:
    """Without weights: the part that reads a config, on the skeleton of a model."""
    model = copy.deepcopy(skeleton)
    try:
        with frugal_and_quick():
            install(model, EckartConfig(modules, tied, history), torch.float32)
    except (ValueError, TypeError) as error:
        assert len(str(error)) > 10  # noqa: PT017
    assert all(tensor.is_meta for name in modules if name for tensor in tensors_at(model, name))


@pytest.fixture(scope="module")
def skeleton() -> Any:
    with torch.device("meta"):
        return build("llama")


def tensors_at(model: Any, name: str) -> list[torch.Tensor]:
    try:
        return list(model.get_submodule(name).state_dict().values())
    except AttributeError:
        return []


PATHS = [("modules",), ("tied",), ("history",), ("format",), ("new",), ("quant_method",), ("modules", FIRST)]
PATHS += [("modules", FIRST, key) for key in ("kind", "form", "shape", "bias", "new")]
REFUSED = (ValueError, TypeError, RuntimeError, AttributeError, OSError)


@given(st.sampled_from(PATHS), json_values)
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_change_of_a_config_is_loaded_or_refused(
    honest: Path, config: Config, tmp_path_factory: pytest.TempPathFactory, path: tuple[str, ...], value: Any
) -> None:
    folder = tmp_path_factory.getbasetemp() / "mutated"
    shutil.copytree(honest, folder, dirs_exist_ok=True)
    write(folder, changed(config, *path, value=value))
    try:
        with frugal_and_quick():
            load(folder)
    except REFUSED as error:
        assert len(str(error)) > 5  # noqa: PT017


@given(st.data())
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_to_a_file_is_loaded_or_refused(
    honest: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes of the header changed, or bytes added or taken away at the end."""
    folder = tmp_path_factory.getbasetemp() / "damaged"
    shutil.copytree(honest, folder, dirs_exist_ok=True)
    content = bytearray((folder / FILE).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(-8, 8))
    content = content[:cut] if cut < 0 else content + bytes(cut)
    (folder / FILE).write_bytes(content)
    try:
        with frugal_and_quick():
            load(folder)
    except (*REFUSED, SafetensorError) as error:
        assert len(str(error)) > 5  # noqa: PT017
