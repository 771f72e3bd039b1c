"""What every method of structured training needs: which layers it takes, and what is left when training is over."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.calibration.subject import block_names
from eckart.checkpoint.hf import describe
from eckart.checkpoint.ties import sharers
from eckart.forms import Factored, Form, LowRank, as_form, drop_in
from eckart.forms.densifying import dense_layer
from eckart.forms.layers import DropIn, kind_of, matrix_of
from eckart.forms.layout import laid_out
from eckart.jobs.recipe import Recipe
from eckart.jobs.remember import remember
from eckart.linalg.whitening import check_finite
from eckart.registry import find
from eckart.remarks import remark
from eckart.schedules import Schedule
from eckart.settings import with_settings, words_of


class NoSaving(UserWarning):
    """A structure takes as many parameters as the layer it replaces."""


class StructuredSchedule(Schedule):
    """What a method does to a model while it is trained; `finish` leaves the model as it is to be saved.

    Args:
        model: the model whose layers it follows.
        names: of these layers.
    """

    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.model, self.names = model, names
        self.words: dict[str, Any] = {}
        self.finished = False

    def finish(self) -> None:
        """Training is over: put into the model what is to be kept, and let `save_pretrained` describe it.

        Parameters may be new ones afterwards. What was saved before can be resumed, but not loaded as a model.
        """
        self.release()
        if self.finished:
            return
        self.finished = True
        with torch.no_grad():
            self.settle()
        record(self.model, self.words)

    def settle(self) -> None:
        """Replace what only training needs."""


@dataclass(frozen=True)
class TrainingMethod(ABC):
    """A way to structure weights while they are trained. Its dataclass fields are its hyperparameters.

    Attributes:
        taken: knows which kinds of layers the method takes.
    """

    key: ClassVar[str] = ""
    taken: ClassVar[type[Recipe]] = Recipe

    @abstractmethod
    def place(self, model: nn.Module, names: list[str], seed: int) -> Schedule:
        """Change the layers of these names, in place; returns what must follow the optimiser's steps."""


@dataclass(frozen=True)
class Born(TrainingMethod):
    """A method whose weights have their final form from the first step on; nothing follows the optimiser's steps."""

    @abstractmethod
    def stand_in(self, module: nn.Module, W: Float[Tensor, "out in"], generator: torch.Generator) -> nn.Module:
        """What takes a layer's place, of which W is the weight in float32 or wider; the layer itself to leave it."""

    def place(self, model: nn.Module, names: list[str], seed: int) -> Schedule:
        for name, W in weights(model, names):
            module = model.get_submodule(name)
            try:
                new = self.stand_in(module, W, generator_of(seed, names.index(name)))
            except ValueError as e:
                raise ValueError(f"{name}: {e}") from None
            if new is module:
                remark(f"{name} stays as it is: at this rank nothing would be saved", NoSaving)
                continue
            put(model, name, new)
            if size(new) >= size(module):
                remark(f"{name}: {size(new):,} parameters take the place of {size(module):,}, which saves nothing: lower the rank or the density", NoSaving)  # fmt: skip # noqa: E501
        return Finished(model, names)


class Finished(StructuredSchedule):
    """Of a model that is as it is to be saved all along."""

    def finish(self) -> None:
        self.release()


@dataclass(frozen=True)
class FromForm(Born):
    """Trains any form, from its fit to the weight that is there."""

    form: Form

    def stand_in(self, module: nn.Module, W: Float[Tensor, "out in"], generator: torch.Generator) -> nn.Module:
        if self.form.open:
            raise ValueError(f"{self.form} has an open dial: close it, there is no budget here")
        return like(module, self.form.fit(W, dtype=dtype_of(module)))


def structure(
    model: nn.Module, method: str | TrainingMethod | None = None, *, form: Form | str | None = None,
    layers: str = "", seed: int = 0, **settings: Any,
) -> Schedule:  # fmt: skip
    """Let the linear layers of a model be trained in another structure than dense, in place.

    Args:
        model: any torch model. Make the optimiser afterwards: its parameters are new ones.
        method: key of a method of the wing `training` (`eckart methods` lists them), or a `TrainingMethod`.
        form: instead of a method, a closed form that every layer's weight is fitted with and then trained as.
        layers: regular expression that the names of the layers match in full; empty for all linear layers and
            convolutions within the blocks, or all but the head where there are no blocks.
        seed: of every random choice.
        settings: fields of the method.

    Returns:
        What must follow the optimiser's steps, in a bare loop or in Trainer (see `Schedule`).

    Raises `ValueError` on unknown words, on layers that cannot be taken, and on weights that are not finite.
    """
    if (method is None) == (form is None):
        raise ValueError("say what to train: a method of the wing 'training' (see `eckart methods`), or a form")
    if form is not None:
        chosen: Any = FromForm(as_form(form))
    else:
        chosen = find(method, "training").cls() if isinstance(method, str) else method
    chosen = with_settings(chosen, settings)
    names = targeted(model, layers, chosen.taken)
    schedule = chosen.place(model, names, seed)
    words = {"training": chosen.key or str(form), **words_of(chosen), "seed": seed}
    if isinstance(schedule, Finished):
        record(model, words)
    elif isinstance(schedule, StructuredSchedule):
        schedule.words = words
    return schedule


def targeted(model: nn.Module, layers: str, taken: type[Recipe] = Recipe) -> list[str]:
    """Names of the layers that `layers` asks for, none of them shared or factored already."""
    sites = taken(targets=layers).sites(model, block_names(model))
    names = [name for part in sorted(sites) for name in sites[part]]
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, DropIn):
            raise ValueError(f"{name} is factored already: make it dense first with `eckart.densify(model)`")
        weight: Any = module.weight
        others = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight and n != f"{name}.weight"]
        if others or sharers(model, name):
            raise ValueError(f"{name} shares its weight with {(others or sharers(model, name))[0]}: leave it out with layers=..., or untie them")  # fmt: skip # noqa: E501
        if kind_of(module) == "embedding":
            raise ValueError(f"{name} is an embedding, which no method of structured training takes: leave it out with layers=...")  # fmt: skip # noqa: E501
        check_finite(matrix_of(module).detach(), f"the weight of {name}")
    return names


def weights(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, Float[Tensor, "out in"]]]:
    """Name and matrix of each layer, one copy at a time, in float32 or wider. Raises `ValueError` on NaN."""
    for name in names:
        W = matrix_of(model.get_submodule(name)).detach()
        check_finite(W, f"the weight of {name}")
        yield name, W.to(torch.promote_types(W.dtype, torch.float32), copy=True)


def like(module: nn.Module, matrix: Factored) -> nn.Module:
    """What stands in for a module, with this matrix and the module's own bias."""
    bias = getattr(module, "bias", None)
    return drop_in(module, matrix, None if bias is None else bias.detach())


def factored_or_dense(module: nn.Module, W: Float[Tensor, "out in"], rank: int) -> nn.Module:
    """A stand-in with two factors of the matrix, which has that rank, or an ordinary layer where that is no larger."""
    if rank * sum(W.shape) < W.numel():
        return like(module, LowRank(rank).fit(W, dtype=dtype_of(module)))
    bias: Any = getattr(module, "bias", None)
    return dense_layer(module, laid_out(module, W.to(dtype_of(module))), None if bias is None else bias.detach())


def put(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replace a module, training or not as the one before."""
    old = model.get_submodule(name)
    model.set_submodule(name, new.to(matrix_of(old).device).train(old.training))


def record(model: nn.Module, words: dict[str, Any]) -> None:
    """Let a transformers model describe its stand-ins, if it has any, when it is saved."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict") and describe(model):
        remember(model, words)


def dtype_of(module: nn.Module) -> torch.dtype:
    """Of a layer's weight."""
    weight: Any = module.weight
    return weight.dtype


def size(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def generator_of(*seeds: int) -> torch.Generator:
    """A generator that these numbers determine."""
    mixed = 0
    for seed in seeds:
        mixed = (mixed * 1_000_003 + seed + 1) % 2**63
    return torch.Generator().manual_seed(mixed)
