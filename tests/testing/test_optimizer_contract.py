"""The contract of optimisers fails those that break it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from eckart.optimizers import GaLore
from eckart.testing import OptimizerContract, registered_optimizers


class Forgetful(GaLore):
    """Loses its moments in a checkpoint."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state.pop("exp_avg", None)


class Hoarding(GaLore):
    """Keeps an object in its state, as the released GaLore does."""

    def _finish(self, job: Any, *rest: Any) -> None:
        super()._finish(job, *rest)
        job.state["projector"] = self.projector


class Meddling(GaLore):
    """Writes into gradients."""

    def _finish(self, job: Any, *rest: Any) -> None:
        super()._finish(job, *rest)
        job.p.grad.zero_()


class Growing(GaLore):
    """Keeps more than it says."""

    def _finish(self, job: Any, *rest: Any) -> None:
        super()._finish(job, *rest)
        job.state["spare"] = torch.zeros(1)


class Uneven(GaLore):
    """Does another thing when working on many parameters at once."""

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        super()._update(group, params)
        for p in params[1:]:
            p.mul_(1.001)


@pytest.mark.parametrize(
    ("cls", "test"),
    [
        (Forgetful, "test_a_run_from_a_checkpoint_continues_bit_for_bit"),
        (Hoarding, "test_state_holds_tensors_and_numbers_only"),
        (Meddling, "test_gradients_are_left_as_they_are"),
        (Growing, "test_bytes_are_foreseen_and_counted"),
        (Uneven, "test_working_on_all_parameters_at_once_is_working_on_each"),
    ],
)
def test_what_breaks_the_contract_fails_it(cls: type[GaLore], test: str) -> None:
    class Contract(OptimizerContract):
        def optimizers(self) -> list[Any]:
            return [("broken", cls, {"rank": 3})]

    with pytest.raises(AssertionError):
        getattr(Contract(), test)()


def test_a_package_of_ones_own_inherits_it() -> None:
    class Contract(OptimizerContract):
        def optimizers(self) -> list[Any]:
            return [("mine", GaLore, {"rank": 2})]

    for test in _tests(Contract()):
        test()
    assert {name for name, *_ in registered_optimizers()} >= {"galore", "fira", "frugal", "dct_adamw", "lion_k"}


def _tests(contract: OptimizerContract) -> Iterator[Any]:
    return (getattr(contract, name) for name in dir(contract) if name.startswith("test_"))
