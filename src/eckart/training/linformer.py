"""Linformer: attention whose keys and values are projected along the sequence, put into Hugging Face encoders.

The modules of a model stay; the projections are parameters on them, and transformers' attention interface calls the
function below in place of its own. `model.set_attn_implementation("sdpa")` brings exact attention back, to compare.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

from eckart.forms.residual import Connected
from eckart.forms.stand_ins import stand_in
from eckart.jobs.remember import remember
from eckart.training.base import generator_of

NAME = "linformer"
SHARES = ("none", "headwise", "key_value", "layerwise")
STARTS = ("pooling", "normal")
HIDDEN = -1e4  # transformers' additive masks hold the least number of a dtype, that of float16 is -65504


def projected_attention(
    query: Float[Tensor, "batch heads m d"],
    key: Float[Tensor, "batch kv_heads n d"],
    value: Float[Tensor, "batch kv_heads n dv"],
    E: Float[Tensor, "*kv_heads k longest"],
    F: Float[Tensor, "*kv_heads k longest"],
    valid: Bool[Tensor, "#batch #kv_heads n"] | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads m dv"]:
    """softmax(Q (E K)^T / sqrt(d)) (F V), in O(m k + n k) where exact attention is O(m n).

    A sequence below the longest takes the first n columns of E and F. Keys and values that are not `valid` are zeroed
    before they are projected. Of a slot (a row of E) then only the share s = sum_valid |E_ij| / sum_all |E_ij| has
    anything behind it, and its score gets log s: an empty slot takes no part, one of a whole sequence is the paper's.
    So padding changes nothing, and with E = F = 1 this is exact attention with its mask. (In the paper an empty slot
    scores 0 and counts; with dense random E, s is about the same everywhere and cancels.)

    Linformer: Self-Attention with Linear Complexity, Wang et al., 2020, arXiv 2006.04768, equation 7.

    Raises `ValueError` if n is more than the longest.
    """
    n, longest = key.shape[-2], E.shape[-1]
    if n > longest:
        raise ValueError(f"a sequence of {n} does not fit projections of {longest}")
    if valid is not None:
        key, value = (x.masked_fill(~valid[..., None], 0) for x in (key, value))
    K, V = E[..., :n] @ key, F[..., :n] @ value
    bias = None if valid is None and n == longest else _log_share(E, n, valid, query.dtype)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        K, V = (x.repeat_interleave(groups, dim=1) for x in (K, V))
        if bias is not None and bias.dim() > 2 and bias.shape[-3] > 1:
            bias = bias.repeat_interleave(groups, dim=-3)
    return scaled_dot_product_attention(query, K, V, attn_mask=bias, dropout_p=dropout, scale=scaling)


def _log_share(
    E: Float[Tensor, "*kv_heads k longest"], n: int, valid: Bool[Tensor, "batch kv_heads n"] | None, dtype: torch.dtype
) -> Float[Tensor, "*batch 1 k"]:
    """log of the share of each slot that is behind it; the least number of the dtype for an empty one."""
    size = E.to(torch.promote_types(E.dtype, torch.float32)).abs()
    behind = size[..., :n]
    sums = behind.sum(-1) if valid is None else (behind @ valid[..., None].to(size.dtype))[..., 0]
    tiny = torch.finfo(size.dtype).tiny
    share = sums / size.sum(-1).clamp_min(tiny)
    log = share.clamp_min(tiny).log().to(dtype)
    return log.masked_fill(share == 0, torch.finfo(dtype).min)[..., None, :]


@dataclass(frozen=True)
class Projected:
    """How one attention module projects its keys and values.

    Attributes:
        name: of the module, for errors.
        length: the longest sequence.
        rank: k, the slots that it is projected to.
        share: `none`, `headwise`, `key_value` or `layerwise`.
        owns: whether the module has projections of its own; false for all but one where `share` is `layerwise`.
    """

    name: str
    length: int
    rank: int
    share: str
    owns: bool = True

    def __post_init__(self) -> None:
        for word in ("length", "rank"):
            value = getattr(self, word)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{self.name}: linformer({word}={value!r}): it is a positive integer")
        if self.rank > self.length:
            raise ValueError(f"{self.name}: linformer(rank={self.rank}, length={self.length}): more slots than positions; lower the rank")  # fmt: skip # noqa: E501
        if self.share not in SHARES:
            raise ValueError(f"{self.name}: linformer(share={self.share!r}): it is one of {', '.join(SHARES)}")
        if not isinstance(self.owns, bool) or not (self.owns or self.share == "layerwise"):
            raise ValueError(f"{self.name}: linformer(owns={self.owns!r}): only layerwise projections are another's")


@stand_in
class Linformer(Connected):
    """An encoder's attention with projections; `projecting` makes it a subclass of the very class it was."""

    kind = NAME
    _is_hf_initialized = False  # the rest of the module is the model's own
    linformer: Projected
    linformer_E: nn.Parameter
    linformer_F: nn.Parameter | None
    linformer_owner: list[Linformer]  # within a list, it is no submodule

    def spec(self) -> dict[str, Any]:
        how = self.linformer
        return {"kind": self.kind, "length": how.length, "rank": how.rank, "share": how.share, "owns": how.owns}

    @classmethod
    def from_spec(cls, model: nn.Module, name: str, spec: dict[str, Any], dtype: torch.dtype) -> nn.Module:
        words: list[Any] = [spec.get(word) for word in ("length", "rank", "share", "owns")]
        how, module = Projected(name, *words), model.get_submodule(name)
        _check(name, module)
        _encoder(model).set_attn_implementation(NAME)
        return projecting(module, how, dtype, torch.device("meta"))

    def connect(self, model: nn.Module, name: str) -> None:
        if self.linformer.owns:
            return
        same = [m for m in model.modules() if isinstance(m, Linformer) and m.linformer.owns]
        ours = (self.linformer.length, self.linformer.rank, self.linformer.share)
        if len(same) != 1 or ours != (same[0].linformer.length, same[0].linformer.rank, same[0].linformer.share):
            raise ValueError(f"{name} needs the projections of one other layer of its length and rank, the checkpoint describes {len(same)} with any")  # fmt: skip # noqa: E501
        self.linformer_owner = same

    def projections(self) -> tuple[Tensor, Tensor]:
        """E and F, each (k, longest) or (kv_heads, k, longest)."""
        owner = self if self.linformer.owns else self.linformer_owner[0]
        return owner.linformer_E, owner.linformer_E if owner.linformer_F is None else owner.linformer_F


@cache
def _class(cls: Any) -> Any:
    return type(f"Linformer{cls.__name__}", (Linformer, cls), {"__module__": __name__})


def projecting(module: Any, how: Projected, dtype: torch.dtype, device: torch.device) -> Linformer:
    """The very module, made a `Linformer`, its projections without values."""
    heads = getattr(module.config, "num_key_value_heads", None) or module.config.num_attention_heads
    shape = (heads, how.rank, how.length) if how.share == "none" else (how.rank, how.length)
    cls: Any = type(module)
    module.__class__ = _class(cls)
    new = cast(Linformer, module)
    new.linformer = how
    for word, there in (("linformer_E", how.owns), ("linformer_F", how.share in ("none", "headwise"))):
        empty = nn.Parameter(torch.empty(shape, dtype=dtype, device=device)) if there else None
        new.register_parameter(word, empty)
    return new


def linformer_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads m d"],
    key: Float[Tensor, "batch kv_heads n d"],
    value: Float[Tensor, "batch kv_heads n dv"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch m heads dv"], None]:
    """What transformers calls by the name `linformer`: projected where a module is, exact where it was left out."""
    if not isinstance(module, Linformer):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    how = module.linformer
    if key.shape[-2] > how.length:
        raise ValueError(f"{how.name} projects sequences of at most {how.length}, this one has {key.shape[-2]}: cut it, or make the model anew with length={key.shape[-2]}")  # fmt: skip # noqa: E501
    for word in ("position_bias", "softcap", "s_aux", "sliding_window", "cache"):
        if kwargs.get(word) is not None:
            raise ValueError(f"{how.name} uses {word}, which Linformer has no form of: leave it out with layers=...")
    valid = None if attention_mask is None else _valid(how.name, attention_mask)
    E, F = (p.to(key.device) for p in module.projections())
    out = projected_attention(query, key, value, E, F, valid, scaling=scaling, dropout=dropout)
    return out.transpose(1, 2).contiguous(), None


def _valid(name: str, mask: Tensor) -> Bool[Tensor, "batch heads n"]:
    """Which keys a mask of (batch, heads, m, n) lets through. Raises `ValueError` if it says more than that."""
    row = mask[..., :1, :]
    if mask.shape[-2] > 1 and not bool((mask == row).all()):
        raise ValueError(f"{name}: the mask differs between queries, as a causal, windowed or packed one does. Linformer mixes all positions: give it a padding mask of (batch, n), or leave the layer out with layers=...")  # fmt: skip # noqa: E501
    row = row[..., 0, :]
    if row.dtype == torch.bool:
        return row
    hidden = row < HIDDEN
    if bool(row.masked_fill(hidden, 0).any()):
        raise ValueError(f"{name}: the mask adds to scores of single positions, which Linformer has none of: give it a padding mask of (batch, n)")  # fmt: skip # noqa: E501
    return ~hidden


def linformer_mask(**kwargs: Any) -> Tensor | None:
    """transformers' own mask for sdpa; where every query has the same, one row of it in place of n."""
    if kwargs.get("mask_function") is bidirectional_mask_function:
        kwargs["q_length"] = 1
    return sdpa_mask(**kwargs)


AttentionInterface.register(NAME, linformer_attention)
AttentionMaskInterface.register(NAME, linformer_mask)


def use_linformer(
    model: PreTrainedModel, *, length: int, rank: int = 256,
    share: Literal["none", "headwise", "key_value", "layerwise"] = "key_value", layers: str = "",
    start: Literal["pooling", "normal"] = "pooling", seed: int = 0,
) -> list[str]:  # fmt: skip
    """Let the attention of a Hugging Face encoder project its keys and values along the sequence, in place.

    Make the optimiser afterwards: there are new parameters. The model is saved and loaded as any other, by
    `save_pretrained` and, after `import eckart`, `from_pretrained`.

    Args:
        model: an encoder that computes attention through transformers' interface: BERT, RoBERTa, ELECTRA, ViT, ...
        length: the longest sequence, n; shorter ones take the first columns of the projections.
        rank: k, the number of slots that every sequence is projected to.
        share: `none`: E and F for every head; `headwise`: for every layer; `key_value`: and E = F; `layerwise`: one E
            for the whole model.
        layers: regular expression that the names of the attention modules match in full; empty for all. The others
            stay exact.
        start: `pooling`: means over n / k neighbours, which at k = n is exact attention, so a trained model stays near
            what it was; `normal`: independent N(0, 1/k), as R of the paper's proofs, to train from scratch.
        seed: of `normal`.

    Returns:
        The names of the attention modules.

    Raises `TypeError` or `ValueError` where a model, or one of the layers, cannot be a Linformer.
    """
    _encoder(model)
    found = {n: m for n, m in model.named_modules() if _is_attention(m) and re.fullmatch(layers or ".*", n)}
    if not found:
        raise ValueError(f"no attention module of {type(model).__name__} matches layers={layers!r}")
    if start not in STARTS:
        raise ValueError(f"linformer(start={start!r}): it is one of {', '.join(STARTS)}")
    for name, module in found.items():
        _check(name, module)
    first, *_ = found
    hows = {name: Projected(name, length, rank, share, share != "layerwise" or name == first) for name in found}
    new: list[Linformer] = []
    for i, (name, module) in enumerate(found.items()):
        like = next(p for p in module.parameters() if p.is_floating_point())
        new.append(projecting(module, hows[name], like.dtype, like.device))
        if not hows[name].owns:
            new[-1].linformer_owner = new[:1]
        for j, matrix in enumerate(p for p in (new[-1].linformer_E, new[-1].linformer_F) if p is not None):
            _begin(matrix, start, generator_of(seed, i, j))
    model.set_attn_implementation(NAME)
    words = {"training": NAME, "length": length, "rank": rank, "share": share, "start": start, "seed": seed}
    remember(model, {**words, "layers": layers})
    return list(found)


def pooling(rank: int, length: int) -> Float[Tensor, "rank length"]:
    """Means over neighbours: the row i is 1 / size on its window of consecutive positions."""
    window = torch.arange(length) * rank // length
    one = torch.nn.functional.one_hot(window, rank).T.to(torch.float32)
    return one / one.sum(-1, keepdim=True)


def _begin(matrix: nn.Parameter, start: str, generator: torch.Generator) -> None:
    *_, rank, length = matrix.shape
    drawn = pooling(rank, length) if start == "pooling" else torch.randn(matrix.shape, generator=generator) / rank**0.5
    with torch.no_grad():
        matrix.copy_(drawn)


def _is_attention(module: nn.Module) -> bool:
    """Whether it is what transformers hands to its attention functions."""
    is_model = isinstance(module, PreTrainedModel)
    return isinstance(getattr(module, "is_causal", None), bool) and hasattr(module, "config") and not is_model


def _encoder(model: nn.Module) -> PreTrainedModel:
    """The model, if its attention can be replaced by name. Raises `TypeError` or `ValueError`."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{type(model).__name__} is no transformers model: call `projected_attention` in its attention")
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and not (part._can_set_attn_implementation() and part._supports_sdpa):
            raise ValueError(f"{type(part).__name__} does not compute its attention through transformers' interface, so nothing can be put in its place: take a model that does (BERT, RoBERTa, ELECTRA, ViT, ...), or call `projected_attention` in an attention of your own")  # fmt: skip # noqa: E501
    return model


def _check(name: str, module: Any) -> None:
    """Raise `ValueError` where a module cannot be a Linformer."""
    if isinstance(module, Linformer):
        raise ValueError(f"{name} is a Linformer already: load the model anew to give it other projections")
    if not _is_attention(module):
        raise ValueError(f"{name}: {type(module).__name__} is not an attention that Linformer can stand in for")
    if module.is_causal:
        raise ValueError(f"{name} is causal, and Linformer has no causal form: a projection along the sequence mixes later positions into every slot. Take an encoder, or leave the layer out with layers=...")  # fmt: skip # noqa: E501
    if getattr(module, "sliding_window", None) is not None:
        raise ValueError(f"{name} has a sliding window, which Linformer has no form of: leave it out with layers=...")
