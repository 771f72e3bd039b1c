"""Groups of columns kept or dropped: aligned zeros, equal rows, bytes, widths that the group does not divide."""

from __future__ import annotations

import pytest
import torch

from eckart.forms import GroupSparse, Sparse, parse
from eckart.forms.selections import Fisher, Wanda
from eckart.testing import FormContract, error_ratio, gaussian
from eckart.testing.forms import Case


@pytest.mark.parametrize("width", [5, 16, 40, 64])
@pytest.mark.parametrize("density", [0.1, 0.4, 1.0])
def test_groups_stand_or_fall_together(width: int, density: float) -> None:
    out, group = 7, min(16, width)
    per_row = -(-width // group)
    W = gaussian(out, width)
    module = GroupSparse(density).fit(W, dtype=torch.float16)
    dense = module.dense().detach()
    kept = round(density * out * per_row)
    found = [dense[i, j : j + group] for i in range(out) for j in range(0, width, group)]
    assert sum(bool((g != 0).all()) for g in found) == kept
    assert sum(not g.any() for g in found) == len(found) - kept
    norms = [float(W[i, j : j + group].square().sum()) for i in range(out) for j in range(0, width, group)]
    pairs = sorted(zip(norms, (bool(g.any()) for g in found), strict=True))
    assert [alive for _, alive in pairs] == [False] * (len(found) - kept) + [True] * kept
    index = min(kept + 4 * (out + 1), out * ((per_row + 7) // 8))
    assert module.nbytes == GroupSparse(density).nbytes((out, width), torch.float16) == 2 * kept * group + index


def test_rows_keep_equally_many_where_asked() -> None:
    W = gaussian(6, 64) * torch.logspace(0, 3, 6)[:, None]
    per_row = (GroupSparse(0.5, 8, Fisher(per_row=True)).fit(W).dense() != 0).sum(1)
    assert per_row.tolist() == [32] * 6
    anywhere = (GroupSparse(0.5, 8).fit(W).dense() != 0).sum(1)
    assert anywhere[-1] == 64
    assert anywhere[0] == 0  # an empty row
    assert error_ratio(GroupSparse(0.5, 8).fit(W)(W), W @ GroupSparse(0.5, 8).fit(W).dense().T) <= 1e-6


def test_groups_of_one_are_unstructured() -> None:
    W = gaussian(9, 33)
    assert torch.equal(GroupSparse(0.3, 1).fit(W).dense(), Sparse(0.3).fit(W).dense())
    assert GroupSparse(0.3, 1).nbytes((9, 33), torch.float32) == Sparse(0.3).nbytes((9, 33), torch.float32)


def test_padding_of_a_short_group_teaches_nothing() -> None:
    module = GroupSparse(1.0, 4).fit(gaussian(2, 6))
    module.dense().sum().backward()
    assert module.kept.weight.grad is not None
    assert module.kept.weight.grad.view(4, 4).sum(1).tolist() == [4, 2, 4, 2]


def test_other_selections() -> None:
    W = gaussian(4, 32)
    assert torch.equal(
        GroupSparse(0.5, 8, Wanda()).fit(W).dense(), GroupSparse(0.5, 8, Fisher(per_row=True)).fit(W).dense()
    )


@pytest.mark.parametrize(("density", "group"), [(0, 4), (1.5, 4), (0.5, 0), (0.5, "many")])
def test_refused(density: float, group: int) -> None:
    with pytest.raises(ValueError, match="group_sparse"):
        GroupSparse(density, group)


class TestValuesOfAnyForm(FormContract):
    def forms(self) -> list[Case]:
        texts = ["quantized(bits=3, group=4)", "quantized(bits=8, group=None)", "low_rank(rank=1)"]
        return [(parse(f"group_sparse(density=0.4, group=4, values={text})"), (12, 10)) for text in texts]
