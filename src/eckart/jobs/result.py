"""What a job hands back: figures for every layer and in total."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eckart.jobs.engine import Run
from eckart.jobs.plan import Layer, Plan, total_error


@dataclass
class Result:
    """A finished job, or with `planned` a plan that was not carried out.

    Attributes:
        layers: every targeted layer, with its form, bytes, predicted and measured error.
        bytes_before, bytes_after: of all weight files.
        budget: bytes that were allowed.
        settings: everything that was asked for.
        seconds: where the time went.
        folder: where the model was saved, if it was.
        extra: what the method keeps of its plan, such as the losses of the plans that `auto` tried.
        remarks: what a user should know of how the plan was found.
    """

    layers: list[Layer]
    bytes_before: int
    bytes_after: int
    budget: int
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    predicted_seconds: float = 0.0
    predicted_memory: int = 0
    peak_memory: int | None = None
    folder: Path | None = None
    planned: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @classmethod
    def of_plan(cls, plan: Plan, settings: dict[str, Any]) -> Result:
        return cls(
            plan.layers, plan.bytes_before, plan.bytes_after, plan.budget, settings,
            predicted_seconds=plan.seconds, predicted_memory=plan.peak_memory, planned=True, extra=plan.extra,
            remarks=plan.remarks,
        )  # fmt: skip

    @classmethod
    def of_run(cls, run: Run, settings: dict[str, Any]) -> Result:
        plan = run.plan
        return cls(
            run.layers, plan.bytes_before, plan.bytes_after, plan.budget, settings, run.seconds,
            predicted_seconds=plan.seconds, predicted_memory=plan.peak_memory, extra=plan.extra, remarks=plan.remarks,
        )  # fmt: skip

    @property
    def ratio(self) -> float:
        """Bytes after over bytes before."""
        return self.bytes_after / self.bytes_before if self.bytes_before else 1.0

    def advice(self) -> list[str]:
        """How the plan was found, what stays, and whether it can be faster; see benchmarks/inference.py."""
        kept = sum(layer.bytes for layer in self.layers) / max(1, sum(layer.dense_bytes for layer in self.layers))
        lines = [*self.remarks]
        if kept > 0.85:
            lines.append(
                f"the targeted layers keep {kept:.2f} of their bytes: above about 0.85 a factored layer is no faster "
                "than the dense one, so this saves space, not time"
            )
        dense = [layer for layer in self.layers if layer.form == "dense()"]
        if dense:
            lines.append(f"{len(dense)} of {len(self.layers)} layers stay dense, {dense[0].name} among them")
        return lines

    def totals(self) -> dict[str, Any]:
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "predicted_error": total_error(self.layers, "predicted_error"),
            "measured_error": total_error(self.layers, "measured_error"),
        }

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            "planned": self.planned,
            "folder": None if self.folder is None else str(self.folder),
            "settings": self.settings,
            "budget_bytes": self.budget,
            "totals": self.totals(),
            "seconds": self.seconds,
            "predicted": {"seconds": self.predicted_seconds, "peak_memory": self.predicted_memory},
            "peak_memory": self.peak_memory,
            "extra": self.extra,
            "remarks": self.remarks,
            "layers": [layer.to_json() for layer in self.layers],
        }

    def __str__(self) -> str:
        changed = sum(layer.form != "dense()" for layer in self.layers)
        kept = len(self.layers) - changed
        error = self.totals()["measured_error" if not self.planned else "predicted_error"]
        parts = [
            f"{self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB ({self.ratio:.3f})",
            f"{changed} layers {'to be ' if self.planned else ''}compressed, {kept} left dense",
        ]
        if error is not None:
            parts.append(f"relative error {error**0.5:.2g}, root of the mean square over layers")
        return "; ".join(parts)
