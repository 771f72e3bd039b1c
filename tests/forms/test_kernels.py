"""Every way in which a quantised matrix multiplies, against the plain one; what is kept, saved and forgotten."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eckart.forms import drop_in, kernels, parse
from eckart.forms.kernels import bag, integers, packed, planes, prepared, tiles
from eckart.forms.quantized import QuantizedMatrix
from eckart.testing import error_ratio
from eckart.testing.numbers import gaussian

ROWWISE = "quantized(bits=8, group=None, grid=uniform(symmetric=True))"
GROUPED = "quantized(bits=4, group=32)"
FORMS = [
    ROWWISE,
    GROUPED,
    "quantized(bits=8, group=None)",
    "quantized(bits=5, group=None, grid=uniform(zero='real'))",
    "quantized(bits=8, group=48, grid=uniform(symmetric=True))",
    "quantized(bits=4, group=64, grid=uniform(symmetric=True))",
    "quantized(bits=3, group=32, grid=uniform(zero='real'))",
    "quantized(bits=6, group=32)",
    "quantized(bits=2, group=32, scales=quantized(bits=8, group=16))",
    "quantized(bits=1, group=16, grid=uniform(symmetric=True))",
    "quantized(bits=4, group=20, grid=normal_float())",
    "quantized(bits=3, group=7)",
]
SHAPES = [(128, 192), (300, 70), (7, 33), (1, 64)]
BATCHES = [0, 1, 2, 17, 512]
ROUNDING = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Error ratios of one product whose arithmetic is of this dtype."""
needs_integers = pytest.mark.skipif(not integers.available(), reason="this processor multiplies no 8-bit integers")


def fitted(text: str, shape: tuple[int, int] = (128, 192), dtype: torch.dtype = torch.float32) -> QuantizedMatrix:
    matrix = parse(text).fit(gaussian(*shape, dtype=dtype)).requires_grad_(False)
    assert isinstance(matrix, QuantizedMatrix)
    return matrix


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several tiles and blocks even in small matrices, and what a test set is set back."""
    monkeypatch.setattr(tiles, "TILE", 5000)
    monkeypatch.setattr(integers, "BLOCK", 200)
    before = kernels.activations.current
    yield
    kernels.activations(before)


@pytest.mark.parametrize("text", FORMS)
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_every_product_is_the_plain_one(text: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        matrix, bias = fitted(text, shape, dtype), gaussian(shape[0], seed=3, dtype=dtype)
        for batch in BATCHES:
            x = gaussian(batch, shape[1], seed=1, dtype=dtype)
            wanted = x.double() @ matrix.dense().double().T
            y = matrix(x)
            assert (y.dtype, y.shape) == (dtype, (batch, shape[0]))
            # the kernel may round otherwise than the plain product, but not more than one product does
            assert error_ratio(y, wanted) <= ROUNDING[dtype]
            assert error_ratio(matrix(x, bias), wanted + bias.double()) <= ROUNDING[dtype]
            assert error_ratio(y, kernels.plain(matrix, x)) <= ROUNDING[dtype]


def test_the_kernels_meant_are_the_ones_used(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    for module in (bag, integers, packed, tiles):
        own = module.product

        def spied(*arguments: Any, own: Any = own, name: str = module.__name__) -> Tensor:
            used.append(name.rpartition(".")[2])
            return own(*arguments)

        monkeypatch.setattr(module, "product", spied)
    few, several, many = 1, 3, 200
    expected = {
        (ROWWISE, torch.float32): ["bag", "integers", "integers"],
        (ROWWISE, torch.bfloat16): ["bag", "integers", "tiles"],
        (ROWWISE, torch.float64): ["tiles", "tiles", "tiles"],
        (GROUPED, torch.float32): ["bag", "bag", "tiles"],
        (GROUPED, torch.bfloat16): ["packed", "packed", "tiles"],
        ("quantized(bits=4, group=32, grid=normal_float())", torch.float32): ["tiles", "tiles", "tiles"],
    }
    if not (integers.available() and bag.available()):
        pytest.skip("this build of torch has not all of the kernels")
    for (text, dtype), names in expected.items():
        matrix = fitted(text, dtype=dtype)
        used.clear()
        for rows in (few, several, many):
            matrix(gaussian(rows, 192, dtype=dtype))
        assert used == names, (text, dtype)


@needs_integers
@pytest.mark.parametrize("text", [ROWWISE, "quantized(bits=8, group=None)", "quantized(bits=4, group=None)"])
def test_three_digits_are_exact_and_one_is_not(text: str) -> None:
    matrix, x = fitted(text), gaussian(17, 192, seed=1)
    x[:, 5] *= 1000  # an activation far larger than the others takes digits from them
    at, wanted = prepared.prepared(matrix), x.double() @ matrix.dense().double().T
    others = gaussian(17, 192, seed=1)
    plain = others.double() @ matrix.dense().double().T
    assert error_ratio(integers.product(at, matrix, x, 3), wanted) <= 1e-6
    assert error_ratio(integers.product(at, matrix, others, 3), plain) <= 1e-6
    assert 1e-3 <= error_ratio(integers.product(at, matrix, others, 1), plain) <= 2e-2


@needs_integers
def test_activations_are_rounded_only_where_allowed() -> None:
    matrix, grouped, x = fitted(ROWWISE), fitted(GROUPED), gaussian(9, 192, seed=1)
    wanted, exact = x.double() @ matrix.dense().double().T, grouped(x)
    with kernels.activations("int8"):
        assert 1e-3 <= error_ratio(matrix(x), wanted) <= 2e-2
        assert torch.equal(grouped(x), exact)
        with kernels.activations("exact"):
            assert error_ratio(matrix(x), wanted) <= 1e-6
        assert error_ratio(matrix(x), wanted) >= 1e-3
    assert error_ratio(matrix(x), wanted) <= 1e-6
    kernels.activations("int8")
    assert error_ratio(matrix(x), wanted) >= 1e-3
    with pytest.raises(ValueError, match="int4"):
        kernels.activations("int4")
    assert error_ratio(matrix(x), wanted) >= 1e-3


@pytest.mark.parametrize("text", FORMS)
def test_planes_hold_the_numbers_of_the_dense_matrix(text: str) -> None:
    matrix = fitted(text)
    at = prepared.prepared(matrix)
    if not planes.Planes.serves(at):
        assert "normal_float" in text or "group=7" in text
        return
    by = planes.Planes(at, matrix, torch.float32)
    assert torch.equal(by.restored(by.tile(slice(None))), matrix.dense())
    assert torch.equal(by.restored(by.arranged(gaussian(3, 192))), gaussian(3, 192))


def saved_by(matrix: nn.Module, x: Tensor) -> list[Tensor]:
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        matrix(x)
    return kept


@pytest.mark.parametrize("text", FORMS)
@pytest.mark.parametrize("batch", [1, 40])
def test_gradients_of_activations_are_those_of_the_dense_matrix(text: str, batch: int) -> None:
    """INT2.1's card, 1: nothing flows to what is packed."""
    for shape in SHAPES[1:]:
        matrix = fitted(text, shape)
        x, g = gaussian(2, batch, shape[1], seed=1).requires_grad_(), gaussian(2, batch, shape[0], seed=2)
        (found,) = torch.autograd.grad(matrix(x), x, g)
        assert error_ratio(found, g @ matrix.dense()) <= 1e-5
        assert all(t.grad is None for t in matrix.state_dict(keep_vars=True).values())


@pytest.mark.parametrize("text", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 40])
def test_what_is_saved_for_the_backward_pass_is_packed(text: str, dtype: torch.dtype, batch: int) -> None:
    """INT2.1's card, 2: no float tensor of the matrix's shape, and no more bytes than codes and scales."""
    matrix = fitted(text, dtype=dtype)
    kept = saved_by(matrix, gaussian(batch, 192, dtype=dtype).requires_grad_())
    assert kept
    assert sum(t.untyped_storage().nbytes() for t in kept) <= matrix.nbytes
    assert not any(t.is_floating_point() and t.numel() >= 128 * 192 for t in kept)


@pytest.mark.parametrize("text", [ROWWISE, GROUPED, FORMS[3]])
@pytest.mark.parametrize("batch", [1, 40])
def test_scales_can_be_trained(text: str, batch: int) -> None:
    matrix = fitted(text).requires_grad_()
    x, bias = gaussian(batch, 192, seed=1).requires_grad_(), gaussian(128, seed=4).requires_grad_()
    inputs, g = [x, bias, *matrix.parameters()], gaussian(batch, 128, seed=2)
    found = torch.autograd.grad(matrix(x, bias), inputs, g)
    wanted = torch.autograd.grad(kernels.plain(matrix, x, bias), inputs, g)
    assert all(error_ratio(a, b) <= 1e-5 for a, b in zip(found, wanted, strict=True))
    optimizer = torch.optim.SGD(matrix.parameters(), lr=1e-2)
    for _ in range(3):  # each step changes the scales that are kept beside the codes
        optimizer.zero_grad()
        matrix(x).square().sum().backward()
        before = matrix.dense().detach().clone()
        optimizer.step()
        assert not torch.equal(matrix.dense(), before)
        assert error_ratio(matrix(x), kernels.plain(matrix, x)) <= 1e-5


def test_codes_that_changed_since_are_refused_in_the_backward_pass() -> None:
    matrix = fitted(ROWWISE)
    y = matrix(gaussian(3, 192).requires_grad_())
    matrix.load_state_dict(fitted(GROUPED.replace("4", "8").replace("32", "None")).state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("text", [ROWWISE, GROUPED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("assign", [False, True])
def test_layouts_follow_the_codes(text: str, dtype: torch.dtype, assign: bool) -> None:
    matrix, other = fitted(text, dtype=dtype), parse(text).fit(gaussian(128, 192, seed=9, dtype=dtype))
    batches = [gaussian(n, 192, seed=1, dtype=dtype) for n in (1, 3, 40)]

    def check() -> None:
        for x in batches:
            assert error_ratio(matrix(x), kernels.plain(matrix, x)) <= ROUNDING[matrix.dense().dtype]

    check()
    before = kernels.cached_bytes(matrix)
    check()
    assert kernels.cached_bytes(matrix) == before > 0
    matrix.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    check()
    matrix.requires_grad_(False)
    for parameter in matrix.parameters():
        parameter.mul_(2)
    check()
    assert kernels.cached_bytes(matrix) == before
    there_and_back = matrix.to(torch.float16).to(torch.float32)
    batches = [x.float() for x in batches]
    assert there_and_back is matrix
    check()
    with torch.inference_mode():
        kernels.forget(matrix)
        check()
    check()


@pytest.mark.parametrize("text", [ROWWISE, GROUPED])
def test_layouts_are_neither_saved_nor_copied(text: str) -> None:
    matrix, x = fitted(text), gaussian(3, 192, seed=1)
    state, size = set(matrix.state_dict()), len(pickle.dumps(matrix))
    ys = [matrix(x), matrix(x[:1])]
    assert kernels.cached_bytes(matrix) > 0
    assert set(matrix.state_dict()) == state
    assert len(pickle.dumps(matrix)) == size
    for other in (copy.deepcopy(matrix), pickle.loads(pickle.dumps(matrix))):
        assert kernels.cached_bytes(other) == 0
        assert torch.equal(other(x), ys[0])
        assert torch.equal(other(x[:1]), ys[1])
    kernels.forget(nn.ModuleList([matrix]))
    assert kernels.cached_bytes(matrix) == 0
    assert torch.equal(matrix(x), ys[0])


def test_layouts_go_with_their_matrix() -> None:
    before = len(prepared._KEPT)
    matrix = fitted(ROWWISE)
    matrix(gaussian(1, 192))
    assert len(prepared._KEPT) == before + 1
    del matrix
    assert len(prepared._KEPT) <= before


@pytest.mark.parametrize(("text", "times"), [(ROWWISE, 2), (GROUPED, 1), ("quantized(bits=3, group=64)", 4 / 3)])
def test_layouts_are_no_larger_than_promised(text: str, times: float) -> None:
    """Once the codes for a kind of kernel, 3 % for ends of rows, and scales in float32."""
    matrix = fitted(text, (512, 512))
    assert kernels.cached_bytes(matrix) == 0
    for rows in (1, 3, 40):
        matrix(gaussian(rows, 512))
    scales = 2 * 4 * 512 * -(-512 // (matrix.form.group or 512))
    assert kernels.cached_bytes(matrix) <= times * 1.04 * matrix.codes.numel() + 3 * scales


@pytest.mark.parametrize("text", [ROWWISE, GROUPED, "quantized(bits=3, group=64, grid=normal_float())"])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_no_dense_copy_is_ever_alive(text: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor as large as a dense float matrix passes through any operator, making layouts and gradients included."""
    monkeypatch.setattr(tiles, "TILE", 2**13)
    matrix, x = fitted(text, (640, 640)), gaussian(rows, 640).requires_grad_()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.layout == torch.strided:
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    with Watch():
        matrix(x).sum().backward()
    assert 0 < largest <= 1.2 * 640 * 640


def test_autocast_multiplies_in_its_dtype() -> None:
    for text in (ROWWISE, GROUPED, FORMS[-1]):
        matrix = fitted(text)
        for rows in (1, 3, 200):
            x = gaussian(rows, 192, seed=1).requires_grad_()
            bias = gaussian(128, seed=2)
            with torch.autocast("cpu", torch.bfloat16):
                y = matrix(x, bias)
                assert y.dtype == kernels.plain(matrix, x, bias).dtype == torch.bfloat16
            y.sum().backward()
            assert x.grad is not None
            assert x.grad.dtype == torch.float32
            assert error_ratio(y, kernels.plain(matrix, x, bias)) <= ROUNDING[torch.bfloat16]


def test_tracing_sees_plain_operators() -> None:
    """So that torch.export, and ONNX behind it, know every one of them."""
    layer = drop_in(nn.Linear(192, 128), fitted(ROWWISE), gaussian(128))
    x = gaussian(3, 192, seed=1)
    program = torch.export.export(layer, (x,))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any(word in name for name in called for word in ("onednn", "quantized", "pack"))
    assert error_ratio(program.module()(x), layer(x)) <= 1e-5
    jacobian = torch.func.jacrev(layer)(x[0])
    assert error_ratio(jacobian, layer.weight.detach()) <= 1e-5


def test_activations_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 191\)"):
        fitted(ROWWISE)(gaussian(3, 191))


def test_values_that_are_not_finite_stay_so() -> None:
    for text in (ROWWISE, GROUPED):
        matrix = fitted(text)
        for rows in (1, 3, 40):
            x = gaussian(rows, 192)
            x[0, 0] = float("nan")
            assert bool(matrix(x)[0].isnan().all())
            assert bool(matrix(x)[1:].isfinite().all())
