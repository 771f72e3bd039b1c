"""Whisper as CTranslate2 stores it, converted to the layout of transformers.

A CTranslate2 file is little-endian: a version, the name and revision of a model class, then the number of variables
and each one's name, rank, dimensions, type and bytes; aliases of variables follow, which are not needed here.
"""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration

VERSION = 6
TYPES = {0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16, 5: torch.bfloat16}
HEAD = 64  # width of an attention head in all sizes of Whisper
Pairs = dict[str, tuple[str, ...]]


class _Bytes:
    """What is left of a file's bytes."""

    def __init__(self, data: bytearray):
        self.data, self.at = data, 0

    def numbers(self, layout: str) -> tuple[int, ...]:
        found = struct.unpack_from(f"<{layout}", self.data, self.at)
        self.at += struct.calcsize(f"<{layout}")
        return found

    def text(self) -> str:
        (length,) = self.numbers("H")
        self.at += length
        return bytes(self.data[self.at - length : self.at]).rstrip(b"\0").decode()

    def tensor(self) -> Tensor:
        shape = self.numbers("I" * self.numbers("B")[0])
        kind, length = self.numbers("BI")
        start, self.at = self.at, self.at + length
        return torch.frombuffer(self.data[start : self.at], dtype=TYPES[kind]).view(shape)


def read_ctranslate2(path: Path) -> dict[str, Tensor]:
    """Name -> variable. Raises `ValueError` on a file of another version or class."""
    rest = _Bytes(bytearray(path.read_bytes()))
    (version,), name, _ = rest.numbers("I"), rest.text(), rest.numbers("I")
    if (version, name) != (VERSION, "WhisperSpec"):
        raise ValueError(f"{path} holds a {name!r} of version {version}, not a WhisperSpec of version {VERSION}")
    (count,) = rest.numbers("I")
    return {rest.text(): rest.tensor() for _ in range(count)}


def names(layers: int) -> Pairs:
    """Module of CTranslate2 -> modules of transformers, several where one weight holds theirs stacked."""
    found: Pairs = {"encoder/conv1": ("model.encoder.conv1",), "encoder/conv2": ("model.encoder.conv2",)}
    for side in ("encoder", "decoder"):
        found[f"{side}/layer_norm"] = (f"model.{side}.layer_norm",)
        for i in range(layers):
            old, new = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            own, other = f"{new}.self_attn", f"{new}.encoder_attn"
            found |= {
                f"{old}/self_attention/layer_norm": (f"{own}_layer_norm",),
                f"{old}/self_attention/linear_0": (f"{own}.q_proj", f"{own}.k_proj", f"{own}.v_proj"),
                f"{old}/self_attention/linear_1": (f"{own}.out_proj",),
                f"{old}/ffn/layer_norm": (f"{new}.final_layer_norm",),
                f"{old}/ffn/linear_0": (f"{new}.fc1",),
                f"{old}/ffn/linear_1": (f"{new}.fc2",),
            }
            if side == "decoder":
                found |= {
                    f"{old}/attention/layer_norm": (f"{other}_layer_norm",),
                    f"{old}/attention/linear_0": (f"{other}.q_proj",),
                    f"{old}/attention/linear_1": (f"{other}.k_proj", f"{other}.v_proj"),
                    f"{old}/attention/linear_2": (f"{other}.out_proj",),
                }
    return found


def state_dict(variables: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The tensors under transformers' names. Raises `ValueError` where a key projection has a bias: none may."""
    state: dict[str, Tensor] = {}
    for old, new in names(layers).items():
        for own, stored in (("weight", "weight"), ("weight", "gamma"), ("bias", "bias"), ("bias", "beta")):
            if (whole := variables.get(f"{old}/{stored}")) is not None:
                state |= {f"{name}.{own}": part for name, part in zip(new, whole.chunk(len(new)), strict=True)}
    for name in [name for name in state if name.endswith("k_proj.bias")]:
        if bool(state.pop(name).any()):
            raise ValueError(f"{name} is not zero, and transformers' Whisper has no such bias")
    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_positions.weight"] = variables[f"{side}/position_encodings/encodings"]
    state["model.decoder.embed_tokens.weight"] = state["proj_out.weight"] = variables["decoder/embeddings/weight"]
    return state


def from_ctranslate2(path: Path) -> WhisperForConditionalGeneration:
    """The model, in the dtype in which it is stored. Raises `ValueError` where tensors are missing or left over."""
    variables = read_ctranslate2(path)
    tokens, width = variables["decoder/embeddings/weight"].shape
    layers = sum(name.startswith("decoder/") and name.endswith("/ffn/linear_0/weight") for name in variables)
    inner, mels = len(variables["decoder/layer_0/ffn/linear_0/weight"]), variables["encoder/conv1/weight"].shape[1]
    config = WhisperConfig(
        vocab_size=tokens, num_mel_bins=mels, d_model=width, encoder_layers=layers, decoder_layers=layers,
        encoder_attention_heads=width // HEAD, decoder_attention_heads=width // HEAD, encoder_ffn_dim=inner,
        decoder_ffn_dim=inner,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).to(variables["decoder/embeddings/weight"].dtype).eval()
    missing, unexpected = model.load_state_dict(state_dict(variables, layers), strict=False)
    if missing or unexpected:
        raise ValueError(f"{path} does not fill a Whisper: missing {missing[:3]}, left over {unexpected[:3]}")
    return model
