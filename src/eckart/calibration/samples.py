"""Some of the numbers that enter layers while a model runs, for methods that need more of them than sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.calibration.collect import first_input, mask_of_rows
from eckart.calibration.store import OUTSIDE
from eckart.calibration.stream import Stream
from eckart.forms.layers import matrix_shape, patches
from eckart.linalg.whitening import all_finite


class Shared(NamedTuple):
    """Layers that read the same tensor, and some of its rows."""

    names: tuple[str, ...]
    x: Float[Tensor, "rows in"]


class _Enough(Exception):
    """Ends a run of which no more is wanted."""


def entering(model: nn.Module, names: Iterable[str], run: Callable[[], object], last: str | None = None) -> dict[str, Tensor]:  # fmt: skip # noqa: E501
    """What enters the layers called `names` in a run, which ends at the layer called `last`.

    Layers that read the same tensor are given the same one; those that are not reached are left out.
    """
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[name] = first_input(args, kwargs)
            if name == last:
                raise _Enough

        return hook

    handles = [model.get_submodule(n).register_forward_pre_hook(watch(n), with_kwargs=True) for n in names]
    try:
        with suppress(_Enough):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def shared_inputs(stream: Stream, part: int, names: Sequence[str], rows: int) -> list[Shared]:
    """What enters the layers of a part, which is loaded: about so many rows, as many from every batch, evenly spaced.

    Raises `ValueError` where a layer is not reached, or what enters it is not finite.
    """
    leaders: dict[str, str] = {}
    taken: dict[str, list[Tensor]] = {}
    each = -(-rows // len(stream.batches))
    for b in range(len(stream.batches)):
        entered = entering(stream.model, names, lambda b=b: _run(stream, part, b))  # type: ignore[misc]
        first: dict[tuple[int, int], str] = {}
        for name, x in entered.items():
            module = stream.model.get_submodule(name)
            leader = leaders.setdefault(name, first.setdefault((id(x), matrix_shape(module)[1]), name))
            if leader == name:
                taken.setdefault(name, []).append(_spaced(real_rows(module, x, stream.mask(b)), each))
    for name in names:
        if name not in leaders:
            raise ValueError(f"{name} is not reached by the calibration data: give other data, or leave the layer out by `targets`")  # fmt: skip # noqa: E501
        if leaders[name] == name and not all(all_finite(x) for x in taken[name]):
            raise ValueError(f"{name} receives NaN or infinite activations: check the model and the data")
    groups = {leader: tuple(n for n in names if leaders[n] == leader) for leader in taken}
    return [Shared(members, torch.cat(taken[leader])) for leader, members in groups.items()]


def real_rows(module: nn.Module, x: Tensor, mask: Tensor | None) -> Float[Tensor, "rows in"]:
    """What a layer multiplies, row by row, without padding."""
    if isinstance(module, nn.Conv2d):
        return patches(x, module).flatten(0, -2)
    real = mask_of_rows(x, mask)
    return x.flatten(0, -2) if real is None else x[real]


def _spaced(x: Float[Tensor, "n in"], count: int) -> Float[Tensor, "rows in"]:
    return x[torch.linspace(0, len(x) - 1, min(count, len(x))).round().long()]


def _run(stream: Stream, part: int, batch: int) -> object:
    at = len(stream.blocks) if part == OUTSIDE else part
    hidden = stream.hidden(at).read(stream.shapes, batch)
    return stream.finish(hidden, batch) if part == OUTSIDE else stream.run(part, hidden, batch)
