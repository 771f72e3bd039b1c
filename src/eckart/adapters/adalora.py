"""AdaLoRA: ranks that move to where they matter while the adapter is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import AdaLoraConfig, PeftConfig
from torch import nn
from torch.optim import Optimizer

from eckart.adapters.native import Native
from eckart.adapters.orthogonality import Factor, pull
from eckart.registry import method
from eckart.schedules import Schedule, at_step
from eckart.settings import check_whole


@method("adalora", family="rank allocation", paper="AdaLoRA, Zhang et al., ICLR 2023, arXiv 2303.10512")
@dataclass(frozen=True)
class AdaLora(Native):
    """PEFT's AdaLoRA, W + alpha / initial_rank B diag(E) A, whose ranks really change: its schedule reallocates them.

    PEFT leaves three things to the training loop: to call the allocator between the optimiser's step and `zero_grad`,
    to tell it how many steps there will be, and to train on a loss that the model itself returned, as only that has
    the orthogonality term. `eckart.adapters.schedule(model)` does all three, in a bare loop and in Trainer, once for
    every optimiser step; the logged loss is that of the task. A run that is cut goes on exactly: smoothed scores travel
    with the optimiser's state, and no component is cut off before `finish`.

    A layer may end with rank 0. PEFT then warns of empty tensors when it saves, and of a `rank_pattern` that matches no
    layer when it loads: both are wrong, and what is saved and loaded is right.

    Args:
        rank: average at the end.
        initial_rank: of each matrix, at the start.
        alpha: of the scale alpha / initial_rank, which stays as it is when ranks fall.
        warmup: steps, or share of the run, before ranks begin to fall.
        final: steps, or share of the run, at the end, in which they stay as they are.
        every: steps between allocations.
        orthogonality: strength of the mean of ||A Aᵀ - I||_F and ||Bᵀ B - I||_F over all matrices.
        beta1, beta2: of the moving averages of sensitivity and of its uncertainty.
    """

    rank: int = 8
    initial_rank: int = 12
    alpha: float = 16.0
    warmup: float = 0.1
    final: float = 0.3
    every: int = 1
    orthogonality: float = 0.1
    beta1: float = 0.85
    beta2: float = 0.85

    of: ClassVar[type[PeftConfig]] = AdaLoraConfig
    sits_on: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d,)
    follows: ClassVar[tuple[str, ...]] = ("dilation",)

    def check(self) -> None:
        check_whole(self, rank=1, every=1)
        if not isinstance(self.initial_rank, int) or self.initial_rank <= self.rank:
            raise ValueError(f"adalora(initial_rank={self.initial_rank!r}): it is a whole number above the rank at the end, {self.rank}, to which ranks fall")  # fmt: skip # noqa: E501
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"adalora({name}={getattr(self, name)!r}): it is a number between 0 and 1")
        if not self.orthogonality >= 0:
            raise ValueError(f"adalora(orthogonality={self.orthogonality!r}): it is a number, 0 or more")
        for name in ("warmup", "final"):
            at_step(getattr(self, name), 1, name)

    def fits(self, name: str, module: nn.Module, shape: tuple[int, int]) -> None:
        if self.initial_rank > min(shape):
            raise ValueError(f"{name}: initial_rank {self.initial_rank} is more than a matrix of shape {shape} can have: lower it to {min(shape)} or leave the layer out")  # fmt: skip # noqa: E501

    def config(self) -> AdaLoraConfig:
        later = int(self.warmup + self.final) + 2  # PEFT asks for a length, which only `begin` will know
        return AdaLoraConfig(
            target_r=self.rank, init_r=self.initial_rank, lora_alpha=self.alpha, tinit=self.warmup, tfinal=self.final,
            deltaT=self.every, beta1=self.beta1, beta2=self.beta2, orth_reg_weight=self.orthogonality,
            lora_dropout=self.dropout, total_step=later, **self.targeting(),
        )  # fmt: skip

    @classmethod
    def schedule(cls, model: Any, adapter_name: str) -> Schedule:
        return Reallocation(model.base_model, adapter_name)


SCORES = {"exp_avg_ipt": "adalora_sensitivity", "exp_avg_unc": "adalora_uncertainty"}
"""What the allocator has of every parameter, and what the optimiser's state of it calls that."""


class Reallocation(Schedule):
    """Calls PEFT's allocator after every step of the optimiser, and adds the orthogonality term before it.

    Args:
        tuner: PEFT's, with an adapter that is being trained.
        adapter_name: of that adapter.
    """

    needs_total = True

    def __init__(self, tuner: Any, adapter_name: str):
        super().__init__()
        if getattr(tuner, "trainable_adapter_name", None) != adapter_name:
            raise ValueError(f"adapter {adapter_name!r} was loaded to be used: to train it, load it with PeftModel.from_pretrained(..., is_trainable=True)")  # fmt: skip # noqa: E501
        self.tuner, self.name = tuner, adapter_name
        self.config = tuner.peft_config[adapter_name]
        self.points = self.config.tinit, self.config.tfinal
        self.pattern: dict[str, list[bool]] = {}

    def of(self, kind: str) -> dict[str, nn.Parameter]:
        """name -> parameter, of all layers: those of `A`, `B` or `E`."""
        return {n: p for n, p in self.tuner.model.named_parameters() if f"lora_{kind}.{self.name}" in n}

    def live(self) -> dict[str, list[bool]]:
        """name of a layer's E -> which of its entries are not zero."""
        return {n: (p.detach() != 0).flatten().tolist() for n, p in self.of("E").items()}

    def begin(self, optimizer: Optimizer | None = None, total: int | None = None) -> None:
        """As every schedule's; raises `ValueError` too where no step is left between warm-up and the final phase."""
        total = total or self.total
        if total:
            warmup, final = (at_step(p, total, n) for p, n in zip(self.points, ("warmup", "final"), strict=True))
            if warmup >= total - final:
                raise ValueError(f"a run of {total} steps with {warmup} of warm-up and {final} of the final phase has none in which ranks could fall: lower warmup or final")  # fmt: skip # noqa: E501
            self.config.total_step, self.config.tinit, self.config.tfinal = total, warmup, final
        super().begin(optimizer, total)
        self.tuner.forward = self.tuner.model.forward  # without PEFT's term, which `gradients` adds once for every step
        self.config.rank_pattern = None
        self.pattern = self.live()
        if self.steps:
            self._recall()

    def gradients(self, step: int) -> None:
        for parameter in self.of("E").values():
            if parameter.grad is None:  # a layer that was not run, such as an expert without tokens
                parameter.grad = torch.zeros_like(parameter)
        factors: list[Factor] = [([p], dim) for dim, kind in enumerate("AB") for p in self.of(kind).values()]
        pull(factors, self.config.orth_reg_weight)

    def after(self, step: int) -> None:
        if step == 0:
            return
        values = list(self.of("E").values())
        if any(p.grad is None for p in values) or not any(bool(p.grad.any()) for p in values if p.grad is not None):
            raise RuntimeError("AdaLoRA reads the gradients of the step that was just made, and there are none: call schedule.step() before optimizer.zero_grad()")  # fmt: skip # noqa: E501
        self.config.rank_pattern = self.pattern
        self.tuner.update_and_allocate(step)
        self.pattern, self.config.rank_pattern = self.config.rank_pattern, None
        self._remember()

    def _remember(self) -> None:
        """Let smoothed scores travel with the optimiser's state."""
        assert self.optimizer is not None
        for name, parameter in self._scored().items():
            state = self.optimizer.state[parameter]
            for ours, theirs in SCORES.items():
                found = getattr(self.tuner.rankallocator, ours)
                if name in found:
                    state[theirs] = found[name]
                else:
                    state.pop(theirs, None)

    def _recall(self) -> None:
        assert self.optimizer is not None
        allocator = self.tuner.rankallocator
        allocator.reset_ipt()
        for name, parameter in self._scored().items():
            state = self.optimizer.state.get(parameter, {})
            if SCORES["exp_avg_ipt"] in state:
                allocator.ipt[name] = torch.zeros_like(parameter)
                for ours, theirs in SCORES.items():
                    getattr(allocator, ours)[name] = state[theirs]

    def _scored(self) -> dict[str, nn.Parameter]:
        return {**self.of("A"), **self.of("B"), **self.of("E")}

    def finish(self) -> None:
        """Note which components live, so that only these are saved."""
        self.config.rank_pattern = self.live()
        self.release()

    def release(self) -> None:
        super().release()
        vars(self.tuner).pop("forward", None)
