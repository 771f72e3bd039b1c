"""Which channels of a model can be removed: found by running it once and following them from layer to layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from eckart.calibration.relevance import channel_axis
from eckart.calibration.stream import Batch


@dataclass(frozen=True)
class Units:
    """Units that stand and fall together: channels of some layers, added up where there are several of these.

    Attributes:
        producers: Linear or convolution layers whose outputs they are.
        consumers: those that read them, perhaps flattened (each unit then makes several inputs, one after the other).

    Between both stand only activations that leave zero as it is, poolings, sums and products.
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]

    @property
    def name(self) -> str:
        return "+".join(self.producers)


@torch.no_grad()
def find_units(model: nn.Module, batch: Batch) -> list[Units]:
    """The units between the linear layers and convolutions of a model, as it runs this batch.

    What is added up must stay alike, and so is one group. Channels that reach the model's output, or something other
    than activations that leave zero as it is, poolings, sums and flattening, are in no group.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    tracer = _Tracer(layers)
    hooks = [hook for name, module in layers.items() for hook in tracer.hooks(name, module)]
    try:
        with tracer:
            found = model(**{k: v for k, v in batch.items() if k != "labels"})
    finally:
        for hook in hooks:
            hook.remove()
    tracer.fix(_tensors([found]))
    return tracer.units()


LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Channels(NamedTuple):
    """Whose channels a tensor has along an axis. It is kept meanwhile, so that its id stays its own."""

    layer: str
    axis: int
    tensor: Tensor


class _Tracer(TorchFunctionMode):
    """Follows channels from the layers that make them to those that read them.

    Attributes:
        group: a layer -> another one of its group, or itself.
        fixed: layers whose channels stay as they are.
    """

    def __init__(self, layers: Mapping[str, nn.Module]):
        super().__init__()
        self.group = {name: name for name in layers}
        self.consumers: dict[str, list[str]] = {name: [] for name in layers}
        self.calls = dict.fromkeys(layers, 0)
        self.fixed = {name for name, module in layers.items() if getattr(module, "groups", 1) != 1}
        self.channels: dict[int, _Channels] = {}
        self.inside = False

    def hooks(self, name: str, module: nn.Module) -> Iterator[Any]:
        """Those of one layer."""

        def entering(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.inside = True
            source = self.channels.get(id(args[0]))
            if source is not None:
                self.consumers[source.layer].append(name)
                if source.axis != channel_axis(module, args[0]) or name in self.fixed:
                    self.fixed.add(source.layer)

        def leaving(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.inside = False
            self.calls[name] += 1
            self.channels[id(output)] = _Channels(name, channel_axis(module, output), output)

        yield module.register_forward_pre_hook(entering)
        yield module.register_forward_hook(leaving)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        given = _tensors([*args, *kwargs.values()])
        owned = [self.channels[id(x)] for x in given if id(x) in self.channels]
        if self.inside or not owned or not _tensors([found]):
            return found
        if len(owned) == len(given) and isinstance(found, Tensor) and _passes(func, owned, found, args, kwargs):
            for other in owned[1:]:
                self.group[self.root(other.layer)] = self.root(owned[0].layer)
            self.channels[id(found)] = owned[0]._replace(tensor=found)
        else:
            self.fix(given)
        return found

    def fix(self, tensors: Iterable[Tensor]) -> None:
        """Their channels stay as they are."""
        self.fixed |= {self.channels[id(x)].layer for x in tensors if id(x) in self.channels}

    def root(self, name: str) -> str:
        """The one layer that stands for a group."""
        while self.group[name] != name:
            name = self.group[name]
        return name

    def units(self) -> list[Units]:
        groups: dict[str, list[str]] = {}
        for name in self.group:
            groups.setdefault(self.root(name), []).append(name)
        odd = {name for name, calls in self.calls.items() if calls != 1}
        found = []
        for names in groups.values():
            readers = dict.fromkeys(reader for name in names for reader in self.consumers[name])
            if readers and not self.fixed & set(names) and not odd & {*names, *readers}:
                found.append(Units(tuple(names), tuple(readers)))
        return found


_ELEMENTWISE = {
    F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.gelu, F.silu, F.elu, F.leaky_relu, F.mish, F.relu6,
    F.hardswish, F.tanh, torch.tanh, Tensor.tanh, F.dropout, F.dropout2d, Tensor.clone, Tensor.contiguous,
}  # fmt: skip
_SUMS = {"add", "add_", "__add__", "__iadd__", "__radd__", "sub", "__sub__"}
_SCALINGS = {"mul", "__mul__", "__rmul__", "div", "__truediv__"}


def _passes(func: Any, owned: Sequence[_Channels], y: Tensor, args: Any, kwargs: Any) -> bool:
    """Whether y has the same channels along the same axis, and zeros where these are zero."""
    name, first = getattr(func, "__name__", ""), owned[0]
    x = first.tensor
    alike = all(c.axis == first.axis and c.tensor.shape == y.shape for c in owned)
    if name in _SUMS:
        return alike and len(owned) == 2
    if func in _ELEMENTWISE or name in _SCALINGS:
        return alike
    if first.axis != 1 or len(owned) > 1 or y.dim() < 2 or len(y) != len(x):
        return False
    if "pool" in name:
        return y.dim() == x.dim() and y.shape[1] == x.shape[1]
    if name in ("mean", "sum", "amax"):
        given = kwargs.get("dim", args[1] if len(args) > 1 else ())
        axes = [given] if isinstance(given, int) else list(given or ())
        return bool(axes) and all(axis % x.dim() >= 2 for axis in axes)
    return name in ("flatten", "view", "reshape", "squeeze") and y.dim() == 2 and y.shape[1] % x.shape[1] == 0


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, Mapping):
            found += _tensors(value.values())
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found
