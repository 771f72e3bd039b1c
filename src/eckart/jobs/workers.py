"""Fanning the work on layers out over Ray workers; the results are those of one process, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from eckart.jobs.solve import Executor, Task, Threads, alone

R = TypeVar("R")


class RayExecutor:
    """Maps tasks over a Ray cluster, a bounded number of them in flight, and yields their results in order.

    Every worker computes with as many threads as this process, because the last bits of a matrix product depend on
    their number.
    """

    def __init__(self, ray: Any, in_flight: int):
        self.ray, self.in_flight = ray, in_flight
        self.threads = torch.get_num_threads()

    def map(self, function: Callable[[Task], R], tasks: Iterable[Task]) -> Iterator[R]:
        ray, threads = self.ray, self.threads

        @ray.remote
        def work(task: Task) -> R:
            torch.set_num_threads(threads)
            return alone(function, task)

        pending: list[Any] = []
        for task in tasks:
            if len(pending) >= self.in_flight:
                yield self._result(pending.pop(0))
            pending.append(work.remote(task))
        while pending:
            yield self._result(pending.pop(0))

    def _result(self, call: Any) -> Any:
        """What a worker returns; what went wrong there is raised here as itself, without Ray's story around it."""
        try:
            return self.ray.get(call)
        except Exception as e:
            raise getattr(e, "cause", None) or e from None


@contextmanager
def executor_for(workers: str | int | None) -> Iterator[Executor]:
    """An executor for `--workers`: nothing for this process, a number for that many local Ray workers, or an address.

    Raises `ImportError` where Ray is not installed, `ValueError` where the text is neither.
    """
    if workers is None:
        yield Threads()
        return
    text = str(workers)
    count = int(text) if text.isdigit() else None
    if (count is not None and count < 1) or (count is None and ":" not in text and text != "auto"):
        raise ValueError(f"cannot read --workers {text!r}: give a number of at least 1, or a cluster's address")
    try:
        import ray
    except ImportError as e:
        raise ImportError("workers need Ray: pip install 'eckart[ray]'") from e
    options: dict[str, Any] = {"num_cpus": count} if count is not None else {"address": text}
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR", **options)
    try:
        yield RayExecutor(ray, 2 * (count or int(ray.cluster_resources().get("CPU", 1))))
    finally:
        ray.shutdown()
