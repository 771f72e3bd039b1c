"""What adapters learn in finetune.py: each task is a model, batches to train it on, and two figures."""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import eckart
from convolutions import WIDTHS, Network, accuracy, batches
from corpora import corpora
from eckart.calibration.data import token_batches
from eckart.calibration.wikipedia import articles
from eckart.checkpoint.source import resolve
from eckart.downloads import build_once
from eckart.registry import entries
from garments import Garments, garments
from mail import Mail, mails
from models import FOLDERS, load
from pretrain_decoder import split
from tasks import SENTENCE

WHOLE, LORA, DORA, PISSA = "full fine-tuning", "PEFT LoRA", "PEFT DoRA", "PEFT PiSSA"
KERNELS = ("lora_c", "conv_dora", "cp_lora", "cp_dora")
STARTS = ("lq_lora_start", "eora_start")
ELSEWHERE = ("dp_lora", "fedsvd", "loku")
"""Methods with benchmarks of their own."""


def usual() -> tuple[str, ...]:
    """What adapts linear layers of a dense model; the adapters of kernels are LoRA and DoRA there."""
    others = {*ELSEWHERE, *KERNELS, *STARTS, "welore_tune", "compress_then_prompt"}
    return (WHOLE, LORA, DORA, PISSA, *(e.key for e in entries("adapters") if e.key not in others))


class Task(ABC):
    """A model, batches to train it on, and two figures.

    Attributes:
        rows: methods that are compared on it.
        targets: of adapters; a regular expression, or PEFT's word for all linear layers.
    """

    name: str
    better: str
    figure: str
    rows: ClassVar[tuple[str, ...]] = usual()
    targets: ClassVar[str] = "all-linear"

    def __init__(self, quick: bool):
        self.few = quick

    @abstractmethod
    def model(self) -> nn.Module:
        """A fresh copy of what is adapted."""

    def words(self, method: str) -> dict[str, Any]:
        """Settings of a method that belong to the task."""
        return {} if self.targets == "all-linear" else {"target_modules": self.targets}

    def wrapped(self, adapted: nn.Module, seed: int) -> nn.Module:
        """What is trained: the adapted model and whatever else the task needs."""
        return adapted

    @abstractmethod
    def batches(self, steps: int, seed: int) -> Iterator[dict[str, Tensor]]: ...

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor: ...

    @abstractmethod
    def judge(self, model: nn.Module, part: str) -> float:
        """The figure on `validation` or `test`."""

    @abstractmethod
    def forgotten(self, model: nn.Module) -> float: ...


class Decoder(Task):
    """The domain: a text model of novels, speeches and encyclopaedias learns to predict e-mails."""

    name, better, figure = "decoder", "lower", "perplexity"
    length, size, judged = 64, 8, 96

    def __init__(self, quick: bool):
        super().__init__(quick)
        self.mails = mails()
        tokenizer = AutoTokenizer.from_pretrained(self.folder())
        self.windows = {p: self._windows(tokenizer, [m.text for m in part], p) for p, part in self.mails.items()}
        self.own = self._windows(tokenizer, [t[:40_000] for t in split(corpora())[1].values()], "own")
        self.before = self._nats(self.model(), self.own)

    def _windows(self, tokenizer: Any, texts: list[str], part: str) -> Tensor:
        samples = 16 if self.few else 2000 if part == "train" else self.judged
        return token_batches(texts, tokenizer, samples=samples, length=self.length, seed=0).ids

    def folder(self) -> Path:
        return FOLDERS["decoder"]()

    def model(self) -> nn.Module:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(self.folder(), dtype=torch.float32)
        return model

    def batches(self, steps: int, seed: int) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            ids = self.windows["train"][torch.randint(len(self.windows["train"]), (self.size,), generator=generator)]
            yield {"input_ids": ids, "labels": ids}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss

    @torch.no_grad()
    def _nats(self, model: nn.Module, windows: Tensor) -> float:
        return statistics.mean(float(self.loss(model, {"input_ids": w, "labels": w})) for w in windows.split(16))

    def judge(self, model: nn.Module, part: str) -> float:
        return math.exp(min(50.0, self._nats(model, self.windows[part])))

    def forgotten(self, model: nn.Module) -> float:
        return self._nats(model, self.own) - self.before


class SmolLM2(Decoder):
    """The same with SmolLM2-135M-Instruct: few windows, because a step takes seconds."""

    name = "smollm2"
    size, judged = 4, 32

    def folder(self) -> Path:
        return resolve("smollm2-135m").folder


class Compressed(Decoder):
    """The decoder after a compression, which its adapters sit on."""

    def __init__(self, quick: bool):
        self.original = super().model()
        tokenizer = AutoTokenizer.from_pretrained(self.folder())
        windows = token_batches(
            [mail.text for mail in mails()["train"]], tokenizer, samples=16, length=self.length, seed=0
        )
        self.compressed = self.compress(deepcopy(self.original), list(windows.batches(8)))
        super().__init__(quick)

    @abstractmethod
    def compress(self, model: nn.Module, data: list[Any]) -> nn.Module: ...

    def model(self) -> nn.Module:
        return deepcopy(self.compressed)


class Quantised(Compressed):
    """Of 2 bits a weight in the linear layers, rounded to the nearest: adapters that repair it beside plain ones."""

    name = "quantised"
    rows = (LORA, "lora", *STARTS, "compress_then_prompt")

    def compress(self, model: nn.Module, data: list[Any]) -> nn.Module:
        return eckart.compress(model, form="quantized(bits=2, group=64)", budget="1.0").model

    def words(self, method: str) -> dict[str, Any]:
        return {"original": self.original} if method in STARTS else {}


class Factored(Compressed):
    """Of two factors in its linear layers, by WeLore at 0.7 of their bytes."""

    name = "factored"
    rows = (WHOLE, LORA, "lora", "welore_tune")

    def compress(self, model: nn.Module, data: list[Any]) -> nn.Module:
        return eckart.compress(model, "welore", budget="0.7 linears", data=data).model


class Classifier(nn.Module):
    """Mean features of real tokens, and a linear head."""

    def __init__(self, encoder: nn.Module, seed: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(384, 2)
        generator = torch.Generator().manual_seed(seed)
        self.head.weight.data.copy_(0.02 * torch.randn(2, 384, generator=generator))
        self.head.bias.data.zero_()

    def features(self, input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return (hidden * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)

    def forward(self, **batch: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(**batch))
        return logits


class MiniLM(Task):
    """Classification: spam or not."""

    name, better, figure = "minilm", "higher", "accuracy"
    length, size, judged = 48, 8, 400

    def __init__(self, quick: bool):
        super().__init__(quick)
        self.mails = mails()
        self.tokenizer = AutoTokenizer.from_pretrained(FOLDERS["minilm"]())
        sentences = [s for a in articles()[-6:] for s in SENTENCE.split(a) if 40 < len(s) < 400][: 16 if quick else 100]
        self.own = self._encode([Mail(s, 0) for s in sentences])
        with torch.no_grad():
            self.before = Classifier(self.model(), 0).features(**self.own)

    def _encode(self, part: list[Mail]) -> dict[str, Tensor]:
        words: Any = self.tokenizer([m.text[:2000] for m in part], truncation=True, padding="max_length",
                                    max_length=self.length, return_tensors="pt")  # fmt: skip
        return {"input_ids": words["input_ids"], "attention_mask": words["attention_mask"],
                "labels": torch.tensor([m.unwanted for m in part])}  # fmt: skip

    def model(self) -> nn.Module:
        return load("minilm", torch.float32)

    def words(self, method: str) -> dict[str, Any]:
        """The features do not depend on the pooler, so that no gradient says where to start there."""
        return {"exclude_modules": ["pooler.dense"]} if method == "lora_sb" else {}

    def wrapped(self, adapted: nn.Module, seed: int) -> nn.Module:
        return Classifier(adapted, seed)

    def batches(self, steps: int, seed: int) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        train = self.mails["train"]
        for _ in range(steps):
            yield self._encode(
                [train[i] for i in torch.randint(len(train), (self.size,), generator=generator).tolist()]
            )

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(**batch).float(), batch["labels"])

    @torch.no_grad()
    def judge(self, model: nn.Module, part: str) -> float:
        chosen = self.mails[part][: 32 if self.few else self.judged]
        right = 0
        for i in range(0, len(chosen), 32):
            batch = self._encode(chosen[i : i + 32])
            right += int((model(**batch).argmax(-1) == batch["labels"]).sum())
        return right / len(chosen)

    @torch.no_grad()
    def forgotten(self, model: nn.Module) -> float:
        after: Tensor = model.features(**self.own)  # type: ignore[operator]
        return float(1 - F.cosine_similarity(after.float(), self.before).mean())


class Still(nn.Module):
    """A model whose norms keep their statistics while it is trained, which no adapter would save."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, pictures: Tensor, **_: Tensor) -> Tensor:
        logits: Tensor = self.model(pictures)
        return logits


class Turned(Task):
    """The network of convolutions.py, which knows garments that stand upright, learns them lying on their sides."""

    name, better, figure = "garments", "higher", "accuracy"
    rows = (WHOLE, LORA, DORA, "lora", "flora", *KERNELS)
    targets = r".*(first|second)"
    size, judged, seen, epochs, rate = 16, 1000, 10_000, 2, 3e-3

    def __init__(self, quick: bool):
        super().__init__(quick)
        whole, judged = garments("train"), garments("t10k")
        judged = judged.rows(slice(64 if quick else self.judged))
        self.upright = {"train": whole.rows(slice(self.seen)), "test": judged}
        self.parts = {"train": _lying(whole.rows(slice(self.seen, 2 * self.seen))), "test": _lying(judged),
                      "validation": _lying(whole.rows(slice(-len(judged.kinds), None)))}  # fmt: skip
        self.folder = build_once("models/garments-1", self._learn)
        self.before = self._nats(self.model())

    def _learn(self, target: Path) -> None:
        torch.manual_seed(0)
        model, (pictures, kinds) = Network(WIDTHS), self.upright["train"]
        optimizer = torch.optim.AdamW(model.parameters(), self.rate)
        for rows in batches(len(kinds), self.epochs, 0):
            F.cross_entropy(model(pictures[rows]), kinds[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
        save_file(model.state_dict(), target / "model.safetensors")

    def model(self) -> nn.Module:
        model = Network(WIDTHS)
        model.load_state_dict(load_file(self.folder / "model.safetensors"))
        return model.eval()

    def wrapped(self, adapted: nn.Module, seed: int) -> nn.Module:
        return Still(adapted)

    def batches(self, steps: int, seed: int) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        whole = self.parts["train"]
        for _ in range(steps):
            pictures, kinds = whole.rows(torch.randint(len(whole.kinds), (self.size,), generator=generator))
            yield {"pictures": pictures, "labels": kinds}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["pictures"]).float(), batch["labels"])

    def judge(self, model: nn.Module, part: str) -> float:
        return accuracy(model, self.parts[part])

    @torch.no_grad()
    def _nats(self, model: nn.Module) -> float:
        pictures, kinds = self.upright["test"]
        return float(self.loss(model, {"pictures": pictures, "labels": kinds}))

    def forgotten(self, model: nn.Module) -> float:
        return self._nats(model) - self.before


def _lying(garments: Garments) -> Garments:
    return Garments(garments.pictures.transpose(-2, -1), garments.kinds)


TASKS: dict[str, type[Task]] = {t.name: t for t in (Decoder, MiniLM, SmolLM2, Quantised, Factored, Turned)}
