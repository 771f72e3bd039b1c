"""A model whose weights lie between neighbours on their grids, and how it learns to which of them each one goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from eckart.calibration.answers import Answer
from eckart.calibration.stream import Batch
from eckart.checkpoint.layout import save_tensors
from eckart.downloads import Progress, silent
from eckart.forms import Quantized, parse
from eckart.forms.layers import kind_of
from eckart.forms.quantized import Groups
from eckart.forms.roundings import Between, Stored, between
from eckart.jobs.solve import Fitted, Task
from eckart.linalg.whitening import all_finite

WARM = 0.1
"""Share of the steps over which the learning rate rises."""


@dataclass
class Relaxed:
    """A matrix of which every weight lies somewhere between two neighbours on its grid.

    Attributes:
        name: of the layer.
        form, at, p: its grid.
        bracket: codes of the neighbours, and the original weights' place between them.
        low, step: the lower number, and how far the upper one is above it.
        error: mean squared error of rounding to nearest.
        x: place of every weight, from 0 (lower) to 1 (upper).
    """

    name: str
    form: Quantized
    at: Groups
    p: Stored
    bracket: Between
    low: Float[Tensor, "out in"]
    step: Float[Tensor, "out in"]
    error: float
    x: Float[Tensor, "out in"]

    @classmethod
    def of(cls, task: Task) -> Relaxed:
        """At the original weights, on the grid that the task's form chooses. Errors name the layer."""
        form, W = parse(task.form), task.matrix.to(torch.promote_types(task.matrix.dtype, torch.float32))
        assert isinstance(form, Quantized)
        at = Groups(form, W.shape[1], task.dtype)
        weighting = task.metric.weighting(task.statistics, task.name)
        try:
            p = form.rounding.round(W, weighting, at)[1]
            bracket = between(W, p, at)
        except ValueError as e:
            raise ValueError(f"{task.name}: {e}") from e
        low, high = at.decode(bracket.lower, p), at.decode(bracket.upper, p)
        nearest = torch.where(bracket.way > 0.5, high, low)
        error = float((W - nearest).square().mean()) if W.numel() else 0.0
        return cls(task.name, form, at, p, bracket, low.float(), (high - low).float(), error, bracket.way.float())

    @property
    def up(self) -> Bool[Tensor, "out in"]:
        """Whether a weight is rounded to its upper neighbour."""
        return self.x > 0.5

    @property
    def near(self) -> Bool[Tensor, "out in"]:
        """Whether the upper neighbour is the nearest."""
        return self.bracket.way > 0.5

    @property
    def moved(self) -> Bool[Tensor, "out in"]:
        """Whether a weight is rounded to the farther one of two neighbours."""
        return (self.up != self.near) & (self.step > 0)

    def fitted(self, task: Task) -> Fitted:
        """The rounded matrix, packed, and its error in the task's metric."""
        codes = torch.where(self.up, self.bracket.upper, self.bracket.lower)
        module = self.form.assembled(codes, self.p, self.at)
        difference = task.matrix - module.dense().detach().to(task.matrix.dtype)
        error = task.metric.weighting(task.statistics, task.name).norm2(difference)
        share = float(self.moved.float().mean()) if self.x.numel() else 0.0
        return Fitted(module, None, error, f"{100 * share:.1f}% of its weights are not rounded to nearest")


MODES: dict[str, Callable[[Relaxed], Tensor]] = {
    "relaxed": lambda layer: layer.x,
    "rounded": lambda layer: layer.up.float(),
    "nearest": lambda layer: layer.near.float(),
}


class RelaxedModel:
    """A model in which layers stand between neighbours on their grids. Its own parameters are never changed.

    Attributes:
        unit: twelve times the mean squared error of rounding to nearest, layers counting alike.
    """

    def __init__(self, model: nn.Module, layers: Iterable[Relaxed]):
        self.model, self.layers = model, list(layers)
        self.unit = 12 * sum(layer.error for layer in self.layers) / max(1, len(self.layers))

    def start(self, where: str, seed: int) -> None:
        """Put all weights to `random` places, or where the original `weights` are."""
        draw = torch.Generator().manual_seed(seed)
        for layer in self.layers:
            x = torch.rand(layer.x.shape, generator=draw) if where == "random" else layer.bracket.way
            layer.x = x.to(layer.low, copy=True)

    @torch.no_grad()
    def divergence(self, batches: Iterable[Batch], mode: str = "relaxed") -> float:
        """Mean over answers of KL(original || model) in nats, weights being `relaxed`, `rounded` or `nearest`."""
        weights = self._weights(mode)
        found = [self._divergence(batch, weights) for batch in batches]
        return sum(float(lost) for lost, _ in found) / max(1, sum(count for _, count in found))

    @torch.enable_grad()
    def gradients(self, batches: Sequence[Batch]) -> tuple[float, list[Float[Tensor, "out in"]]]:
        """The divergence of the relaxed model, and its gradients at all x, divided by `unit`.

        Raises `RuntimeError` where one of them is not finite.
        """
        weights = {name: weight.detach().requires_grad_() for name, weight in self._weights("relaxed").items()}
        sums = [torch.zeros_like(weight) for weight in weights.values()]
        total, count = 0.0, 0
        for batch in batches:
            lost, answers = self._divergence(batch, weights)
            total, count = total + float(lost.detach()), count + answers
            found = torch.autograd.grad(lost, list(weights.values()), allow_unused=True, materialize_grads=True)
            for summed, gradient in zip(sums, found, strict=True):
                summed += gradient
        if not math.isfinite(total):
            able = all(bool(torch.isfinite(answer(self.model, batch).values).all()) for batch in batches)
            which, advice = ("between its grids' numbers", "more bits or smaller groups") if able else ("as it was given", "another model or other data")  # fmt: skip # noqa: E501
            raise RuntimeError(f"the answers of the model {which} are not finite: give {advice}")
        for layer, summed in zip(self.layers, sums, strict=True):
            if not all_finite(summed):
                raise RuntimeError(f"{layer.name}: the gradient at its weights is not finite: leave it out by targets")
        scale = 1 / (max(1, count) * self.unit)
        return total / max(1, count), [
            self._turned(layer, g).reshape(layer.step.shape) * layer.step * scale
            for layer, g in zip(self.layers, sums, strict=True)
        ]

    def _divergence(self, batch: Batch, weights: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """Summed over the answers to one batch, and their number."""
        with torch.no_grad():
            wanted = answer(self.model, batch)
        found = answer(self.model, batch, weights)
        return (found.divergence(wanted) * wanted.real).sum(), int(wanted.real.sum())

    def _weights(self, mode: str) -> dict[str, Tensor]:
        """Parameter -> the matrices of a mode, as the layers hold them."""
        found = {}
        for layer in self.layers:
            module: Any = self.model.get_submodule(layer.name)
            matrix = layer.low + MODES[mode](layer) * layer.step
            found[f"{layer.name}.weight"] = self._turned(layer, matrix).reshape(module.weight.shape)
        return found

    def _turned(self, layer: Relaxed, weight: Tensor) -> Tensor:
        """(in, out) as (out, in) and back, where a layer holds its matrix so."""
        return weight.t() if kind_of(self.model.get_submodule(layer.name)) == "conv1d" else weight


def answer(model: nn.Module, batch: Batch, weights: Mapping[str, Tensor] | None = None) -> Answer:
    """What the model answers, some parameters replaced."""
    cached = getattr(getattr(model, "config", None), "use_cache", None) is not None
    inputs = {**batch, "use_cache": False} if cached else dict(batch)
    return Answer.of(model, functional_call(model, dict(weights or {}), kwargs=inputs), batch)


@dataclass(frozen=True)
class Descent:
    """Projected descent of the divergence, with a linear pull to the nearest neighbours.

    Args:
        rho: weight of the divergence's gradient against the pull.
        clamp: largest entry of that weighted gradient.
        lr: of AdamW without weight decay, after a linear warm-up and before a cosine decay.
        steps: how many.
        batch: windows in a step.
        every: steps after which the state is saved.
    """

    rho: float
    clamp: float
    lr: float
    steps: int
    batch: int
    every: int

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("batch", 1), ("every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)!r}: a whole number, at least {least}")
        if not 0 <= self.rho < math.inf:
            raise ValueError(f"rho={self.rho!r}: the weight of the divergence is finite and at least 0")
        for name in ("clamp", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r}: a positive number")

    def run(
        self, model: RelaxedModel, windows: Sequence[Batch], *, seed: int, kept: Path | None = None,
        progress: Progress = silent,
    ) -> None:  # fmt: skip
        """Move the weights of a model from where they are, or go on from the state in the file `kept`.

        That ends with the bits of a run that was never interrupted.
        """
        layers = model.layers
        done = _restored(layers, kept) if kept is not None and kept.exists() else None
        optimiser = torch.optim.AdamW([layer.x for layer in layers], lr=self.lr, weight_decay=0.0)
        if done is not None:
            optimiser.state.update(done.moments)
        steps = self.steps if model.unit > 0 else 0  # all weights on their grids stay there
        for i in range(done.steps if done else 0, steps):
            _, gradients = model.gradients(self.drawn(windows, i, seed))
            for layer, gradient in zip(layers, gradients, strict=True):
                pull = 2 * layer.bracket.way.to(gradient) - 1
                layer.x.grad = (self.rho * gradient).clamp(-self.clamp, self.clamp) - pull
            optimiser.param_groups[0]["lr"] = self.rate(i)
            optimiser.step()
            for layer in layers:
                layer.x.clamp_(0, 1)
            if kept is not None and ((i + 1) % self.every == 0 or i + 1 == steps):
                _save(layers, optimiser, i + 1, kept)
            progress("distil", i + 1, steps)

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        warm = max(1, round(WARM * self.steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm))) / 2

    def drawn(self, windows: Sequence[Batch], step: int, seed: int) -> list[Batch]:
        """The windows of a step: pass after pass over all, each in a random order of its own."""
        count, found = min(self.batch, len(windows)), []
        for k in range(step * count, (step + 1) * count):
            turn, i = divmod(k, len(windows))
            found.append(windows[np.random.default_rng([seed, turn]).permutation(len(windows))[i]])
        return found


@dataclass(frozen=True)
class _State:
    steps: int
    moments: dict[Any, dict[str, Tensor]]


def _save(layers: Sequence[Relaxed], optimiser: torch.optim.Optimizer, steps: int, kept: Path) -> None:
    tensors = {"steps": torch.tensor(steps)}
    for layer in layers:
        moments = optimiser.state[layer.x]
        found = {"x": layer.x, "first": moments["exp_avg"], "second": moments["exp_avg_sq"]}
        tensors |= {f"{layer.name}|{key}": value for key, value in found.items()}
    save_tensors(tensors, kept)


def _restored(layers: Sequence[Relaxed], kept: Path) -> _State:
    """What `_save` wrote; the layers are put where they were."""
    tensors = load_file(kept)
    steps, moments = int(tensors["steps"]), {}
    for layer in layers:
        x, first, second = (tensors[f"{layer.name}|{key}"].to(layer.low) for key in ("x", "first", "second"))
        layer.x = x
        moments[x] = {"step": torch.tensor(float(steps)), "exp_avg": first, "exp_avg_sq": second}
    return _State(steps, moments)
