"""A saved adapter on its base model, and the change that it makes to each layer, as two thin matrices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from jaxtyping import Float
from peft import PeftConfig, PeftModel
from peft.tuners.adalora import SVDLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from torch import Tensor, nn

from eckart.adapters.kinds import as_matrix, carries
from eckart.adapters.layer import AdapterLayer
from eckart.checkpoint.folder import model_class
from eckart.checkpoint.source import no_bars, resolve
from eckart.downloads import Progress, silent
from eckart.linalg.svd import truncated_svd

CONFIG, WEIGHTS, NAME = "adapter_config.json", "adapter_model.safetensors", "default"
SLACK = 1e-6
"""Relative error below which an approximation counts as exact: that of float32."""


class Pair(NamedTuple):
    """The change of a layer's matrix, left @ right.

    Attributes:
        left: (out, r).
        right: (r, in).
        error: of the product, relative to the change.
    """

    left: Float[Tensor, "out r"]
    right: Float[Tensor, "r in"]
    error: float

    @property
    def rank(self) -> int:
        return self.right.shape[0]

    def text(self) -> str:
        """For a table."""
        return f"rank {self.rank}, " + (f"relative error {self.error:.2g}" if self.error > SLACK else "exact")


@dataclass
class Adapted:
    """A base model with a saved adapter.

    Attributes:
        model: PEFT's.
        source: folder of the adapter.
        base: what the base model is called.
        before: layer -> its weight before PEFT put the adapter there, for adapters of PEFT's own, which may change it.
    """

    model: Any
    source: Path
    base: str
    before: dict[str, Tensor]

    @property
    def config(self) -> Any:
        return self.model.peft_config[NAME]

    @property
    def inner(self) -> Any:
        """The base model, with the adapter's layers in it."""
        return self.model.get_base_model()

    def saved(self) -> dict[str, ModulesToSaveWrapper]:
        """Modules that were trained and saved whole."""
        return {n: m for n, m in self.inner.named_modules() if isinstance(m, ModulesToSaveWrapper)}


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter, and no model."""
    path = Path(folder).expanduser()
    return (path / CONFIG).is_file() and not (path / "config.json").is_file()


def open_adapter(folder: Path, base: str | None = None, progress: Progress = silent) -> Adapted:
    """The adapter of a folder on its base model, in float32.

    Args:
        base: any MODEL; the one that the adapter's settings name where it is not given.

    Raises `ValueError` where the adapter, or its base, cannot be loaded.
    """
    try:
        config = PeftConfig.from_pretrained(folder)
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{folder / CONFIG} is not of an adapter that PEFT or eckart knows: {e}") from e
    spec = base or config.base_model_name_or_path
    if not spec:
        raise ValueError(f"{folder / CONFIG} does not name its base model: give it with --base MODEL")
    source = resolve(spec, progress=progress)
    model = _base(source.folder, config.task_type, folder)
    ours = str(getattr(config.peft_type, "value", config.peft_type)).startswith("ECKART_")
    before = {} if ours else {n: w.detach().clone() for n, m in model.named_modules() if (w := _weight(m)) is not None}
    with no_bars():
        adapted = PeftModel.from_pretrained(model, folder, adapter_name=NAME).eval()
    return Adapted(adapted, folder, spec, before)


def _base(folder: Path, task: str | None, adapter: Path) -> Any:
    """The base model with the head that the adapter was trained with."""
    more: dict[str, Any] = {}
    if task == "SEQ_CLS":
        cls: Any = transformers.AutoModelForSequenceClassification
        more["num_labels"] = classes(adapter / WEIGHTS)
    elif task == "CAUSAL_LM":
        cls = transformers.AutoModelForCausalLM
    else:
        cls = model_class(transformers.AutoConfig.from_pretrained(folder))
    with no_bars():
        return cls.from_pretrained(folder, dtype=torch.float32, **more)


def classes(path: Path) -> int:
    """Rows of the last matrix of the classifier that was saved with an adapter."""
    with safe_open(path, "pt") as file:
        names = [n for n in file.keys() if n.endswith(".weight") and {"score", "classifier"} & set(n.split("."))]  # noqa: SIM118
        rows = [file.get_slice(n).get_shape()[0] for n in names]
    return min(rows, default=2)


def pairs(adapted: Adapted, rank: int | None) -> dict[str, Pair]:
    """layer -> its change, at most of a rank; of layers that change, only.

    Exact where the adapter's own factors are thin enough, else the nearest of that rank (Eckart and Young 1936).

    Raises `ValueError` where the adapter is no sum of matrices and the frozen model, or has no rank of its own and none
    is asked for.
    """
    config = adapted.config
    if getattr(config, "bias", "none") not in ("none", None) or getattr(config, "lora_bias", False):
        raise ValueError(f"{adapted.source} holds trained biases (bias={config.bias!r}), which a plain LoRA has no place for: merge it with model.merge_and_unload() instead")  # fmt: skip # noqa: E501
    found = {}
    for name, layer in adapted.inner.named_modules():
        if isinstance(layer, BaseTunerLayer):
            pair = _pair(name, layer, adapted.before.get(name), rank)
            if pair is not None:
                found[name] = pair
    if not found:
        raise ValueError(f"{adapted.source} ({config.peft_type.value}) changes no matrix of a layer: there is nothing that a LoRA could hold")  # fmt: skip # noqa: E501
    return found


@torch.no_grad()
def _pair(name: str, layer: Any, before: Tensor | None, rank: int | None) -> Pair | None:
    own = _own(name, layer) if isinstance(layer, AdapterLayer) else _native(name, layer, before)
    if own is None:
        return None
    change, factors, known = own
    if factors is not None and (rank is None or factors[1].shape[0] <= rank):
        left, right = (f.detach().float().cpu().clone(memory_format=torch.contiguous_format) for f in factors)
        return Pair(left, right, 0.0) if right.shape[0] else None
    change = change.detach().float().cpu()
    norm = float(change.norm())
    if norm == 0:
        return None
    wanted = known if rank is None else rank
    if wanted is None:
        raise ValueError(f"{name}: the change that this adapter makes has no rank of its own: say how many columns the LoRA may have, --rank R (up to {min(change.shape)})")  # fmt: skip # noqa: E501
    svd = truncated_svd(change, min(wanted, *change.shape))
    kept = svd.S > 0
    root = svd.S[kept].sqrt()
    left, right = svd.U[:, kept] * root, root[:, None] * svd.Vh[kept]
    error = float((change.double() - left.double() @ right.double()).norm()) / norm
    return Pair(left.contiguous(), right.contiguous(), error)


Change = tuple[Tensor, tuple[Tensor, Tensor] | None, int | None]
"""A change (out, in), its factors if it has some, and a rank that it does not exceed."""


def _own(name: str, layer: AdapterLayer) -> Change | None:
    """The change of a layer by an adapter of this library."""
    if NAME not in layer.updates:
        return None
    update = layer._matrix(NAME)
    bias = update.bias_delta(layer.host)
    if bias is not None and bool(bias.any()):
        raise ValueError(f"{name}: this adapter changes the bias, too, which a plain LoRA has no place for: merge it with model.merge_and_unload() instead")  # fmt: skip # noqa: E501
    return update.delta(layer.host), update.factors(layer.host), None


def _native(name: str, layer: Any, before: Tensor | None) -> Change | None:
    """The change of a layer by an adapter of PEFT's own, which may have changed the frozen weight, too."""
    if not any(NAME in getattr(layer, part, {}) for part in layer.adapter_layer_names):
        return None
    module = layer.get_base_layer()
    if not carries(module):
        raise ValueError(f"{name} is a {type(module).__name__}, whose adapter eckart cannot write as a plain LoRA: leave the layer out of the adapter")  # fmt: skip # noqa: E501
    same = before is None or torch.equal(before, module.weight)
    dora = getattr(layer, "use_dora", {}).get(NAME, False)
    factors = _factors(layer) if isinstance(layer, LoraLayer) and not dora else None
    if factors is not None and same:
        return factors[0] @ factors[1], factors, None
    if before is None:
        raise ValueError(f"{name} is factored, and what {type(layer).__name__} does to it cannot be told apart: call eckart.densify on the base model and save that first")  # fmt: skip # noqa: E501
    layer.merge(adapter_names=[NAME])
    change = as_matrix(module, module.weight.detach() - before)
    return change, None, None if factors is None else 2 * factors[1].shape[0]


def _factors(layer: Any) -> tuple[Tensor, Tensor]:
    """B and A of a LoRA of PEFT's, which may be convolutions, or AdaLoRA's with singular values between them."""
    if isinstance(layer, SVDLinear):
        scale = layer.scaling[NAME] / (layer.ranknum[NAME] + 1e-5)
        return scale * layer.lora_B[NAME], layer.lora_A[NAME] * layer.lora_E[NAME]
    return layer.scaling[NAME] * layer.lora_B[NAME].weight.flatten(1), layer.lora_A[NAME].weight.flatten(1)


def _weight(module: nn.Module) -> Tensor | None:
    if not carries(module):
        return None
    found: Any = module._parameters.get("weight")
    return found
