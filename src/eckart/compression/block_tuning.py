"""A block whose rounded weights learn to put out what the original block does, by low ranks that are merged after."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.calibration.rounds import rounds
from eckart.calibration.stream import Stream
from eckart.forms import Dense, Factored, LowRank, Sum, drop_in
from eckart.forms.algebra import Product, ProductMatrix, SumMatrix
from eckart.forms.base import stored
from eckart.forms.dense import DenseMatrix
from eckart.forms.layers import DropIn
from eckart.forms.quantized_inputs import QuantizedInputs, QuantizedInputsMatrix
from eckart.jobs.trial import swapped


@dataclass(frozen=True)
class Rounding:
    """One layer: its weight, before it is rounded, and how it is.

    Attributes:
        W: what multiplies the rounded inputs.
        form: of W and inputs.
        before: a matrix that inputs go through first.
    """

    W: Float[Tensor, "out in"]
    form: QuantizedInputs
    before: Factored | None = None

    def matrix(self, dtype: torch.dtype, added: Tensor | None = None) -> Factored:
        """Q(W), or Q(W + added), on rounded inputs."""
        return self._after(self.form.fit(self.W if added is None else self.W + added, dtype=dtype))

    def learning(self, dtype: torch.dtype, rank: int, draw: torch.Generator) -> tuple[Factored, ProductMatrix]:
        """Q(W) + B A on rounded inputs, in float32, and B A, whose factor 1 / rank is in A."""
        out, in_ = self.W.shape
        low = LowRank(min(rank, out, in_))
        A = (2 * torch.rand(low.rank or 0, in_, generator=draw) - 1) / (math.sqrt(in_) * rank)
        B = torch.zeros(out, low.rank or 0)
        fixed = DenseMatrix(self.form.fit(self.W, dtype=dtype).dense().detach().float(), Dense())
        left, right = (DenseMatrix(stored(t.to(self.W.device), torch.float32), Dense()) for t in (B, A))
        BA = ProductMatrix(left, right, low)
        both = Sum((Dense(), low))
        return self._after(QuantizedInputsMatrix(SumMatrix([fixed, BA], both), QuantizedInputs(both, self.form.inputs))), BA  # fmt: skip # noqa: E501

    def _after(self, matrix: Factored) -> Factored:
        if self.before is None:
            return matrix
        return ProductMatrix(matrix, self.before, Product(matrix.form, self.before.form))


class Tuning:
    """A block of the model, which is loaded and still the original.

    Args:
        student: hidden states as the rewritten blocks before put them out.
        teacher: those of the original model, which are known after this block, too.
        part: its index.
        roundings: of its layers, by name.
        norms: names of those that learn, too.
        dtype: in which numbers are stored.
    """

    def __init__(
        self, student: Stream, teacher: Stream, part: int, roundings: Mapping[str, Rounding], norms: Sequence[str],
        dtype: torch.dtype,
    ):  # fmt: skip
        self.student, self.teacher, self.part = student, teacher, part
        self.roundings, self.norms, self.dtype = roundings, norms, dtype
        self.model = student.model

    def rounded(self) -> dict[str, nn.Module]:
        """The layers as they are rounded."""
        return {name: self._layer(name, r.matrix(self.dtype)) for name, r in self.roundings.items()}

    def taught(self, rank: int, epochs: int, lr: float, seed: int) -> dict[str, nn.Module]:
        """Layers and norms after teaching, what was learnt merged and rounded.

        Raises `RuntimeError` where the loss is not finite.
        """
        draw = torch.Generator().manual_seed(seed)
        made = {name: r.learning(self.dtype, rank, draw) for name, r in self.roundings.items()}
        layers = {name: self._layer(name, matrix).float() for name, (matrix, _) in made.items()}
        norms = {name: copy.deepcopy(self.model.get_submodule(name)).float() for name in self.norms}
        learning = [p for _, low in made.values() for p in low.parameters()]
        learning += [layer.bias for layer in layers.values() if isinstance(layer.bias, nn.Parameter)]
        learning += [p for norm in norms.values() for p in norm.parameters()]
        for p in learning:
            p.requires_grad_(True)
        with swapped(self.model, layers | norms), torch.enable_grad():
            self._learn(learning, epochs, lr, draw)
        merged = {}
        for name, (_, low) in made.items():
            layer = layers[name]
            assert isinstance(layer, DropIn)
            matrix = self.roundings[name].matrix(self.dtype, low.dense().detach())
            merged[name] = self._layer(name, matrix, layer.bias)
        return merged | {name: norm.to(self.dtype) for name, norm in norms.items()}

    def error(self, modules: Mapping[str, nn.Module]) -> float:
        """Mean squared error of what the block puts out with these in it."""
        computing = {name: copy.deepcopy(module).float() for name, module in modules.items()}
        total, count = 0.0, 0
        with swapped(self.model, computing), torch.no_grad():
            for b in range(len(self.student.batches)):
                apart = self._apart(b)
                total, count = total + float(apart.double().square().sum()), count + apart.numel()
        return total / max(1, count)

    def _layer(self, name: str, matrix: Factored, bias: Tensor | None = None) -> nn.Module:
        module = self.model.get_submodule(name)
        own = getattr(module, "bias", None) if bias is None else bias
        return drop_in(module, matrix, None if own is None else own.detach().to(self.dtype).clone()).requires_grad_(False)  # fmt: skip # noqa: E501

    def _learn(self, learning: list[nn.Parameter], epochs: int, lr: float, draw: torch.Generator) -> None:
        batches = len(self.student.batches)
        optimiser = torch.optim.AdamW(learning, lr=lr, weight_decay=0.0)
        falling = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / (epochs * batches))
        for b in islice(rounds(batches, draw), epochs * batches):
            loss = self._apart(b).square().mean()
            if not bool(torch.isfinite(loss)):
                raise RuntimeError(f"{self.student.blocks[self.part]}: the loss of batch {b} is {float(loss.detach())} while it is taught: lower lr, which is {lr}, or set epochs=0")  # fmt: skip # noqa: E501
            optimiser.zero_grad()
            loss.backward(inputs=learning)
            optimiser.step()
            falling.step()
        optimiser.zero_grad()

    def _apart(self, batch: int) -> Float[Tensor, "rows width"]:
        """What the block puts out less what it should, without padding."""
        entered, wanted = (s.hidden(p).read(s.shapes, batch) for s, p in ((self.student, self.part), (self.teacher, self.part + 1)))  # fmt: skip # noqa: E501
        apart = self.student.run(self.part, entered, batch) - wanted
        real = self.student.mask(batch)
        return apart.flatten(0, -2) if real is None else apart[real]
