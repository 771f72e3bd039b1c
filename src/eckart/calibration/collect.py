"""Collecting statistics: forward sums by hooks as blocks are run, gradient sums by a backward pass in reverse order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eckart.calibration.answers import Answer
from eckart.calibration.experts import add_experts
from eckart.calibration.store import OUTSIDE
from eckart.calibration.stream import Stream, single_rows
from eckart.downloads import Progress
from eckart.forms.experts import stack_of
from eckart.linalg.whitening import all_finite
from eckart.metrics.statistics import FORWARD_SUMS, GRADIENT_SUMS, Statistics


class Collector:
    """Sums over the inputs of named layers. Layers that read the same tensor share one sum; tables count their rows.

    Attributes:
        leaders: layer -> the layer under whose name its sums are kept.
        sums: leader -> statistics.
    """

    def __init__(self, needs: Iterable[str]):
        self.needs = frozenset(needs) & FORWARD_SUMS
        self.leaders: dict[str, str] = {}
        self.sums: dict[str, Statistics] = {}
        self.mask: Tensor | None = None
        self._seen: dict[tuple[int, Any], tuple[str, Tensor]] = {}

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
            x = first_input(args, kwargs)
            if isinstance(module, nn.Embedding):
                return self._count(name, module, x)
            if stack_of(module) is not None:
                return self._route(name, module, *args, **kwargs)
            read = (id(x), _window(module))
            leader, _ = self._seen.setdefault(read, (name, x))  # keeps x alive, so that its id stays its own
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
        self.sums.setdefault(name, Statistics()).add_ids(ids, rows, mask_of_rows(ids[..., None], self.mask))

    def _route(self, name: str, module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, *_: Any, **__: Any) -> None:  # fmt: skip # noqa: E501
        if not all_finite(hidden_states):
            raise ValueError(f"{name} receives NaN or infinite activations: check the model and the data")
        real = mask_of_rows(hidden_states, self.mask)
        keep = slice(None) if real is None else real
        self.leaders[name] = name
        add_experts(
            self.sums.setdefault(name, Statistics()), module, hidden_states[keep], top_k_index[keep], self.needs
        )

    def _rows(self, module: nn.Module, x: Tensor) -> tuple[Tensor, frozenset[str], Tensor | None]:
        if isinstance(module, nn.Conv2d):
            from eckart.forms.layers import patches

            return patches(x, module), self.needs, None
        return x, self.needs, mask_of_rows(x, self.mask)

    def of(self, name: str) -> Statistics:
        """The statistics of a layer; empty where no data reached it."""
        return self.sums.get(self.leaders.get(name, name), Statistics())


def _window(module: nn.Module) -> Any:
    """How a layer looks at its input: convolutions of one tensor may cut it into different patches."""
    if not isinstance(module, nn.Conv2d):
        return None
    return module.kernel_size, module.stride, module.padding, module.dilation


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a layer is called with, however it is passed."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


def mask_of_rows(x: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask (b, length) as it applies to inputs that keep both dimensions or have made one of them."""
    if mask is None or x.shape[:-1] == mask.shape:
        return mask
    return mask.reshape(-1) if x.dim() == 2 and x.shape[0] == mask.numel() else None


def collect_gradients(
    stream: Stream, targets: dict[int, list[str]], needs: Iterable[str], labels: str, seed: int,
    samples: int, progress: Progress,
) -> Iterator[tuple[int, dict[str, Statistics]]]:  # fmt: skip
    """Gradient sums, block by block from the last to the first, one sequence at a time; first those outside.

    The hidden states that enter every block must lie on disk for the first `samples` sequences. Yields
    (block index, layer -> statistics). Gradients are of the loss summed over a sequence's answers, with targets from
    the text (`labels="data"`, for models that foretell it) or drawn from the model's own answers. Layers before the
    first block have none, unless the model has no blocks.
    """
    wanted = frozenset(needs) & GRADIENT_SUMS
    rows = Stream(stream.subject, single_rows(stream.batches)[:samples], stream.folder, stream.blocks)
    rows.start()  # over the same files, which hold one row after the other
    generator = torch.Generator().manual_seed(seed)
    gradients: list[Tensor] = []
    terms: list[int] = []
    last = len(rows.blocks)
    sums: dict[str, Statistics] = {name: Statistics() for name in targets.get(OUTSIDE, [])}
    with rows.subject.loaded(*rows.outside):
        for row, batch in enumerate(rows.batches):
            hidden = rows.hidden(last).read(rows.shapes, row).requires_grad_(True)
            with _watched(rows.model, sums) as seen, torch.enable_grad():
                answer = Answer.of(rows.model, rows.finish(hidden, row), batch)
                if not bool(torch.isfinite(answer.values).all()):
                    raise ValueError(f"the predictions for calibration window {row} are not finite: check the model")
                drawn = labels == "model" or answer.next_words is None
                losses, counts = answer.drawn_losses(generator) if drawn else answer.losses()
                terms.append(int(counts.sum()))
                loss = (losses * counts).sum()
            gradients.append(_backward(loss, None, hidden, seen, sums, wanted, rows.mask(row), terms[row]))
    if sums:
        yield OUTSIDE, sums
    for index in reversed(range(last)):
        sums = {name: Statistics() for name in targets.get(index, [])}
        with rows.subject.loaded(rows.blocks[index]):
            for row in range(len(rows.batches)):
                hidden = rows.hidden(index).read(rows.shapes, row).requires_grad_(True)
                with _watched(rows.model, sums) as seen, torch.enable_grad():
                    out = rows.run(index, hidden, row)
                gradients[row] = _backward(out, gradients[row], hidden, seen, sums, wanted, rows.mask(row), terms[row])
        progress("gradients", last - index, last)
        yield index, sums


Seen = list[tuple[str, Tensor, Tensor, nn.Module]]


def _backward(
    out: Tensor, gradient: Tensor | None, hidden: Tensor, seen: Seen, sums: dict[str, Statistics],
    needs: frozenset[str], mask: Tensor | None, terms: int,
) -> Tensor:  # fmt: skip
    """The gradient at what entered; those at the outputs of the layers that were seen are added to their sums."""
    found = torch.autograd.grad(out, [hidden, *(y for _, _, y, _ in seen)], gradient, allow_unused=True)
    for (name, x, _, module), g in zip(seen, found[1:], strict=True):
        if g is None:
            continue  # the answers do not depend on it
        if isinstance(module, nn.Conv2d):
            from eckart.forms.layers import patches

            x, g = patches(x, module), g.movedim(1, -1).flatten(1, 2)
        real = mask_of_rows(x, mask)
        keep = slice(None) if real is None else real
        sums[name].add_gradients(x[keep], g[keep], needs, terms)
    return torch.zeros_like(hidden) if found[0] is None else found[0]


@contextmanager
def _watched(model: nn.Module, names: Iterable[str]) -> Iterator[Seen]:
    """Within the context, every call of these layers is kept: name, input, output, module."""
    seen: Seen = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            if not output.requires_grad:
                output.requires_grad_(True)  # nothing before it asks for a gradient
            seen.append((name, first_input(args, kwargs).detach(), output, module))
            return output.clone()  # what comes after may write into it

        return hook

    modules = {name: model.get_submodule(name) for name in names}
    handles = [
        module.register_forward_hook(watch(name), with_kwargs=True)
        for name, module in modules.items()
        if not isinstance(module, nn.Embedding)  # ids have no gradient
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
