"""Statistics of shards of the data, added up over the processes of torch.distributed, are those of one pass."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import tiny
from eckart.calibration.calibrate import Request, calibrate
from eckart.calibration.store import OUTSIDE, StatisticsStore
from eckart.calibration.stream import Stream
from eckart.calibration.subject import InMemory
from eckart.calibration.tokens import Tokens
from eckart.downloads import silent
from eckart.jobs import Recipe
from eckart.metrics import Statistics
from eckart.metrics.statistics import GRADIENT_SUMS, INPUT_SUMS

WORLD = 2


def collected(tokens: Tokens, folder: Path) -> dict[str, Statistics]:
    """All sums of all layers, window by window."""
    folder.mkdir()
    model = tiny.build("llama")
    stream = Stream(InMemory(model), tokens.batches(1), folder)
    stream.start()
    probes = {**Recipe().sites(model, stream.blocks), OUTSIDE: ["lm_head"]}
    request = Request(probes, INPUT_SUMS | GRADIENT_SUMS)
    store = StatisticsStore(folder / "statistics")
    calibrate(stream, request, store, seed=0, progress=silent)
    return {name: store.of(name, part) for part, names in probes.items() for name in names}


def flat(found: dict[str, Statistics]) -> dict[str, torch.Tensor]:
    return {f"{name}|{key}": value.clone() for name, s in found.items() for key, value in s.sums.items()}


def worker(rank: int, folder: Path, tokens: Tokens) -> None:
    found = collected(tokens.shard(rank, WORLD), folder / f"hidden-{rank}")
    for statistics in found.values():
        statistics.all_reduce()
    save_file(flat(found), folder / f"rank-{rank}.safetensors")


def test_two_processes_on_two_shards_are_one_pass(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, tiny.VOCABULARY, (5, 9), generator=generator)
    tokens = Tokens(ids, torch.arange(9) < torch.tensor([9, 4, 9, 7, 9])[:, None])
    with tiny.two_processes(worker, tmp_path, tokens):
        whole = flat(collected(tokens, tmp_path / "whole"))
    ranks = [load_file(tmp_path / f"rank-{rank}.safetensors") for rank in range(WORLD)]
    assert ranks[0].keys() == ranks[1].keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        rounding = 1e-6 if value.dtype == torch.float32 else 1e-12
        torch.testing.assert_close(ranks[0][name], value, rtol=rounding, atol=rounding * float(value.abs().max()))


def test_merged_shards_are_one_pass() -> None:
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    whole, parts = Statistics(), [Statistics(), Statistics()]
    whole.add_inputs(rows, INPUT_SUMS)
    for part, shard in zip(parts, rows.split([15, 25]), strict=True):
        part.add_inputs(shard, INPUT_SUMS)
    before = parts[1].sums["x"].clone()
    parts[0].merge(parts[1])
    for key, value in whole.sums.items():
        torch.testing.assert_close(parts[0].sums[key], value, rtol=1e-6, atol=1e-6)
    assert parts[0].tokens == 40
    assert torch.equal(parts[1].sums["x"], before)
