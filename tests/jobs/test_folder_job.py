"""The main job on disk: exact bytes, the same model as in memory, and nothing lost when something cannot be written."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import eckart
import tiny
from eckart.allocation import BudgetError
from eckart.jobs.result import Result

DATA: dict[str, Any] = {"samples": 6, "length": 12, "batch_size": 2}
Compress = Callable[..., Result]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of models, each made once; and beside them a text."""
    folder = tmp_path_factory.mktemp("models")
    tiny.save_text(folder / "t.txt")

    def model(name: str = "llama", **settings: Any) -> Path:
        path = folder / "-".join([name, *(f"{k}={v}" for k, v in settings.items())])
        return path if path.exists() else tiny.save_model(path, name, **settings)

    return model


@pytest.fixture
def compress(tmp_path: Path) -> Compress:
    """`compress_to` with the text beside the model as its data, into `tmp_path / "out"`."""

    def run(model: Path, *words: Any, out: str = "out", **settings: Any) -> Result:
        return eckart.compress_to(tmp_path / out, model, *words, data=model.parent / "t.txt", **DATA | settings)

    return run


RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "svd": ("llama", {"method": "svd", "budget": 0.8}),
    "svd_llm": ("llama", {"method": "svd_llm", "budget": 0.8}),
    "sequential": ("opt", {"method": "svd_llm", "budget": 0.8, "one_shot": False}),
    "lord adds biases": ("llama", {"method": "lord", "budget": 0.8}),
    "lord changes biases": ("opt", {"method": "lord", "budget": 0.85}),
    "tied embeddings": ("llama-tied", {"method": "svd_llm", "budget": 0.8}),
    "conv1d": ("gpt2", {"method": "svd_llm", "budget": 0.8}),
    "untouched layers": ("llama", {"method": "svd", "budget": 0.9, "targets": r".*\.mlp\.(up|down)_proj"}),
    "the head": ("llama", {"method": "svd_llm", "budget": 0.8, "targets": r".*(_proj|lm_head)"}),
    "dense where worth it": ("llama", {"method": "welore", "budget": 0.9}),
    "a form": ("llama", {"form": "low_rank(7) + diagonal()", "metric": "output_covariance()", "budget": 0.8}),
    "modegpt": ("llama", {"method": "modegpt", "budget": 0.8}),
    "slicegpt": ("llama", {"method": "slicegpt", "budget": 0.8}),
    "fwsvd": ("opt", {"method": "fwsvd", "budget": 0.8}),
    "auto": ("llama", {"method": "auto", "budget": 0.7}),
    "all": ("llama", {"method": "svd_llm", "budget": 1.0}),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_bytes_that_are_planned_are_the_bytes_on_disk(recipe: str, made: Any, compress: Compress, tmp_path: Path) -> None:  # fmt: skip # noqa: E501
    name, settings = RECIPES[recipe]
    model = made(name)
    result = compress(model, **settings)
    assert result.bytes_after == tiny.weight_bytes(tmp_path / "out")
    assert result.bytes_after <= result.budget <= result.bytes_before
    assert result.bytes_before == pytest.approx(tiny.weight_bytes(model), rel=0.01)
    kept = tiny.read_json(tmp_path / "out" / "eckart.json")
    assert kept["totals"]["bytes_after"] == result.bytes_after
    assert kept["budget"]["bytes"] == result.budget
    index = tiny.read_json(tmp_path / "out" / "model.safetensors.index.json")
    tensors = {k: v for p in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(p).items()}
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize("budget", ["0.7", "45KB", "12bpw", "0.8 linears", "50000B"])
@pytest.mark.parametrize("method", ["svd_llm", "lord"])
def test_every_kind_of_budget_is_kept(budget: str, method: str, made: Any, compress: Compress, tmp_path: Path) -> None:
    model = made()
    tensors = load_file(model / "model.safetensors")
    weights, total = sum(t.numel() for t in tensors.values()), tiny.weight_bytes(model)
    linears = sum(t.nbytes for k, t in tensors.items() if "_proj" in k)
    allowed = {"0.7": 0.7 * total, "45KB": 45_000, "12bpw": 12 / 8 * weights, "0.8 linears": total - 0.2 * linears, "50000B": 50_000}  # fmt: skip # noqa: E501
    result = compress(model, method, budget=budget)
    assert tiny.weight_bytes(tmp_path / "out") == result.bytes_after <= result.budget
    assert result.budget == pytest.approx(allowed[budget], rel=0.01)
    assert result.bytes_after > 0.93 * result.budget


@pytest.mark.parametrize("method", ["svd_llm", "lord", "modegpt"])
def test_an_impossible_budget_names_the_smallest_possible(method: str, made: Any, compress: Compress, tmp_path: Path) -> None:  # fmt: skip # noqa: E501
    model = made()
    with pytest.raises(BudgetError, match=r"smallest possible is (\d+) bytes \(0\.\d+ of the input\)") as caught:
        compress(model, method, budget="1KB")
    assert not list(tmp_path.iterdir())
    smallest = int(str(caught.value).split("smallest possible is ")[1].split()[0])
    result = compress(model, method, budget=f"{smallest}B")
    assert tiny.weight_bytes(tmp_path / "out") == result.bytes_after <= smallest
    with pytest.raises(BudgetError):
        compress(model, method, budget=f"{int(0.95 * result.bytes_after)}B", out="smaller")


def test_disk_usage_is_what_is_reported(compress: Compress, tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "m", "llama", vocab_size=30_000, hidden_size=128, intermediate_size=256)
    tiny.save_text(tmp_path / "t.txt")
    result = compress(folder, "svd", budget=0.95)
    used = sum(512 * p.stat().st_blocks for p in (tmp_path / "out").iterdir())
    assert result.bytes_after > 1e7
    assert used == pytest.approx(result.bytes_after, rel=0.01)


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "opt"])
def test_on_disk_and_in_memory_the_same_model_comes_out(name: str, shard: str, made: Any, compress: Compress, tmp_path: Path) -> None:  # fmt: skip # noqa: E501
    """Bit for bit, whether the input is one file or many; loaded it computes the same."""
    folder, method = made(name, shard=shard), "lord" if name == "opt" else "svd_llm"
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard == "20KB")
    compress(folder, method, budget=0.8)
    tokens = tiny.batches((3,), length=12)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    tokenizer = tiny.tokenizer()
    in_memory, result = eckart.compress(
        model, method, budget=0.8, data=[(folder.parent / "t.txt").read_text()], tokenizer=tokenizer, **DATA
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16)
    own = {k: v for k, v in in_memory.state_dict().items() if k in loaded.state_dict()}
    for key, value in loaded.state_dict().items():
        assert torch.equal(own[key], value), key
    assert result.bytes_after == tiny.weight_bytes(tmp_path / "out")
    with torch.no_grad():
        expected = in_memory.float()(**tokens[0]).logits
        wide = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        torch.testing.assert_close(wide(**tokens[0]).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["svd_llm", "lord", "modegpt", "slicegpt"])
def test_save_load_save_gives_the_same_bytes(method: str, made: Any, compress: Compress, tmp_path: Path) -> None:
    compress(made(), method, budget=0.8)
    first, second = tmp_path / "first", tmp_path / "second"
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(first)
    AutoModelForCausalLM.from_pretrained(first).save_pretrained(second)
    assert tiny.hashes(first) == tiny.hashes(second)
    parts = [load_file(p) for p in sorted((tmp_path / "out").glob("*.safetensors"))]
    own, saved = {k: v for part in parts for k, v in part.items()}, load_file(first / "model.safetensors")
    assert own.keys() == saved.keys()
    assert all(torch.equal(own[k], saved[k]) for k in own)


def test_the_same_job_gives_the_same_bytes(made: Any, compress: Compress, tmp_path: Path) -> None:
    for out in ("out", "again"):
        compress(made(), "lord", budget=0.8, out=out)
    assert tiny.hashes(tmp_path / "out") == tiny.hashes(tmp_path / "again")


def test_the_folder_says_how_its_plan_was_found(made: Any, compress: Compress, tmp_path: Path) -> None:
    result = compress(made("llama"), "auto", budget=0.7)
    (remark,) = result.remarks
    assert tiny.read_json(tmp_path / "out" / "eckart.json")["remarks"] == [remark]
    assert remark[1:] in (tmp_path / "out" / "README.md").read_text()
    assert result.advice()[0] == remark


def test_a_dry_run_changes_nothing_and_plans_what_is_done(made: Any, compress: Compress, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    planned = compress(made(), "svd_llm", budget=0.8, dry_run=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").iterdir())
    assert planned.planned
    result = compress(made(), "svd_llm", budget=0.8, overwrite=True)
    assert planned.bytes_after == result.bytes_after == tiny.weight_bytes(tmp_path / "out")
    assert [(x.name, x.form, x.bytes, x.predicted_error) for x in planned.layers] == [
        (x.name, x.form, x.bytes, x.predicted_error) for x in result.layers
    ]
    assert all(x.measured_error is None for x in planned.layers)
    assert planned.predicted_memory > 0
    assert planned.predicted_seconds > 0


class TestStatisticsFolder:
    """Shared between jobs: it never changes a result, whoever was there before."""

    def results(self, compress: Compress, tmp_path: Path, jobs: list[tuple[Path, dict[str, Any]]]) -> None:
        for i, (model, settings) in enumerate(jobs):
            compress(model, **settings, out=f"alone-{i}", budget=0.8)
            compress(model, **settings, out=f"shared-{i}", budget=0.8, statistics=tmp_path / "statistics")
            assert tiny.hashes(tmp_path / f"alone-{i}") == tiny.hashes(tmp_path / f"shared-{i}"), settings

    def test_between_methods_with_other_needs(self, made: Any, compress: Compress, tmp_path: Path) -> None:
        methods = ["asvd", "svd_llm", "fwsvd", "modegpt", "auto", "svd_llm"]
        jobs = [(made(), {"method": m}) for m in methods]
        jobs.insert(3, (made(), {"method": "lord", "metric": "kronecker()"}))
        self.results(compress, tmp_path, jobs)

    def test_between_models_and_data(self, made: Any, compress: Compress, tmp_path: Path) -> None:
        one, other = made(), made(seed=1)
        self.results(compress, tmp_path, [(one, {"method": "svd_llm"}), (other, {"method": "svd_llm"}),
                                          (one, {"method": "svd_llm", "seed": 5}),
                                          (one, {"method": "svd_llm", "length": 10})])  # fmt: skip
        assert len(list((tmp_path / "statistics").glob("*/*"))) == 4

    def test_it_spares_the_second_job_the_calibration(self, made: Any, compress: Compress, tmp_path: Path) -> None:
        stages: list[str] = []
        for out in ("one", "two"):
            stages.clear()
            compress(made(), "svd_llm", budget=0.8, out=out, statistics=tmp_path / "s", progress=lambda s, *_: stages.append(s))  # fmt: skip # noqa: E501
            assert ("calibrate" in stages) == (out == "one")


class TestTargets:
    """What is there stays as it was, whatever happens."""

    def test_an_existing_folder_is_kept(self, made: Any, compress: Compress, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine")
        with pytest.raises(FileExistsError, match="out exists already: choose another folder, or pass --overwrite"):
            compress(made(), "svd", budget=0.8)
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        compress(made(), "svd", budget=0.8, overwrite=True)
        assert not (tmp_path / "out" / "notes.txt").exists()
        assert tiny.weight_bytes(tmp_path / "out") > 0

    def test_a_file_or_the_model_itself_is_no_target(self, made: Any, compress: Compress, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("mine")
        with pytest.raises(FileExistsError, match="out is a file"):
            compress(made(), "svd", budget=0.8, overwrite=True)
        assert (tmp_path / "out").read_text() == "mine"
        with pytest.raises(ValueError, match="is the folder of the model itself"):
            eckart.compress_to(made(), made(), "svd", budget=0.8, data=None, overwrite=True)
        with pytest.raises(NotADirectoryError):
            compress(made(), "svd", budget=0.8, out="out/below")

    def test_a_folder_of_someone_elses_is_not_taken_for_work(self, made: Any, compress: Compress, tmp_path: Path) -> None:  # fmt: skip # noqa: E501
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial" / "notes.txt").write_text("mine")
        for overwrite in (False, True):
            with pytest.raises(FileExistsError, match=r"out\.partial is in the way and was not made by eckart"):
                compress(made(), "svd", budget=0.8, overwrite=overwrite)
        assert (tmp_path / "out.partial" / "notes.txt").read_text() == "mine"

    def test_the_old_folder_comes_back_when_the_exchange_fails(self, made: Any, compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip # noqa: E501
        compress(made(), "svd", budget=0.9)
        before, rename = tiny.hashes(tmp_path / "out"), Path.rename

        def failing(self: Path, target: Path) -> Path:
            if self.name == "model":
                raise OSError(errno.EIO, "Input/output error", str(target))
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", failing)
        with pytest.raises(OSError, match="Input/output error") as caught:
            compress(made(), "svd", budget=0.8, overwrite=True)
        assert "--resume goes on" in caught.value.__notes__[0]
        monkeypatch.undo()
        assert tiny.hashes(tmp_path / "out") == before
        compress(made(), "svd", budget=0.8, overwrite=True, resume=True)
        compress(made(), "svd", budget=0.8, out="fresh")
        assert tiny.hashes(tmp_path / "out") == tiny.hashes(tmp_path / "fresh")

    def test_a_full_disk_at_any_file_is_told_and_resumed(self, made: Any, compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip # noqa: E501
        compress(made(), "svd_llm", budget=0.8, out="expected")
        compress(made(), "svd", budget=0.9)
        before, fsync = tiny.hashes(tmp_path / "out"), os.fsync
        left = 0

        def full(descriptor: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        for files in (1, 3, 3, 3, 3):
            left = files
            with pytest.raises(OSError, match=r"No space left on device: '/.*'") as caught:
                compress(made(), "svd_llm", budget=0.8, overwrite=True, resume=True)
            assert caught.value.errno == errno.ENOSPC
            assert tiny.hashes(tmp_path / "out") == before
        monkeypatch.undo()
        compress(made(), "svd_llm", budget=0.8, overwrite=True, resume=True)
        assert tiny.hashes(tmp_path / "out") == tiny.hashes(tmp_path / "expected")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system in memory, or mounts it anew with other options; needs to be root."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def do(options: str) -> Path:
        how = ["-o", f"remount,{options}", str(folder)] if os.path.ismount(folder) else ["-o", options, "tmpfs", str(folder)]  # fmt: skip # noqa: E501
        done = subprocess.run(["mount", "-t", "tmpfs", *how], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount: {done.stderr.strip()}")
        return folder

    yield do
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(made: Any, compress: Compress, tmp_path: Path, mount: Callable[[str], Path]) -> None:  # fmt: skip # noqa: E501
    compress(made(), "svd_llm", budget=0.8, out="expected")
    for kilobytes in (20, 60, 120, 180):
        folder = mount(f"size={kilobytes}k")
        with pytest.raises(OSError, match="No space left on device") as caught:
            compress(made(), "svd_llm", budget=0.8, out="mounted/out", resume=True)
        assert caught.value.errno == errno.ENOSPC
        assert not (folder / "out").exists()
    mount("size=10m")
    compress(made(), "svd_llm", budget=0.8, out="mounted/out", resume=True)
    assert tiny.hashes(folder / "out") == tiny.hashes(tmp_path / "expected")


def test_a_read_only_target(made: Any, compress: Compress, mount: Callable[[str], Path]) -> None:
    folder = mount("size=10m")
    compress(made(), "svd", budget=0.9, out="mounted/out")
    before = tiny.hashes(folder)
    mount("ro")
    for out, overwrite in (("mounted/new", False), ("mounted/out", True)):
        with pytest.raises(OSError, match="Read-only file system"):
            compress(made(), "svd", budget=0.8, out=out, overwrite=overwrite)
    assert tiny.hashes(folder) == before


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None, reason="a torch with CUDA is itself larger than the limit")
def test_a_model_larger_than_memory(tmp_path: Path) -> None:
    """Held by the kernel to 0.76 of the model's float32 bytes, of which Python and torch take more than half."""
    bench = tiny.benchmark("larger_than_memory")
    size = dataclasses.replace(bench.SMALL, blocks=32)
    figures = bench.measure(tmp_path, size, size.limit, "svd_llm")
    assert figures["exit code"] == 0, figures["said"]
    assert figures["model in float32"] > 1.3 * size.limit
    assert figures["peak resident"] < size.limit
    assert 0 < figures["result on disk"] <= 0.95 * figures["model on disk"]
    load = (
        "from transformers import AutoModelForCausalLM as A; import torch; A.from_pretrained({!r}, dtype=torch.float32)"
    )
    code, *_ = bench.run_limited([sys.executable, "-c", load.format(str(tmp_path / "model"))], size.limit)
    assert code != 0
