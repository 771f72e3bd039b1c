"""What rounding leaves over, and whether a low rank or more codes take it away for fewer bytes.

    python benchmarks/residuals.py [--models decoder minilm mpnet] [--bits 2 3 4] [--spent 0.25] [--samples 32]
                                   [--length 128] [--threads 1] [--json FILE]

Every linear layer of the blocks is rounded to codes in groups of 64, to the nearest and by GPTQ. What is left, in the
metric `input_covariance()`, is then lessened in two ways: by the best low rank with factors of 8 bits that fits into
`--spent` bits a weight, and by as many more bits for the codes, which one bit more in each code says the worth of: if
that leaves the part q of the error, d bits leave q^d. A row has medians over layers, as parts of the squared error that
rounding leaves, and the share of layers where the low rank takes away more.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from common import machine, table, write_json
from eckart.calibration.calibrate import Request, calibrate
from eckart.calibration.store import StatisticsStore
from eckart.calibration.stream import Stream
from eckart.calibration.subject import InMemory
from eckart.forms import Form, parse
from eckart.forms.layers import matrix_of
from eckart.jobs.recipe import Recipe
from eckart.linalg.weighting import Weighting
from eckart.metrics import InputCovariance
from models import load
from tasks import TASKS

ROUNDINGS = {"nearest": "", "gptq": ", rounding=gptq()"}
REPAIR = "low_rank(rank={rank}, factors=quantized(bits=8))"


def layers(model: nn.Module, batches: Any) -> Iterator[tuple[str, Tensor, Weighting]]:
    """The linear layers of the blocks, their matrices, and the metric of their inputs."""
    metric = InputCovariance()
    with tempfile.TemporaryDirectory() as folder:
        stream = Stream(InMemory(model), batches, Path(folder))
        stream.start()
        sites = Recipe().sites(model, stream.blocks)
        store = StatisticsStore(Path(folder) / "statistics")
        calibrate(stream, Request(sites, metric.needs), store, seed=0, progress=lambda *_: None)
        for part, names in sites.items():
            for name in names:
                yield name, matrix_of(model.get_submodule(name)).detach(), metric.weighting(store.of(name, part), name)


def bits_of(form: Form, matrix: Tensor) -> float:
    """Of a weight, all overhead counted."""
    return 8 * form.nbytes((matrix.shape[0], matrix.shape[1]), torch.float16) / matrix.numel()


def repair(matrix: Tensor, spent: float) -> Form | None:
    """The largest low rank within so many bits a weight."""
    fitting = None
    for rank in range(1, min(matrix.shape) + 1):
        form = parse(REPAIR.format(rank=rank))
        if bits_of(form, matrix) > spent:
            break
        fitting = form
    return fitting


def left(matrix: Tensor, weighting: Weighting, form: Form) -> Tensor:
    return matrix - form.fit(matrix, weighting, dtype=torch.float16).dense().detach().to(matrix.dtype)


def measured(matrix: Tensor, weighting: Weighting, rounding: str, bits: int, form: Form) -> dict[str, float]:
    """Parts of rounding's squared error that remain: with a low rank, with one more bit, with the low rank's bytes."""

    def codes(width: int) -> Form:
        return parse(f"quantized(bits={width}, group=64{ROUNDINGS[rounding]})")

    rest, finer = left(matrix, weighting, codes(bits)), left(matrix, weighting, codes(bits + 1))
    error, one_more = weighting.norm2(rest), weighting.norm2(finer) / weighting.norm2(rest)
    repaired = weighting.norm2(left(rest, weighting, form)) / error
    spent = bits_of(form, matrix)
    return {"low rank": repaired, "codes": one_more**spent, "one bit more": one_more, "spent": spent}


def measure(a: argparse.Namespace, report: dict[str, Any], console: Console) -> None:
    for key in a.models:
        model = load(key, torch.float32)
        batches = TASKS[key](key, a.samples, a.length).calibration()
        for name, matrix, weighting in layers(model, batches):
            form = repair(matrix, a.spent)
            if form is None:
                console.print(f"{key}: {name} has no low rank of {a.spent:g} bits a weight", markup=False)
                continue
            for rounding in ROUNDINGS:
                for bits in a.bits:
                    found = {
                        "model": key,
                        "layer": name,
                        "shape": list(matrix.shape),
                        "rounding": rounding,
                        "bits": bits,
                    }
                    report["rows"].append(found | measured(matrix, weighting, rounding, bits, form))
            if a.json:
                write_json(report, a.json)


def show(report: dict[str, Any], a: argparse.Namespace, console: Console) -> None:
    made = table(
        f"squared error that is left, of what rounding leaves, for {a.spent:g} bits a weight",
        ["model", "rounding"], ["layers", "bits", "with a low rank", "with more codes", "low rank is better"],
    )  # fmt: skip
    for key in a.models:
        for rounding in ROUNDINGS:
            for bits in a.bits:
                rows = [r for r in report["rows"] if (r["model"], r["rounding"], r["bits"]) == (key, rounding, bits)]
                if not rows:
                    continue
                better = sum(r["low rank"] < r["codes"] for r in rows)
                made.add_row(
                    key, rounding, str(len(rows)), str(bits),
                    f"{statistics.median(r['low rank'] for r in rows):.2f}",
                    f"{statistics.median(r['codes'] for r in rows):.2f}", f"{better / len(rows):.0%}",
                )  # fmt: skip
    console.print(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["decoder", "minilm", "mpnet"], choices=list(TASKS))
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--spent", type=float, default=0.25, help="bits a weight for the low rank (default 0.25)")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows (default 32)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a window (default 128)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the rows of all layers to this file")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    console = Console()
    settings = {k: getattr(a, k) for k in ("models", "bits", "spent", "samples", "length")}
    report: dict[str, Any] = {"settings": settings, "machine": machine(), "rows": []}
    measure(a, report, console)
    show(report, a, console)


if __name__ == "__main__":
    main()
