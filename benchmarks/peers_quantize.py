"""Quantisers beside one another: the same model, bits, groups and calibration text; quality, bytes and seconds.

    pip install torchao hqq optimum-quanto llmcompressor
    python benchmarks/peers_quantize.py [--bits 2 3 4] [--group 64] [--json FILE]

The model is the decoder of this folder, in float32; all linear layers within its blocks are quantised, asymmetric, in
groups along the input. Bytes are those of the tensors that stand for these layers when saved, over their weights: a
peer that keeps a code of 3 bits in a byte pays for the byte. `auto` makes a whole model as large as the row before it,
and may take bytes from the tables for these layers. A peer that is not installed, or has no such width on a CPU, is a
row that says so.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader

import eckart
from common import linears, machine, table, write_json
from eckart.calibration.stream import Batch
from models import load
from quality import Scale
from tasks import TASKS, Decoder

COLUMNS = ("way", "bits asked", "bits stored", "perplexity", "KL", "top-1", "seconds")


def stored(value: Any) -> int:
    """Bytes of all plain tensors that a value is made of: quantised tensors are flattened."""
    if isinstance(value, dict):
        return sum(map(stored, value.values()))
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        return sum(stored(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def held(model: nn.Module, names: Iterable[str]) -> int:
    """Bytes of the state of these modules."""
    return sum(stored(dict(model.get_submodule(name).state_dict())) for name in names)


def ours(form: str, **settings: Any) -> Callable[[int, int, list[Batch]], tuple[nn.Module, int]]:
    def run(bits: int, group: int, batches: list[Batch]) -> tuple[nn.Module, int]:
        model = load("decoder", torch.float32)
        names = list(linears(model))
        text = form.format(bits=bits, group=group)
        eckart.compress(model, form=text, budget="1.0", data=batches, allocation="uniform()", **settings)
        return model, held(model, names)

    return run


def auto(nbytes: float, batches: list[Batch]) -> tuple[nn.Module, int]:
    """The best of `auto` in the linear layers' bytes of another row; codes are stored beside scales in float16."""
    model = load("decoder", torch.float16)
    names, scale = list(linears(model)), Scale.of(model, "")
    eckart.compress(model, "auto", budget=scale.budget(8 * nbytes / scale.weights), data=batches)
    return model.float(), held(model.half(), names)


def torchao(bits: int, group: int, batches: list[Batch]) -> tuple[nn.Module, int]:
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_

    model = load("decoder", torch.float32)
    names = list(linears(model))
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(group), mapping_type=MappingType.ASYMMETRIC
    )
    quantize_(model, config, filter_fn=lambda module, name: name in names)
    return model, held(model, names)


def hqq(bits: int, group: int, batches: list[Batch]) -> tuple[nn.Module, int]:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = load("decoder", torch.float32)
    for name, module in linears(model).items():
        config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=1)
        model.set_submodule(name, HQQLinear(module, config, compute_dtype=torch.float32, device="cpu"))
    return model, sum(stored({"W": m.W_q, "meta": m.meta}) for m in model.modules() if isinstance(m, HQQLinear))


def quanto(bits: int, group: int, batches: list[Batch]) -> tuple[nn.Module, int]:
    from optimum.quanto import freeze, qint2, qint4, quantize

    if bits not in (2, 4):
        raise ValueError(f"no codes of {bits} bits")
    model = load("decoder", torch.float32)
    names = list(linears(model))
    quantize(model, weights={2: qint2, 4: qint4}[bits], include=names)
    freeze(model)
    return model, held(model, names)


def llm_compressor(bits: int, group: int, batches: list[Batch]) -> tuple[nn.Module, int]:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    model: Any = load("decoder", torch.float32)
    names = list(linears(model))
    rows = [{k: v[i : i + 1] for k, v in b.items()} for b in batches for i in range(len(b["input_ids"]))]
    weights = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": group}
    recipe = GPTQModifier(config_groups={"group_0": {"targets": names, "weights": weights}}, ignore=["lm_head"])
    loader: Any = DataLoader(rows, batch_size=None)  # type: ignore[arg-type]
    oneshot(model=model, recipe=recipe, dataset=loader, num_calibration_samples=len(rows))
    found = load("decoder", torch.float32)
    for name, module in linears(found).items():  # saving packs the weights of the model that is saved
        module.weight.data.copy_(model.get_submodule(name).weight)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_compressed=True)
        total = 0
        for path in Path(folder).glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                total += sum(stored(file.get_tensor(k)) for k in file.keys() if k.rpartition(".")[0] in names)  # noqa: SIM118
    return found, total


WAYS: dict[str, Callable[[int, int, list[Batch]], tuple[nn.Module, int]]] = {
    "torchao intx": torchao,
    "quanto": quanto,
    "hqq": hqq,
    "eckart nearest": ours("quantized(bits={bits}, group={group})"),
    "eckart searched": ours(
        "quantized(bits={bits}, group={group}, grid=uniform(search=20))", metric="input_covariance()"
    ),
    "llm-compressor gptq": llm_compressor,
    "eckart gptq": ours("quantized(bits={bits}, group={group}, rounding=gptq())", metric="input_covariance()"),
    "eckart gptq searched": ours(
        "quantized(bits={bits}, group={group}, grid=uniform(search=20), rounding=gptq())", metric="input_covariance()"
    ),
}


def row(task: Decoder, name: str, bits: int, make: Callable[[], tuple[nn.Module, int]], weights: int) -> dict[str, Any]:
    """What one quantiser makes; what goes wrong is part of the result."""
    begin = time.process_time()
    try:
        model, nbytes = make()
        seconds = time.process_time() - begin
        figures = task.measure(model.float())
    except Exception as error:  # a peer that cannot is a row, whatever stops it
        return {"way": name, "bits": bits, "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    return {"way": name, "bits": bits, "bytes": nbytes, "stored": 8 * nbytes / weights, "seconds": seconds,
            "figures": figures}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of 256 tokens (default 64)")
    parser.add_argument("--size", type=int, default=0, help="held-out windows (default: the task's)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    task = TASKS["decoder"]("decoder", arguments.samples, 256, arguments.size)
    assert isinstance(task, Decoder)
    batches = task.calibration()
    weights = sum(m.weight.numel() for m in linears(task.original).values())
    rows = []
    for bits in arguments.bits:
        for name, make in WAYS.items():
            with console.status(f"{name}, {bits} bits"):
                rows.append(row(task, name, bits, partial(make, bits, arguments.group, batches), weights))
        allowed = rows[-1]["bytes"]
        with console.status(f"auto, {bits} bits"):
            rows.append(row(task, "eckart auto", bits, partial(auto, allowed, batches), weights))
        if arguments.json:
            write_json({"machine": machine(), "settings": {k: str(v) for k, v in vars(arguments).items()}, "rows": rows}, arguments.json)  # fmt: skip # noqa: E501
    figures = task.measure(load("decoder", torch.float32))
    made = table(f"decoder in float32, groups of {arguments.group}; perplexity {figures['perplexity']:.2f}", COLUMNS[:1], COLUMNS[1:])  # fmt: skip # noqa: E501
    for r in rows:
        if "error" in r:
            made.add_row(r["way"], str(r["bits"]), "-", "-", "-", "-", r["error"])
            continue
        cells = [form.format(r["figures"][key]) for key, form in Decoder.columns.items()]
        made.add_row(r["way"], str(r["bits"]), f"{r['stored']:.2f}", *cells, f"{r['seconds']:.1f}")
    console.print(made)


if __name__ == "__main__":
    main()
