"""DCT-AdamW: the basis, the choice of columns, rotation, error feedback, and what is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.fft
import torch
from drive import drive, gradients, parameter
from torch import Tensor, nn

from eckart.linalg.dct import dct, dct_basis
from eckart.linalg.svd import truncated_svd
from eckart.optimizers import DCT, SGD, Adafactor, DCTAdamW, ErrorFeedback, Fira, Frugal, Projected, Random
from eckart.optimizers.modes import contract, expand, overlap
from eckart.optimizers.projectors import Draw, Projector
from eckart.optimizers.storage import Blocks, Plain
from eckart.testing import error_ratio


@pytest.mark.parametrize("n", [1, 2, 7, 12, 31])
def test_the_basis_is_orthonormal_and_the_fft_computes_its_products(n: int) -> None:
    B, x = dct_basis(n), parameter(5, n).detach()
    torch.testing.assert_close(B.T @ B, torch.eye(n), atol=1e-6, rtol=0)
    torch.testing.assert_close(dct(x), x @ B, atol=1e-5, rtol=0)
    np.testing.assert_allclose(dct(x).numpy(), scipy.fft.dct(x.numpy(), type=2, norm="ortho"), atol=1e-5)
    if n > 2:
        assert error_ratio(x @ B.T, x @ B) > 0.1
    assert dct(x.double()).dtype == dct_basis(n, torch.float64).dtype == torch.float64


def test_wide_bases_stay_orthonormal() -> None:
    B = dct_basis(1500)
    torch.testing.assert_close(B[:, -3:].T @ B, torch.eye(1500)[-3:], atol=1e-5, rtol=0)
    assert dct(torch.zeros(2, 0)).shape == (2, 0)


def captured(projector: Projector, G: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """What a projector keeps of G, and what it loses."""
    ranks, draw = projector.ranks(tuple(G.shape), {"rank": rank, "density": None}, Draw()), Draw()
    factors = projector.factors(projector.choose(G, ranks, {}, draw), G)
    kept = expand(contract(G, factors), factors, tuple(G.shape))
    return kept, G - kept


def smooth(m: int, n: int) -> Tensor:
    """Rows whose neighbouring entries are correlated."""
    at = torch.arange(n, dtype=torch.float64)
    C = torch.exp(-((at[:, None] - at[None, :]) ** 2) / 18) + 1e-3 * torch.eye(n, dtype=torch.float64)
    return parameter(m, n).detach() @ torch.linalg.cholesky(C).T.float()


MATRICES = {
    "random": lambda: parameter(20, 16).detach(),
    "low-rank": lambda: parameter(20, 3).detach() @ parameter(3, 16, seed=1).detach(),
    "smooth": lambda: smooth(20, 16),
}


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_lost_are_the_other_coordinates_and_never_more_than_its_share(kind: str, transposed: bool) -> None:
    G, r = MATRICES[kind](), 5
    S = G @ dct_basis(16)
    discarded = S.square().sum(0).sort().values[: 16 - r].sum()
    lost = captured(DCT(norm="l2"), G.T if transposed else G, r)[1].square().sum()
    torch.testing.assert_close(lost, discarded, rtol=1e-5, atol=1e-5)
    assert lost <= (1 - r / 16) * G.square().sum() * (1 + 1e-5)
    assert captured(DCT(norm="l1"), G.T if transposed else G, r)[1].square().sum() >= lost * (1 - 1e-5)


def test_the_norms_rank_spikes_and_plateaus_differently() -> None:
    S = torch.zeros(9, 8)
    S[0, 2], S[:, 5] = 3.0, 0.5  # l1 norms 3 and 4.5, l2 norms 3 and 1.5
    for transposed in (False, True):
        G = S @ dct_basis(8).T
        G = G.T if transposed else G
        for norm, column in (("l1", 5), ("l2", 2)):
            found = DCT(norm=norm).choose(G, {int(not transposed): 1}, {}, Draw())
            assert found[int(not transposed)].tolist() == [column]


@pytest.mark.parametrize("shape", [(20, 15), (15, 20), (17, 17)])
def test_both_paths_choose_the_same_columns(shape: tuple[int, int]) -> None:
    G = gradients(shape, 1)[0]
    for norm in ("l1", "l2"):
        ours = captured(DCT(norm=norm, path="fft"), G, 4)[0]
        assert torch.equal(ours, captured(DCT(norm=norm, path="matmul"), G, 4)[0])


def test_it_is_far_above_a_random_basis_on_smooth_gradients_and_no_better_on_others() -> None:
    n, r = 64, 16
    G = smooth(96, n)
    errors = {name: error_ratio(captured(p, G, r)[0], G) for name, p in {"dct": DCT(), "random": Random()}.items()}
    best = truncated_svd(G, r).error / float(G.norm())
    assert best < errors["dct"] < 0.5 * errors["random"]
    U, V = (torch.linalg.qr(parameter(k, n, seed=s).detach())[0] for k, s in ((96, 2), (n, 3)))
    rotated = U * 0.8 ** torch.arange(n) @ V.T
    dct_error, random_error = (error_ratio(captured(p, rotated, r)[0], rotated) for p in (DCT(), Random()))
    assert dct_error > 0.75 * random_error


def test_rotation_keeps_common_columns_and_zeroes_the_others() -> None:
    I = torch.tensor([1, 4, 6], dtype=torch.int32)
    assert torch.equal(overlap(I, I), torch.eye(3))
    assert not overlap(I, torch.tensor([0, 2, 3], dtype=torch.int32)).any()
    assert torch.equal(overlap(I, torch.tensor([4, 5, 6])), torch.tensor([[0, 0, 0], [1, 0, 0], [0, 0, 1]]).float())
    B = dct_basis(8)
    J = torch.tensor([4, 5, 6])
    torch.testing.assert_close(B[:, I.long()].T @ B[:, J], overlap(I, J), atol=1e-6, rtol=0)


def test_moments_follow_their_columns() -> None:
    B, lr = dct_basis(8), 0.1
    p = nn.Parameter(torch.zeros(10, 8))
    optimizer = DCTAdamW([{"params": [p], "rank": 2}], lr=lr)
    first = torch.ones(10, 1) * (2 * B[:, 1] + 1.5 * B[:, 4])
    second = torch.ones(10, 1) * (2 * B[:, 4] + 1.5 * B[:, 6])
    drive(optimizer, p, [first])
    assert optimizer.state[p]["basis_1"].tolist() == [1, 4]
    before = optimizer.state[p]["exp_avg"].clone()
    drive(optimizer, p, [second])
    assert optimizer.state[p]["basis_1"].tolist() == [4, 6]
    after = optimizer.state[p]["exp_avg"]
    a = second @ B
    torch.testing.assert_close(after[:, 0], 0.9 * before[:, 1] + 0.1 * a[:, 4])
    torch.testing.assert_close(after[:, 1], 0.1 * a[:, 6])


@pytest.mark.parametrize("interval", [1, 3])
def test_at_full_rank_it_is_adamw_in_the_fixed_basis(interval: int) -> None:
    grads, B = gradients((12, 8), 7), dct_basis(8)
    p, q = parameter(12, 8), nn.Parameter(parameter(12, 8).detach() @ B)
    path = drive(DCTAdamW([{"params": [p], "rank": 8}], lr=0.01, interval=interval, weight_decay=0.1), p, grads)
    adamw = torch.optim.AdamW([q], lr=0.01, weight_decay=0.1)
    for ours, theirs in zip(path, drive(adamw, q, [G @ B for G in grads]), strict=True):
        torch.testing.assert_close(ours, theirs @ B.T, atol=1e-5, rtol=0)


def descended(feedback: ErrorFeedback | None, steps: int, G: Tensor, rank: int, interval: int = 1) -> Tensor:
    """The sum of the updates of gradient descent with a constant gradient, per step."""
    p = nn.Parameter(torch.zeros_like(G))
    optimizer = Projected(
        [{"params": [p], "rank": rank}], projector=DCT(), inner=SGD(), residual=feedback, lr=1.0, interval=interval
    )
    return -drive(optimizer, p, [G] * steps)[-1] / steps


@pytest.mark.parametrize(
    "storage", [Plain(), Blocks(8, group=None), Blocks(4, group=None)], ids=["exact", "8bit", "4bit"]
)
def test_errors_that_are_fed_back_are_made_up_for(storage: object) -> None:
    G, r = gradients((12, 16), 1)[0], 4
    G = G @ G.T @ G / 50  # (12, 16), whose left side of 12 is projected
    steps = 20 * 12 // r
    error = error_ratio(descended(ErrorFeedback(storage), steps, G, r), G)
    assert error < 0.05
    if isinstance(storage, Plain):
        assert error_ratio(descended(ErrorFeedback(storage), 4 * steps, G, r), G) < 0.4 * error
    dropped = descended(None, steps, G, r)
    assert error_ratio(dropped, G) > 0.1
    torch.testing.assert_close(dropped, captured(DCT(), G, r)[0], atol=1e-5, rtol=1e-5)


def test_state_is_whole_numbers_and_two_moments_and_bases_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    bases = []

    def noted(*args: Any) -> Tensor:
        bases.append(dct_basis(*args))
        return bases[-1]

    monkeypatch.setattr("eckart.optimizers.projectors.dct.dct_basis", noted)
    params = [parameter(20, 8), parameter(8, 30), parameter(16, 16), parameter(5)]
    optimizer = DCTAdamW([{"params": params[:3], "rank": 4}, {"params": params[3:]}], lr=0.1)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    for p, long in zip(params[:3], (20, 30, 16), strict=True):
        held = [x for x in optimizer.state[p].values() if isinstance(x, Tensor)]
        assert sum(x.numel() for x in held if not x.is_floating_point()) == 4
        assert sum(x.numel() for x in held if x.is_floating_point()) == 2 * 4 * long
    assert {len(B) for B in bases} == {8, 16}
    assert len({id(B) for B in bases}) == 2 < len(bases)
    assert optimizer.state_bytes() == optimizer.expected_state_bytes()


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_errors_are_kept_in_so_many_bits(bits: int) -> None:
    p = parameter(20, 16)
    optimizer = DCTAdamW([{"params": [p], "rank": 4}], lr=0.1, feedback=bits)
    drive(optimizer, p, gradients((20, 16), 3))
    rows = 20 * (4 + 1) if bits < 32 else 0
    assert optimizer.state_bytes() - 4 * 4 - 2 * 4 * 4 * 20 == 20 * 16 * bits // 8 + rows
    assert optimizer.state_bytes() == optimizer.expected_state_bytes()


def test_half_precision_uses_the_basis_in_full_precision() -> None:
    p, q = parameter(12, 8, dtype=torch.bfloat16), parameter(12, 8)
    grads = [G.bfloat16() for G in gradients((12, 8), 5)]
    drive(DCTAdamW([{"params": [p], "rank": 3}], lr=0.1), p, grads)
    q.data.copy_(parameter(12, 8, dtype=torch.bfloat16).data)
    drive(DCTAdamW([{"params": [q], "rank": 3}], lr=0.1), q, [G.float() for G in grads])
    torch.testing.assert_close(p.detach().float(), q.detach(), atol=0.05, rtol=0.02)


def test_the_same_selector_serves_fira_and_frugal() -> None:
    p, q = (nn.Parameter(torch.zeros(12, 8)) for _ in range(2))
    for optimizer, x in (
        (Fira([{"params": [p], "rank": 2}], lr=0.1, projector=DCT()), p),
        (Frugal([{"params": [q], "density": 0.25}], lr=0.1, subspace="dct"), q),
    ):
        values = torch.linalg.svdvals(drive(optimizer, x, gradients((12, 8), 1))[0])
        assert values[-1] > 1e-3 * values[0]
        assert optimizer.state[x]["basis_1"].dtype == torch.int32


def test_impossible_settings_are_refused() -> None:
    p = parameter(4, 6)
    with pytest.warns(UserWarning, match="rank 5 is more than parameter 0 of group 0"):
        optimizer = DCTAdamW([{"params": [p], "rank": 5}], lr=0.1)
    drive(optimizer, p, gradients((4, 6), 1))
    assert optimizer.state[p]["basis_0"].numel() == 4
    with pytest.raises(ValueError, match="rank of group 0 is a whole number"):
        DCTAdamW([{"params": [p], "rank": 0}])
    with pytest.raises(ValueError, match="DCT projects matrices only"):
        DCTAdamW([{"params": [parameter(3, 4, 5)], "rank": 2}])
    with pytest.raises(ValueError, match="4, 8 or 32 bits"):
        DCTAdamW([{"params": [p], "rank": 2}], feedback=5)
    with pytest.raises(ValueError, match="'l1' or 'l2'"):
        DCTAdamW([{"params": [p], "rank": 2}], norm="l3")
    with pytest.raises(ValueError, match="'matmul' or 'fft'"):
        DCTAdamW([{"params": [p], "rank": 2}], path="fast")
    optimizer = Projected(
        [{"params": [p], "rank": 2}], projector=DCT(), inner=Adafactor(), lr=0.1, interval=1, transport="rotate"
    )
    with pytest.raises(ValueError, match="cannot be turned"):
        drive(optimizer, p, gradients((4, 6), 2))
