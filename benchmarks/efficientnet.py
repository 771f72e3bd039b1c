"""EfficientNet-Lite0 (Tan and Le 2019): 4.65 million parameters, in the layout of its published weights."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

STAGES = ((3, 1, 1, 32, 16, 1), (3, 2, 6, 16, 24, 2), (5, 2, 6, 24, 40, 2), (3, 2, 6, 40, 80, 3), (5, 1, 6, 80, 112, 3),
          (5, 2, 6, 112, 192, 4), (3, 1, 6, 192, 320, 1))  # fmt: skip
"""Kernel, stride, expansion, channels in, channels out, repeats."""


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow does: more on the right and below where the padding is odd."""

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        sides = []
        for size, kernel, stride in zip(input.shape[:-3:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            missing = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            sides += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(input, sides) if any(sides) else input)


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Expand, convolve each channel by itself, project; plus the input where the shapes agree."""

    def __init__(self, kernel: int, stride: int, expansion: int, into: int, out: int):
        super().__init__()
        wide = into * expansion
        self._expand_conv = nn.Conv2d(into, wide, 1, bias=False) if expansion > 1 else None
        self._bn0 = norm(wide) if expansion > 1 else None
        self._depthwise_conv = SameConv(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = norm(wide)
        self._project_conv = nn.Conv2d(wide, out, 1, bias=False)
        self._bn2 = norm(out)
        self.residual = stride == 1 and into == out

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        y = x
        if self._expand_conv is not None and self._bn0 is not None:
            y = F.relu6(self._bn0(self._expand_conv(y)))
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """Logits of 1,000 classes of ImageNet for images of 224 x 224, (pixel - 127) / 128."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv(3, 32, 3, 2, bias=False)
        self._bn0 = norm(32)
        self._blocks = nn.ModuleList(
            Block(kernel, stride if i == 0 else 1, expansion, into if i == 0 else out, out)
            for kernel, stride, expansion, into, out, repeats in STAGES
            for i in range(repeats)
        )
        self._conv_head = nn.Conv2d(320, 1280, 1, bias=False)
        self._bn1 = norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, pixel_values: Float[Tensor, "b 3 224 224"]) -> Float[Tensor, "b 1000"]:
        x = F.relu6(self._bn0(self._conv_stem(pixel_values)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x))).mean((-2, -1))
        logits: Tensor = self._fc(x)
        return logits


def from_published(file: Path) -> EfficientNetLite0:
    """The model with the weights of the package's .pth file, of which nothing is executed."""
    model = EfficientNetLite0()
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()
