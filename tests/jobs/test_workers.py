"""Work on layers fanned out over Ray: bit for bit what one process does; and errors that say what to do."""

from __future__ import annotations

import builtins
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import eckart
import tiny
from eckart.jobs.solve import SMALL, Task, Threads
from eckart.jobs.workers import RayExecutor, executor_for
from eckart.metrics import Plain, Statistics
from eckart.remarks import noting, remark


def test_without_workers_it_is_this_process() -> None:
    with executor_for(None) as executor:
        assert isinstance(executor, Threads)


@pytest.mark.parametrize("text", ["0", "-2", "2.5", "some", "", 0])
def test_what_is_neither_a_number_nor_an_address_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match=f"cannot read --workers '{text}': give a number of at least 1, or"), executor_for(text):  # fmt: skip # noqa: E501
        pass


def test_without_ray_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def missing(name: str, *more: Any, **named: Any) -> Any:
        if name == "ray":
            raise ImportError("No module named 'ray'")
        return imported(name, *more, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"workers need Ray: pip install 'eckart\[ray\]'"), executor_for(2):
        pass


class Local:
    """Stands for Ray: remote calls run when they are asked for, and are counted while in flight."""

    def __init__(self) -> None:
        self.flying = self.most = 0

    def remote(self, function: Any) -> Any:
        outer = self

        class Remote:
            @staticmethod
            def remote(task: Any) -> Any:
                outer.flying += 1
                outer.most = max(outer.most, outer.flying)
                return function, task

        return Remote

    def get(self, call: Any) -> Any:
        self.flying -= 1
        return call[0](call[1])


def task(number: int, width: int = 4) -> Task:
    return Task(str(number), torch.full((width, width), float(number)), "low_rank(rank=1)", Plain(), Statistics(), torch.float32)  # fmt: skip # noqa: E501


def squared(task: Task) -> float:
    return float(task.matrix[0, 0]) ** 2


@pytest.mark.parametrize("make", [lambda: RayExecutor(Local(), 3), lambda: Threads(2)], ids=["ray", "threads"])
def test_results_come_in_order_and_few_tasks_are_in_flight(make: Any) -> None:
    taken: list[int] = []

    def tasks() -> Any:
        for i in range(9):
            taken.append(i)
            yield task(i)

    executor = make()
    results = executor.map(squared, tasks())
    assert next(results) == 0
    assert len(taken) == 4  # no more than three wait for a worker while the fourth is read
    assert list(results) == [i * i for i in range(1, 9)]
    if isinstance(executor, RayExecutor):
        assert executor.ray.most == 3


def test_large_matrices_have_all_cores_to_themselves_and_small_ones_a_thread_each() -> None:
    seen: list[tuple[str, int, bool, bool]] = []

    def look(task: Task) -> str:
        threads, here = torch.get_num_threads(), threading.current_thread() is threading.main_thread()
        seen.append((task.name, threads, here, torch.is_grad_enabled()))
        return task.name

    before = torch.get_num_threads()
    with torch.no_grad():
        names = list(Threads(2).map(look, [task(1), task(2, SMALL + 1), task(3)]))
    assert names == ["1", "2", "3"]
    assert sorted(seen) == [("1", 1, False, False), ("2", before, True, False), ("3", 1, False, False)]
    assert torch.get_num_threads() == before


def test_an_error_in_a_thread_reaches_the_caller_and_notes_stay_with_their_task() -> None:
    def work(task: Task) -> str | None:
        if task.name == "7":
            raise ValueError("layer 7 is broken")
        with noting() as notes:
            remark(f"about {task.name}", UserWarning)
        return notes.text

    assert list(Threads(2).map(work, map(task, range(6)))) == [f"about {i}" for i in range(6)]
    with pytest.raises(ValueError, match="layer 7 is broken"):
        list(Threads(2).map(work, map(task, range(9))))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_two_workers_give_the_bytes_of_one_process(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    tiny.save_model(tmp_path / "m")
    tiny.save_model(tmp_path / "wide", hidden_size=192, intermediate_size=512)  # whose matrices Ray shares
    text = tiny.save_text(tmp_path / "t.txt")
    jobs: dict[str, tuple[str, dict[str, Any]]] = {
        "svd_llm": ("wide", {"method": "svd_llm"}),
        "sequential": ("m", {"method": "lord", "one_shot": False}),
        "fwsvd": ("m", {"method": "fwsvd"}),
        "modegpt": ("m", {"method": "modegpt"}),
    }
    for workers in (None, 2):
        with executor_for(workers) as executor:
            for name, (model, job) in jobs.items():
                eckart.compress_to(
                    tmp_path / f"{name}-{workers}", tmp_path / model, **job, budget=0.8, data=text, samples=6,
                    length=12, executor=executor,
                )  # fmt: skip
            if workers:
                broken = tiny.build("llama")
                broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
                with pytest.raises(ValueError, match=r"^the weight of model\.layers\.1\.mlp\.up_proj [^\n]*$"):
                    eckart.compress(broken, "svd", budget=0.8, executor=executor)
    for name in jobs:
        assert tiny.hashes(tmp_path / f"{name}-2") == tiny.hashes(tmp_path / f"{name}-None")


@pytest.mark.slow
def test_the_command_line_with_workers_prints_json_alone(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    tiny.save_model(tmp_path / "m")
    done = tiny.eckart("compress", tmp_path / "m", "-o", tmp_path / "out", "-m", "svd", "-b", 0.8, "--data", tiny.save_text(tmp_path / "t.txt"), "--samples", 2, "--length", 8, "--workers", 2, "--json")  # fmt: skip # noqa: E501
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["totals"]["bytes_after"] == tiny.weight_bytes(tmp_path / "out")
