"""What a model answers to a batch, and how far two answers lie apart, in nats, whatever kind of model it is.

A model with logits answers with a distribution over words or classes at every position. One without answers with
features: a Gaussian about them, whose variance is their squared length, so that the divergence of two answers is half
the squared relative distance. A plain tensor is taken for logits where the layer that the model holds last puts it out,
as classifiers do; encoders end in a norm or in no weights. A single logit is a feature: one class has no distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from eckart.calibration.stream import Batch
from eckart.forms.layers import kind_of, matrix_shape


@dataclass(frozen=True)
class Answer:
    """What a model says to one batch.

    Attributes:
        values: float32 logits or features, (b, ..., n): one position has n.
        words: whether they are logits.
        next_words: (b, length) the ids that the logits of (b, length, n) foretell one position ahead, where they do.
        real: (b, ...) where an answer counts.
    """

    values: Float[Tensor, "*positions n"]
    words: bool
    next_words: Tensor | None
    real: Bool[Tensor, "*positions"]

    @classmethod
    def of(cls, model: nn.Module, output: Any, batch: Batch) -> Answer:
        """Raises `ValueError` where a model puts out neither logits nor a last hidden state."""
        logits: Tensor | None = getattr(output, "logits", None)
        values = logits if logits is not None else getattr(output, "last_hidden_state", None)
        if values is None and isinstance(output, Tensor):
            values, logits = output, output if _ends_in_head(model, output.shape[-1]) else None
        if values is None:
            raise ValueError(f"{type(model).__name__} puts out neither logits nor a last hidden state, by which it could be judged")  # fmt: skip # noqa: E501
        ids, mask = batch.get("decoder_input_ids", batch.get("input_ids")), batch.get("attention_mask")
        positions = values.shape[:-1]
        real = torch.ones(positions, dtype=torch.bool, device=values.device)
        if isinstance(mask, Tensor) and mask.shape == positions:
            real = mask.bool()
        foretells = logits is not None and isinstance(ids, Tensor) and ids.shape == positions and _generates(model)
        return cls(values.float(), logits is not None and logits.shape[-1] > 1, ids if foretells else None, real)

    def divergence(self, wanted: Answer) -> Float[Tensor, "*positions"]:
        """KL(wanted || this) of every position."""
        if self.words:
            p, q = wanted.values.log_softmax(-1), self.values.log_softmax(-1)
            return (p.exp() * (p - q)).sum(-1)
        return 0.5 * (self.values - wanted.values).square().sum(-1) / self._variance(wanted.values)

    def squares(self, wanted: Answer) -> Float[Tensor, "*positions"]:
        """Mean squared difference over the values of every position."""
        return (self.values - wanted.values).square().mean(-1)

    def losses(self) -> tuple[Float[Tensor, "b rest"], Bool[Tensor, "b rest"]]:
        """Cross-entropy of every next word, and where it counts. Raises `ValueError` where none is foretold."""
        if self.next_words is None:
            raise ValueError("this model foretells no next words: measure how far its answers move, not their loss")
        losses = F.cross_entropy(self.values[:, :-1].transpose(1, 2), self.next_words[:, 1:], reduction="none")
        return losses, self.real[:, 1:] & self.real[:, :-1]

    def drawn_losses(self, generator: torch.Generator) -> tuple[Float[Tensor, "*positions"], Bool[Tensor, "*positions"]]:  # fmt: skip # noqa: E501
        """Minus log likelihood of an answer drawn from this one, and where it counts."""
        values = self.values.detach()
        if self.words:
            flat = values.flatten(0, -2).softmax(-1)
            targets = torch.multinomial(flat, 1, generator=generator)[:, 0]
            return F.cross_entropy(self.values.flatten(0, -2), targets, reduction="none").view(self.real.shape), self.real  # fmt: skip # noqa: E501
        variance = self._variance(values)
        noise = torch.randn(values.shape, generator=generator, device=generator.device).to(values)
        drawn = values + variance.sqrt()[..., None] * noise
        return 0.5 * (self.values - drawn).square().sum(-1) / variance, self.real

    @staticmethod
    def _variance(values: Tensor) -> Tensor:
        return values.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)


def _ends_in_head(model: nn.Module, width: int) -> bool:
    """Whether the last of the modules that hold weights is a layer that puts out so many numbers."""
    last, within = None, "."
    for name, module in model.named_modules():
        if name.startswith(within):
            continue  # what a factored layer is made of
        if kind_of(module) is not None:
            last, within = module, f"{name}." if name else ""
        elif next(module.parameters(recurse=False), None) is not None:
            last = module
    return last is not None and kind_of(last) not in (None, "embedding") and matrix_shape(last)[0] == width


def _generates(model: nn.Module) -> bool:
    """Whether logits are about the next word: not those of a masked language model."""
    able = getattr(model, "can_generate", None)
    return bool(able()) if callable(able) else True
