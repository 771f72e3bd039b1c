"""Collecting statistics: forward sums by hooks as blocks are run, gradient sums by a backward pass in reverse order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eckart.calibration.stream import Stream, single_rows
from eckart.downloads import Progress
from eckart.linalg.whitening import all_finite
from eckart.metrics.statistics import GRADIENT_SUMS, INPUT_SUMS, Statistics


class Collector:
    """Sums over the inputs of named layers. Layers that read the same tensor share one sum; tables count their rows.

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
            x = _first(args, kwargs)
            if isinstance(module, nn.Embedding):
                return self._count(name, module, x)
            leader, _ = self._seen.setdefault(id(x), (name, x))  # keeps x alive, so that its id stays its own
            if self.leaders.setdefault(name, leader) == name:
                if not all_finite(x):
                    raise ValueError(f"{name} receives NaN or infinite activations: check the model and the data")
                self.sums.setdefault(name, Statistics()).add_inputs(*self._rows(module, x))

        return hook

    def _count(self, name: str, table: nn.Embedding, ids: Tensor) -> None:
        rows = table.num_embeddings
        low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (0, 0)
        if low < 0 or high >= rows:
            raise ValueError(f"{name} has rows 0 to {rows - 1} and is asked for {low} to {high}: check the data")
        self.leaders[name] = name
        self.sums.setdefault(name, Statistics()).add_ids(ids, rows, _rows_of(ids[..., None], self.mask))

    def _rows(self, module: nn.Module, x: Tensor) -> tuple[Tensor, frozenset[str], Tensor | None]:
        if isinstance(module, nn.Conv2d):
            from eckart.forms.layers import patches

            return patches(x, module), self.needs, None
        return x, self.needs, _rows_of(x, self.mask)

    def of(self, name: str) -> Statistics:
        """The statistics of a layer; empty where no data reached it."""
        return self.sums.get(self.leaders.get(name, name), Statistics())


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a layer is called with, however it is passed."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


def _rows_of(x: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask (b, length) as it applies to inputs that keep both dimensions or have made one of them."""
    if mask is None or x.shape[:-1] == mask.shape:
        return mask
    return mask.reshape(-1) if x.dim() == 2 and x.shape[0] == mask.numel() else None


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
    rows = Stream(stream.subject, single_rows(stream.batches)[:samples], stream.folder, stream.blocks)
    rows.start()  # over the same files, which hold one row after the other
    generator = torch.Generator().manual_seed(seed)
    gradients: list[Tensor] = []
    last = len(rows.blocks)
    with rows.subject.loaded(*rows.outside):
        for row, batch in enumerate(rows.batches):
            hidden = rows.hidden(last).read(rows.shapes, row).requires_grad_(True)
            with torch.enable_grad():
                logits = getattr(rows.finish(hidden, row), "logits", None)
                if logits is None or logits.dim() != 3 or "input_ids" not in batch:
                    raise ValueError(f"{type(rows.model).__name__} gives no loss over tokens, which this metric needs")
                if not bool(torch.isfinite(logits).all()):
                    raise ValueError(f"the predictions for calibration window {row} are not finite: check the model")
                (gradient,) = torch.autograd.grad(_summed_loss(logits, batch, labels, generator), hidden)
            gradients.append(gradient)
    for index in reversed(range(last)):
        sums: dict[str, Statistics] = {name: Statistics() for name in targets.get(index, [])}
        with rows.subject.loaded(rows.blocks[index]):
            for row in range(len(rows.batches)):
                hidden = rows.hidden(index).read(rows.shapes, row).requires_grad_(True)
                with _gradient_hooks(rows.model, sums, wanted, rows.mask(row)), torch.enable_grad():
                    out = rows.run(index, hidden, row)
                    (gradients[row],) = torch.autograd.grad(out, hidden, gradients[row])
        progress("gradients", last - index, last)
        yield index, sums


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
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = _first(args, kwargs).detach()
            real = _rows_of(x, mask)
            keep = slice(None) if real is None else real
            output.register_hook(lambda g: sums[name].add_gradients(x[keep], g[keep], needs))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(forward_hook(name), with_kwargs=True) for name in sums]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
