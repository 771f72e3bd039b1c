"""GGUF, as llama.cpp loads it: every matrix in the block type that holds its codes, low-rank terms as an adapter."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from accelerate import init_empty_weights
from jaxtyping import Int
from torch import Tensor, nn

from eckart.checkpoint.folder import model_class
from eckart.export.blocks import Type, Unfit, blocks_of
from eckart.export.export import Written
from eckart.export.gguf_config import ARCHITECTURES, add_hyperparameters, check_supported, head_dim
from eckart.export.vocabulary import NoVocabulary, add_vocabulary
from eckart.forms.base import Factored
from eckart.forms.layers import DropIn, FactoredEmbedding
from eckart.forms.quantized import QuantizedMatrix
from eckart.forms.quantized_inputs import QuantizedInputsMatrix
from eckart.forms.splits import Split, split
from eckart.forms.stand_ins import StandIn

MODEL, ADAPTER = "model.gguf", "adapter.gguf"
PLAIN = {torch.float16: Type.F16, torch.bfloat16: Type.BF16, torch.float32: Type.F32}
QUANTISED = (Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0)
FILE_TYPES = {Type.F32: gguf.LlamaFileType.ALL_F32} | {
    kind: gguf.LlamaFileType[f"MOSTLY_{kind.name}"] for kind in (Type.F16, Type.BF16, *QUANTISED)
}


class Held(NamedTuple):
    """One tensor of the file: rows of numbers, or of the bytes of a block type; and a sentence on how it is held."""

    type: Type
    data: np.ndarray
    text: str
    update: Split | None = None


def write(model: Any, source: Path, out: Path, strict: bool = False) -> Written:
    """Write `out/model.gguf` and, where sums of a quantised and low-rank terms ask for it, `out/adapter.gguf`.

    A quantised matrix becomes the smallest block type that reaches its codes, its scales in float16 (rounded where
    they are not); what no block type holds is dequantised. Both are said of each layer, and refused where `strict`.

    Raises `ValueError` where llama.cpp would compute something else: another architecture, shape, or setting.
    """
    arch = check_supported(model.config)
    names = gguf.get_tensor_name_map(ARCHITECTURES[arch], model.config.num_hidden_layers)
    written = Written()
    tensors: dict[str, Held] = {}
    updates: dict[str, Split] = {}
    for name, module, value in held_tensors(model):
        stem, _, ending = name.rpartition(".")
        found = names.get_name(stem)
        if found is None:
            raise ValueError(f"{name}: GGUF has no name for this tensor in a model of the architecture {arch}")
        held = hold(stem, module, value, strict)
        order = rotary_order(model.config, stem)
        if order is not None:
            held = held._replace(data=held.data[order.numpy()])
        tensors[f"{found}.{ending}"] = held
        if held.text:
            written.layers[stem] = held.text
        if held.update is not None:
            left = held.update.left if order is None else held.update.left[order]
            updates[f"{found}.{ending}"] = held.update._replace(left=left)
    written.notes += _write_model(model, source, out / MODEL, arch, tensors)
    if strict and written.notes:
        raise ValueError(f"{source} cannot be written to GGUF as it is: {written.notes[0]}. Export without strict to go on without")  # fmt: skip # noqa: E501
    if updates:
        write_adapter(out / ADAPTER, arch, {name: (parts.left, parts.right) for name, parts in updates.items()})
        written.notes.append(f"the low-rank terms are in {ADAPTER}: load it beside the model (llama.cpp: --lora {ADAPTER})")  # fmt: skip # noqa: E501
    return written


def held_tensors(model: Any) -> Iterator[tuple[str, nn.Module, Tensor | Factored]]:
    """Name, module and value of every tensor that the model's own code has, a factored one under `<layer>.weight`.

    Raises `ValueError` where a tensor is not one of the model's own, or is of another shape.
    """
    own = shapes(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, DropIn):
            found: list[tuple[str, Tensor | Factored]] = [(f"{name}.weight", module.matrix)]
            if module.bias is not None and not isinstance(module, FactoredEmbedding):
                found.append((f"{name}.bias", module.bias.detach()))
        elif isinstance(module, StandIn):
            raise ValueError(f"{name}: GGUF has no place for a {type(module).__name__}, which a method put there; export to peft or onnx")  # fmt: skip # noqa: E501
        elif _inside(model, name):
            continue
        else:
            found = [(f"{name}.{key}", p.detach()) for key, p in module._parameters.items() if p is not None]
        for full, value in found:
            if full.removesuffix(".weight") == "lm_head" and tied(model):
                continue
            if tuple(value.shape) != own.get(full):
                raise ValueError(f"{full} has shape {tuple(value.shape)}, and llama.cpp expects {own.get(full, 'no such tensor')}; export to peft or onnx, or compress with a method that keeps the widths")  # fmt: skip # noqa: E501
            yield full, module, value


def _inside(model: nn.Module, name: str) -> bool:
    """Whether a module is part of a drop-in."""
    parents = [name[:i] for i, c in enumerate(name) if c == "."]
    return any(isinstance(model.get_submodule(p), DropIn) for p in parents)


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of an uncompressed model with this config."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        skeleton = model_class(config)._from_config(config)
    return {name: tuple(t.shape) for name, t in skeleton.state_dict(keep_vars=True).items()}


def tied(model: Any) -> bool:
    """Whether the head's matrix is that of the embedding, which llama.cpp then reads twice."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, DropIn) and isinstance(table, DropIn):
        return head.matrix is table.matrix and table.bias is None
    return not isinstance(head, DropIn) and not isinstance(table, DropIn) and head.weight is table.weight


def rotary_order(config: Any, layer: str) -> Int[Tensor, " out"] | None:
    """The order of output rows in which llama.cpp wants queries and keys: rotary pairs side by side, not half a head
    apart. None where it takes them as they are."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(layer.rpartition(".")[2])
    if config.model_type != "llama" or heads is None:
        return None
    return torch.arange(heads * head_dim(config)).view(heads, 2, -1).transpose(1, 2).flatten()


def hold(layer: str, module: nn.Module, value: Tensor | Factored, strict: bool) -> Held:
    """How a tensor goes into the file."""
    if isinstance(value, Tensor):
        kind = Type.F32 if value.dim() == 1 else PLAIN[value.dtype]
        return Held(kind, numbers(value, kind), "" if value.dim() == 1 else kind.name)
    if not value.exact and strict:
        raise ValueError(f"{layer}: {value.form} rounds its inputs, which llama.cpp does in its own way. Export without strict to store the weights alone")  # fmt: skip # noqa: E501
    inputs = "" if value.exact else ", its inputs not rounded as they were"
    parts = split(value) if isinstance(module, nn.Linear) else None
    base = parts.rest if parts is not None else value
    if isinstance(base, QuantizedInputsMatrix):
        base = base.matrix
    extra = getattr(module, "bias", None) if isinstance(module, FactoredEmbedding) else None
    try:
        if not isinstance(base, QuantizedMatrix) or extra is not None:
            raise Unfit("it is not a quantised matrix, alone or with low-rank terms")
        blocks = blocks_of(base)
        if blocks.rounded and strict:
            raise Unfit(f"its scales are not float16 (rounding them is off by up to {blocks.rounded:.1e} of each)")
    except Unfit as e:
        if strict:
            raise ValueError(f"{layer}: no type of GGUF holds {value.form} exactly, for {e}. Compress a float16 model with a form such as 'quantized(bits=4, group=32, grid=uniform(symmetric=True))', or export without strict") from None  # fmt: skip # noqa: E501
        dense = copy.deepcopy(value).float().dense().detach()
        dense = dense if extra is None else dense + extra.detach().float()
        kind = Type.F16 if bool(dense.half().isfinite().all()) else Type.F32
        return Held(
            kind, numbers(dense, kind), f"{kind.name}, dequantised{inputs}: no type holds {value.form}, for {e}"
        )
    text = blocks.type.name + inputs
    if blocks.rounded:
        text += f", scales rounded to float16 (relative error up to {blocks.rounded:.1e})"
    return Held(blocks.type, blocks.data, text + (f", with a LoRA of rank {parts.rank}" if parts else ""), parts)


def numbers(x: Tensor, kind: Type) -> np.ndarray:
    """A tensor as GGUF's writer takes it."""
    if kind == Type.BF16:
        return x.contiguous().view(torch.uint8).numpy()
    return x.to(torch.float16 if kind == Type.F16 else torch.float32).contiguous().numpy()


def _write_model(model: Any, source: Path, path: Path, arch: str, tensors: dict[str, Held]) -> list[str]:
    """Write the file of the model, and say what it lacks."""
    notes: list[str] = []
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("model")
    writer.add_name(source.name)
    add_hyperparameters(writer, model)
    rows = model.config.vocab_size
    try:
        add_vocabulary(writer, source, rows)
    except NoVocabulary as e:
        notes.append(f"the file has no vocabulary and takes token ids only, for the model has {e}")
        writer.add_tokenizer_model("none")
    writer.add_vocab_size(rows)
    sizes: Counter[Type] = Counter()
    for name, held in tensors.items():
        raw = None if held.type in (Type.F16, Type.F32) else held.type
        writer.add_tensor(name, np.ascontiguousarray(held.data), raw_dtype=raw)
        sizes[held.type] += held.data.nbytes
    writer.add_file_type(FILE_TYPES[sizes.most_common(1)[0][0]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _finish(writer)
    return notes


def write_adapter(path: Path, arch: str, updates: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Write the file of an adapter.

    Args:
        updates: tensor -> left (out, r) and right (r, in), whose product is added to it.
    """
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    ranks = {len(right) for _, right in updates.values()}
    # an alpha of 0 is read as a scale of 1 at every rank
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(ranks.pop()) if len(ranks) == 1 else 0.0)
    for name, (left, right) in updates.items():
        for ending, factor in (("lora_a", right), ("lora_b", left)):
            kind = Type.F16 if factor.dtype == torch.float16 else Type.F32
            writer.add_tensor(f"{name}.{ending}", numbers(factor, kind))
    _finish(writer)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
