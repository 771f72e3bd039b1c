"""DP-SGD: every example's own gradient, clipped, summed, and hidden in Gaussian noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm

Batch = Mapping[str, Tensor]
"""Tensors of which the first dimension counts examples; keyword arguments of the model."""
Loss = Callable[[nn.Module, Batch], Tensor]
"""The mean loss of a model over a batch."""
Gradients = dict[str, Tensor]
"""By the name of the parameter."""


@dataclass(frozen=True)
class Privacy:
    """What is done to gradients before a step.

    `certified` is DP-SGD (Abadi et al., 2016, algorithm 1): each example enters a step with probability
    batch / examples, the gradient of all that is trained is clipped to `clip` for each example, and noise of standard
    deviation noise * clip is added to their sum, which is divided by `batch`. A federation reports its epsilon.

    `as described` is algorithm 1 of DP-LoRA read literally: a batch of fixed size, whose mean gradient is clipped, for
    A and B separately, and given noise once. That bounds a step, and not what one example does to it: it certifies
    nothing, and has no epsilon.

    Noise comes from numpy's generator, which is none of cryptography, and is added in floating point: the proofs are
    of real numbers.

    Args:
        clip: C, the most that a gradient may have as its 2-norm; infinity clips nothing, without noise only.
        noise: sigma.
        mode: `certified` or `as described`.
        vectorised: take the gradients of `at_once` examples together, by torch.func.vmap: faster, for models whose
            code does not look at its tensors' values; else one after the other. Masks of transformers do that: give
            `attention_mask` ready made, (examples, 1, length, length), 0 where words are seen, else the lowest float.
        at_once: examples.
    """

    clip: float = 10.0
    noise: float = 2.0
    mode: str = "certified"
    vectorised: bool = False
    at_once: int = 8

    def __post_init__(self) -> None:
        if not self.clip > 0:
            raise ValueError(f"privacy(clip={self.clip!r}): gradients are clipped to a norm above 0")
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise ValueError(f"privacy(noise={self.noise!r}): the noise multiplier is a finite number, 0 or more")
        if self.noise and math.isinf(self.clip):
            raise ValueError("privacy(clip=inf): noise is measured in clipping norms: give a finite one, or noise=0")
        if self.mode not in ("certified", "as described"):
            raise ValueError(f"privacy(mode={self.mode!r}): it is 'certified' or 'as described'")
        if self.at_once < 1:
            raise ValueError(f"privacy(at_once={self.at_once!r}): it is a whole number, at least 1")

    @property
    def certified(self) -> bool:
        """Whether an epsilon can be said."""
        return self.mode == "certified"

    def rows(self, examples: int, batch: int, generator: np.random.Generator) -> Int[Tensor, " rows"]:
        """The examples of a step; where certified, of a random number, which may be none."""
        if self.certified:
            return torch.from_numpy((generator.random(examples) < batch / examples).nonzero()[0])
        return torch.from_numpy(generator.permutation(examples)[:batch])

    def gradients(
        self, model: nn.Module, loss: Loss, data: Batch, expected: int, generator: np.random.Generator
    ) -> Gradients:
        """The gradient of a step.

        Args:
            model: of which those parameters count that require gradients.
            loss: mean over a batch.
            data: the batch, as `rows` drew it.
            expected: examples that a step has on average.
            generator: of the noise.

        Raises `ValueError` on batch normalisation, `RuntimeError` where a gradient is not finite.
        """
        if not self.certified:
            total = gradient(model, loss, data)
            for group in _groups(total):
                _scale({n: total[n] for n in group}, self.clip)
            return noisy(total, self.noise * self.clip if self.noise else 0.0, generator)
        no_mixing(model)
        total = clipped_sum(model, loss, data, self.clip, self.at_once if self.vectorised else None)
        total = noisy(total, self.noise * self.clip if self.noise else 0.0, generator)
        return {n: g / expected for n, g in total.items()}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def count_of(data: Batch) -> int:
    """Examples of a batch. Raises `ValueError` where its tensors do not agree, or there are none."""
    counts = {name: len(t) for name, t in data.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"the first dimension of every tensor counts examples, and these differ: {counts}")
    return next(iter(counts.values()))


def taken(data: Batch, rows: Int[Tensor, " rows"]) -> Batch:
    """Some examples."""
    return {name: t[rows.to(t.device)] for name, t in data.items()}


def gradient(model: nn.Module, loss: Loss, data: Batch) -> Gradients:
    """Of the mean loss of a batch; zero where the loss does not depend on a parameter."""
    parameters = trained(model)
    with torch.enable_grad():
        found = torch.autograd.grad(loss(model, data), list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}


def each_gradient(model: nn.Module, loss: Loss, data: Batch) -> Iterator[Gradients]:
    """The gradient of every example by itself, one after the other."""
    for i in range(count_of(data)):
        yield gradient(model, loss, {name: t[i : i + 1] for name, t in data.items()})


def gradients_together(model: nn.Module, loss: Loss, data: Batch) -> Gradients:
    """The same at once: tensors whose first dimension counts examples.

    Raises `RuntimeError` where the model's code cannot be vectorised.
    """
    whole = _WithLoss(model, loss)

    def of_one(parameters: Gradients, example: Batch) -> Tensor:
        found: Tensor = functional_call(whole, parameters, ({name: t[None] for name, t in example.items()},))
        return found

    parameters = {f"model.{n}": p.detach() for n, p in trained(model).items()}
    try:
        found = vmap(grad(of_one), in_dims=(None, 0), randomness="different")(parameters, dict(data))
    except RuntimeError as e:
        raise RuntimeError(f"{type(model).__name__} cannot be vectorised over examples ({str(e).splitlines()[0]}): take their gradients one after the other, Privacy(vectorised=False)") from e  # fmt: skip # noqa: E501
    return {n.removeprefix("model."): g for n, g in found.items()}


@torch.no_grad()
def clipped_sum(model: nn.Module, loss: Loss, data: Batch, clip: float, at_once: int | None = None) -> Gradients:
    """sum_i g_i min(1, clip / ||g_i||), where ||g_i|| is over all that is trained; in float32 or wider.

    Args:
        at_once: examples whose gradients are taken together; None takes them one after the other.
    """
    total = {n: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for n, p in trained(model).items()}  # fmt: skip # noqa: E501
    if count_of(data) == 0:
        return total
    if at_once is None:
        for g in each_gradient(model, loss, data):
            _scale(g, clip)
            for n in total:
                total[n] += g[n]
        return total
    for rows in torch.arange(count_of(data)).split(at_once):
        together = gradients_together(model, loss, taken(data, rows))
        norms = torch.stack([g.flatten(1).float().norm(dim=1) for g in together.values()]).norm(dim=0)
        factors = _factor(norms, clip)
        for n in total:
            total[n] += torch.tensordot(factors.to(total[n].dtype), together[n].to(total[n].dtype), dims=1)
    return total


def noisy(gradients: Gradients, deviation: float, generator: np.random.Generator) -> Gradients:
    """The same with Gaussian noise, drawn in the order of the names."""
    if deviation == 0:
        return gradients
    drawn = {n: torch.as_tensor(generator.standard_normal(g.shape)) for n, g in gradients.items()}
    return {n: g + deviation * drawn[n].to(g) for n, g in gradients.items()}


def no_mixing(model: nn.Module) -> None:
    """Raises `ValueError` where a layer mixes examples, which then have no gradients of their own."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            raise ValueError(f"{name or 'the model'} is a {type(module).__name__}, which mixes the examples of a batch, so that none can be clipped by itself: use group or layer normalisation")  # fmt: skip # noqa: E501


def model_loss(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """The loss that a transformers model computes from its labels."""
    output: Any = model(**batch)
    found = getattr(output, "loss", None)
    if found is None:
        raise ValueError(f"{type(model).__name__} computes no loss from {', '.join(batch)}: give labels in the data, or a loss of your own")  # fmt: skip # noqa: E501
    loss: Tensor = found
    return loss


class _WithLoss(nn.Module):
    """The loss as a module, whose parameters can be replaced in a call."""

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Batch) -> Tensor:
        return self.loss(self.model, batch)


def _groups(names: Sequence[str] | Gradients) -> list[list[str]]:
    """All A, all B, and what else is trained."""
    by_kind: dict[str, list[str]] = {}
    for name in names:
        last = name.rpartition(".")[2]
        by_kind.setdefault(last if last in ("A", "B") else "", []).append(name)
    return list(by_kind.values())


@torch.no_grad()
def _scale(gradients: Gradients, clip: float) -> None:
    """Clip tensors together, in place."""
    factor = _factor(torch.stack([g.float().norm() for g in gradients.values()]).norm(), clip)
    if factor < 1:
        for g in gradients.values():
            g.mul_(factor.to(g.dtype))


def _factor(norms: Float[Tensor, "*n"], clip: float) -> Float[Tensor, "*n"]:
    """min(1, clip / norm). Raises `RuntimeError` where a norm is not finite."""
    if not bool(norms.isfinite().all()):
        raise RuntimeError("the gradient of an example is not finite: training has diverged, or its data are broken; lower the learning rate")  # fmt: skip # noqa: E501
    return (clip / norms.clamp_min(1e-30)).clamp(max=1.0)
