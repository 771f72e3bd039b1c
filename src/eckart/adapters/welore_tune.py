"""WeLore's fine-tuning: only the factors of what a compression made low-rank are trained."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from eckart.adapters.matching import inner, targets
from eckart.adapters.native import Native, put
from eckart.forms.algebra import ProductMatrix
from eckart.forms.layers import DropIn
from eckart.registry import method


@method("welore_tune", family="own factors", paper="From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients, Jaiswal et al., ICML 2025, arXiv 2407.11239")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class WeLoreTune(Native):
    """Trains the factors of every low-rank layer of a compressed model, and the gains of its norms; the rest is frozen.

    Nothing is put beside the layers: PEFT trains and saves copies of the factors (its `modules_to_save`), so that the
    adapter is disabled, switched and loaded on the same compressed model as any other, and `merge_and_unload` leaves
    the compressed model with tuned factors. They are trained in the dtype that they are stored in. Dense layers,
    biases, embeddings and the head learn nothing.

    Args:
        norms: whether the norms' gains learn, as in the paper's code.
    """

    norms: bool = True

    def check(self) -> None:
        if self.dropout:
            raise ValueError(f"welore_tune(dropout={self.dropout!r}): there is no adapter path that could drop inputs; leave it at 0")  # fmt: skip # noqa: E501

    def put(self, model: nn.Module, data: list[Any] | None, adapter_name: str) -> Any:
        base = inner(model)
        chosen = [f"{name}.matrix" for name in low_rank_layers(base, targets(model, LoraConfig(**self.targeting())))]
        if not chosen:
            raise ValueError("none of the targeted layers is low-rank: compress the model first, eckart.compress(model, 'welore', budget=...)")  # fmt: skip # noqa: E501
        chosen += [name for name, module in base.named_modules() if self.norms and is_norm(module)]
        more = next((n for n, _ in base.named_modules() if n not in chosen and n.endswith(tuple(chosen))), None)
        if more is not None:
            raise ValueError(f"PEFT finds what it trains by how names end, and {more} ends like one that was chosen: target both, or rename the model's parts")  # fmt: skip # noqa: E501
        names = [*chosen, *(self.modules_to_save or ())]
        return put(model, LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=names), adapter_name)


def low_rank_layers(model: nn.Module, names: list[str]) -> list[str]:
    """Those of the named layers whose matrix is a product that is thin inside, and theirs alone."""
    drop_ins = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, DropIn)}
    holders = Counter(id(m.matrix) for m in drop_ins.values())
    found: dict[str, Any] = {name: drop_ins[name].matrix for name in names if name in drop_ins}
    return [name for name, matrix in found.items() if _thin(matrix) and holders[id(matrix)] == 1]


def _thin(matrix: nn.Module) -> bool:
    """Also where PEFT already keeps a trained copy."""
    matrix = getattr(matrix, "original_module", matrix)
    if not isinstance(matrix, ProductMatrix) or matrix.left.shape[1] >= min(matrix.shape):
        return False
    return all(any(p.is_floating_point() for p in f.parameters()) for f in (matrix.left, matrix.right))


def is_norm(module: nn.Module) -> bool:
    """A layer norm or one of its kin, with parameters of its own."""
    return "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False))
