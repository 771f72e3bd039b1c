"""Compressed tiny models, in folders as users have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import eckart
import tiny
from eckart.checkpoint.hf import EckartConfig, describe
from eckart.forms import as_form, drop_in
from eckart.forms.layers import matrix_of

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "c_attn", "c_fc")


def build(family: str, **settings: Any) -> Any:
    """As `tiny.build`, which has no Qwen2."""
    with patch.dict(tiny.CONFIGS, {"qwen2": (tf.Qwen2Config, tiny.GQA)}):
        return tiny.build(family, **settings)


def factor(model: Any, form: str, which: tuple[str, ...] = LAYERS, dtype: torch.dtype | None = None) -> Any:
    """Put `form` in the place of the layers whose names end with one of `which`."""
    before = getattr(model.config, "quantization_config", None)
    for name, module in list(model.named_modules()):
        if name.endswith(which):
            matrix = eckart.fit(as_form(form), matrix_of(module).detach(), dtype=dtype)
            bias = getattr(module, "bias", None)
            model.set_submodule(name, drop_in(module, matrix, None if bias is None else bias.detach()))
    history = [] if before is None else before.history
    model.config.quantization_config = EckartConfig(describe(model), history=history)
    return model


def save(model: Any, folder: Path, tokenizer: Any = None) -> Path:
    """The model and a tokenizer as a folder."""
    model.save_pretrained(folder)
    (tokenizer or tiny.tokenizer()).save_pretrained(folder)
    return folder


def logits(model: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **more).logits.float()


def ids(rows: int = 2, length: int = 9, seed: int = 5, vocabulary: int = tiny.VOCABULARY) -> torch.Tensor:
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


CONVERSATION = "{% for m in messages %}{{ m.content }}{% endfor %}"


def byte_tokenizer(size: int = 300) -> tf.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `size` tokens, learned from a few words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    text = "the matrix that the other matrix is near to, in the norm of the inputs"
    tokenizer.train_from_iterator([text] * 3, trainer)
    made = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    made.chat_template = CONVERSATION
    return made


def piece_tokenizer(words: tuple[str, ...] = ("the", "then", "matrix", "norm")) -> tf.PreTrainedTokenizerFast:
    """A tokenizer as SentencePiece makes them: pieces with a visible space, and bytes for what no piece has."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{i:02X}>": 3 + i for i in range(256)}
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = "▁" + word
        for letter in pieces:
            vocabulary.setdefault(letter, len(vocabulary))
        for i in range(1, len(pieces)):
            pair = (pieces[:i], pieces[i])
            if "".join(pair) not in vocabulary:
                vocabulary["".join(pair)] = len(vocabulary)
                merges.append(pair)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
"""Widths of which GGUF's blocks of 32 can be made."""


def decoder(family: str, tokenizer: Any, dtype: torch.dtype = torch.float16, **more: Any) -> Any:
    """A random model for that tokenizer whose widths are multiples of 32."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    return build(family, dtype=dtype, **(WIDE | {"vocab_size": len(tokenizer)} | ids | more))
