"""What every form owes, as tests: numbers against `dense()`, bytes as stored, text, reloading, and refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from eckart.checkpoint.layout import file_bytes, layout_of, save_tensors
from eckart.checkpoint.reader import read_header
from eckart.forms import FORMS, Factored, Form, parse
from eckart.forms.base import Shape
from eckart.forms.quantized_inputs import unrounded
from eckart.linalg.weighting import Weighting
from eckart.linalg.whitening import DiagonalRoot, psd_root
from eckart.testing.numbers import error_ratio, gaussian

SHAPE: Shape = (12, 10)
ODD_SHAPES: list[Shape] = [(7, 5), (5, 7), (1, 9), (9, 1), (1, 1), (0, 5), (5, 0)]
BATCHES: list[tuple[int, ...]] = [(), (3,), (2, 3), (0,)]
Case = tuple[Form, Shape]

STORED = pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def registered_forms(shape: Shape = SHAPE) -> list[Case]:
    """Every registered word as it comes, or where its dials are open, its cheapest, a middle and its dearest rung."""
    found: list[Case] = []
    for cls in FORMS.words.values():
        ladder = cls().ladder(shape)
        rungs = dict.fromkeys([ladder[0], ladder[len(ladder) // 2], ladder[-1]])
        found += [(form, shape) for form in rungs]
    return found


def composed_forms(shape: Shape = SHAPE) -> list[Case]:
    """Every registered word as a term of a sum and as a factor of a product, where it can be one."""
    words = {form.word: form for form, _ in registered_forms(shape)}  # type: ignore[attr-defined]
    found: list[Form] = []
    for form in words.values():
        found += [form + parse("diagonal()"), parse(f"dense(width={shape[1] // 2})") @ form]
    return [(form, shape) for form in found if _fits(form, shape)]


def _fits(form: Form, shape: Shape) -> bool:
    try:
        form.build(shape, device="meta")
    except ValueError:
        return False
    return True


class FormContract:
    """The battery. A subclass names its closed forms in `forms`; without that it covers every registered word.

    Attributes:
        tolerance: by dtype, the largest error ratio of what a module computes against its own dense matrix.
    """

    tolerance: ClassVar = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}

    def forms(self) -> list[Case]:
        """Closed forms, each with the shape (out, in) to try it on."""
        return registered_forms()

    def pytest_generate_tests(self, metafunc: Any) -> None:
        if "form" in metafunc.fixturenames:
            cases = self.forms()
            metafunc.parametrize(("form", "shape"), cases, ids=[f"{form} {out}x{in_}" for form, (out, in_) in cases])
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", list(self.tolerance), ids=lambda dtype: str(dtype).removeprefix("torch."))

    def assert_close(self, found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
        assert error_ratio(found, wanted) <= self.tolerance[dtype]

    def assert_computes_its_matrix(self, module: Factored, dtype: torch.dtype) -> None:
        """Forward, with a bias and without, rows and shapes agree with `dense()`, inputs not being rounded."""
        out, in_ = module.shape
        dense, bias = module.dense().detach(), gaussian(out, seed=3, dtype=dtype)
        assert dense.shape == (out, in_)
        for batch in BATCHES:
            x = gaussian(*batch, in_, seed=1, dtype=dtype)
            y = module(x)
            assert (y.shape, y.dtype) == ((*batch, out), dtype)
            wanted = x.double() @ dense.double().T
            with unrounded(module):
                self.assert_close(module(x), wanted, dtype)
                self.assert_close(module(x, bias), wanted + bias.double(), dtype)
            if out:
                ids = torch.randint(out, batch, generator=torch.Generator().manual_seed(2))
                self.assert_close(module.rows(ids), dense[ids], dtype)

    def test_forward_and_rows_are_those_of_the_dense_matrix(self, form: Form, shape: Shape, dtype: torch.dtype) -> None:
        module = form.fit(gaussian(*shape, dtype=dtype))
        assert module.dense().dtype == dtype
        self.assert_computes_its_matrix(module, dtype)

    def test_gradients_are_those_of_the_dense_matrix(self, form: Form, shape: Shape) -> None:
        module = form.fit(gaussian(*shape, dtype=torch.float64))
        x = gaussian(2, 3, shape[1], seed=1, dtype=torch.float64).requires_grad_()
        bias = gaussian(shape[0], seed=3, dtype=torch.float64).requires_grad_()
        weight = gaussian(2, 3, shape[0], seed=2, dtype=torch.float64)
        inputs = [x, bias, *(p for p in module.parameters() if p.requires_grad)]

        def gradients(y: Tensor) -> list[Tensor]:
            found = torch.autograd.grad((y * weight).sum(), inputs, allow_unused=True)
            return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)]

        with unrounded(module):
            found = gradients(module(x, bias))
        wanted = gradients(x @ module.dense().T + bias)
        for a, b in zip(found, wanted, strict=True):
            self.assert_close(a, b, torch.float64)
        self.assert_close(gradients(module(x, bias))[0], wanted[0], torch.float64)  # through the rounding

    def test_says_whether_it_rounds_its_inputs(self, form: Form, shape: Shape) -> None:
        module, x = form.fit(gaussian(*shape, dtype=torch.float64)), gaussian(3, shape[1], seed=1, dtype=torch.float64)
        off = error_ratio(module(x), x @ module.dense().T)
        assert (off <= self.tolerance[torch.float64]) == module.exact
        with unrounded(module):
            assert module.exact

    def test_odd_shapes_compute_or_are_refused(self, form: Form, shape: Shape) -> None:
        for odd in ODD_SHAPES:
            if _fits(form, odd):
                module = form.fit(gaussian(*odd))
                assert layout_of(module.state_dict()) == layout_of(form.build(odd).state_dict())
                self.assert_computes_its_matrix(module, torch.float32)
            else:
                with pytest.raises(ValueError):
                    form.fit(gaussian(*odd))

    @STORED
    def test_bytes_are_what_is_stored(self, form: Form, shape: Shape, stored: torch.dtype, tmp_path: Path) -> None:
        module = form.fit(gaussian(*shape), dtype=stored)
        state, file = module.state_dict(), tmp_path / "model.safetensors"
        held = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in state.values())}
        save_tensors(state, file)
        written = sum(entry.nbytes for entry in read_header(file).values())
        assert module.nbytes == form.nbytes(shape, stored) == sum(held.values()) == written
        assert file.stat().st_size == file_bytes(layout_of(state))

    def test_flops_grow_with_tokens(self, form: Form, shape: Shape) -> None:
        flops = form.build(shape, device="meta").flops
        assert 0 <= flops(1) <= flops(7) <= 7 * flops(1)

    def test_text_and_back(self, form: Form, shape: Shape) -> None:
        again = parse(str(form))
        assert (again, hash(again), str(again)) == (form, hash(form), str(form))

    @STORED
    def test_an_empty_module_has_the_layout_of_a_fitted_one(
        self, form: Form, shape: Shape, stored: torch.dtype
    ) -> None:
        fitted, empty = form.fit(gaussian(*shape), dtype=stored), form.build(shape, dtype=stored, device="meta")
        assert layout_of(empty.state_dict()) == layout_of(fitted.state_dict())
        assert (empty.form, empty.shape) == (fitted.form, fitted.shape) == (form, shape)
        assert all(tensor.is_meta for tensor in empty.state_dict().values())
        assert [p.requires_grad for p in empty.parameters()] == [p.requires_grad for p in fitted.parameters()]

    def test_loading_is_strict(self, form: Form, shape: Shape) -> None:
        state = form.fit(gaussian(*shape)).state_dict()
        empty = form.build(shape)
        empty.load_state_dict(state)
        assert all(torch.equal(value, state[name]) for name, value in empty.state_dict().items())
        name, value = next(iter(state.items()))
        wrong = [
            {k: v for k, v in state.items() if k != name},
            {**state, "unexpected": value},
            {**state, name: value.new_zeros(*value.shape, 2)},
        ]
        for bad in wrong:
            with pytest.raises(RuntimeError):
                form.build(shape).load_state_dict(bad)

    def test_fits_twice_to_the_same_bits(self, form: Form, shape: Shape) -> None:
        matrix, states = gaussian(*shape), []
        kept = matrix.clone()
        for seed in (0, 1):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                states.append(form.fit(matrix).state_dict())
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert torch.equal(matrix, kept)

    @pytest.mark.parametrize("weighting", ["definite", "singular", "diagonal", "of nothing"])
    def test_fits_under_any_weighting(self, form: Form, shape: Shape, weighting: str) -> None:
        out, in_ = shape
        matrix = gaussian(*shape) if weighting != "of nothing" else torch.zeros(shape)
        module = form.fit(matrix, _weighting(weighting, out, in_))
        assert layout_of(module.state_dict()) == layout_of(form.build(shape).state_dict())
        assert bool(torch.isfinite(module.dense()).all())

    def test_dials_refuse_nonsense(self, form: Form, shape: Shape) -> None:
        word = getattr(form, "word", "")
        for dial in _dials(form):
            for value in ("many", -1, 0):
                with pytest.raises(ValueError, match=word):
                    dataclasses.replace(form, **{dial: value}).build(shape)
            if isinstance(getattr(form, dial), int):
                with suppress(ValueError):
                    huge: Any = dataclasses.replace(form, **{dial: 2**31})
                    assert huge.nbytes(shape, torch.float32) <= 4 * shape[0] * shape[1]

    def test_an_open_dial_is_refused(self, form: Form, shape: Shape) -> None:
        word = getattr(form, "word", "")
        for dial in _dials(form):
            reopened = dataclasses.replace(form, **{dial: None})
            if reopened.open:
                with pytest.raises(ValueError, match=word):
                    reopened.build(shape)
                with pytest.raises(ValueError, match=word):
                    reopened.fit(gaussian(*shape))

    def test_reloads_to_the_same_bits_in_a_new_process(self, tmp_path: Path) -> None:
        """One process for all forms."""
        cases = [(form, shape, dtype) for form, shape in self.forms() for dtype in (torch.float32, torch.bfloat16)]
        wanted = []
        for i, (form, shape, dtype) in enumerate(cases):
            module, x = form.fit(gaussian(*shape), dtype=dtype), gaussian(3, shape[1], seed=1, dtype=dtype)
            save_tensors(module.state_dict(), tmp_path / f"{i}.state.safetensors")
            save_tensors({"x": x}, tmp_path / f"{i}.x.safetensors")
            with torch.no_grad():  # as it is served: learning may add up in another order
                wanted.append({"y": module(x), "dense": module.dense()})
        texts = [[str(form), shape, str(dtype).removeprefix("torch.")] for form, shape, dtype in cases]
        foreign = {cls.__module__ for cls in FORMS.words.values() if not cls.__module__.startswith("eckart.")}
        (tmp_path / "cases.json").write_text(json.dumps({"cases": texts, "imports": sorted(foreign)}))
        child = [sys.executable, "-m", "eckart.testing.reload", str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        done = subprocess.run(child, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        for i, tensors in enumerate(wanted):
            found = load_file(tmp_path / f"{i}.found.safetensors")
            assert all(torch.equal(found[name], tensors[name]) for name in tensors), texts[i]


def _dials(form: Form) -> list[str]:
    """The settings that a budget turns: those whose default is None."""
    return [f.name for f in dataclasses.fields(form) if f.default is None and getattr(form, f.name) is not None]


def _weighting(kind: str, out: int, in_: int) -> Weighting:
    if kind == "diagonal":
        return Weighting(
            DiagonalRoot(gaussian(out, seed=3).abs() + 0.1), DiagonalRoot(gaussian(in_, seed=4).abs() + 0.1)
        )
    left, right = gaussian(out, 2 * out, seed=3), gaussian(in_, 2 * in_, seed=4)
    if kind == "singular":
        left, right = left[:, : out // 2], right[:, : in_ // 2]
    return Weighting(psd_root(left @ left.T, 0.0, "eigen"), psd_root(right @ right.T, 0.0, "eigen"))
