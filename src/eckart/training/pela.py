"""PELA: a model is factored once and repaired by its own pre-training, with the original as its teacher."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from eckart.calibration.subject import block_names
from eckart.forms import LowRank
from eckart.forms.layers import matrix_of, matrix_shape
from eckart.registry import method
from eckart.schedules import Schedule
from eckart.training.base import Finished, TrainingMethod, dtype_of, generator_of, like, put, weights


@method("pela", family="low-rank", paper="PELA, Guo et al., CVPR 2024, arXiv 2310.10700")
@dataclass(frozen=True)
class PELA(TrainingMethod):
    """Low-rank factors that learn their task and the original model: its features, logits and weights.

    The loss is the model's own + alpha MSE(block outputs) + beta MSE(logits) + gamma mean (max |B A - W| - eps)². While
    the model trains, each forward pass runs the frozen original on the same batch and adds these terms to the `loss` of
    the output; a model that returns no loss finds them in `schedule.extra`. Every layer shrinks by the ratio.

    Args:
        ratio: r = floor(out in / (ratio (out + in))).
        alpha: weight of the features, the mean over the blocks.
        beta: weight of the logits.
        gamma: weight of the perturbation.
        eps: the largest entry of the perturbation is drawn to this, from above and from below.
        sampled: layers whose perturbation is taken in each forward pass, drawn at random; 0 for all.
    """

    ratio: float = 1.5
    alpha: float = 1.0
    beta: float = 0.0
    gamma: float = 1.0
    eps: float = 1e-3
    sampled: int = 0

    def __post_init__(self) -> None:
        if not self.ratio > 0:
            raise ValueError(f"pela(ratio={self.ratio!r}): it is positive")
        for name in ("alpha", "beta", "gamma", "eps", "sampled"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"pela({name}={getattr(self, name)!r}): it is not negative")

    def rank(self, shape: tuple[int, int]) -> int:
        """Of the two factors of a matrix of this shape, at most its own."""
        return min(int(shape[0] * shape[1] / (self.ratio * (shape[0] + shape[1]))), *shape)

    def place(self, model: nn.Module, names: list[str], seed: int) -> Schedule:
        for name in names:
            shape = matrix_shape(model.get_submodule(name))
            if self.rank(shape) < 1:
                raise ValueError(f"{name}: pela(ratio={self.ratio}) leaves no rank of a matrix of shape {shape}: lower the ratio, or leave the layer out with layers=...")  # fmt: skip # noqa: E501
        if self.alpha and not block_names(model):
            raise ValueError(f"pela compares the outputs of blocks, and {type(model).__name__} has none that are known: set alpha=0")  # fmt: skip # noqa: E501
        teacher = copy.deepcopy(model).eval().requires_grad_(False)
        for name, W in weights(model, names):
            module = model.get_submodule(name)
            rank = self.rank((W.shape[0], W.shape[1]))
            put(model, name, like(module, LowRank(rank).fit(W, dtype=dtype_of(module))))
        return Distillation(model, names, teacher, self, seed)


class Distillation(Finished):
    """Runs the teacher beside the student and adds its terms to the loss.

    Attributes:
        teacher: the original model, frozen.
        extra: what the last forward pass added to its loss, or would have.
    """

    def __init__(self, model: nn.Module, names: list[str], teacher: nn.Module, settings: PELA, seed: int):
        super().__init__(model, names)
        self.teacher, self.settings, self.seed = teacher, settings, seed
        self.extra: Tensor | None = None
        self.blocks = block_names(model) if settings.alpha else []
        self.features: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self.hooks = [model.register_forward_hook(self._with_teacher, with_kwargs=True)]
        for held, source in zip(self.features, (model, teacher), strict=True):
            for name in self.blocks:
                self.hooks.append(source.get_submodule(name).register_forward_hook(_keeper(held, name)))

    def finish(self) -> None:
        super().finish()
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def _with_teacher(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        student, original = self.features
        if not (model.training and torch.is_grad_enabled()):
            student.clear()
            return output
        self.teacher.to(next(model.parameters()).device)
        with torch.no_grad():
            wanted = self.teacher(*args, **kwargs)
        self.extra = extra = self._terms(output, wanted)
        student.clear()
        original.clear()
        if not bool(torch.isfinite(extra)):
            raise RuntimeError(f"the distillation loss is {float(extra.detach())}: the student has diverged from its teacher, lower the learning rate")  # fmt: skip # noqa: E501
        if getattr(output, "loss", None) is not None:
            output.loss = output.loss + extra * _share(model, kwargs)
        return output

    def _terms(self, output: Any, wanted: Any) -> Tensor:
        settings = self.settings
        total = torch.zeros((), device=next(self.model.parameters()).device)
        if settings.alpha and self.blocks:
            student, original = self.features
            total = total + settings.alpha * torch.stack([F.mse_loss(student[n], original[n]) for n in self.blocks]).mean()  # fmt: skip # noqa: E501
        if settings.beta:
            total = total + settings.beta * F.mse_loss(_logits(output), _logits(wanted))
        if settings.gamma:
            total = total + settings.gamma * self.perturbation()
        return total

    def perturbation(self) -> Tensor:
        """The mean over layers of (max |B A - W| - eps)²."""
        names = self.names
        if self.settings.sampled:
            drawn = torch.randperm(len(names), generator=generator_of(self.seed, self.steps))[: self.settings.sampled]
            names = [names[int(i)] for i in drawn]
        largest = []
        for name in names:
            module: Any = self.model.get_submodule(name)
            W = matrix_of(self.teacher.get_submodule(name))
            largest.append(farthest(module.matrix.left.weight, module.matrix.right.weight, W).abs())
        return (torch.stack(largest) - self.settings.eps).square().mean()


def farthest(B: Float[Tensor, "out r"], A: Float[Tensor, "r in"], W: Float[Tensor, "out in"]) -> Float[Tensor, ""]:
    """The entry of B A - W of largest magnitude; its gradient needs one row of B and one column of A."""
    with torch.no_grad():
        i, j = divmod(int((B @ A - W).abs().argmax()), W.shape[1])
    return B[i] @ A[:, j] - W[i, j]


def _keeper(held: dict[str, Tensor], name: str) -> Any:
    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        held[name] = output[0] if isinstance(output, tuple) else output

    return keep


def _logits(output: Any) -> Tensor:
    found = getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise TypeError(f"pela(beta=...) compares logits, and {type(output).__name__} has none")
    return found


def _share(model: Any, kwargs: dict[str, Any]) -> float | Tensor:
    """The share of an optimiser step's labels that are in this batch, where the loss is divided by all of them."""
    total, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if total is None or labels is None:
        return 1.0
    causal = getattr(model, "loss_type", None) == "ForCausalLM" and not model.config.is_encoder_decoder
    return ((labels[..., 1:] if causal else labels) != -100).sum() / total
