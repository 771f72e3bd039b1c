"""NOLA: random matrices that are never kept, drawn the same everywhere, and combined as plain products would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from eckart.adapters.nola import Bases, Combination, quantise
from eckart.adapters.streams import stream_key, uniform_at
from eckart.testing.adapters import adapted, answers, layers, near, small_model, trained


def explicit(bases: Bases) -> Tensor:
    """All of the matrices at once."""
    return torch.cat([rows for _, rows in bases.pieces(torch.device("cpu"))]).view(-1, *bases.shape)


def test_the_stream_is_splitmix64_from_any_place() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]  # of seed 1234567
    halves = [h for word in published for h in (word & 0xFFFFFFFF, word >> 32)]
    expected = [((h - (1 << 32) if h >> 31 else h) >> 8) * 2.0**-23 for h in halves]
    assert uniform_at(1234567, 0, 8).tolist() == expected
    assert uniform_at(1234567, 4, 4).tolist() == expected[4:]


def test_the_stream_is_uniform_and_others_have_nothing_to_do_with_it() -> None:
    x, y = (uniform_at(stream_key(0, name, "A"), 0, 1 << 18) for name in ("one", "two"))
    assert float(x.min()) >= -1
    assert float(x.max()) < 1
    assert abs(float(x.mean())) < 0.01
    assert abs(float(x.square().mean()) - 1 / 3) < 0.005
    assert abs(float(torch.corrcoef(torch.stack([x, y]))[0, 1])) < 0.01
    assert abs(float(torch.corrcoef(torch.stack([x[:-1], x[1:]]))[0, 1])) < 0.01


def test_unrelated_draws_change_nothing_and_the_global_generator_stays_where_it_was() -> None:
    first = explicit(Bases(7, 3, (2, 5), 1.0))
    torch.manual_seed(3)
    torch.rand(11)
    state = torch.get_rng_state()
    assert torch.equal(explicit(Bases(7, 3, (2, 5), 1.0)), first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("piece", [0, 1, 40])
def test_sums_and_gradients_are_those_of_explicit_matrices(piece: int) -> None:
    bases = Bases(7, 6, (3, 5), 0.5, piece)
    coefficients, upstream = torch.randn(6, requires_grad=True), torch.randn(3, 5)
    plain = torch.einsum("k,krc->rc", coefficients, explicit(bases))
    (expected,) = torch.autograd.grad((plain * upstream).sum(), coefficients)
    made = bases.combined(coefficients)
    (found,) = torch.autograd.grad((made * upstream).sum(), coefficients)
    assert near(made, plain)
    assert near(found, expected)


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_bases() -> None:
    def saved(count: int) -> int:
        model, total = adapted("nola", bases=count), 0

        def keep(t: Tensor) -> Tensor:
            nonlocal total
            total += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum()
        return total

    assert saved(64) == saved(4)


def test_it_starts_at_the_model_to_the_bit_and_only_then_moves() -> None:
    plain, model = answers(small_model()), adapted("nola", bases=16)
    assert torch.equal(answers(model), plain)
    vision = answers(adapted("nola", bases=16, mode="vision"))
    assert not torch.equal(vision, plain)
    assert near(vision, plain, 0.1)


@pytest.mark.parametrize("rank", [1, 4])
def test_it_trains_two_numbers_for_each_basis_of_a_layer_whatever_its_width_and_rank(rank: int) -> None:
    model = adapted("nola", bases=9, rank=rank)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 9 * len(layers(model))


def test_saved_it_is_its_coefficients_alone(tmp_path: Path) -> None:
    model = trained(adapted("nola", bases=16))
    before = answers(model)
    model.save_pretrained(tmp_path)
    head = (tmp_path / "adapter_model.safetensors").read_bytes()
    size = len(head) - 8 - int.from_bytes(head[:8], "little")
    assert size == 4 * 2 * 16 * len(layers(model))
    other = PeftModel.from_pretrained(small_model(), tmp_path).eval()
    assert torch.equal(answers(other), before)
    assert near(answers(other.merge_and_unload()), before, 1e-6)


def test_another_generator_is_refused(tmp_path: Path) -> None:
    adapted("nola", bases=4).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    words = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**words, "generator": "splitmix32"}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"'splitmix32'.* cannot repeat"):
        PeftModel.from_pretrained(small_model(), tmp_path)


def test_with_as_many_bases_as_numbers_it_is_any_lora() -> None:
    target = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    bases, start = Bases(5, 12, (3, 4), 12**-0.5), Bases(6, 1, (3, 4), 0.5)
    made = Combination(bases, 0.0, start)
    columns = explicit(bases).view(12, 12).T.double()
    found = torch.linalg.solve(columns, (target - explicit(start)[0]).view(-1).double())
    made.coefficients.data.copy_(found)
    assert near(made(), target, 1e-4)


def test_what_is_kept_without_gradients_follows_the_coefficients() -> None:
    made = Combination(Bases(5, 4, (3, 4), 1.0), 1.0)
    with torch.no_grad():
        first = made()
        assert made() is first
        made.coefficients.data.mul_(2)
        assert near(made(), 2 * first)
    assert made().requires_grad


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_rounded_coefficients_are_packed_and_near(bits: int, tmp_path: Path) -> None:
    model = trained(adapted("nola", bases=16))
    exact = [part.values().detach() for part in combinations(model)]
    full = answers(model)
    quantise(model, bits)
    for before, part in zip(exact, combinations(model), strict=True):
        step = (before.max() - before.min()) / (2**bits - 1)
        assert float((part.values() - before).abs().max()) <= 0.501 * float(step)
    assert near(answers(model), full, 0.25 * 2.0**-bits)
    assert not torch.equal(answers(model), full)
    assert not any(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path)
    head = (tmp_path / "adapter_model.safetensors").read_bytes()
    size = len(head) - 8 - int.from_bytes(head[:8], "little")
    assert size == (16 * bits // 8 + 8) * 2 * len(layers(model))
    loaded = PeftModel.from_pretrained(small_model(), tmp_path).eval()
    assert torch.equal(answers(loaded), answers(model))
    assert near(answers(loaded.merge_and_unload()), answers(model))
    with pytest.raises(ValueError, match=f"rounded to {bits} bits already"):
        quantise(model)


def combinations(model: Any) -> list[Combination]:
    return [m for m in model.modules() if isinstance(m, Combination)]


def test_only_coefficients_are_rounded_and_to_whole_bits() -> None:
    with pytest.raises(ValueError, match=r"quantise\(bits=9\)"):
        quantise(adapted("nola", bases=4), 9)
    with pytest.raises(ValueError, match="only an adapter of nola"):
        quantise(adapted("svfit"), 4)


@pytest.mark.parametrize("settings", [{"bits": 9}, {"bases": 0}, {"rank": 0}, {"mode": "sound"}, {"alpha": 0.0}])
def test_bad_settings_are_named(settings: dict[str, object]) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=rf"nola\({name}="):
        adapted("nola", **settings)


def test_a_rank_that_a_layer_cannot_have_is_named() -> None:
    with pytest.raises(ValueError, match="rank 9 is more than"):
        adapted("nola", rank=9)
