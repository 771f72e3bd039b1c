"""The contract of optimisers: every registered one keeps it, and so does one of your own that subclasses the class."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eckart.registry import entries
from eckart.testing.numbers import gaussian

Make = Callable[..., torch.optim.Optimizer]
SHAPES = ((10, 6), (6, 10), (8, 8))


def registered_optimizers() -> list[tuple[str, Make, dict[str, Any]]]:
    """(name, class, settings of the projected group) of every registered optimiser."""
    dials: dict[str, dict[str, Any]] = {"frugal": {"density": 0.5}}
    found = [e for e in entries("optimizers") if issubclass(e.cls, torch.optim.Optimizer)]
    return [(e.key, e.cls, dials.get(e.key, {"rank": 3})) for e in found]


class OptimizerContract:
    """What every optimiser of matrices in a subspace owes. Subclass it under a name that pytest collects."""

    def optimizers(self) -> list[tuple[str, Make, dict[str, Any]]]:
        """(name, class, settings of the projected group)."""
        return registered_optimizers()

    def _each(self, dtype: torch.dtype = torch.float32, **settings: Any) -> Iterator[tuple[str, Case]]:
        for name, cls, group in self.optimizers():
            yield name, Case(cls, group, dtype, settings)

    def test_a_run_from_a_checkpoint_continues_bit_for_bit(self) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            for name, case in self._each(dtype):
                case.run(range(5))
                file = io.BytesIO()
                torch.save(case.optimizer.state_dict(), file)
                file.seek(0)
                other = Case(case.cls, case.group, dtype, case.settings)
                for p, q in zip(other.params, case.params, strict=True):
                    p.data.copy_(q.data)
                other.optimizer.load_state_dict(torch.load(file, weights_only=True))
                case.run(range(5, 12))
                other.run(range(5, 12))
                assert all(map(torch.equal, case.params, other.params)), (name, dtype)

    def test_state_holds_tensors_and_numbers_only(self) -> None:
        for name, case in self._each():
            case.run(range(3))
            for state in case.optimizer.state.values():
                for key, value in state.items():
                    parts = value if isinstance(value, tuple) else (value,)
                    assert all(isinstance(x, Tensor | int | float) for x in parts), (name, key)

    def test_working_on_all_parameters_at_once_is_working_on_each(self) -> None:
        for name, looped in self._each(foreach=False):
            together = Case(looped.cls, looped.group, looped.dtype, {"foreach": True})
            looped.run(range(9))
            together.run(range(9))
            for p, q in zip(looped.params, together.params, strict=True):
                assert torch.allclose(p, q, atol=1e-6, rtol=1e-6), name

    def test_updates_within_the_backward_pass_are_the_same_and_free_gradients(self) -> None:
        for name, case in self._each():
            other = Case(case.cls, case.group, case.dtype, case.settings)
            alive = _counted(other.params)
            handles = other.optimizer.update_in_backward()  # type: ignore[attr-defined]
            for step in range(5):
                case.optimizer.zero_grad()
                case.loss(step).backward()
                case.optimizer.step()
                other.loss(step).backward()
                other.optimizer.step()
            assert all(map(torch.equal, case.params, other.params)), name
            assert max(alive) == 1, name
            for handle in handles:
                handle.remove()
            other.loss(9).backward()
            assert all(p.grad is not None for p in other.params), name

    def test_bytes_are_foreseen_and_counted(self) -> None:
        for name, case in self._each():
            foreseen = case.optimizer.expected_state_bytes()  # type: ignore[attr-defined]
            case.run(range(1))
            held = [x for state in case.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
            assert foreseen == sum(x.nbytes for x in held), name
            assert foreseen == case.optimizer.state_bytes(), name  # type: ignore[attr-defined]

    def test_groups_can_be_added_and_have_their_own_learning_rates(self) -> None:
        for name, case in self._each():
            late = nn.Parameter(gaussian(6, 4, seed=9))
            case.run(range(2))
            case.optimizer.add_param_group({"params": [late], "lr": 0.0, **case.group})
            start, before = late.detach().clone(), case.params[0].detach().clone()
            late.grad = gaussian(6, 4, seed=8)
            case.run(range(2, 4))
            assert torch.equal(late.detach(), start), name
            case.optimizer.param_groups[-1]["lr"] = 0.1
            case.run(range(4, 5))
            assert not torch.equal(late.detach(), start), name
            assert not torch.equal(case.params[0].detach(), before), name

    def test_closures_and_schedulers_work(self) -> None:
        for name, case in self._each(lr=0.02):
            scheduler = torch.optim.lr_scheduler.LinearLR(case.optimizer, 1.0, 0.1, 40)
            losses = []
            for _ in range(40):
                losses.append(case.optimizer.step(case.closure))
                scheduler.step()
            assert losses[-1] < losses[0], name

    def test_copies_go_on_as_the_original_does(self) -> None:
        for name, case in self._each():
            case.run(range(3))
            params, optimizer = copy.deepcopy((case.params, case.optimizer))
            case.run(range(3, 6))
            case.params, case.optimizer, done = params, optimizer, case.params
            case.run(range(3, 6))
            assert all(map(torch.equal, case.params, done)), name

    def test_parameters_without_gradients_and_empty_groups_stay(self) -> None:
        for name, case in self._each():
            case.optimizer.add_param_group({"params": [], **case.group})
            before = [p.detach().clone() for p in case.params]
            case.optimizer.step()
            assert all(map(torch.equal, case.params, before)), name
            assert not any(case.optimizer.state.values()), name

    def test_gradients_that_cannot_be_worked_on_are_refused_before_anything_changes(self) -> None:
        for name, case in self._each():
            before = [p.detach().clone() for p in case.params]
            case.give(0)
            case.params[1].grad[0, 0] = torch.nan  # type: ignore[index]
            with pytest.raises(RuntimeError, match="parameter 1 of group 0 holds NaN or infinity"):
                case.optimizer.step()
            case.params[1].grad = gaussian(*case.params[1].shape).to_sparse()
            with pytest.raises(RuntimeError, match="parameter 1 of group 0 is sparse"):
                case.optimizer.step()
            assert all(map(torch.equal, case.params, before)), name
            case.run(range(1))
            assert all(p.isfinite().all() for p in case.params), name

    def test_impossible_settings_are_refused(self) -> None:
        bad: list[tuple[dict[str, Any], str]] = [
            ({"rank": 0}, "rank of group 0"), ({"rank": 2.5}, "rank of group 0"), ({"rank": True}, "rank of group 0"),
            ({"rank": 2, "density": 0.5}, "both a rank"), ({"density": 2.0}, "density of group 0"),
            ({"interval": 0}, "interval of group 0"), ({"lr": -0.1}, "lr of group 0"),
            ({"weight_decay": -1.0}, "weight_decay of group 0"),
        ]  # fmt: skip
        for name, cls, group in self.optimizers():
            for settings, message in bad:
                with pytest.raises(ValueError, match=message):
                    cls([{"params": [nn.Parameter(torch.ones(4, 4))], **settings}])
            for shape in ((4,), ()):
                with pytest.raises(ValueError, match="only matrices can be projected"):
                    cls([{"params": [nn.Parameter(torch.ones(shape))], **group}])
            with pytest.raises(TypeError, match="floating point"):
                cls([nn.Parameter(torch.ones(4, dtype=torch.int32), requires_grad=False)])
            assert name

    def test_gradients_are_left_as_they_are(self) -> None:
        for name, case in self._each():
            for step in range(3):
                case.give(step)
                before = [p.grad.clone() for p in case.params]  # type: ignore[union-attr]
                case.optimizer.step()
                assert all(torch.equal(p.grad, g) for p, g in zip(case.params, before, strict=True)), name  # type: ignore[arg-type]


def _counted(params: list[nn.Parameter]) -> list[int]:
    """A list that gets the number of gradients alive, each time that one has been made."""
    alive: list[int] = []

    def count(_: Tensor) -> None:
        alive.append(sum(q.grad is not None for q in params))

    for p in params:
        p.register_post_accumulate_grad_hook(count)
    return alive


class Case:
    """An optimiser with three matrices in a projected group and two other parameters."""

    def __init__(self, cls: Make, group: dict[str, Any], dtype: torch.dtype, settings: dict[str, Any]):
        self.cls, self.group, self.dtype, self.settings = cls, group, dtype, settings
        matrices = [nn.Parameter(gaussian(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(SHAPES)]
        others = [nn.Parameter(gaussian(5, seed=7, dtype=dtype)), nn.Parameter(gaussian(4, 3, seed=8, dtype=dtype))]
        self.params = matrices + others
        self.optimizer = cls(
            [{"params": matrices, "interval": 3, **group}, {"params": others}], **({"lr": 0.05} | settings)
        )

    def give(self, step: int) -> None:
        """Gradients that depend on the step only."""
        for i, p in enumerate(self.params):
            p.grad = (gaussian(*p.shape, seed=100 + i) + 0.5 * gaussian(*p.shape, seed=1000 * step + i)).to(p.dtype)

    def run(self, steps: range) -> None:
        for step in steps:
            self.give(step)
            self.optimizer.step()

    def closure(self) -> float:
        self.optimizer.zero_grad()
        loss = self.loss(0)
        loss.backward()
        return loss.item()

    def loss(self, step: int) -> Tensor:
        """A loss whose gradient is a little different at each step."""
        targets = [gaussian(*p.shape, seed=50 + i) + 0.1 * gaussian(*p.shape, seed=1000 * step + i) for i, p in enumerate(self.params)]  # fmt: skip # noqa: E501
        losses = [(p - t.to(p.dtype)).square().sum() for p, t in zip(self.params, targets, strict=True)]
        return torch.stack(losses).sum()
