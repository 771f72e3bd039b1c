"""Find the parts of a model that its family's table names, and read their sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

from torch import nn

from eckart.anatomy.families import FAMILIES, Family
from eckart.anatomy.linears import features, linears
from eckart.anatomy.parts import MLP, Anatomy, Attention, Block, Norm, Projection, Rotary, Rows, unique

_WAY_OUT = (
    "Use linears(model) with a method that treats every linear layer by itself, "
    "or describe the model with an entry in eckart.anatomy.FAMILIES."
)


class UnknownModel(ValueError):
    """The model's structure is not one that the table of families describes."""


def anatomy(model: nn.Module) -> Anatomy:
    """Where the parts of a Hugging Face model are; nothing is run, so the meta device will do.

    The model may be bare, have a head, or be wrapped; its projections may have been replaced by any module that states
    its `in_features` and `out_features`.

    Raises:
        UnknownModel: the model type is not in `FAMILIES`, or a part that its family names is missing.
    """
    return _Finder(model).anatomy()


class _Finder:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parts: dict[str, nn.Module | nn.Parameter] = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_modules(remove_duplicate=False)),
        }
        self.base, self.config, self.family = self._locate()

    def anatomy(self) -> Anatomy:
        family, config = self.family, self.config
        block_list = _join(self.base, family.blocks)
        depth = len(cast(nn.ModuleList, self._module(block_list)))
        head = next((name for name in self._around(family.head) if features(self.parts[name])), None)
        token_embedding = _join(self.base, family.token_embedding)
        found = Anatomy(
            model_type=config.model_type,
            kind=family.kind,
            width=config.hidden_size,
            base=self.base,
            block_list=block_list,
            blocks=tuple(self._block(f"{block_list}.{index}") for index in range(depth)),
            token_embedding=token_embedding,
            position_embedding=self._optional(self.base, family.position_embedding),
            position_bias=self._optional(self.base, family.position_bias),
            other_embeddings=unique(*(self._optional(self.base, path) for path in family.other_embeddings)),
            embedding_projection=self._optional(self.base, family.embedding_projection),
            embedding_norm=self._norm(self._optional(self.base, family.embedding_norm)),
            embedding_scale=config.hidden_size**0.5 if family.scaled_embedding else 1.0,
            final_norm=self._norm(self._optional(self.base, family.final_norm)),
            final_readers=tuple(self._around(family.final_readers)) or unique(head),
            head=head,
            tied=head is not None and self._share(head, token_embedding),
            unplaced=(),
        )
        return replace(found, unplaced=self._unplaced(found))

    def _locate(self) -> tuple[str, Any, Family]:
        """Name, config and family of the one module that holds the blocks and the token embedding."""
        found = []
        for name, module in self.model.named_modules():
            config = getattr(module, "config", None)
            family = FAMILIES.get(getattr(config, "model_type", ""))
            if family and all(_join(name, path) in self.parts for path in (family.blocks, family.token_embedding)):
                found.append((name, config, family))
        if len(found) > 1:
            names = ", ".join(repr(name) for name, _, _ in found)
            raise UnknownModel(
                f"{type(self.model).__name__} holds several transformers ({names}); "
                f"give anatomy one of them, such as model.get_submodule({found[-1][0]!r})."
            )
        if not found:
            raise UnknownModel(self._nothing_found())
        return found[0]

    def _nothing_found(self) -> str:
        cls = type(self.model).__name__
        model_type = getattr(getattr(self.model, "config", None), "model_type", None)
        if model_type is None:
            why = f"{cls} has no config.model_type, so anatomy cannot tell what it is"
        elif model_type in FAMILIES:
            family = FAMILIES[model_type]
            why = (
                f"{cls} is of type {model_type!r}, but no module of it holds both "
                f"{family.blocks!r} and {family.token_embedding!r}"
            )
        else:
            why = f"anatomy does not know the model type {model_type!r} ({cls}); it knows {', '.join(sorted(FAMILIES))}"
        return f"{why}. {_WAY_OUT}"

    def _block(self, name: str) -> Block:
        family = self.family
        return Block(
            name=name,
            attention=self._attention(name),
            mlp=self._mlp(name),
            attention_norm=self._required_norm(_join(name, family.attention_norm)),
            mlp_norm=self._required_norm(_join(name, family.mlp_norm)),
            post_attention_norm=self._norm(family.post_attention_norm and _join(name, family.post_attention_norm)),
            post_mlp_norm=self._norm(family.post_mlp_norm and _join(name, family.post_mlp_norm)),
            pre_norm=self._flag(family.pre_norm),
            parallel=self._flag(family.parallel),
        )

    def _attention(self, block: str) -> Attention:
        family = self.family
        name = _join(block, family.attention)
        heads = self.config.num_attention_heads
        kv_heads = getattr(self.config, "num_key_value_heads", None) or heads
        o = self._projection(_join(block, family.out))
        head_dim = o.shape[1] // heads
        q, k, v = self._qkv(block, heads * head_dim, kv_heads * head_dim)
        sizes = q.shape[0], k.shape[0], v.shape[0], o.shape[1]
        if q == k or sizes != (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim, heads * head_dim):
            raise UnknownModel(
                f"the attention {name!r} has {sizes[0]} query, {sizes[1]} key and {sizes[2]} value rows and its output "
                f"projection {sizes[3]} inputs, which does not make {heads} heads over {kv_heads} key heads. {_WAY_OUT}"
            )
        return Attention(
            name=name,
            q=q,
            k=k,
            v=v,
            o=o,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rotary=self._rotary(),
            qk_norm=unique(*(self._optional(block, path) for path in family.qk_norm)),
            scale=float(getattr(self._module(name), "scaling", head_dim**-0.5)),
        )

    def _qkv(self, block: str, rows: int, kv_rows: int) -> tuple[Projection, Projection, Projection]:
        family = self.family
        q, k, v = (self._projection(_join(block, path)) for path in (family.query, family.key, family.value))
        if not q == k == v or q.shape[0] != rows + 2 * kv_rows:
            return q, k, v
        if family.fused == "stacked":
            return _part(q, Rows(0, rows)), _part(k, Rows(rows, kv_rows)), _part(v, Rows(rows + kv_rows, kv_rows))
        heads = self.config.num_attention_heads
        h = rows // heads
        q, k, v = (_part(q, Rows(i * h, h, 3 * h, heads)) for i in range(3))
        return q, k, v

    def _mlp(self, block: str) -> MLP:
        family = self.family
        up = self._projection(_join(block, family.up))
        gate = None if family.gate is None else self._projection(_join(block, family.gate))
        if gate == up:
            half = up.shape[0] // 2
            gate, up = _part(up, Rows(0, half)), _part(up, Rows(half, half))
        return MLP(
            name=_join(block, family.mlp),
            gate=gate,
            up=up,
            down=self._projection(_join(block, family.down)),
            activation=getattr(self.config, family.activation),
        )

    def _rotary(self) -> Rotary | None:
        """The rotated width, from the frequencies that the model's rotary module holds."""
        name = self._optional(self.base, self.family.rotary)
        if name is None:
            return None
        frequencies = [b for key, b in self._module(name).named_buffers() if key.endswith("inv_freq")]
        return Rotary(2 * frequencies[0].numel())

    def _norm(self, name: str | None) -> Norm | None:
        return None if name is None else self._required_norm(name)

    def _required_norm(self, name: str) -> Norm:
        module = self._module(name)
        eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
        if eps is None:
            raise UnknownModel(f"the norm {name!r} ({type(module).__name__}) does not state its eps. {_WAY_OUT}")
        return Norm(name, "layer" if isinstance(module, nn.LayerNorm) else "rms", eps, self.family.gain_offset)

    def _projection(self, name: str) -> Projection:
        module = self._module(name)
        shape = features(module)
        if shape is None:
            raise UnknownModel(
                f"{name!r} ({type(module).__name__}) should be a linear map, "
                f"but it does not state its out_features and in_features. {_WAY_OUT}"
            )
        return Projection(name, shape)

    def _module(self, name: str) -> nn.Module:
        part = self.parts.get(name)
        if not isinstance(part, nn.Module):
            raise UnknownModel(
                f"a model of type {self.config.model_type!r} should have a module {name!r}, "
                f"but this {type(self.model).__name__} has none. {_WAY_OUT}"
            )
        return part

    def _optional(self, prefix: str, path: str | None) -> str | None:
        name = None if path is None else _join(prefix, path)
        return name if name in self.parts else None

    def _around(self, paths: tuple[str, ...]) -> Iterator[str]:
        """Those of the paths that exist in the base or in a module around it, nearest first."""
        ancestors = self.base.split(".") if self.base else []
        for depth in range(len(ancestors), -1, -1):
            for path in paths:
                if name := self._optional(".".join(ancestors[:depth]), path):
                    yield name

    def _flag(self, value: bool | str) -> bool:
        return bool(getattr(self.config, value)) if isinstance(value, str) else value

    def _share(self, a: str, b: str) -> bool:
        return any(p is q for p in self._module(a).parameters() for q in self._module(b).parameters())

    def _unplaced(self, found: Anatomy) -> tuple[str, ...]:
        placed = set(unique(found.token_embedding, found.position_bias, found.head))
        placed.update(found.writers(), found.readers())
        for block in found.blocks:
            placed.update(block.readers(), block.writers())
        sites = (site.name for site in linears(self.model))
        return tuple(name for name in sites if placed.isdisjoint(_ancestry(name)))


def _part(whole: Projection, rows: Rows) -> Projection:
    return Projection(whole.module, (len(rows), whole.shape[1]), rows)


def _join(prefix: str, path: str) -> str:
    return ".".join(part for part in (prefix, path) if part)


def _ancestry(name: str) -> Iterator[str]:
    """The name itself and every module around it."""
    path = name.split(".")
    return (".".join(path[:depth]) for depth in range(1, len(path) + 1))
