"""What a training run is made of: the settings that a YAML file gives, each checked when it is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from eckart.schedules import at_step

Decay = Literal["cosine", "linear", "none"]
Precision = Literal["float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]


def least(name: str, value: int, bound: int) -> None:
    """Raises `ValueError` where a number is too small."""
    if value < bound:
        raise ValueError(f"{name}: {value} is too small, it is at least {bound}")


@dataclass(frozen=True)
class Model:
    """A model to go on from, or the shape of a new one.

    Args:
        folder: any MODEL (hub id, folder, GGUF file, `builtin`) to go on from; empty for a new one.
        type: of a new model, as transformers calls it.
        tokenizer: any MODEL whose tokenizer a new model takes; empty to train one on the texts.
        vocabulary: entries of a tokenizer that is trained.
        dtype: of the weights.
        settings: of a new model's config; sizes that are not given are those of a Llama of 5 million parameters.
    """

    folder: str = ""
    type: str = "llama"
    tokenizer: str = ""
    vocabulary: int = 4096
    dtype: Literal["float32", "bfloat16"] = "float32"
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        least("model.vocabulary", self.vocabulary, 257)
        if self.folder and (self.settings or self.tokenizer):
            given = sorted(self.settings) or ["tokenizer"]
            raise ValueError(f"model.{given[0]} is of a new model, and model.folder names one that is there: leave out one of them")  # fmt: skip # noqa: E501


@dataclass(frozen=True)
class Data:
    """The text.

    Args:
        texts: `builtin`, or .txt, .jsonl and .csv files.
        column: the field of a .jsonl object or the column of a .csv file that holds the text.
        length: tokens in a window.
        held_out: share of the windows, the last ones, that are not trained on but judged on; one at least, unless 0.
        judged: windows of these that are judged on, at most.
    """

    texts: tuple[str, ...] = ("builtin",)
    column: str = "text"
    length: int = 256
    held_out: float = 0.05
    judged: int = 64

    def __post_init__(self) -> None:
        least("data.length", self.length, 2)
        least("data.judged", self.judged, 1)
        if not self.texts:
            raise ValueError("data.texts is an empty list: name 'builtin', or files")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"data.held_out: {self.held_out} is not a share from 0, below 1")


@dataclass(frozen=True)
class Training:
    """How training goes on.

    Args:
        steps: of the optimiser.
        batch: windows that run together.
        accumulate: batches of an optimiser step.
        warmup: steps (a whole number) or share of the run (0.0 to 1.0) over which the learning rate rises linearly.
        decay: how it falls afterwards.
        floor: share of the learning rate that is left at the end.
        clip: largest norm of all gradients together; 0 does not clip.
        precision: of the products: `bfloat16` is autocast.
        save_every: steps between checkpoints, of which the last one is kept.
        device: `auto` takes a GPU where there is one.
    """

    steps: int = 1000
    batch: int = 32
    accumulate: int = 1
    warmup: int | float = 0.1
    decay: Decay = "cosine"
    floor: float = 0.05
    clip: float = 1.0
    precision: Precision = "float32"
    save_every: int = 100
    device: Device = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "save_every"):
            least(f"training.{name}", getattr(self, name), 1)
        if not 0 <= self.floor <= 1:
            raise ValueError(f"training.floor: {self.floor} is not a share from 0 to 1")
        if not self.clip >= 0:
            raise ValueError(f"training.clip: {self.clip} is not a norm; 0 does not clip")
        if at_step(self.warmup, self.steps, "training.warmup") > self.steps:
            raise ValueError(f"training.warmup: {self.warmup} is more than the run has steps, {self.steps}")


@dataclass(frozen=True)
class Optimizer:
    """The optimiser.

    Args:
        name: `adamw` (torch's), or the key of an optimiser of the wing (see `eckart methods`).
        lr: its highest learning rate.
        rank, density: of the projected weights, see `eckart.optimizers.param_groups`; neither projects none.
        include, exclude: regular expressions of the names of projected weights.
        int8: keep the weights of linear layers in 8 bits, as Q-GaLore does.
        settings: its further settings.
    """

    name: str = "adamw"
    lr: float = 1e-3
    rank: int | None = None
    density: float | None = None
    include: str | None = None
    exclude: str | None = None
    int8: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"optimizer.lr: {self.lr} is not a learning rate above 0")
        if self.rank is not None and self.density is not None:
            raise ValueError("optimizer.rank and optimizer.density say the same: leave out one of them")
        if (self.include or self.exclude) and self.rank is self.density is None:
            raise ValueError("optimizer.include and optimizer.exclude say which weights are projected: give a rank or a density, too")  # fmt: skip # noqa: E501
        if self.int8 and self.name != "q_galore":
            raise ValueError(f"optimizer.int8 is for q_galore, which writes 8-bit weights; {self.name} does not: leave it out")  # fmt: skip # noqa: E501


@dataclass(frozen=True)
class Structure:
    """What the weights are while they are trained.

    Args:
        method: key of a method of structured training (see `eckart methods`).
        form: instead of one, a closed form, such as `low_rank(rank=32)`.
        layers: regular expression that the names of the layers match in full; empty for all within the blocks.
        settings: of the method.
    """

    method: str = ""
    form: str = ""
    layers: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.method) == bool(self.form):
            raise ValueError("structure: give a method of structured training or a form, one of them")


@dataclass(frozen=True)
class Config:
    """A whole run.

    Args:
        output: the new folder.
        seed: of every random choice.
        structure: None trains dense weights.
    """

    output: str
    seed: int = 0
    model: Model = Model()
    data: Data = Data()
    training: Training = Training()
    optimizer: Optimizer = Optimizer()
    structure: Structure | None = None

    def to_json(self) -> dict[str, Any]:
        """All settings but where the result goes."""
        return {k: v for k, v in asdict(self).items() if k != "output"}
