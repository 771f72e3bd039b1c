"""L-GreCo: how far the gradient of each layer is compressed on its way between processes is chosen while training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import GradBucket, Work
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from eckart.optimizers.communication import (
    COMPRESSORS,
    Compressor,
    Draw,
    Layer,
    NoPlan,
    Plan,
    Wire,
    choose,
)
from eckart.optimizers.communication.compressor import check_whole
from eckart.optimizers.communication.plan import total
from eckart.registry import method, suggest
from eckart.remarks import remark

Running = tuple[Generator[Work, None, None], Work, Future, Tensor]


@method(
    "l_greco",
    family="optimiser",
    paper="L-GreCo, Alimohammadi, Markov, Frantar and Alistarh, MLSys 2024, arXiv 2210.17357",
)
class LGreCo:
    """Compresses what data-parallel processes send of their gradients, each layer as far as its error allows.

    A communication hook, which takes its place in the model when it is made; any optimiser then follows as ever. At
    first all gradients are averaged as they are; then every `refresh` steps dynamic programming chooses for every layer
    the rank (or k, or number of bits) with the fewest bytes in all, the sum of errors being at most alpha times that of
    the uniform setting. What a step does not send is added to the next one's gradients.

    Gradients that are not finite arrive as NaN everywhere, and leave no trace in what is kept. `alpha` may be assigned
    while training, as a method that finds critical phases would.

    Args:
        ddp: the model.
        compressor: `PowerSGD`, `TopK` or `QSGD`, with the uniform setting; or `power_sgd`, `top_k`, `qsgd`.
        alpha: the error allowed, over that of the uniform setting.
        refresh: steps for which settings stay; None keeps the uniform one.
        start: steps that are not compressed.
        window: steps before a choice whose mean gradient it is made from.
        resolution: parts of the uniform setting's error that dynamic programming tells apart.
        squares: add up squared errors rather than errors.
        average: choose by the mean gradient of all processes, which is sent for that uncompressed; otherwise by the
            first process's own, as released.
        feedback: keep what is not sent; None where the compressor is biased.
        seed: of what is random, the same on all processes.
    """

    def __init__(
        self, ddp: DistributedDataParallel, compressor: str | Compressor = "power_sgd", *, alpha: float = 1.0,
        refresh: int | None = 1000, start: int = 10, window: int = 10, resolution: int = 10_000, squares: bool = False,
        average: bool = True, feedback: bool | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        if not isinstance(ddp, DistributedDataParallel):
            raise TypeError(f"l_greco compresses what processes tell each other about a DistributedDataParallel model, not a {type(ddp).__name__}: wrap the model first, or train without it where there is one process")  # fmt: skip # noqa: E501
        if isinstance(compressor, str):
            if compressor not in COMPRESSORS:
                raise ValueError(f"unknown compressor {compressor!r}{suggest(compressor, list(COMPRESSORS))}")
            compressor = COMPRESSORS[compressor]()
        if not 0 < alpha < float("inf"):
            raise ValueError(f"alpha of l_greco is a positive number, not {alpha!r}")
        wholes = {"refresh": (refresh, 1), "start": (start, 0), "window": (window, 1), "resolution": (resolution, 1), "seed": (seed, 0)}  # fmt: skip # noqa: E501
        for name, (value, least) in wholes.items():
            if name != "refresh" or value is not None:
                check_whole("l_greco", name, value, least)
        self.compressor, self.alpha, self.refresh, self.start = compressor, alpha, refresh, start
        self.window, self.resolution, self.squares, self.average, self.seed = window, resolution, squares, average, seed
        self.feedback = not compressor.unbiased if feedback is None else feedback
        self.plan: Plan | None = None
        """The last choice, once there has been one."""
        self.step = self.plans = 0
        self._layers = dict(_layers(ddp, compressor))
        self._running: list[Running] = []
        self._wire = Wire(ddp.process_group)
        ddp.register_comm_hook(self, lambda state, bucket: state.reduce(bucket))

    @property
    def layers(self) -> list[Layer]:
        """The compressed parameters, with their present settings; all others are sent as they are."""
        return list(self._layers.values())

    @property
    def sent(self) -> Counter[str]:
        """Bytes this process has handed to collectives, by kind: `start`, `dense`, `compressed`, `planning`."""
        return self._wire.sent

    @torch.no_grad()
    def reduce(self, bucket: GradBucket) -> Future[Tensor]:
        """Start to average a bucket of gradients, as DDP asks for; with the last one of a step, finish all.

        The first collectives of a bucket run while the backward pass goes on. Later ones are started in one order on
        all processes, since each is waited for here.
        """
        buffer = bucket.buffer()
        if buffer.layout != torch.strided:
            raise RuntimeError("l_greco cannot compress sparse gradients: make the embedding with sparse=False")
        if bucket.index() == 0:
            self._running.clear()  # of a backward pass that failed
        future: Future[Tensor] = Future(devices=[buffer.device] if buffer.is_cuda else None)
        rounds = self._averaged(list(zip(bucket.parameters(), bucket.gradients(), strict=True)))
        self._running.append((rounds, next(rounds), future, buffer))
        if bucket.is_last():
            self._finish()
        return future

    def _finish(self) -> None:
        while self._running:
            running, self._running = self._running, []
            for rounds, work, future, buffer in running:
                work.wait()
                following = next(rounds, None)
                if following is None:
                    future.set_result(buffer)
                else:
                    self._running.append((rounds, following, future, buffer))
        left = self._steps_to_plan()
        self.step += 1
        if left == 1:
            self._choose()

    def _steps_to_plan(self) -> int | None:
        """How many steps there are until settings are chosen, this one among them."""
        if self.refresh is None:
            return None
        if self.step < self.start:
            return self.start - self.step
        return self.refresh - (self.step - self.start) % self.refresh

    def _averaged(self, gradients: list[tuple[Tensor, Tensor]]) -> Generator[Work, None, None]:
        """Average the gradients of parameters in place; yields every collective once it is started."""
        compressing = self.step >= self.start
        chosen = [(self._layers[p], g) for p, g in gradients if p in self._layers]
        matrices = [self._matrix(layer, g, compressing) for layer, g in chosen]
        dense = [g for p, g in gradients if not (compressing and p in self._layers)]
        if dense:
            message = torch.cat([g.flatten() for g in dense])
            work = self._wire.mean(message, "dense" if compressing else "start")
        if compressing and chosen:
            layers, dtype = [layer for layer, _ in chosen], chosen[0][1].dtype
            draw = Draw(self.seed, self.step, self.plans)
            found = yield from self.compressor.exchange(layers, matrices, dtype, self._wire, draw)
            for (layer, g), M, (mean, own) in zip(chosen, matrices, found, strict=True):
                self._arrived(layer, g, M, mean, own)
        if dense:
            yield work
            for g, part in zip(dense, message.split([g.numel() for g in dense]), strict=True):
                g.copy_(part.view_as(g))

    def _matrix(self, layer: Layer, g: Tensor, compressing: bool) -> Tensor:
        """The gradient with what has not been sent before, added to the statistics where they are wanted."""
        M = g.view(layer.shape).to(torch.float64 if g.dtype == torch.float64 else torch.float32)
        if compressing and layer.error is not None:
            M = M + layer.error
        if (self._steps_to_plan() or self.window + 1) <= self.window:
            layer.total = M.clone() if layer.total is None else layer.total.add_(M)
        return M

    def _arrived(self, layer: Layer, g: Tensor, M: Tensor, mean: Tensor, own: Tensor) -> None:
        """Put an average into the gradient's place, and keep what this process has not told of its own."""
        good = mean.isfinite().all()
        if self.feedback:
            before = torch.zeros_like(M) if layer.error is None else layer.error
            layer.error = torch.where(good, M - own.to(g.dtype), before)
        g.copy_(torch.where(good, mean, torch.nan).view_as(g))

    def _choose(self) -> None:
        """New settings, chosen by the first process; all keep theirs where the gradients tell nothing."""
        errors, layers = self._errors(), self.layers
        sizes = [np.array([self._nbytes(p, layer, dial) for dial in layer.dials], float) for p, layer in self._layers.items()]  # fmt: skip # noqa: E501
        default = [layer.dials.index(layer.default) for layer in layers]
        found = choose(errors, sizes, default, self.alpha, self.resolution) if self._wire.rank == 0 else None
        sent = torch.tensor(found or [-1] * len(layers), device=self._device)
        self._wire.share(sent, "planning").wait()
        choice = sent.tolist()
        self.plans += 1
        if -1 in choice:
            odd = [layer.name for layer, e in zip(layers, errors, strict=True) if not np.isfinite(e).all()]
            reason = f"gradients of {', '.join(odd)} hold NaN or infinity" if odd else "the uniform setting makes no error"  # fmt: skip # noqa: E501
            remark(f"l_greco keeps its settings after step {self.step}: {reason}", NoPlan)
            return
        for layer, i in zip(layers, choice, strict=True):
            self._set(layer, layer.dials[i])
        self.plan = Plan(
            self.step, {layer.name: layer.dial for layer in layers}, round(total(sizes, choice)),
            round(total(sizes, default)), total(errors, choice), self.alpha * total(errors, default),
        )  # fmt: skip

    def _errors(self) -> list[np.ndarray]:
        """Errors of every layer's mean gradient at every setting, the same on all processes, who share the work."""
        layers, world = self.layers, self._wire.world
        totals = [x for layer in layers if (x := layer.total) is not None]
        steps = self.start if self.step == self.start else self.refresh or 0
        for x in totals:
            x.div_(min(self.window, steps))
        for work in [self._wire.mean(x, "planning") for x in totals if self.average]:
            work.wait()
        rows = [torch.zeros(len(layer.dials), dtype=torch.float64) for layer in layers]
        for layer, M, row in zip(layers, totals, rows, strict=True):
            if self._wire.rank == (layer.index % world if self.average else 0):
                found = self.compressor.errors(M, layer.dials) if bool(M.isfinite().all()) else [np.nan] * len(row)
                row.copy_(torch.as_tensor(found))
            layer.total = None
        table = torch.cat(rows).to(self._device)
        self._wire.sum(table, "planning").wait()
        each = [row.numpy() for row in table.cpu().split([len(row) for row in rows])]
        return [row**2 for row in each] if self.squares else each

    def _set(self, layer: Layer, dial: int) -> None:
        if dial != layer.dial:
            layer.dial, layer.basis = dial, None

    def _nbytes(self, p: Tensor, layer: Layer, dial: int) -> int:
        return self.compressor.nbytes(layer.shape, dial, p.itemsize)

    @property
    def nbytes(self) -> int:
        """Bytes that this process sends of the compressed parameters in a step, at the present settings."""
        return sum(self._nbytes(p, layer, layer.dial) for p, layer in self._layers.items())

    @property
    def _device(self) -> torch.device:
        return next(iter(self._layers)).device

    def state_dict(self) -> dict[str, Any]:
        """What training goes on from: tensors and numbers, each process having its own."""
        kept = ("dial", "error", "basis", "total")
        layers = {x.name: {k: v for k in kept if (v := getattr(x, k)) is not None} for x in self.layers}
        return {"step": self.step, "plans": self.plans, "alpha": self.alpha, "layers": layers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`. Raises ValueError where it is of another model or other settings."""
        own, given = {layer.name: layer for layer in self.layers}, state["layers"]
        if own.keys() != given.keys():
            odd = sorted(own.keys() ^ given.keys())
            raise ValueError(f"the state of l_greco is of another model or compressor: {', '.join(odd)} is compressed in one of them only")  # fmt: skip # noqa: E501
        for name, kept in given.items():
            layer = own[name]
            if kept["dial"] not in layer.dials:
                raise ValueError(f"the state of l_greco sets {name} to {kept['dial']}, which is none of {layer.dials}")
            shapes = {"error": layer.shape, "total": layer.shape, "basis": (layer.shape[1], kept["dial"])}
            for k, x in kept.items():
                if k != "dial" and tuple(x.shape) != shapes[k]:
                    raise ValueError(f"the state of l_greco has a {k} of shape {tuple(x.shape)} for {name}, not {shapes[k]}")  # fmt: skip # noqa: E501
        for p, layer in self._layers.items():
            kept = given[layer.name]
            layer.dial = kept["dial"]
            for k in ("error", "basis", "total"):
                setattr(layer, k, kept[k].detach().clone().to(p.device) if k in kept else None)
        self.step, self.plans, self.alpha = state["step"], state["plans"], state["alpha"]


def _layers(ddp: DistributedDataParallel, compressor: Compressor) -> list[tuple[Tensor, Layer]]:
    """The parameters worth compressing. Raises ValueError where there are none."""
    found: list[tuple[Tensor, Layer]] = []
    for name, p in ddp.module.named_parameters():
        if not p.requires_grad or p.dim() < 2 or not p.numel() or name in ddp.parameters_to_ignore:
            continue
        shape = (p.shape[0], p.numel() // p.shape[0])
        if compressor.shrinks(shape, p.itemsize):
            default = compressor.default(shape)
            found.append((p, Layer(name, len(found), shape, default, compressor.dials(shape), default)))
    if not found:
        raise ValueError(f"no gradient of {type(ddp.module).__name__} shrinks by more than {compressor.min_rate:g} under {compressor}: compress further, or lower min_rate")  # fmt: skip # noqa: E501
    return found
