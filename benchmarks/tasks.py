"""What a compressed model is judged by: a task for each kind of model, always against the original in float32.

A task gives calibration batches (keyword arguments of the model's forward pass) and measures a model. Nothing that is
measured on was calibrated on, or trained on as far as that is known.
"""

from __future__ import annotations

import re
import wave
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerFast, WhisperFeatureExtractor

from eckart.calibration.data import load_texts, token_batches
from eckart.calibration.stream import Batch
from eckart.calibration.wikipedia import articles
from eckart.evaluation import agreement
from eckart.evaluation.agreement import divergence
from models import CALIBRATED_ON, FOLDERS, JUDGED_ON, load, pictures, speech

UNSEEN = 0.04  # of the built-in text, at its end, which lies in the twentieth that the decoder was not trained on
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
CALIBRATION, JUDGED = 0, 1  # halves of the recording


@dataclass
class Task(ABC):
    """One model and how it is judged.

    Args:
        model: key of `models.FOLDERS`.
        samples: calibration windows (clips of speech).
        length: tokens of each.
        size: windows, sentences or clips that are measured on.
        batch: windows run together.
        seed: of all draws.
    """

    model: str
    samples: int = 16
    length: int = 128
    size: int = 0
    batch: int = 4
    seed: int = 0
    original: Any = field(init=False)

    targets: ClassVar[str] = ""
    columns: ClassVar[dict[str, str]] = {}
    default: ClassVar[int] = 0

    def __post_init__(self) -> None:
        self.size = self.size or self.default
        self.original = load(self.model, torch.float32)
        self.prepare()

    @abstractmethod
    def prepare(self) -> None:
        """Make what is measured on, and what the original says to it."""

    @abstractmethod
    def calibration(self) -> list[Batch]: ...

    @abstractmethod
    def measure(self, model: nn.Module) -> dict[str, float]:
        """The figures in `columns` of a model in float32."""


class Decoder(Task):
    """Perplexity on held-out text, KL(original || compressed) in nats, share of tokens with the same first choice."""

    columns: ClassVar = {"perplexity": "{:.2f}", "KL": "{:.4f}", "top-1": "{:.1%}"}
    default: ClassVar = 64

    def prepare(self) -> None:
        tokenizer = AutoTokenizer.from_pretrained(FOLDERS[self.model]())
        whole = "\n".join(articles())
        self.tokens = token_batches(
            [whole[-int(UNSEEN * len(whole)) :]], tokenizer, samples=self.size, length=256, seed=self.seed
        )

    def calibration(self) -> list[Batch]:
        return text_batches(self)

    def measure(self, model: nn.Module) -> dict[str, float]:
        found = agreement(self.original, model, self.tokens)
        return {"perplexity": found.compressed.value, "KL": found.kl, "top-1": found.top1}


class Encoder(Task):
    """Sentence embeddings: mean cosine with the original's, the share of each sentence's ten nearest neighbours that
    stay, and how well a linear probe tells from which of the articles a sentence comes."""

    columns: ClassVar = {"cosine": "{:.4f}", "recall@10": "{:.1%}", "probe": "{:.1%}"}
    default: ClassVar = 500
    neighbours: ClassVar = 10

    def prepare(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(FOLDERS[self.model]())
        texts: Any = load_texts("builtin", split="heldout")
        self.sentences, self.labels = sentences(list(texts), self.size)
        self.embedded = self.embed(self.original)
        self.nearest = neighbours(self.embedded, self.neighbours)

    def calibration(self) -> list[Batch]:
        return text_batches(self)

    @torch.no_grad()
    def embed(self, model: nn.Module) -> Float[Tensor, "sentences width"]:
        order = sorted(range(len(self.sentences)), key=lambda i: len(self.sentences[i]))
        rows: list[Tensor] = []
        for start in range(0, len(order), 32):
            texts = [self.sentences[i] for i in order[start : start + 32]]
            batch = self.tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
            mask = batch["attention_mask"]
            hidden = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
            rows += F.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)
        return torch.stack(rows)[torch.tensor(order).argsort()]

    def measure(self, model: nn.Module) -> dict[str, float]:
        found = self.embed(model)
        same = (neighbours(found, self.neighbours)[:, :, None] == self.nearest[:, None]).any(-1)
        return {
            "cosine": float((found * self.embedded).sum(-1).mean()),
            "recall@10": float(same.float().mean()),
            "probe": probe(found, self.labels),
        }


class Speech(Task):
    """Under teacher forcing on transcripts by the original: KL(original || compressed) in nats per token of the
    transcript, and the share of them with the same first choice.

    One recording is all the speech there is: its first half, at other speeds and with noise, is for calibration, and
    its second half is judged on. The prompt before a transcript is text, calibrated on and judged on in other articles.
    """

    columns: ClassVar = {"KL": "{:.4f}", "top-1": "{:.1%}"}
    default: ClassVar = 12
    targets: ClassVar = r"model\.(encoder|decoder)\.layers\..*"

    def prepare(self) -> None:
        folder = FOLDERS[self.model]()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        self.features = WhisperFeatureExtractor(feature_size=80)
        self.clips = self.batches(JUDGED, self.size)
        self.said = [self.logits(self.original, b, n) for b, n in self.clips]

    def calibration(self) -> list[Batch]:
        return [batch for batch, _ in self.batches(CALIBRATION, self.samples)]

    def batches(self, half: int, count: int) -> list[tuple[Batch, int]]:
        """Batches of one clip, and how many tokens at its end are predicted: the transcript and the end of text."""
        begin, silent, previous, end = self.tokenizer.convert_tokens_to_ids(
            ["<|startoftranscript|>", "<|notimestamps|>", "<|startofprev|>", "<|endoftext|>"]
        )
        texts: Any = load_texts("builtin", split=("calibration", "heldout")[half])
        prompts = token_batches(texts, self.tokenizer, samples=count, length=self.length, seed=self.seed).ids
        made = []
        for heard, prompt in zip(variants(halves(recording())[half], count, self.seed), prompts, strict=True):
            sound = self.features(heard.numpy(), sampling_rate=16000, return_tensors="pt")["input_features"]
            words = transcript(self.original, sound, [begin, silent], end)
            kept = prompt[: self.length - 3 - len(words)].tolist()
            ids = torch.tensor([[previous, *kept, begin, silent, *words]])
            made.append(({"input_features": sound, "decoder_input_ids": ids}, len(words) + 1))
        return made

    @torch.no_grad()
    def logits(self, model: nn.Module, batch: Batch, count: int) -> Float[Tensor, "count vocab"]:
        return F.log_softmax(model(**batch, use_cache=False).logits[0, -count:].float(), -1)

    def measure(self, model: nn.Module) -> dict[str, float]:
        kl, same, seen = 0.0, 0, 0
        for (batch, count), logp in zip(self.clips, self.said, strict=True):
            logq = self.logits(model, batch, count)
            kl += float(divergence(logp, logq).sum())
            same += int((logp.argmax(-1) == logq.argmax(-1)).sum())
            seen += count
        return {"KL": kl / seen, "top-1": same / seen}


class Images(Task):
    """KL(original || compressed) in nats for a picture, and the share of pictures with the same first class.

    The pictures are crops of photographs, at scales of 0.3 to 1, mirrored or not: of ten for calibration (greys among
    them, the moon, a retina), and of four others to be judged on.
    """

    columns: ClassVar = {"KL": "{:.4f}", "top-1": "{:.1%}"}
    default: ClassVar = 96
    side: ClassVar = 224

    def prepare(self) -> None:
        self.shown = self.crops(JUDGED_ON, self.size, self.seed + 1).split(self.batch * 4)
        self.said = [self.logits(self.original, x) for x in self.shown]

    def calibration(self) -> list[Batch]:
        crops = self.crops(CALIBRATED_ON, self.samples, self.seed)
        return [{"pixel_values": x.half()} for x in crops.split(self.batch)]  # as models are loaded

    def crops(self, names: Sequence[str], count: int, seed: int) -> Float[Tensor, "count 3 224 224"]:
        """Squares of the photographs, evenly many of each."""
        generator = torch.Generator().manual_seed(seed)
        photographs = [photograph(pictures() / name) for name in names]
        made = []
        for i, (scale, top, left, mirrored) in enumerate(torch.rand(count, 4, generator=generator).tolist()):
            picture = photographs[i % len(photographs)]
            height, width = picture.shape[1:]
            side = int((0.3 + 0.7 * scale) * min(height, width))
            y, x = int(top * (height - side)), int(left * (width - side))
            crop = picture[:, y : y + side, x : x + side]
            shown = F.interpolate(crop[None], (self.side, self.side), mode="bilinear", antialias=True)[0]
            made.append(shown.flip(-1) if mirrored < 0.5 else shown)
        return (torch.stack(made) - 127) / 128

    @torch.no_grad()
    def logits(self, model: nn.Module, x: Tensor) -> Float[Tensor, "count classes"]:
        return F.log_softmax(model(pixel_values=x).float(), -1)

    def measure(self, model: nn.Module) -> dict[str, float]:
        found = torch.cat([self.logits(model, x) for x in self.shown])
        said = torch.cat(self.said)
        return {
            "KL": float(divergence(said, found).mean()),
            "top-1": float((said.argmax(-1) == found.argmax(-1)).float().mean()),
        }


def photograph(file: Path) -> Float[Tensor, "3 h w"]:
    """Pixels from 0 to 255. Needs Pillow."""
    try:
        from PIL import Image
    except ImportError:
        raise RuntimeError("the pictures are read with Pillow: pip install pillow, or leave efficientnet out (--models)") from None  # fmt: skip # noqa: E501
    with Image.open(file) as image:
        pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        return pixels.view(image.height, image.width, 3).permute(2, 0, 1).float()


TASKS: dict[str, type[Task]] = {
    "decoder": Decoder, "decoder-11m": Decoder, "minilm": Encoder, "mpnet": Encoder, "whisper": Speech,
    "efficientnet": Images,
}  # fmt: skip


def text_batches(task: Task) -> list[Batch]:
    """Windows of the built-in calibration text."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDERS[task.model]())
    tokens = token_batches(load_texts("builtin"), tokenizer, samples=task.samples, length=task.length, seed=task.seed)
    return list(tokens.batches(task.batch))


def sentences(texts: list[str], count: int) -> tuple[list[str], Int[Tensor, " sentences"]]:
    """About `count` sentences of 40 to 200 characters, as many of each text, evenly spread; and whose they are."""
    found: list[str] = []
    labels: list[int] = []
    each = -(-count // len(texts))
    for label, text in enumerate(texts):
        own = [s for line in text.splitlines() for s in SENTENCE.split(line) if 40 <= len(s) <= 200]
        own = own[:: max(1, len(own) // each)][:each]
        found += own
        labels += [label] * len(own)
    return found, torch.tensor(labels)


def neighbours(x: Float[Tensor, "n width"], count: int) -> Int[Tensor, "n count"]:
    """The most similar rows of every row, itself left out."""
    return (x @ x.T).fill_diagonal_(-2.0).topk(count).indices


def probe(x: Float[Tensor, "n width"], labels: Int[Tensor, " n"], ridge: float = 0.1) -> float:
    """Share of the odd rows whose label ridge regression on the even rows finds."""
    x = F.pad(x.double(), (0, 1), value=1.0)
    known, asked = x[::2], x[1::2]
    wanted = F.one_hot(labels)[::2].double()
    weights = torch.linalg.solve(known.T @ known + ridge * torch.eye(x.shape[1], dtype=x.dtype), known.T @ wanted)
    return float(((asked @ weights).argmax(-1) == labels[1::2]).float().mean())


def recording() -> Float[Tensor, " time"]:
    with wave.open(str(speech())) as file:
        if (file.getframerate(), file.getnchannels(), file.getsampwidth()) != (16000, 1, 2):
            raise ValueError(f"{speech()} is not mono of 16 bits at 16 kHz")
        frames = bytearray(file.readframes(file.getnframes()))
    return torch.frombuffer(frames, dtype=torch.int16).float() / 32768


def halves(x: Float[Tensor, " time"]) -> tuple[Float[Tensor, " a"], Float[Tensor, " b"]]:
    """A recording cut in its quietest fifth of a second around the middle."""
    step, near, half = 3200, len(x) // 5, len(x) // 2
    loudness = x[half - near : half + near].unfold(0, step, step // 10).square().mean(-1)
    cut = half - near + int(loudness.argmin()) * (step // 10) + step // 2
    return x[:cut], x[cut:]


def variants(said: Float[Tensor, " time"], count: int, seed: int) -> list[Float[Tensor, " time"]]:
    """The same words at other speeds (0.85 to 1.15), loudness, and with white noise 10 to 30 dB below."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for speed, gain, decibels in torch.rand(count, 3, generator=generator).tolist():
        length = int(len(said) / (0.85 + 0.3 * speed))
        x = F.interpolate(said[None, None], size=length, mode="linear", align_corners=False)[0, 0]
        noise = torch.randn(length, generator=generator) * x.square().mean().sqrt() * 10 ** -(0.5 + decibels)
        made.append((0.5 + gain) * (x + noise))
    return made


@torch.no_grad()
def transcript(model: Any, sound: Tensor, start: list[int], end: int, most: int = 40) -> list[int]:
    """What the model hears, greedily, without the end of text."""
    encoded = model.model.encoder(sound)
    ids = list(start)
    while len(ids) < most + len(start):
        logits = model(encoder_outputs=encoded, decoder_input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        if (token := int(logits.argmax())) == end:
            break
        ids.append(token)
    return ids[len(start) :]
