"""Outlier channels split, similar ones merged, both sides rounded to 4 bits, and each block taught what it lost."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.anatomy import Block, anatomy
from eckart.calibration.calibrate import Request
from eckart.calibration.samples import entering, real_rows, shared_inputs
from eckart.calibration.store import OUTSIDE
from eckart.calibration.stream import Stream
from eckart.compression.block_tuning import Rounding, Tuning
from eckart.compression.narrowing import check_block
from eckart.compression.settled import Settled, settled_plan
from eckart.forms import Factored, Form, Quantized, drop_in
from eckart.forms.algebra import Product
from eckart.forms.layers import DropIn, matrix_of
from eckart.forms.quantized_inputs import QuantizedInputs
from eckart.forms.reassembly import Reassembly
from eckart.jobs.method import Job, Method
from eckart.jobs.plan import Layer, Plan
from eckart.jobs.trial import swapped
from eckart.linalg.reassembling import Channels, candidates
from eckart.linalg.whitening import all_finite, check_finite
from eckart.registry import method
from eckart.settings import check_whole

INT4 = Quantized(bits=4, group=None)


@method("qllm", family="quantised", paper="QLLM: Accurate and Efficient Low-Bitwidth Quantization for Large Language Models, Liu, Gong, Wei, Dong, Cai, Zhuang, ICLR 2024, arXiv 2310.08041")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class QLLM(Method):
    """W4A4: channels above a threshold are split into equal parts, as many similar ones merged, and blocks repaired.

    Queries, keys and values share one reassembly of their inputs, so do gate and up; down has its own. Of thresholds
    from the largest activation to the least, that one is taken with which rounding the layers changes least of what
    the sub-layer puts out (section 4.1). Then low ranks beside the rounded weights, norms and biases learn to put out
    what the original block does on original inputs, and are merged: stored is Q(W + BA) (section 4.2), if with it the
    block's error is smaller than without.

    Departs from the paper: pairs are merged by the error that this makes, |x_i - x_j|² |w_i - w_j|² / 4, where the
    authors' code takes another sum; activations are measured on some batches; blocks are taught one at a time, not in
    fours, a batch a step, and the last norm is not; the products within attention are not rounded. Nothing is left to
    the budget, which must be large enough.

    Args:
        form: of the rounded matrix.
        channel_ratio: most channels that splitting may add, as a share of all.
        thresholds: that are tried, at least; more where activations are large.
        tokens: on which thresholds are judged, in whole batches.
        rank: of what is learnt and merged.
        epochs: passes over the calibration data for every block; 0 leaves weights as they are rounded.
        lr: of AdamW, falling linearly to 0.
    """

    form: Form = field(default_factory=lambda: QuantizedInputs(INT4, INT4))
    channel_ratio: float = 0.2
    thresholds: int = 100
    tokens: int = 2048
    rank: int = 4
    epochs: int = 10
    lr: float = 5e-4

    def __post_init__(self) -> None:
        if not isinstance(self.form, QuantizedInputs) or self.form.open:
            raise ValueError(f"qllm(form={self.form}): it is quantized_inputs(matrix=quantized(bits=...), inputs=...)")
        if not 0 <= self.channel_ratio < 0.5:
            raise ValueError(f"qllm(channel_ratio={self.channel_ratio!r}): it is a share from 0 up and below 0.5, for only every second channel can be merged into another")  # fmt: skip # noqa: E501
        if not 0 < self.lr < math.inf:
            raise ValueError(f"qllm(lr={self.lr!r}): it is a positive number")
        check_whole(self, thresholds=2, tokens=1, rank=1, epochs=0)

    @property
    def sequential(self) -> bool:
        return True

    def request(self, model: nn.Module, blocks: list[str]) -> Request:
        for block in anatomy(model).blocks:
            check_block(model, block)
        return Request(probes={}, needs=frozenset())

    def plan(self, job: Job) -> Plan:
        assert job.stream is not None
        windows = Windows(job.stream("hidden"), self.tokens)
        settled: list[Settled] = []
        known: dict[str, Channels] = {}
        for part, block in enumerate(anatomy(job.model).blocks):
            with job.subject.loaded(block.name), torch.no_grad():
                notes: dict[str, str] = {}
                for names, out in readers(block):
                    found = self.search(job, windows, part, names, out)
                    notes |= dict.fromkeys(names, found.note)
                    known |= {} if found.channels is None else dict.fromkeys(names, found.channels)
                for name in (*block.readers(), *block.writers()):
                    W, channels = matrix_of(job.model.get_submodule(name)), known.get(name)
                    matrix = self.rounding(W, channels, job.dtype).matrix(job.dtype)
                    lost = losses(matrix, W, windows.entering(part, name))
                    settled.append(Settled(name, part, self.whole(channels), notes.get(name), *lost))
                windows.advance(part)
            job.progress("plan", part + 1, len(job.blocks))
        return settled_plan(job, self.key, settled, {"channels": {name: list(c) for name, c in known.items()}})

    def whole(self, channels: Channels | None) -> Form:
        """What stands in for a matrix."""
        if channels is None:
            return self.form
        return Product(self.form, Reassembly(len(channels.split), len(channels.merged)))

    def rounding(self, W: Float[Tensor, "out in"], channels: Channels | None, dtype: torch.dtype) -> Rounding:
        """A matrix, rewritten for the reassembled channels of its inputs."""
        assert isinstance(self.form, QuantizedInputs)
        W = W.detach().to(torch.promote_types(W.dtype, torch.float32))
        if channels is None:
            return Rounding(W, self.form)
        form = Reassembly(len(channels.split), len(channels.merged))
        split, copies, merged, into = (torch.tensor(t, dtype=torch.long, device=W.device) for t in channels)
        before = form.at(split, copies, merged, into, (W.shape[1], W.shape[1]), dtype)
        return Rounding(before.columns(W), self.form, before)

    def search(self, job: Job, windows: Windows, part: int, names: Sequence[str], out: str | None) -> Found:
        """The channels for these layers, whose block is loaded, that change least of what enters the layer `out`.

        None stands for the output of the only layer.
        """
        weights = {name: matrix_of(job.model.get_submodule(name)) for name in names}
        x = windows.entering(part, names[0])

        def outcome() -> Tensor:
            found = job.model.get_submodule(names[0])(x) if out is None else windows.entering(part, out)
            return found.double()

        wanted, tried = outcome(), []
        for threshold, channels in candidates(x, torch.cat(list(weights.values())), self.channel_ratio, self.thresholds):  # fmt: skip # noqa: E501
            made = {}
            for name, W in weights.items():
                module = job.model.get_submodule(name)
                matrix = self.rounding(W, channels, job.dtype).matrix(job.dtype)
                made[name] = drop_in(module, matrix, getattr(module, "bias", None)).float()
            with swapped(job.model, made):
                tried.append((threshold, channels, float((outcome() - wanted).square().sum()) / max(1, len(x))))
        return Found(tried)

    def rewrite(self, job: Job, plan: Plan, part: int) -> list[Layer]:
        if part == OUTSIDE:
            return []
        assert job.stream is not None
        block, layers, student = anatomy(job.model).blocks[part], plan.of(part), job.stream("hidden")
        weights = {layer.name: matrix_of(job.model.get_submodule(layer.name)).detach() for layer in layers}
        inputs = {n: shared.x for shared in shared_inputs(student, part, list(weights), self.tokens) for n in shared.names}  # fmt: skip # noqa: E501
        known = {name: Channels(*lists) for name, lists in plan.extra["channels"].items()}
        roundings = {name: self.rounding(W, known.get(name), job.dtype) for name, W in weights.items()}
        modules, note = self._taught(job, block, part, student, roundings)
        for name, module in modules.items():
            for parameter in module.parameters():
                check_finite(parameter, f"{name}, stored as {job.dtype},")
            job.model.set_submodule(name, module)
        done = []
        for layer in layers:
            module = modules[layer.name]
            assert isinstance(module, DropIn)
            error, energy = losses(module.matrix, weights[layer.name], inputs[layer.name])
            done.append(replace(layer, energy=energy).measured(error, note))
        return done

    def _taught(
        self, job: Job, block: Block, part: int, student: Stream, roundings: dict[str, Rounding]
    ) -> tuple[dict[str, nn.Module], str | None]:
        """Layers and norms, and a note on what teaching changed."""
        assert job.stream is not None
        teacher = job.stream("teacher") if self.epochs else student
        if self.epochs:
            teacher.advance(part)
            if part > 1:
                teacher.hidden(part - 1).path.unlink(missing_ok=True)
        norms = (block.attention_norm, block.mlp_norm, block.post_attention_norm, block.post_mlp_norm)
        names = dict.fromkeys(n.name for n in norms if n is not None and n.name.startswith(f"{block.name}."))
        tuning = Tuning(student, teacher, part, roundings, list(names), job.dtype)
        plain = tuning.rounded()
        if not self.epochs:
            return plain, None
        taught = tuning.taught(self.rank, self.epochs, self.lr, job.seed + part)
        before, after = tuning.error(plain), tuning.error(taught)
        words = f"teaching changes the block's squared error from {before:.3g} to {after:.3g}"
        return (taught, words) if after < before else (plain, f"{words} and is left out")


def losses(matrix: Factored, W: Float[Tensor, "out in"], x: Float[Tensor, "rows in"]) -> tuple[float, float]:
    """Squared errors of a matrix's own outputs, and the outputs it should have; means over rows."""
    wanted = x @ W.detach().to(x).T
    missed = copy.deepcopy(matrix).to(x.dtype).forward(x).detach() - wanted
    error, energy = (float(t.double().square().sum()) / max(1, len(x)) for t in (missed, wanted))
    return error, energy


class Found:
    """Thresholds, their channels, and squared errors of what the sub-layer puts out, means over rows."""

    def __init__(self, tried: list[tuple[float, Channels | None, float]]):
        self.tried = tried
        self.threshold, self.channels, self.error = min(tried, key=lambda one: one[2])

    @property
    def note(self) -> str:
        if self.channels is None:
            return "no channel is worth splitting"
        gain = 1 - self.error / self.tried[0][2]
        return f"{len(self.channels.split)} channels above {self.threshold:.3g} split, {len(self.channels.merged)} merged: {gain:.0%} less error"  # fmt: skip # noqa: E501


def readers(block: Block) -> list[tuple[tuple[str, ...], str | None]]:
    """Layers that share a reassembly, and what reads the outcome."""
    a, mlp = block.attention, block.mlp
    return [(a.readers(), a.o.module), (mlp.readers(), mlp.down.module), (mlp.writers(), None)]


class Windows:
    """The first batches of a stream that hold so many tokens, under way through the original blocks in memory."""

    def __init__(self, stream: Stream, tokens: int):
        self.stream = stream
        self.hidden: list[Tensor] = []
        while tokens > 0 and len(self.hidden) < len(stream.batches):
            entered = stream.hidden(0).read(stream.shapes, len(self.hidden))
            self.hidden.append(entered)
            tokens -= entered.shape[:-1].numel()

    def entering(self, part: int, name: str) -> Float[Tensor, "rows in"]:
        """What enters a layer of a block, without padding."""
        module, found = self.stream.model.get_submodule(name), []
        for b, h in enumerate(self.hidden):
            x = entering(self.stream.model, [name], lambda b=b, h=h: self.stream.run(part, h, b), name)[name]  # type: ignore[misc]
            if not all_finite(x):
                raise ValueError(f"{name} receives NaN or infinite activations: check the model and the data")
            found.append(real_rows(module, x, self.stream.mask(b)))
        return torch.cat(found)

    def advance(self, part: int) -> None:
        self.hidden = [self.stream.run(part, h, b) for b, h in enumerate(self.hidden)]
