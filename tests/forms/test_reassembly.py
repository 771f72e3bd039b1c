"""`reassembly`: exact where channels are only split, a mean where they are merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from eckart.forms import FORMS, parse
from eckart.forms.reassembly import Reassembly, ReassemblyMatrix
from eckart.testing import error_ratio, gaussian


def made(split: list[int], copies: list[int], merged: list[int], into: list[int], shape: Any, dtype: Any = torch.float64) -> ReassemblyMatrix:  # fmt: skip # noqa: E501
    places = (torch.tensor(t, dtype=torch.long) for t in (split, copies, merged, into))
    return Reassembly(len(split), len(merged)).at(*places, shape, dtype)


def naive(split: list[int], copies: list[int], merged: list[int], into: list[int], x: Tensor) -> Tensor:
    rows = []
    for i in range(x.shape[-1]):
        if i in merged:
            continue
        own = [i, *(m for m, d in zip(merged, into, strict=True) if d == i)]
        times = copies[split.index(i)] if i in split else 1
        rows += [x[..., own].mean(-1) / times] * times
    return torch.stack(rows, -1)


def test_is_what_a_loop_makes() -> None:
    places = ([1, 6], [3, 2], [0, 4, 7], [2, 2, 5])
    x = gaussian(4, 9, dtype=torch.float64)
    assert torch.allclose(made(*places, (9, 9))(x), naive(*places, x))


def test_splitting_alone_is_exact_and_tames_the_largest() -> None:
    x, W = gaussian(4, 6, dtype=torch.float64), gaussian(5, 6, seed=1, dtype=torch.float64)
    x[:, 3] *= 30
    module = made([3], [7], [], [], (12, 6))
    assert error_ratio(module(x) @ module.columns(W).T, x @ W.T) < 1e-14
    assert float(module(x).abs().max()) < float(x.abs().max()) / 6.99
    assert torch.equal(module.columns(W)[:, 3:10], W[:, 3:4].expand(-1, 7))


def test_a_merged_pair_is_off_by_half_the_products_of_differences() -> None:
    x, W = gaussian(40, 6, dtype=torch.float64), gaussian(5, 6, seed=1, dtype=torch.float64)
    module = made([], [], [1], [4], (5, 6))
    off = float((module(x) @ module.columns(W).T - x @ W.T).square().sum())
    wanted = float((x[:, 1] - x[:, 4]).square().sum() * (W[:, 1] - W[:, 4]).square().sum()) / 4
    assert off == pytest.approx(wanted, rel=1e-12)


def test_stores_places_and_nothing_else() -> None:
    module = made([1, 6], [3, 2], [0, 4, 7], [2, 2, 5], (9, 9), torch.bfloat16)
    assert {k: (v.dtype, len(v)) for k, v in module.state_dict().items()} == {
        "split": (torch.int16, 2), "copies": (torch.int16, 2), "merged": (torch.int16, 3), "into": (torch.int16, 3),
    }  # fmt: skip
    assert module.nbytes == Reassembly(2, 3).nbytes((9, 9), torch.bfloat16) == 20
    assert module.dense().dtype == torch.bfloat16
    assert Reassembly(1, 1).nbytes((40000, 40000), torch.bfloat16) == 16


def test_fit_splits_what_carries_most_and_merges_what_carries_least() -> None:
    W = gaussian(6, 6) * torch.tensor([1.0, 50, 2, 0.01, 3, 0.02])
    module = Reassembly(1, 2).fit(W)
    assert module.split.tolist() == [1]
    assert module.copies.tolist() == [3]
    assert sorted(module.merged.tolist()) == [3, 5]


def test_in_a_product_it_is_square() -> None:
    form = parse("quantized(bits=8, group=None) @ reassembly(split=1, merged=2)")
    module = form.build((7, 10))
    assert module.right.shape == (10, 10)  # type: ignore[union-attr]
    assert FORMS.parse(str(form)) == form


@pytest.mark.parametrize(
    ("places", "shape"),
    [
        (([1], [3], [0], [2]), (7, 7)),
        (([1], [3], [1], [2]), (8, 7)),
        (([1], [2], [0], [1]), (7, 7)),
        (([1], [2], [0], [9]), (7, 7)),
        (([1], [0], [], []), (6, 7)),
        (([], [], [], []), (8, 7)),
        (([0, 1], [1, 1], [2], [2]), (2, 3)),
    ],
)
def test_what_does_not_fit_together_is_refused(places: Any, shape: Any) -> None:
    with pytest.raises(ValueError, match="reassembly"):
        made(*places, shape)


@pytest.mark.parametrize(("name", "value"), [("copies", 9), ("split", 40), ("into", 0), ("merged", -1)])
def test_a_damaged_file_is_named(name: str, value: int) -> None:
    module = made([1], [2], [0], [2], (7, 7))
    module.load_state_dict({**module.state_dict(), name: torch.tensor([value], dtype=torch.int16)})
    with pytest.raises(ValueError, match="the file is damaged"):
        module(gaussian(2, 7, dtype=torch.float64))


@pytest.mark.parametrize("text", ["reassembly(split=-1)", "reassembly(merged=1.5)"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="reassembly"):
        parse(text)
