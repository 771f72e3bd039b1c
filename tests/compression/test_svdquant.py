"""SVDQuant against its card: exact identities, who beats whom with outliers, LoRAs that join, and models."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import eckart
import tiny
from eckart.allocation import BudgetError
from eckart.compression.svdquant import INT4, Split, Splitting, SVDQuant, with_lora
from eckart.forms import drop_in, parse
from eckart.forms.grids import Uniform
from eckart.forms.quantized_inputs import QuantizedInputs, unrounded
from eckart.linalg.svd import truncated_svd
from eckart.testing import error_ratio, gaussian

OUT, IN, ROWS = 96, 128, 256
FORM = QuantizedInputs(INT4, INT4)
SETTINGS: dict[str, Any] = {
    "rank": 4, "points": 6, "form": "quantized_inputs(matrix=quantized(bits=4, group=16, grid=uniform(symmetric=True)),"
    " inputs=quantized(bits=4, group=16, grid=uniform(symmetric=True)))",
}  # fmt: skip


def problem(seed: int = 0, times: float = 30.0, **settings: Any) -> dict[str, Any]:
    """Weights and inputs, four channels of which are `times` as large as the others."""
    x = gaussian(ROWS, IN, seed=seed + 1)
    x[:, [3, 40, 77, 100]] *= times
    given: dict[str, Any] = {"W": gaussian(OUT, IN, seed=seed), "x": x, "form": FORM, "rank": 32}
    return {**given, "dtype": torch.float32, **settings}


def only(splitting: Splitting, split: Split) -> Any:
    """The one module of all rows."""
    return splitting.matrices(split, [len(splitting.W)])[0][0]


@pytest.mark.parametrize("powers", [(0.0, 0.0), (0.5, 0.5), (0.9, 0.0)])
@pytest.mark.parametrize("rank", [0, 1, 8, 96])
def test_without_quantisers_it_is_the_matrix(powers: tuple[float, float], rank: int) -> None:
    fine = QuantizedInputs(replace(INT4, bits=8, group=1), INT4)  # one code a scale: 127 or -128 times it
    given = problem(form=fine, rank=rank, dtype=torch.float64)
    splitting = Splitting(given["W"].double(), given["x"], fine, rank, torch.float64)
    module = only(splitting, splitting.at(splitting.inverse(*powers)))
    with unrounded(module):
        assert error_ratio(module(splitting.x), splitting.y) < 1e-6
    assert error_ratio(module.dense(), splitting.W) < 1e-6


def test_the_branch_on_raw_inputs_is_the_branch_on_smoothed_ones() -> None:
    given = problem(dtype=torch.float64)
    splitting = Splitting(given["W"].double(), given["x"], FORM, 16, torch.float64)
    split = splitting.at(splitting.inverse(0.5, 0.5))
    raw = splitting.x @ split.right.T
    smoothed = (splitting.x * split.inverse) @ (split.right / split.inverse).T
    assert error_ratio(raw, smoothed) < 1e-12
    branch = only(splitting, split).terms[1]
    assert error_ratio(branch(splitting.x), raw @ split.left.T) < 1e-12


@pytest.mark.parametrize("seed", [0, 7])
def test_who_beats_whom_with_outliers(seed: int) -> None:
    given = problem(seed)
    whole, bare = Splitting(**given), Splitting(**{**given, "rank": 0})
    one = torch.ones(IN)
    naive, smooth = bare.at(one), bare.best(iterations=0)
    branch, turned = whole.best(iterations=0), whole.best()
    assert naive.error > 2 * smooth.error
    assert smooth.error > 2 * branch.error
    assert branch.error >= turned.error
    assert whole.at(one).error > 4 * turned.error  # a branch, but nothing smoothed
    for start in (naive, smooth):  # the branch of the error of quantisation, not of the weight
        plain = whole.W / start.inverse
        codes = whole.nearest.fit(plain).dense().detach()
        U, S, Vh, *_ = truncated_svd(plain - codes, 32)
        repaired = whole.measured(Split(start.inverse, U * S, Vh * start.inverse, plain, codes))
        assert repaired.error > 4 * turned.error


def test_the_rest_is_the_tail_of_the_spectrum_and_turns_never_lose() -> None:
    splitting = Splitting(**problem())
    start = splitting.at(splitting.inverse(0.6, 0.0))
    tail = torch.linalg.svdvals((splitting.W / start.inverse).double())[32:].square().sum()
    assert float(start.residual.double().square().sum()) == pytest.approx(float(tail), rel=1e-3)
    assert float(start.residual.double().square().sum()) >= float(tail) * (1 - 1e-5)
    errors = [split.error for split in splitting.turns(start, 100)]
    assert len(errors) > 2
    assert all(b < a for a, b in itertools.pairwise(errors))
    assert len(list(splitting.turns(start, 1))) == 2


def test_the_smoothing_is_the_best_of_its_grid() -> None:
    splitting = Splitting(**problem())
    found = splitting.best(points=5, iterations=0)
    pairs = [(0.0, 0.0), *((a / 5, 0.0) for a in range(1, 5)), *((a / 5, 1 - a / 5) for a in range(1, 5))]
    errors = {pair: splitting.at(splitting.inverse(*pair)).error for pair in pairs}
    assert found.error == min(errors.values()) < errors[0.0, 0.0]
    assert found.note == "s = max|x|^{:g} / max|W|^{:g}".format(*min(errors, key=errors.__getitem__))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_channels_of_zeros_leave_the_scales_finite(dtype: torch.dtype) -> None:
    given = problem(dtype=dtype)
    given["x"][:, 5], given["W"][:, 9] = 0, 0
    given["x"][:, 11] *= 1e-30
    splitting = Splitting(**given)
    for powers in ((0.0, 0.0), (0.5, 0.5), (0.95, 0.0)):
        inverse = splitting.inverse(*powers)
        assert bool(torch.isfinite(inverse).all())
        assert bool((inverse > 0).all())
        assert torch.equal(inverse, inverse.to(dtype).float())
    assert splitting.inverse(0.5, 0.5)[5] == splitting.inverse(0.5, 0.5)[9] == 1
    module = only(splitting, splitting.best(4, 2))
    assert bool(torch.isfinite(module(given["x"].to(dtype))).all())


def test_what_is_stored_computes_what_was_measured_and_stacking_is_one_matrix() -> None:
    splitting = Splitting(**problem())
    split = splitting.best(4, 3)
    (q, k, v), missed = splitting.matrices(split, [48, 16, 32])
    x = splitting.x
    found = torch.cat([module(x) for module in (q, k, v)], -1).detach()
    assert error_ratio(found, only(splitting, split)(x)) < 1e-5
    assert float((found - splitting.y).square().sum()) / ROWS == pytest.approx(split.error, rel=1e-3)
    assert float(missed.square().sum()) / ROWS == pytest.approx(split.error, rel=1e-5)
    for module in (k, v):
        assert torch.equal(module.terms[1].right.dense(), q.terms[1].right.dense())  # type: ignore[union-attr]
        assert torch.equal(module.terms[0].right.diagonal, q.terms[0].right.diagonal)  # type: ignore[union-attr]
    left = torch.cat([module.terms[1].left.dense() for module in (q, k, v)])  # type: ignore[union-attr]
    assert torch.equal(left, split.left)


def test_feedback_under_the_rounded_inputs_lowers_the_error() -> None:
    mixing = gaussian(IN, IN, seed=9) / IN**0.5
    given = problem()
    given["x"] = given["x"] @ mixing
    errors = []
    for rounding in ("nearest()", "gptq()"):
        form = parse(f"quantized_inputs(matrix=quantized(bits=4, grid=uniform(symmetric=True), rounding={rounding}))")
        splitting = Splitting(**{**given, "form": form})
        _, missed = splitting.matrices(splitting.best(4, 2), [OUT])
        errors.append(float(missed.square().sum()))
    assert errors[1] < 0.9 * errors[0]


def test_a_lora_joins_the_branch() -> None:
    splitting = Splitting(**problem())
    matrix = only(splitting, splitting.at(splitting.inverse(0.5, 0.5)))
    A, B, x = gaussian(5, IN, seed=3), gaussian(OUT, 5, seed=4), splitting.x
    joined = with_lora(matrix, A, B, 0.5)
    assert error_ratio(joined(x), matrix(x) + 0.5 * x @ A.T @ B.T) < 1e-5
    assert joined.terms[0] is matrix.terms[0]
    assert joined.form.build((OUT, IN)).nbytes == joined.nbytes
    half = with_lora(matrix.bfloat16(), A, B)
    assert half.nbytes - matrix.nbytes == 2 * 5 * (OUT + IN)
    assert parse(str(joined.form)) == joined.form
    for bad in ((A, B[:4]), (A[:, :4], B), (gaussian(70, IN), gaussian(OUT, 70))):
        with pytest.raises(ValueError, match="does not fit beside a branch of rank 32"):
            with_lora(matrix, *bad)
    with pytest.raises(ValueError, match="no low-rank branch"):
        with_lora(matrix.terms[0], A, B)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: Any) -> tuple[Any, Any, Path]:
    """A tiny model whose norms make outliers, compressed in memory and saved."""
    model = outlying()
    folder = tmp_path_factory.mktemp("svdquant")
    changed, result = eckart.compress(model, "svdquant", budget=1.0, data=tiny.batches((2, 2, 2)), **SETTINGS)
    changed.save_pretrained(folder)
    return changed, result, folder


def outlying(dtype: torch.dtype = torch.float32) -> Any:
    model = tiny.build("llama", num_hidden_layers=2, hidden_size=64, intermediate_size=96, dtype=dtype)
    for block in model.model.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight.data[[4, 31]] *= 30
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**tiny.batches((4,), seed=3)[0]).logits


def test_a_model_is_compressed_saved_and_loaded(compressed: tuple[Any, Any, Path]) -> None:
    model, result, folder = compressed
    assert len(result.layers) == 14
    for layer in result.layers:
        assert "quantized_inputs" in layer.form
        assert layer.form.endswith("@ diagonal() + low_rank(rank=4)")
        assert layer.bytes == parse(layer.form).nbytes(layer.shape, torch.float32) < layer.dense_bytes
        assert 0 < layer.measured_error < 0.1 * layer.energy
        assert "max|x|" in layer.note
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(logits(loaded), logits(model))
    off = error_ratio(logits(model), logits(outlying()))
    with unrounded(model):
        assert 0 < error_ratio(logits(model), logits(outlying())) < off < 0.5


def test_layers_that_read_one_tensor_share_their_scales_and_the_branch(compressed: tuple[Any, Any, Path]) -> None:
    block = compressed[0].model.layers[1]
    groups = [
        [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj],
        [block.mlp.gate_proj, block.mlp.up_proj],
    ]
    for first, *others in groups:
        for other in others:
            for a, b in zip(_shared(first), _shared(other), strict=True):
                assert torch.equal(a, b)
    assert not torch.equal(_shared(groups[0][0])[0], _shared(groups[1][0])[0])
    assert not torch.equal(_shared(groups[0][0])[0], _shared(block.self_attn.o_proj)[0])


def _shared(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.matrix.terms[0].right.diagonal, layer.matrix.terms[1].right.dense()


def test_beats_rounding_both_sides_without_it(compressed: tuple[Any, Any, Path]) -> None:
    plain = outlying()
    for name, module in list(plain.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            plain.set_submodule(name, drop_in(module, parse(SETTINGS["form"]).fit(module.weight.detach())))
    whole = logits(outlying())
    assert error_ratio(logits(compressed[0]), whole) < 0.65 * error_ratio(logits(plain), whole)


def test_a_job_cut_off_ends_with_the_same_bytes(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "m", hidden_size=64, num_hidden_layers=2, dtype=torch.bfloat16)
    whole = tiny.compressed_twice(tmp_path, "svdquant", budget=1.0, data=tiny.batches((2, 2)), **SETTINGS)
    assert tiny.hashes(tmp_path / "whole") == tiny.hashes(tmp_path / "cut")
    assert tiny.weight_bytes(tmp_path / "whole") == whole.bytes_after
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    assert loaded.dtype == torch.bfloat16
    assert bool(torch.isfinite(logits(loaded)).all())


def test_inputs_that_are_never_negative_are_unsigned() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    data = [{"input": gaussian(16, 32, seed=s)} for s in range(2)]
    settings = {**SETTINGS, "form": "quantized_inputs(matrix=quantized(bits=4), inputs=quantized(bits=4, group=16, grid=uniform(symmetric=True)))"}  # fmt: skip # noqa: E501
    changed, result = eckart.compress(model, "svdquant", budget=1.0, data=data, **settings)
    grids = [parse(layer.form).terms[0].left.inputs.grid for layer in result.layers]  # type: ignore[attr-defined]
    assert grids == [Uniform(symmetric=True), Uniform()]
    assert [str(changed[i].matrix.form) for i in (0, 2)] == [layer.form for layer in result.layers]


def test_without_a_branch_and_with_groups_that_do_not_divide() -> None:
    settings = {**SETTINGS, "rank": 0, "form": SETTINGS["form"].replace("group=16", "group=40")}
    changed, result = eckart.compress(outlying(), "svdquant", budget=1.0, data=tiny.batches((2,)), **settings)
    assert {layer.form.rpartition(" @ ")[2] for layer in result.layers} == {"diagonal()"}
    assert error_ratio(logits(changed), logits(outlying())) < 0.8


def test_a_head_can_be_named(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "m", hidden_size=64, num_hidden_layers=1)
    job: dict[str, Any] = {"budget": 1.0, "data": tiny.batches((2, 2)), **SETTINGS}
    result = eckart.compress_to(tmp_path / "out", tmp_path / "m", "svdquant", targets=r"lm_head|.*down_proj", **job)
    assert [layer.name for layer in result.layers] == ["model.layers.0.mlp.down_proj", "lm_head"]
    assert all(0 < layer.measured_error < 0.1 * layer.energy for layer in result.layers)
    assert tiny.weight_bytes(tmp_path / "out") == result.bytes_after


def test_the_budget_is_enough_or_refused() -> None:
    settings: dict[str, Any] = {"data": tiny.batches((2,)), **SETTINGS}
    with pytest.raises(BudgetError, match=r"svdquant leaves nothing to choose: .* takes (\d+) bytes") as error:
        eckart.compress(outlying(), "svdquant", budget=0.2, **settings)
    needed = int(str(error.value).split(" bytes (")[0].split()[-1])
    assert eckart.compress(outlying(), "svdquant", budget=f"{needed}B", **settings).result.bytes_after == needed
    with pytest.raises(BudgetError):
        eckart.compress(outlying(), "svdquant", budget=f"{needed - 1}B", **settings)


def test_what_cannot_be_served_stays_dense_and_says_why() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 48, 1))
    data = [{"input": gaussian(2, 3, 5, 5)}]
    before = model(data[0]["input"])
    changed, result = eckart.compress(model, "svdquant", budget=1.0, data=data, **SETTINGS)
    conv, pixel = result.layers
    assert (conv.form, pixel.form == "dense()") == ("dense()", False)
    assert "left dense: a kernel of (3, 3)" in conv.note
    assert error_ratio(changed(data[0]["input"]), before) < 0.2
    mixed = nn.Sequential(nn.Linear(40, 5), nn.Linear(5, 600), nn.Linear(600, 600))
    _, result = eckart.compress(mixed, "svdquant", budget=1.0, data=[{"input": gaussian(4, 40)}], points=2)
    assert ["would be no smaller" in str(layer.note) for layer in result.layers] == [True, True, False]


def test_bad_input_is_named() -> None:
    for settings, message in (
        ({"rank": -1}, "from 0 up"), ({"points": 0}, "from 1 up"), ({"tokens": 0}, "from 1 up"),
        ({"form": parse("quantized(bits=4)")}, "it is quantized_inputs"),
        ({"form": parse("quantized_inputs()")}, "it is quantized_inputs"), ({"targets": "("}, "regular expression"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            SVDQuant(**settings)
    with pytest.raises(ValueError, match="svdquant needs calibration data"):
        eckart.compress(outlying(), "svdquant", budget=1.0, **SETTINGS)
    broken = outlying()
    broken.model.layers[1].input_layernorm.weight.data[3] = torch.inf
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj receives NaN or infinite"):
        eckart.compress(broken, "svdquant", budget=1.0, data=tiny.batches((2,)), **SETTINGS)
