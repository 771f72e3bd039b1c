"""Tensors that are made once."""

from __future__ import annotations

import torch
from torch import Tensor

from eckart.linalg.constants import constant


def test_made_once_for_the_same_arguments() -> None:
    calls = []

    @constant
    def ones(n: int) -> Tensor:
        calls.append(n)
        return torch.ones(n)

    assert ones(2) is ones(2)
    assert len(ones(3)) == 3
    assert calls == [2, 3]


def test_what_inference_made_can_be_learnt_with() -> None:
    @constant
    def twos(n: int) -> Tensor:
        return 2 * torch.ones(n)

    with torch.inference_mode():
        twos(3)
    x = torch.ones(3, requires_grad=True)
    (x * twos(3)).sum().backward()
    assert torch.equal(x.grad, twos(3))


def test_nothing_is_kept_of_a_graph() -> None:
    @constant
    def threes(n: int) -> Tensor:
        return 3 * torch.ones(n)

    class Times(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * threes(4)

    graph = torch.export.export(Times(), (torch.ones(4),), strict=False)
    assert type(threes(4)) is Tensor
    assert torch.equal(graph.module()(torch.ones(4)), threes(4))
