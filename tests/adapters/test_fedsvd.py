"""FedSVD: clients train B, the server turns A."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from federated import CLASSES, WIDTH, adapted, drawn, federation, loss, measured, network, spread
from torch import Tensor, nn

from eckart import adapters
from eckart.adapters.federation import Privacy, Refresh, Rule
from eckart.adapters.federation.factors import Pair, turned
from eckart.adapters.federation.privacy import clipped_sum, each_gradient, gradient
from eckart.adapters.federation.state import put_state, state_of
from eckart.testing.adapters import near


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(B: Tensor, A: Tensor) -> Pair:
    return Pair(B, A, B.new_zeros(len(B), 0), A.new_zeros(0, A.shape[1]))


def gap(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def orthonormal(A: Tensor) -> bool:
    return bool((A.double() @ A.double().T - torch.eye(len(A), dtype=torch.float64)).abs().max() < 1e-6)


def test_a_refresh_turns_the_factors_and_leaves_the_product() -> None:
    B, A = gaussian(30, 5), gaussian(5, 20, seed=1)
    found = Refresh().joined(pair(B, A), [pair(B, A)], [1.0], 1, "layer")
    product = B.double() @ A.double()
    assert gap(found.B.double() @ found.A.double(), product) < 1e-6
    assert orthonormal(found.A)
    gram = found.B.double().T @ found.B.double()
    sizes = gram.diagonal()
    assert float((gram - sizes.diag()).abs().max()) < 1e-5 * float(sizes[0])
    assert bool((sizes[:-1] >= sizes[1:]).all())
    U, S, V = torch.linalg.svd(product, full_matrices=False)
    torch.testing.assert_close(sizes.sqrt(), S[:5], rtol=1e-5, atol=0)
    assert float((V[:5] @ found.A.double().T).abs().diagonal().min()) > 1 - 1e-6
    assert float((U[:, :5] * (found.B.double() / sizes.sqrt())).sum(0).abs().min()) > 1 - 1e-6
    assert float(found.B.norm()) == pytest.approx(float(product.norm()), rel=1e-5)


def test_products_of_lower_rank_leave_a_whole_frame_in_the_span_of_A() -> None:
    A = gaussian(4, 12, seed=1)
    span = torch.linalg.qr(A.double().T).Q
    for B in (torch.zeros(9, 4), gaussian(9, 1) @ gaussian(1, 4, seed=2), gaussian(9, 2) @ gaussian(2, 4, seed=2)):
        rank = int(torch.linalg.matrix_rank(B))
        left, right, *_ = turned(B, A, 4, "layer")
        assert bool(right.isfinite().all())
        assert orthonormal(right)
        assert float((right.double() - right.double() @ span @ span.T).norm()) < 1e-6
        torch.testing.assert_close(left @ right, B @ A, rtol=1e-4, atol=1e-5)
        assert float(left[:, rank:].norm()) <= 1e-6 * max(1.0, float(left.norm()))
    twice = torch.cat([A[:2], A[:2]])  # a frame that has lost two directions
    left, right, *_ = turned(gaussian(9, 4), twice, 4, "layer")
    assert orthonormal(right)
    torch.testing.assert_close(left @ right, gaussian(9, 4) @ twice, rtol=1e-4, atol=1e-5)


def test_rounds_refresh_the_frame_and_the_model_answers_as_before() -> None:
    model, parts, x = adapted("fedsvd", alpha=2.0), [drawn(20, k) for k in range(3)], drawn(30, 9)["x"]
    never = adapted("fedsvd", alpha=2.0, period=0)
    for made in (model, never):
        federation(made, parts, batch=6, steps=3, lr=0.2).run(1)
    assert not torch.equal(state_of(model)["0.A"], state_of(never)["0.A"])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), never.eval()(x), rtol=1e-5, atol=1e-5)
    assert all(orthonormal(state_of(model)[f"{layer}.A"]) for layer in "02")


def test_the_frame_changes_every_period_after_the_warmup() -> None:
    model = adapted("fedsvd", period=2, warmup=1)
    server = federation(model, [drawn(20, 1), drawn(20, 2)], batch=6, steps=2, lr=0.2)
    changed = []
    for _ in range(5):
        before = state_of(model)["0.A"]
        server.round()
        changed.append(not torch.equal(state_of(model)["0.A"], before))
    assert changed == [False, False, True, False, True]
    frozen = adapted("fedsvd", period=0)
    before = state_of(frozen)["0.A"]
    federation(frozen, [drawn(20, 1)], batch=6, lr=0.2).run(3)
    assert torch.equal(state_of(frozen)["0.A"], before)


def test_turning_never_leaves_the_span_of_the_first_frame() -> None:
    model = adapted("fedsvd")
    first = torch.linalg.qr(state_of(model)["0.A"].double().T).Q
    federation(model, [drawn(30, k) for k in range(3)], batch=8, steps=3, lr=0.5).run(5)
    A = state_of(model)["0.A"].double()
    assert float((A - A @ first @ first.T).norm()) < 1e-5


def test_with_a_common_frame_the_mean_is_exact_and_with_two_trained_factors_it_is_not() -> None:
    A, shares = gaussian(3, 12, seed=1), [0.2, 0.3, 0.5]
    uploads = [pair(gaussian(9, 3, seed=k), A) for k in range(3)]
    expected = sum(p * u.B.double() @ A.double() for p, u in zip(shares, uploads, strict=True))
    assert isinstance(expected, Tensor)
    found = Refresh(0).joined(uploads[0], uploads, shares, 1, "layer")
    assert gap(found.B.double() @ found.A.double(), expected) < 1e-6
    both = [u._replace(A=gaussian(3, 12, seed=10 + k)) for k, u in enumerate(uploads)]
    product = sum(p * u.B @ u.A for p, u in zip(shares, both, strict=True))
    assert isinstance(product, Tensor)
    plain = Rule().joined(both[0], both, shares, 1, "layer")
    assert gap(plain.B @ plain.A, product) > 0.1


def delta(model: Any, layer: str = "0") -> Tensor:
    return adapters.updates(model)[layer].delta(None).detach().double()  # type: ignore[arg-type]


def test_noise_on_B_has_the_energy_of_the_formula_and_on_both_factors_more() -> None:
    """E ||Delta - Delta without noise||² of one step, at the same A, B and C."""
    size, lr, sigma, clip, rank, out = 5, 0.3, 1.3, 0.7, 3, 16
    A = torch.linalg.qr(gaussian(WIDTH, rank, seed=4)).Q.T.contiguous()
    data = drawn(size, 2)

    def energy(key: str, B: Tensor) -> float:
        model = adapted(key, rank=rank, target_modules=["0"])
        put_state(model, {"0.A": A, "0.B": B})
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        privacy, generator = Privacy(clip, sigma), np.random.default_rng(3)
        with torch.no_grad():
            start = {n: p.clone() for n, p in parameters.items()}
            quiet = clipped_sum(model, loss, data, clip)
            empty = {n: t[:0] for n, t in data.items()}
            for n, p in parameters.items():
                p.copy_(start[n] - lr * quiet[n] / size)
            expected, found = delta(model), 0.0
            for _ in range(200):
                noise = privacy.gradients(model, loss, empty, size, generator)
                for n, p in parameters.items():
                    p.copy_(start[n] - lr * (quiet[n] / size + noise[n]))
                found += float((delta(model) - expected).square().sum()) / 200
        return found

    formula = lr**2 * sigma**2 * clip**2 * out * rank / size**2
    B = gaussian(out, rank, seed=6)
    assert energy("fedsvd", torch.zeros(out, rank)) == pytest.approx(formula, rel=0.05)
    assert energy("fedsvd", B) == pytest.approx(formula, rel=0.05)
    small, large = (energy("dp_lora", times * B) for times in (1.0, 3.0))
    assert small > 1.5 * formula
    assert large > 4 * small


def test_an_orthonormal_frame_bounds_the_gradient_of_each_example_by_the_full_one() -> None:
    model = adapted("fedsvd", target_modules=["0"])
    A = torch.linalg.qr(gaussian(WIDTH, 4, seed=4)).Q.T.contiguous()
    put_state(model, {"0.A": A, "0.B": 0.1 * gaussian(16, 4)})
    data = drawn(6, 3)
    of_B = [float(g.popitem()[1].norm()) for g in each_gradient(model, loss, data)]
    merged: nn.Module = model.merge_and_unload()
    for p in merged.parameters():
        p.requires_grad_(False)
    merged.get_submodule("0").weight.requires_grad_(True)  # type: ignore[union-attr]
    for i, norm in enumerate(of_B):
        full = gradient(merged, loss, {n: t[i : i + 1] for n, t in data.items()})
        assert norm <= float(full["0.weight"].norm()) * (1 + 1e-5)


def test_clients_train_B_alone_and_the_frame_is_sent_once_it_has_turned() -> None:
    model = adapted("fedsvd", rank=3)
    names = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert names == {"B"}
    rows, columns = 16 + CLASSES, WIDTH + 16
    found = federation(model, [drawn(10, k) for k in range(3)], {"per_round": 2}, batch=4, lr=0.1).run(3)
    assert [r.received for r in found] == [2 * 4 * 3 * rows] * 3
    assert [r.sent for r in found] == [2 * 4 * 3 * rows, *[2 * 4 * 3 * (rows + columns)] * 2]
    still = federation(adapted("fedsvd", rank=3, period=0), [drawn(10, 1)], batch=4, lr=0.1).run(2)
    assert [r.sent for r in still] == [4 * 3 * rows] * 2


def test_the_first_rows_come_nearer_to_what_central_training_changes() -> None:
    """Than those of a frame that never turns, which spans the same space."""
    central, k = network(), 2
    start, optimizer = central[0].weight.detach().clone(), torch.optim.SGD(central.parameters(), 0.3)
    for _ in range(100):
        optimizer.zero_grad()
        loss(central, drawn(300, 55)).backward()
        optimizer.step()
    top = torch.linalg.svd((central[0].weight.detach() - start).double()).Vh[:k]
    for seed in range(2):
        overlap = []
        for period in (0, 1):
            model = adapted("fedsvd", period=period, rank=6, seed=seed)
            federation(model, spread(drawn(240, 50 + seed), 3, seed), steps=3, batch=12, lr=0.3).run(4)
            frame = torch.linalg.qr(state_of(model)["0.A"][:k].double().T).Q
            overlap.append(float((top @ frame).square().sum()) / k)
        assert overlap[1] > 2 * overlap[0]


def test_under_the_same_noise_it_learns_no_less_than_a_frame_that_never_turns() -> None:
    privacy, test = Privacy(1.0, 1.2, vectorised=True, at_once=64), drawn(400, 9)
    for seed in range(2):
        losses = []
        for period in (0, 1):
            model = adapted("fedsvd", period=period, rank=6, seed=seed)
            parts = spread(drawn(240, 50 + seed), 3, seed)
            server = federation(model, parts, steps=3, batch=12, lr=1.0, privacy=privacy)
            server.run(4)
            losses.append(measured(model, test))
        assert all(a.epsilon is not None and 0 < a.epsilon < 30 for a in server.privacy(1e-3, "rdp"))
        assert losses[1] <= losses[0]


def test_on_its_own_it_is_lora_with_a_frozen_frame() -> None:
    model = adapted("fedsvd", base=network(), alpha=8.0, rank=4)
    update: Any = adapters.updates(model)["0"]
    with torch.no_grad():
        update.B += 1.0
    left, right = update.factors(None)
    assert near(left @ right, 2.0 * update.B @ update.A)
    assert float(update.A.abs().max()) <= WIDTH**-0.5


def test_bad_settings_are_named() -> None:
    for settings in ({"rank": 0}, {"alpha": 0.0}, {"period": -1}, {"warmup": -2}):
        with pytest.raises(ValueError, match=rf"fedsvd\({next(iter(settings))}="):
            adapted("fedsvd", **settings)
    with pytest.raises(ValueError, match="2: rank 7 is more than a matrix of shape"):
        adapted("fedsvd", rank=7)
