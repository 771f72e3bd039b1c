"""Truncated SVD: eckart's routes beside torch.linalg.svd and torch.svd_lowrank.

    python benchmarks/svd.py [--quick] [--full] [--rounds N] [--json FILE]

Matrices of known spectrum at the shapes of language-model layers: "slow" is s_i = i^-0.5, "fast" an exponential decay
with a floor of 1e-3, "outlier" is slow with a first value of 100, which is below what a float32 Gram matrix resolves.
One thread, CPU seconds of the process (so that waiting for a core does not count), the variants interleaved round by
round, medians. "ratio" is to torch.linalg.svd's seconds, round by round; "err/opt" the truncation error over the least
possible; "value err" the worst relative error of a singular value kept. svd_lowrank takes two power steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from eckart.linalg.svd import truncated_svd

Factors = tuple[Tensor, Tensor, Tensor, str]
QUICK = [(1536, 576, 104), (1536, 576, 16)]
USUAL = [*QUICK, (5632, 2048, 375), (5632, 2048, 64)]
FULL = [*USUAL, (11008, 4096, 746), (11008, 4096, 64)]


def spectrum(kind: str, n: int) -> Tensor:
    i = torch.arange(1, n + 1, dtype=torch.float64)
    if kind == "fast":
        return torch.exp(-i / (n / 20)) + 1e-3
    slow = i**-0.5
    if kind == "outlier":
        slow[0] = 100.0
    return slow


def matrix(m: int, n: int, S: Tensor, seed: int = 0) -> Tensor:
    """A float32 matrix with the singular values S and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(m, n, generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    return ((U * S) @ V.mT).float()


def full_svd(A: Tensor, rank: int) -> Factors:
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    return U[:, :rank], S[:rank], Vh[:rank], "gesdd"


def svd_lowrank(A: Tensor, rank: int) -> Factors:
    U, S, V = torch.svd_lowrank(A, rank, niter=2)
    return U, S, V.mT, "randomized"


def ours(**settings: str) -> Callable[[Tensor, int], Factors]:
    def run(A: Tensor, rank: int) -> Factors:
        found = truncated_svd(A, rank, **settings)  # type: ignore[arg-type]
        return found.U, found.S, found.Vh, found.route

    return run


VARIANTS: dict[str, Callable[[Tensor, int], Factors]] = {
    "torch.linalg.svd": full_svd,
    "torch.svd_lowrank": svd_lowrank,
    "eckart": ours(),
    "eckart, spectrum": ours(purpose="spectrum"),
    "eckart, gram": ours(route="gram"),
    "eckart, randomized": ours(route="randomized"),
}


def measure(m: int, n: int, rank: int, kind: str, rounds: int) -> list[dict[str, float | int | str]]:
    S = spectrum(kind, n)
    A = matrix(m, n, S)
    optimal = float(S[rank:].norm())
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    results: dict[str, Factors] = {}
    for _ in range(rounds):
        for name, run in VARIANTS.items():
            start = time.process_time()
            results[name] = run(A, rank)
            seconds[name].append(time.process_time() - start)
    reference = seconds["torch.linalg.svd"]
    rows: list[dict[str, float | int | str]] = []
    for name, (U, values, Vh, route) in results.items():
        residual = A.double() - (U.double() * values.double()) @ Vh.double()
        rows.append(
            {
                "rows": m,
                "columns": n,
                "rank": rank,
                "spectrum": kind,
                "variant": name,
                "route": route,
                "cpu_seconds": statistics.median(seconds[name]),
                "of_torch_linalg_svd": statistics.median(a / b for a, b in zip(seconds[name], reference, strict=True)),
                "error_over_optimal": float(residual.norm()) / optimal,
                "worst_value_error": float(((values - S[:rank]) / S[:rank]).abs().max()),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Truncated SVD routes beside torch's, on one thread.")
    parser.add_argument("--quick", action="store_true", help="the small shapes only")
    parser.add_argument("--full", action="store_true", help="also 11008x4096, which takes many minutes")
    parser.add_argument("--rounds", type=int, default=3, help="rounds per shape (default 3)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shapes = QUICK if arguments.quick else FULL if arguments.full else USUAL
    console, rows = Console(), []
    for m, n, rank in shapes:
        for kind in ("slow", "fast", "outlier"):
            table = Table(title=f"{m} x {n}, rank {rank}, {kind} spectrum", title_justify="left")
            for heading in ("variant", "route", "CPU s", "ratio", "err/opt", "value err"):
                table.add_column(heading, justify="left" if heading in ("variant", "route") else "right")
            found = measure(m, n, rank, kind, arguments.rounds)
            for row in found:
                table.add_row(
                    str(row["variant"]),
                    str(row["route"]),
                    f"{row['cpu_seconds']:.3f}",
                    f"{row['of_torch_linalg_svd']:.2f}",
                    f"{row['error_over_optimal']:.6f}",
                    f"{row['worst_value_error']:.1e}",
                )
            console.print(table)
            rows += found
    if arguments.json:
        record = {"torch": torch.__version__, "threads": 1, "rounds": arguments.rounds, "rows": rows}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
