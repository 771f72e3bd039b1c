"""Any adapter that adds a matrix to each layer, as an adapter of llama.cpp."""

from __future__ import annotations

from pathlib import Path

import gguf

from eckart.export.adapted import Adapted, pairs
from eckart.export.export import Written
from eckart.export.gguf import ADAPTER, rotary_order, write_adapter
from eckart.export.gguf_config import ARCHITECTURES, check_supported
from eckart.export.lora import inexact, refuse_inexact


def write(adapted: Adapted, out: Path, rank: int | None = None, strict: bool = False) -> Written:
    """Write `out/adapter.gguf`, to be loaded beside the base model's own GGUF file.

    Raises `ValueError` where llama.cpp has no place for what the adapter changes, or where `strict` and not all is
    exact.
    """
    config = adapted.inner.config
    arch = check_supported(config)
    found = pairs(adapted, rank)
    saved = sorted(adapted.saved())
    if saved:
        raise ValueError(f"{adapted.source} holds modules that were trained whole ({', '.join(saved)}), which an adapter of llama.cpp has no place for: export it with --to lora")  # fmt: skip # noqa: E501
    names = gguf.get_tensor_name_map(ARCHITECTURES[arch], config.num_hidden_layers)
    if strict:
        refuse_inexact(found)
    updates = {}
    for name, pair in found.items():
        stem = names.get_name(name)
        if stem is None:
            raise ValueError(f"{name}: GGUF has no name for this layer in a model of the architecture {arch}: leave it out of the adapter")  # fmt: skip # noqa: E501
        order = rotary_order(config, name)
        updates[f"{stem}.weight"] = (pair.left if order is None else pair.left[order], pair.right)
    write_adapter(out / ADAPTER, arch, updates)
    note = f"load it beside the base model (llama.cpp: -m MODEL.gguf --lora {ADAPTER}); eckart export MODEL --to gguf writes that"  # fmt: skip # noqa: E501
    return Written({name: pair.text() for name, pair in found.items()}, [note, *inexact(found)])
