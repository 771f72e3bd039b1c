"""Collecting statistics: forward sums by hooks as blocks are run, gradient sums by a backward pass in reverse order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eckart.calibration.stream import Stream
from eckart.downloads import Progress
from eckart.metrics.statistics import GRADIENT_SUMS, INPUT_SUMS, Statistics


class Collector:
    """Sums over the inputs of named layers. Layers that read the same tensor share one sum.

    Attributes:
        leaders: layer -> the layer under whose name its sums are kept.
        sums: leader -> statistics.
    """

    def __init__(self, needs: Iterable[str]):
        self.needs = frozenset(needs) & INPUT_SUMS
        self.leaders: dict[str, str] = {}
        self.sums: dict[str, Statistics] = {}
        self.mask: Tensor | None = None
        self._seen: dict[int, tuple[str, Tensor]] = {}

    def next_batch(self, mask: Tensor | None) -> None:
        """Call before each batch, with its padding mask."""
        self.mask = mask
        self._seen = {}

    @contextmanager
    def hooked(self, model: nn.Module, names: Iterable[str]) -> Iterator[None]:
        """Within the context, a forward pass through the layers called `names` adds to their sums."""
        handles = [
            model.get_submodule(name).register_forward_pre_hook(self._hook(name), with_kwargs=True) for name in names
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            leader, _ = self._seen.setdefault(id(x), (name, x))  # keeps x alive, so that its id stays its own
            if self.leaders.setdefault(name, leader) == name:
                if not bool(torch.isfinite(x).all()):
                    raise ValueError(f"{name} receives NaN or infinite activations: check the model and the data")
                self.sums.setdefault(name, Statistics()).add_inputs(*self._rows(module, x))

        return hook

    def _rows(self, module: nn.Module, x: Tensor) -> tuple[Tensor, frozenset[str], Tensor | None]:
        if isinstance(module, nn.Conv2d):
            from eckart.forms.layers import patches

            return patches(x, module), self.needs, None
        mask = self.mask
        if mask is not None and x.shape[:-1] != mask.shape:
            mask = mask.reshape(-1) if x.dim() == 2 and x.shape[0] == mask.numel() else None
        return x, self.needs, mask

    def of(self, name: str) -> Statistics:
        """The statistics of a layer; empty where no data reached it."""
        return self.sums.get(self.leaders.get(name, name), Statistics())


def collect_gradients(
    stream: Stream, targets: dict[int, list[str]], needs: Iterable[str], labels: str, seed: int,
    samples: int, progress: Progress,
) -> Iterator[tuple[int, dict[str, Statistics]]]:  # fmt: skip
    """Gradient sums, block by block from the last to the first, one sequence at a time.

    The hidden states that enter every block must lie on disk for the first `samples` sequences. Yields
    (block index, layer -> statistics). Gradients are of the loss summed over a sequence's tokens, with targets from
    the text (`labels="data"`) or sampled from the model's own predictions (`"model"`).
    """
    wanted = frozenset(needs) & GRADIENT_SUMS
    examples = _examples(stream, samples)
    generator = torch.Generator().manual_seed(seed)
    gradients: list[Tensor] = []
    last = len(stream.blocks)
    with stream.subject.loaded(*stream.outside):
        for batch, row in examples:
            hidden = stream.hidden(last).read(stream.shapes, batch)[row : row + 1].requires_grad_(True)
            with _one_row(stream, batch, row), torch.enable_grad():
                logits = stream.finish(hidden, batch).logits
                loss = _summed_loss(logits, stream.batches[batch], labels, generator)
                (gradient,) = torch.autograd.grad(loss, hidden)
            gradients.append(gradient)
    for index in reversed(range(last)):
        sums: dict[str, Statistics] = {name: Statistics() for name in targets.get(index, [])}
        with stream.subject.loaded(stream.blocks[index]):
            for e, (batch, row) in enumerate(examples):
                hidden = stream.hidden(index).read(stream.shapes, batch)[row : row + 1].requires_grad_(True)
                with (
                    _one_row(stream, batch, row),
                    _gradient_hooks(stream.model, sums, wanted, stream.mask(batch)),
                    torch.enable_grad(),
                ):
                    out = stream.run(index, hidden, batch)
                    (gradients[e],) = torch.autograd.grad(out, hidden, gradients[e])
        progress("gradients", last - index, last)
        yield index, sums


def _examples(stream: Stream, samples: int) -> list[tuple[int, int]]:
    rows = [(b, r) for b, shape in enumerate(stream.shapes) for r in range(shape[0])]
    return rows[:samples]


@contextmanager
def _one_row(stream: Stream, batch: int, row: int) -> Iterator[None]:
    """Within the context, batch `batch` is its row `row` alone."""
    size = stream.shapes[batch][0]

    def pick(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == size:
            return value[row : row + 1]
        return tuple(pick(v) for v in value) if isinstance(value, tuple) else value

    whole, arguments = stream.batches[batch], [block[batch] for block in stream.arguments]
    stream.batches[batch] = {k: pick(v) for k, v in whole.items()}
    for block in stream.arguments:
        args, kwargs = block[batch]
        block[batch] = (tuple(pick(a) for a in args), {k: pick(v) for k, v in kwargs.items()})
    try:
        yield
    finally:
        stream.batches[batch] = whole
        for block, own in zip(stream.arguments, arguments, strict=True):
            block[batch] = own


def _summed_loss(logits: Tensor, batch: dict[str, Any], labels: str, generator: torch.Generator) -> Tensor:
    logits = logits[:, :-1].float()
    mask = batch.get("attention_mask")
    real = torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
    if labels == "model":
        targets = torch.multinomial(logits[0].detach().softmax(-1), 1, generator=generator).T
    else:
        targets = batch["input_ids"][:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return (losses * (real[:, 1:] & real[:, :-1])).sum()


@contextmanager
def _gradient_hooks(
    model: nn.Module, sums: dict[str, Statistics], needs: frozenset[str], mask: Tensor | None
) -> Iterator[None]:
    def forward_hook(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x = args[0].detach()
            real = mask if mask is not None and mask.shape == x.shape[:-1] else slice(None)
            output.register_hook(lambda g: sums[name].add_gradients(x[real], g[real], needs))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(forward_hook(name)) for name in sums]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
