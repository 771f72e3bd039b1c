"""Relevance: how much of a model's decision flowed through each unit (layer-wise relevance propagation)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from eckart.calibration.relevance_rules import RelevanceRules, away, explained


class Probes:
    """What passes some layers while a model runs, for gradients to be taken of.

    Args:
        layers: names.
        at: `output` or `input`, which of the two.
        masks: layer -> factors of its channels there, 0 where a unit is taken out.

    Attributes:
        seen: (layer, tensor) of every call, in order.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str], at: Literal["output", "input"] = "output",
        masks: Mapping[str, Float[Tensor, " channels"]] | None = None,
    ):  # fmt: skip
        known = dict(model.named_modules())
        for name in layers:
            if name not in known:
                raise ValueError(f"the model has no layer called {name!r}")
        if at not in ("output", "input"):
            raise ValueError(f"at={at!r} is neither 'output' nor 'input'")
        self.modules = {name: known[name] for name in layers}
        self.at, self.masks = at, masks or {}
        self.seen: list[tuple[str, Tensor]] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> Probes:
        for name, module in self.modules.items():
            if self.at == "output":
                self._hooks.append(module.register_forward_hook(self._after(name)))
            else:
                self._hooks.append(module.register_forward_pre_hook(self._before(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _after(self, name: str) -> Callable[..., Tensor]:
        return lambda module, args, output: self._keep(name, output)

    def _before(self, name: str) -> Callable[..., tuple[Any, ...]]:
        return lambda module, args: (self._keep(name, args[0]), *args[1:])

    def _keep(self, name: str, x: Any) -> Tensor:
        if not isinstance(x, Tensor):
            raise ValueError(f"what passes {name} is a {type(x).__name__}, not one tensor: choose a layer within it")
        if name in self.masks:
            mask = self.masks[name].to(x)
            x = x * (mask if channel_axis(self.modules[name], x) in (-1, x.dim() - 1) else mask.view(-1, *[1] * (x.dim() - 2)))  # fmt: skip # noqa: E501
        if not torch.is_grad_enabled():
            return x
        self.seen.append((name, x if x.requires_grad else x.requires_grad_()))
        return x.clone()  # what comes next may work in place

    def gradients(self, of: Tensor, outer: Tensor | None = None) -> list[Tensor]:
        """Of a number (or of a tensor times `outer`), for what was seen, in order; zeros where it does not matter."""
        found = torch.autograd.grad(of, [x for _, x in self.seen], outer, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, (_, x) in zip(found, self.seen, strict=True)]


def channel_axis(module: nn.Module, x: Tensor) -> int:
    """Where the channels of what enters or leaves a layer are: last, or for convolutions before the places."""
    spatial = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
    return next((x.dim() - 1 - n for kind, n in spatial.items() if isinstance(module, kind)), x.dim() - 1)


def starting(logits: Float[Tensor, "*batch classes"], labels: Tensor, epsilon: float) -> Float[Tensor, ""]:
    """A number whose gradient at the logits is relevance over value: of 1 at the true class, or as `labels` say.

    Args:
        labels: classes (*batch), negative ones do not count; or the relevance of every logit (*batch, classes).
    """
    if labels.is_floating_point():
        if labels.shape != logits.shape:
            raise ValueError(f"relevance of shape {tuple(labels.shape)} does not fit logits of shape {tuple(logits.shape)}")  # fmt: skip # noqa: E501
        return (logits * (labels / away(logits, epsilon))).sum()
    chosen = counted(logits, labels)[0].gather(-1, labels[labels >= 0][:, None])
    return (chosen / away(chosen, epsilon)).sum()


def counted(logits: Float[Tensor, "*batch classes"], labels: Int[Tensor, "*batch"]) -> tuple[Tensor, Tensor]:
    """The logits (n, classes) and classes (n,) of what counts. Raises `ValueError` where labels are no classes."""
    keep = labels >= 0
    highest = int(labels.max()) if labels.numel() else -1
    if labels.shape != logits.shape[:-1] or highest >= logits.shape[-1]:
        raise ValueError(f"labels of shape {tuple(labels.shape)} up to {highest} do not fit logits of shape {tuple(logits.shape)}: give the true classes as `labels`")  # fmt: skip # noqa: E501
    if not logits.requires_grad:
        raise ValueError("what the model puts out does not depend on its layers: it must give logits, not probabilities")  # fmt: skip # noqa: E501
    return logits[keep], labels[keep]


def logits_of(found: Any, model: nn.Module) -> Tensor:
    """The logits in what a model gave."""
    logits = found if isinstance(found, Tensor) else getattr(found, "logits", None)
    if logits is None:
        raise ValueError(f"{type(model).__name__} puts out no logits, from which relevance starts: use a model with a head")  # fmt: skip # noqa: E501
    return logits


def unit_relevance(
    model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, layers: Sequence[str], *, rule: str = "zplus",
    epsilon: float | None = None, beta: float = 0.0, at: Literal["output", "input"] = "output",
) -> dict[str, Float[Tensor, " units"]]:  # fmt: skip
    """Relevance at the outputs of some layers, per unit (a channel of a convolution), summed over places and samples.

    Every label that is not negative starts with relevance 1 at its logit (Yeom et al., 2021, arXiv 1912.08881, section
    3.1), so that layers can be compared without being normalised.

    Args:
        model: in evaluation mode, with batch norms fused into the convolutions before them; gives logits (*batch,
            classes), or something that has them as `logits`.
        inputs: keyword arguments of its forward pass.
        labels: the true classes (*batch), negative ones do not count; or the relevance of every logit (*batch,
            classes).
        rule, epsilon, beta: see `RelevanceRules`.
        at: relevance at what enters the layers, or at what leaves them.

    Raises `ValueError` on layers and functions that no rule covers, and labels that are no class.
    """
    rules = RelevanceRules(rule, epsilon, beta)
    inputs = {k: v.detach().clone().requires_grad_() if _is_real(v) else v for k, v in inputs.items()}
    with Probes(model, layers, at) as probes:
        with explained(model, rules):
            logits = logits_of(model(**inputs), model)
        with torch.enable_grad():
            start = starting(logits, labels, rules.epsilon)
        gradients = probes.gradients(start)
    scores: dict[str, Tensor] = {}
    for (name, x), g in zip(probes.seen, gradients, strict=True):
        R = (x.detach() * g).movedim(channel_axis(model.get_submodule(name), x), -1)
        scores[name] = scores.get(name, 0) + R.flatten(0, -2).sum(0)
    return scores


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
