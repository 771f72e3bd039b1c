"""Tensors that are made once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from eckart.forms import parse
from eckart.linalg.constants import MOST, constant
from eckart.testing import gaussian


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


class Times(torch.nn.Module):
    def __init__(self, number: Callable[[int], Tensor]):
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return x * self.number(4)


@pytest.mark.parametrize("known", [False, True])
def test_nothing_is_kept_of_a_graph(known: bool) -> None:
    """And a graph takes what is known as it is, instead of how it is made."""

    @constant
    def threes(n: int) -> Tensor:
        return 3 * torch.special.ndtri(torch.ones(n) / 2).exp()

    if known:
        threes(4)
    graph = torch.export.export(Times(threes), (torch.ones(4),), strict=False)
    assert ("ndtri" in graph.graph_module.code) == (not known)
    assert type(threes(4)) is Tensor
    assert torch.equal(graph.module()(torch.ones(4)), threes(4))


def test_the_oldest_are_forgotten() -> None:
    calls = []

    @constant
    def ones(n: int) -> Tensor:
        calls.append(n)
        return torch.ones(n)

    for n in (*range(MOST), 0, MOST, 1, 0):
        ones(n)
    assert calls == [*range(MOST + 1), 0]


def test_compiled_code_makes_them_itself() -> None:
    """Without a compiler: what is tested is what torch traces, for several numbers of rows."""
    form = parse("rotated(quantized(bits=4))")
    layers = torch.nn.Sequential(*(form.fit(gaussian(*shape)) for shape in ((40, 96), (96, 40))))
    torch._dynamo.reset()
    compiled = torch.compile(layers.requires_grad_(False), backend="eager", fullgraph=True)
    for rows in (3, 5, 7):
        x = gaussian(rows, 96, seed=rows)
        torch.testing.assert_close(compiled(x), layers(x), rtol=1e-4, atol=1e-4)
