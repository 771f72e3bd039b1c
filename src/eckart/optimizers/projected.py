"""One optimiser with four replaceable parts: projector, refresh policy, inner rule, and what happens to the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from eckart.optimizers.groups_check import check_group
from eckart.optimizers.modes import Factors, added, contract
from eckart.optimizers.places import Place, is_projected, places
from eckart.optimizers.projectors import Draw, Projector, low_shape
from eckart.optimizers.refresh import Every
from eckart.optimizers.residual import Drop, Residual, Split
from eckart.optimizers.rules import Direction, Rule
from eckart.optimizers.sharding import local, onto, whole
from eckart.optimizers.storage import State

Transport = Literal["keep", "reset", "rotate"]
PARTS = ("projector", "inner", "refresh", "residual", "transport", "decay_first", "foreach", "seed", "_places")


@dataclass
class Job:
    """One parameter within one step; `split` is None where it is not projected."""

    p: Tensor
    state: State
    R: Tensor
    k: int
    A: Tensor
    factors: Factors | None = None


class Projected(torch.optim.Optimizer):
    """Moments in a subspace of each weight's gradient, which moves with the gradient.

    Groups with a `rank` or a `density` are projected, all others get the inner rule on their gradients as they are.
    Arithmetic is float32 (float64 for float64 parameters), and so are moments; bases are kept in the parameters' dtype.
    State holds tensors and numbers only, so that checkpoints load with `weights_only=True` and go on bit for bit.

    Args:
        params: parameters or groups of them (see `eckart.optimizers.param_groups`); groups may have their own `lr`,
            `weight_decay`, `rank`, `density`, `interval` and `scale`.
        projector, inner, refresh, residual: the four parts.
        lr: learning rate.
        weight_decay: decoupled: weights shrink by lr * weight_decay in a step.
        rank: of the subspace; too large ones are clamped, with a warning.
        density: the rank as a share of the side that shrinks, from 0 to 1, instead of `rank`.
        interval: T, updates between two refreshes.
        scale: by which projected directions are multiplied.
        transport: what a refresh does to moments: `keep` them as they are, `reset` them and the bias correction, or
            `rotate` them into the new basis.
        decay_first: weights shrink before the update (as in torch's AdamW) or after it (as in GaLore's).
        foreach: work on all parameters of a group at once; by default where they are on an accelerator. The loop over
            single ones is its naive twin and takes less memory.
        seed: of all random choices.

    Raises ValueError on impossible settings, named with their parameter; TypeError on parameters that are not floating
    point; RuntimeError on sparse gradients, and on gradients that are not finite when a subspace must be chosen.
    """

    def __init__(
        self, params: Iterable[Any], *, projector: Projector, inner: Rule, refresh: Every | None = None,
        residual: Residual | None = None, lr: float, weight_decay: float = 0.0, rank: int | None = None,
        density: float | None = None, interval: int = 200, scale: float = 1.0, transport: Transport = "keep",
        decay_first: bool = False, foreach: bool | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        if transport not in get_args(Transport):
            raise ValueError(f"moments can be {', '.join(get_args(Transport))} at a refresh, not {transport!r}")
        if transport == "rotate" and not projector.orthonormal:
            raise ValueError("blocks have no coordinates that could be rotated: keep or reset the moments")
        self.projector, self.inner, self.refresh = projector, inner, refresh or Every()
        self.residual, self.transport, self.decay_first = residual or Drop(), transport, decay_first
        self.foreach, self.seed = foreach, seed
        self._places: dict[Tensor, Place] = {}
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "rank": rank, "density": density, "interval": interval,
            "scale": scale,
        }  # fmt: skip
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in PARTS}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, whose settings are the optimiser's where the group has none of its own."""
        super().add_param_group(param_group)
        number, group = len(self.param_groups) - 1, self.param_groups[-1]
        try:
            check_group(group, number, self.projector, self.residual)
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise
        self._places = places(self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; `closure` recomputes the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        for group, params in zip(self.param_groups, found, strict=True):
            self._check_gradients(group, params)
        for group, params in zip(self.param_groups, found, strict=True):
            together = params and (self.foreach or (self.foreach is None and params[0].device.type != "cpu"))
            for some in [params] if together else [[p] for p in params]:
                self._update(group, some)
        return loss

    def update_in_backward(self) -> list[RemovableHandle]:
        """Update each parameter during the backward pass, as soon as its gradient is there, and free the gradient.

        At most one whole gradient is then alive. `step` finds nothing left to do; schedulers still follow it. This does
        not go together with gradient accumulation, with clipping by a global norm, or with a gradient scaler. Removing
        the returned handles ends it.
        """

        def update(p: Tensor) -> None:
            with torch.no_grad():
                group = self.param_groups[self._place(p).group]
                self._check_gradients(group, [p])
                self._update(group, [p])
            p.grad = None

        params = chain.from_iterable(group["params"] for group in self.param_groups)
        return [p.register_post_accumulate_grad_hook(update) for p in params if p.requires_grad]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`. Every tensor keeps its dtype, whatever the parameter's."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        held = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, p in zip(saved, held, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                self.state[p][name] = value.detach().clone().to(p.device) if isinstance(value, Tensor) else value

    def state_bytes(self) -> int:
        """Bytes of all tensors in the state, counted."""
        return sum(x.numel() * x.itemsize for state in self.state.values() for x in state.values() if isinstance(x, Tensor))  # fmt: skip # noqa: E501

    def expected_state_bytes(self) -> int:
        """Bytes of all tensors in the state once every parameter has been updated for the first time."""
        return sum(self._expected(p, group) for group in self.param_groups for p in group["params"])

    def _expected(self, p: Tensor, group: dict[str, Any]) -> int:
        shape, dtype = tuple(p.shape), _arithmetic(p.dtype)
        if not is_projected(group):
            return self.inner.nbytes(shape, dtype)
        ranks = self.projector.ranks(shape, group, self._draw(p, 0))
        moments = self.inner.nbytes(low_shape(shape, ranks), dtype)
        return moments + self.projector.nbytes(shape, ranks, p.dtype) + self.residual.nbytes(shape, ranks, dtype)

    def _check_gradients(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Refuse what cannot be worked on, before anything is changed."""
        for p in params:
            name = self._place(p).name
            if p.grad is None or p.grad.is_sparse:
                raise RuntimeError(f"the gradient of {name} is sparse: use a dense one, such as an embedding with sparse=False")  # fmt: skip # noqa: E501
            if is_projected(group) and self.refresh.due({"step": 0, **self.state[p]}) and not bool(whole(p.grad).isfinite().all()):  # fmt: skip # noqa: E501
                raise RuntimeError(f"the gradient of {name} holds NaN or infinity, and its subspace is to be chosen from it: lower the learning rate, clip, or skip this step")  # fmt: skip # noqa: E501

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """One step for parameters of one group."""
        jobs = [self._begin(p, group) for p in params]
        directions = self.inner.directions([j.state for j in jobs], [j.R for j in jobs], [j.k for j in jobs])
        for job, direction in zip(jobs, directions, strict=True):
            self._finish(job, direction, group)

    def _begin(self, p: Tensor, group: dict[str, Any]) -> Job:
        """Take the gradient, project it, and choose the subspace anew where it is time to."""
        state = self.state[p]
        state.setdefault("step", 0)
        assert p.grad is not None
        grad = whole(p.grad) if is_projected(group) or not self.inner.elementwise else local(p.grad)
        A = grad.to(_arithmetic(p.dtype))
        factors, R = None, A
        if is_projected(group):
            A = self.residual.before(state, A)
            if self.refresh.due(state):
                self._choose(p, state, A, group)
            factors = self.projector.factors(self.projector.kept(state, A), A)
            R = contract(A, factors)
        state["step"] += 1
        return Job(p, state, R, state["step"] - state.get("born", 0), A, factors)

    def _choose(self, p: Tensor, state: State, A: Tensor, group: dict[str, Any]) -> None:
        """A new subspace, and the moments in it."""
        draw = self._draw(p, state.get("refreshes", 0))
        old = self.projector.kept(state, A)
        ranks = self.projector.ranks(tuple(A.shape), group, draw)
        self.projector.keep(state, self.projector.choose(A, ranks, old, draw), p)
        new = self.projector.kept(state, A)
        if self.transport == "reset":
            self.inner.clear(state)
            state["born"] = state["step"]
        elif self.transport == "rotate" and old:
            turns = {mode: self.projector.overlap(old[mode], new[mode]).to(A.dtype) for mode in new}
            self.inner.turn(state, lambda moment: contract(moment, turns))
        self.refresh.done(state, group["interval"], old, new, draw.index, draw.count)

    def _place(self, p: Tensor) -> Place:
        # wrappers that shard a model put new parameters into the groups
        if p not in self._places:
            self._places = places(self.param_groups)
        return self._places[p]

    def _draw(self, p: Tensor, refresh: int) -> Draw:
        index = self._place(p).projected
        return Draw(index, sum(place.projected >= 0 for place in self._places.values()), refresh, self.seed)

    def _finish(self, job: Job, direction: Direction, group: dict[str, Any]) -> None:
        """Apply a direction to its parameter."""
        lr, scale = float(group["lr"]), float(group["scale"])
        W, decay = self._opened(job.p), lr * group["weight_decay"]
        if self.decay_first and decay:
            W.mul_(1 - decay)
        if job.factors is None:
            N = direction.N if self.inner.elementwise else onto(direction.N, job.p)
            W.add_(N, alpha=-lr * direction.gain)
        else:
            split = Split(job.A, job.R, job.factors, direction, scale)
            rest = self.residual.rest(job.state, split)
            step, N = -lr * scale * direction.gain, direction.N
            if W.shape == job.A.shape:
                added(W, N, job.factors, step, out=W)
            else:
                W.add_(onto(split.back(N), job.p), alpha=step)
            if rest is not None:
                W.add_(onto(rest, job.p), alpha=-lr)
        if not self.decay_first and decay:
            W.mul_(1 - decay)
        self._close(job.p, W, job.state)

    def _opened(self, p: Tensor) -> Tensor:
        """The numbers of a parameter, to be written into."""
        return local(p)

    def _close(self, p: Tensor, W: Tensor, state: State) -> None:
        """Take up the written numbers; a parameter's own are where they belong already."""


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
