"""ONNX through torch.export: factors stay factors and codes stay packed; the graph decodes them."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.onnx import OnnxExporterError

from eckart.checkpoint.folder import companions
from eckart.export.export import Written
from eckart.forms.base import Factored
from eckart.forms.densifying import densify, make_portable
from eckart.forms.layers import DropIn
from eckart.forms.quantized import QuantizedMatrix
from eckart.remarks import noting

MODEL = "model.onnx"
PACKAGES = ("onnx", "onnxscript")
INPUTS = ("input_ids", "attention_mask")


def write(model: Any, source: Path, out: Path, strict: bool = False) -> Written:
    """Write `out/model.onnx`: from `input_ids` and `attention_mask` (batch, sequence), both free, to the logits, or
    to the last hidden states of a model without a head; and the tokenizer's files.

    The graph has no cache of keys and values: it computes whole sequences. Weights keep their dtype, but for bfloat16,
    which onnxruntime cannot multiply on a CPU.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        ValueError: the model takes other inputs, or torch cannot export it. A layer whose form is the cause is stored
            dense and that is said; where `strict`, it is named and refused.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"an export to onnx needs the package {' and '.join(missing)}: pip install 'eckart[onnx]'")
    if model.main_input_name != INPUTS[0]:
        raise ValueError(f"{type(model).__name__} takes {model.main_input_name}: only models of token ids can be exported to onnx")  # fmt: skip # noqa: E501
    notes = ["the graph computes whole sequences, without a cache of keys and values"]
    if model.dtype == torch.bfloat16:
        model = model.float()
        notes.append("bfloat16 weights are stored as float32, which onnxruntime can multiply on any machine")
    forms = {n: str(m.matrix.form) for n, m in model.named_modules() if isinstance(m, DropIn)}
    stored = [f"{old.form} is stored as {new.form}, which the graph can decode" for old, new in make_portable(model)]
    notes += list(dict.fromkeys(stored))
    for name, why in inexpressible(model).items():
        if strict:
            raise ValueError(f"{name} cannot be written as ONNX in its form {forms[name]}: torch.export says: {why}. Choose another form for it, or export without strict, which stores it dense")  # fmt: skip # noqa: E501
        with noting() as said:
            model.set_submodule(name, densify(nn.ModuleDict({"layer": model.get_submodule(name)}))["layer"])
        forms[name] = f"dense{', its inputs not rounded' if said.text else ''}: torch cannot export {forms[name]}"
    inputs = {name: torch.ones(2, 3, dtype=torch.long) for name in INPUTS}  # one tensor for both would be one input
    try:
        program = exported(Whole(model), inputs)
    except OnnxExporterError as e:
        raise ValueError(f"{source} cannot be written as ONNX: torch.onnx says: {_reason(e)}. Export `eckart.densify(model)`, or try another version of torch or transformers") from e  # fmt: skip # noqa: E501
    program.save(out / MODEL)
    for name in companions(source):
        shutil.copyfile(source / name, out / name)
    return Written(forms, notes)


class Whole(nn.Module):
    """A transformers model as a function of two tensors."""

    def __init__(self, model: Any):
        super().__init__()
        model.config.use_cache = False
        self.model = model.eval()

    def forward(self, input_ids: Int[Tensor, "b s"], attention_mask: Int[Tensor, "b s"]) -> Float[Tensor, "b s n"]:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]


def exported(module: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """torch's ONNX program of a module whose inputs are free in their first two sizes.

    It is not optimised, for that would decode what is packed, and names no places in our code.
    """
    free = {name: {0: "batch", 1: "sequence"} for name in inputs}
    with torch.no_grad(), _quiet():
        module.eval()(**inputs)  # makes the constants that the graph will hold
        program = torch.onnx.export(
            module, kwargs=inputs, dynamo=True, optimize=False, verbose=False, dynamic_shapes=free,
            input_names=list(inputs), output_names=["output"], custom_translation_table=shifts(),
        )  # fmt: skip
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    return program


def inexpressible(model: nn.Module) -> dict[str, str]:
    """The factored layers that torch cannot trace, and why: of all that are made of the same parts, one is tried."""
    reasons: dict[tuple[Any, ...], str | None] = {}
    for module in model.modules():
        if isinstance(module, DropIn) and _parts(module) not in reasons:
            reasons[_parts(module)] = _untraceable(module)
    found = {n: reasons[_parts(m)] for n, m in model.named_modules() if isinstance(m, DropIn)}
    return {name: reason for name, reason in found.items() if reason is not None}


def _parts(module: DropIn) -> tuple[Any, ...]:
    """What the code that a layer runs through depends on."""
    inner = [m for m in module.matrix.modules() if isinstance(m, Factored)]
    return (module.kind, *(type(m) for m in inner), *(str(m.form) for m in inner if isinstance(m, QuantizedMatrix)))


def _untraceable(module: DropIn) -> str | None:
    """Why torch cannot trace a layer, if it cannot."""
    table = isinstance(module, nn.Embedding)
    x = torch.ones(2, 3, dtype=torch.long) if table else torch.ones(2, 3, module.matrix.shape[1]).to(dtype_of(module))
    free = torch.export.Dim.AUTO
    try:
        with torch.no_grad(), _quiet():
            module(x)
            torch.export.export(module, (x,), dynamic_shapes=({0: free, 1: free},), strict=False)
    except RuntimeError as e:
        return _reason(e)
    return None


def dtype_of(module: nn.Module) -> torch.dtype:
    """Of a layer's floating point numbers."""
    return next(t.dtype for t in module.state_dict().values() if t.is_floating_point())


def _reason(error: BaseException) -> str:
    """The innermost cause, in its first sentence."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).partition("\n")[0].rstrip(".")


def shifts() -> dict[Any, Callable[..., Any]]:
    """The Python operators >> and << on tensors of natural numbers, which torch's own table lacks."""
    from onnx import TensorProto
    from onnxscript import opset18 as op

    def shift(direction: str, by_number: bool) -> Callable[..., Any]:
        def natural(x: Any) -> Any:
            return x if x.dtype == TensorProto.UINT8 else op.Cast(x, to=TensorProto.UINT64)

        def by_tensor(x: Any, places: Any) -> Any:
            shifted = op.BitShift(natural(x), natural(places), direction=direction)
            return shifted if x.dtype == TensorProto.UINT8 else op.Cast(shifted, to=x.dtype)

        def by_scalar(x: Any, places: int) -> Any:
            return by_tensor(x, op.Cast(op.Constant(value_int=places), to=x.dtype))

        return by_scalar if by_number else by_tensor

    aten = torch.ops.aten
    return {
        aten.__rshift__.Tensor: shift("RIGHT", by_number=False),
        aten.__rshift__.Scalar: shift("RIGHT", by_number=True),
        aten.__lshift__.Tensor: shift("LEFT", by_number=False),
        aten.__lshift__.Scalar: shift("LEFT", by_number=True),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks on its own inside, and on packages that are not there."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
