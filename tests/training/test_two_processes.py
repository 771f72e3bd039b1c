"""Schedules in two data-parallel processes, each with its own data: what they decide and train is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import tiny
from eckart.training import structure

METHODS: dict[str, dict[str, Any]] = {
    "sst": {"rank": 2, "every": 2, "warmup": 0},
    "maestro": {"lasso": 1e-2, "shrink_every": 3, "threshold": 0.3},
    "trp": {"period": 2, "nuclear": 1e-2},
    "gradual_pruning": {"begin": 0, "end": 4, "every": 2, "sparsity": 0.5},
}


def work(rank: int, folder: Path) -> None:
    for key, settings in METHODS.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 3))
        schedule = structure(model, key, **settings)
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        schedule.begin(optimizer, 6)
        generator = torch.Generator().manual_seed(rank)
        for _ in range(6):
            parallel(torch.randn(4, 8, generator=generator)).square().sum().backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        torch.save(model.state_dict(), folder / f"{key}-{rank}")


def test_both_processes_end_with_the_same_model(tmp_path: Path) -> None:
    with tiny.two_processes(work, tmp_path):
        pass
    for key in METHODS:
        one, two = (torch.load(tmp_path / f"{key}-{rank}", weights_only=True) for rank in range(2))
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            assert torch.equal(tensor, two[name]), f"{key}: {name}"
