"""Invented people: facts from templates that a tiny causal model learns by heart, and a language beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from jaxtyping import Int
from torch import Tensor

from eckart.calibration.stream import Batch

LENGTH = 8
PADDING, END, OF, IS = range(4)


@dataclass(frozen=True)
class Town:
    """People with a first and a last name and some attributes, each told in two ways; a word is a token.

    Args:
        people: in all; the first `forgotten` of them are to be forgotten.
        forgotten: how many. Their names are made of words that others bear, too.
        attributes: of each, such as a trade.
        values: that each attribute can have.
        words: of the language, in which a word is followed by one of two.
        seed: of who is called what and does what.
    """

    people: int = 24
    forgotten: int = 3
    attributes: int = 4
    values: int = 8
    words: int = 32
    seed: int = 0

    @property
    def names(self) -> int:
        """First names, and as many last ones."""
        return max(4, round((2 * self.people) ** 0.5))

    @property
    def vocabulary(self) -> int:
        return 4 + 2 * self.names + 2 * self.attributes + self.attributes * self.values + self.words

    def facts(self, forgotten: bool) -> Int[Tensor, "rows length"]:
        """Sentences on those to be forgotten, or on the others.

        They are `first last trade value` and `trade' of first last is value`, the value being the word before the end.
        """
        generator = torch.Generator().manual_seed(self.seed)
        called = torch.randperm(self.names**2, generator=generator)[: self.people]
        does = torch.randint(0, self.values, (self.people, self.attributes), generator=generator)
        who = range(self.forgotten) if forgotten else range(self.forgotten, self.people)
        rows = []
        for p in who:
            first, last = 4 + int(called[p]) // self.names, 4 + self.names + int(called[p]) % self.names
            for a in range(self.attributes):
                trade = 4 + 2 * self.names + 2 * a
                value = 4 + 2 * self.names + 2 * self.attributes + a * self.values + int(does[p, a])
                rows.append([first, last, trade, value, END])
                rows.append([trade + 1, OF, first, last, IS, value, END])
        return torch.tensor([row + [PADDING] * (LENGTH - len(row)) for row in rows])

    def language(self, rows: int, seed: int) -> Int[Tensor, "rows length"]:
        """Sentences without people; another seed gives others of the same language."""
        successors = torch.randint(0, self.words, (self.words, 2), generator=torch.Generator().manual_seed(self.seed))
        generator = torch.Generator().manual_seed(1_000_000 + seed)
        told = [torch.randint(0, self.words, (rows,), generator=generator)]
        for _ in range(LENGTH - 1):
            rare = (torch.rand(rows, generator=generator) < 0.3).long()
            told.append(successors[told[-1], rare])
        return self.vocabulary - self.words + torch.stack(told, 1)

    def model(self, width: int = 64, layers: int = 2, seed: int = 0) -> Any:
        """A Llama with random weights, for the vocabulary."""
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=4, max_position_embeddings=16, pad_token_id=PADDING, bos_token_id=None,
            eos_token_id=END, tie_word_embeddings=False,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)


def batches(rows: Int[Tensor, "rows length"], size: int, values_only: bool = False) -> list[Batch]:
    """Keyword arguments of a model; labels are all real words, or of each sentence its value alone."""
    made = []
    for part in rows.split(size):
        labels = part.masked_fill(part == PADDING, -100)
        if values_only:
            ends = (part == END).long().argmax(1, keepdim=True)
            labels = torch.full_like(part, -100).scatter(1, ends - 1, part.gather(1, ends - 1))
        made.append({"input_ids": part, "attention_mask": (part != PADDING).long(), "labels": labels})
    return made


def learn(model: Any, rows: Int[Tensor, "rows length"], steps: int, size: int = 64, lr: float = 3e-3, seed: int = 0) -> None:  # fmt: skip # noqa: E501
    """Train all of a model on rows, drawn step by step; the rate falls to zero."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / steps))
    model.train()
    for _ in range(steps):
        drawn = rows[torch.randint(0, len(rows), (size,), generator=generator)]
        model(**batches(drawn, size)[0]).loss.backward()
        optimizer.step()
        falling.step()
        optimizer.zero_grad()
    model.eval()
