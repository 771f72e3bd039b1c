"""Gradients of a loss at frozen weights, gathered before an adapter is there, one weight at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.adapters.kinds import as_matrix, check_carries
from eckart.calibration.answers import Answer
from eckart.calibration.stream import Batch, single_rows
from eckart.forms.layers import DropIn

Reduce = Callable[[str, Float[Tensor, "out in"]], Any]


def weight_gradients(
    model: nn.Module, names: Sequence[str], data: Sequence[Batch], squared: bool = False,
    reduce: Reduce | None = None, at_once: int | None = None, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """layer -> the sum over all batches of the loss's gradient at its matrix (out, in), in float32.

    No gradient outlives its weight's turn in the backward pass: it is added to the sum, in the CPU's memory, and
    dropped. In the last batch `reduce(layer, sum)`, on the layer's device, takes the place of the sum at once, so that
    with one batch a single gradient is held at a time; with several, the sums of `at_once` layers (all, if None), for
    which the batches are run as many times.

    Args:
        model: run in the mode it is in; its parameters and their gradients are left as they were.
        names: of linear layers, Conv1D or convolutions.
        data: keyword arguments of the model. The loss is the model's own where they hold `labels`, the mean over what
            counts; else that of the next words; and where none are foretold, that of answers drawn from the model's.
        squared: sum squared gradients, of one row of a batch at a time: the diagonal of the Fisher information.
        reduce: called once for each layer.
        at_once: layers of which sums are held.
        seed: of dropout and drawn answers; torch's global generator is left as it was.

    Raises `ValueError` on no data, on layers without a weight of their own or that no gradient reaches, and where one
    is not finite.
    """
    batches = single_rows(data) if squared else list(data)
    if not batches:
        raise ValueError("gradients are taken on data, and there is none: give at least one batch")
    weights = {name: _weight(model, name) for name in names}
    count = len(names) if at_once is None else max(1, at_once)
    found: dict[str, Any] = {}
    for start in range(0, len(names), count):
        chosen = {name: weights[name] for name in names[start : start + count]}
        found |= _Pass(model, chosen, squared, reduce).run(batches, seed)
    return found


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    module: Any = model.get_submodule(name)
    module = getattr(module, "base_layer", module)  # where another adapter is on it
    weight = getattr(module, "weight", None)
    if not isinstance(module, DropIn):
        check_carries(module, name)
    if isinstance(module, DropIn) or not isinstance(weight, nn.Parameter):  # fmt: skip
        raise ValueError(f"{name} is a {type(module).__name__}, which has no dense weight to take a gradient at: leave it out, or make the model dense with eckart.densify")  # fmt: skip # noqa: E501
    if not weight.is_floating_point():
        raise ValueError(f"{name} holds {weight.dtype} codes, which have no gradient: start from the model before it was quantised")  # fmt: skip # noqa: E501
    return weight


class _Pass:
    """One run over all batches, for some layers."""

    def __init__(self, model: nn.Module, weights: dict[str, nn.Parameter], squared: bool, reduce: Reduce | None):
        self.model, self.weights, self.squared, self.reduce = model, weights, squared, reduce
        self.sums: dict[str, Tensor] = {}
        self.last = False
        self.found: dict[str, Any] = {}

    def run(self, batches: Sequence[Batch], seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        with ExitStack() as stack:
            devices = {w.device.index for w in self.weights.values() if w.is_cuda}
            stack.enter_context(torch.random.fork_rng(sorted(devices)))
            torch.manual_seed(seed)
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_only(self.model, self.weights.values()))
            for weight in {id(w): w for w in self.weights.values()}.values():
                hook = weight.register_post_accumulate_grad_hook(self._take)
                stack.callback(hook.remove)
            for index, batch in enumerate(batches):
                self.last = index == len(batches) - 1
                _loss(self.model, batch, generator).backward()
        for name in list(self.sums):  # those that the last batch did not reach
            self._finish(name)
        missed = [name for name in self.weights if name not in self.found]
        if missed:
            raise ValueError(f"no gradient reaches {missed[0]}: the loss on the given data does not depend on it; leave the layer out")  # fmt: skip # noqa: E501
        return self.found

    def _take(self, weight: Tensor) -> None:
        assert weight.grad is not None
        gradient = weight.grad.detach().float()
        weight.grad = None
        if not bool(torch.isfinite(gradient).all()):
            raise ValueError(f"the gradient at {self._of(weight)[0]} is not finite: check the model and the data")
        gradient = gradient.square() if self.squared else gradient
        for name in self._of(weight):
            if self.last:
                self._finish(name, gradient)
            elif name in self.sums:
                self.sums[name].add_(gradient.cpu())
            else:
                self.sums[name] = gradient.to("cpu", copy=True)

    def _of(self, weight: Tensor) -> list[str]:
        return [name for name, w in self.weights.items() if w is weight]

    def _finish(self, name: str, gradient: Tensor | None = None) -> None:
        module, device = self.model.get_submodule(name), self.weights[name].device
        parts = [t.to(device) for t in (self.sums.pop(name, None), gradient) if t is not None]
        total = as_matrix(getattr(module, "base_layer", module), sum(parts[1:], parts[0]))
        self.found[name] = total.cpu() if self.reduce is None else self.reduce(name, total)


@contextmanager
def _only(model: nn.Module, weights: Any) -> Iterator[None]:
    """Within the context, gradients are of these parameters alone, and begin at none."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    chosen = {id(w) for w in weights}
    try:
        for p, _, _ in before:
            p.requires_grad_(id(p) in chosen)
            p.grad = None
        yield
    finally:
        for p, learns, gradient in before:
            p.requires_grad_(learns)
            p.grad = gradient


def _loss(model: nn.Module, batch: Batch, generator: torch.Generator) -> Float[Tensor, ""]:
    output = model(**batch)
    if batch.get("labels") is not None and getattr(output, "loss", None) is not None:
        loss: Tensor = output.loss
        return loss
    answer = Answer.of(model, output, batch)
    losses, counts = answer.drawn_losses(generator) if answer.next_words is None else answer.losses()
    return (losses * counts).sum() / counts.sum().clamp_min(1)
