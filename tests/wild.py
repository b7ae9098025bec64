"""Inverted residual blocks as people write them, and how tests compare models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mbv2_kernels as mbv2
from mbv2_kernels.recognise import LAYER_KINDS


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and BatchNorm statistics with which every layer matters; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)) and "weight" in module._parameters:
                fan_in = module.weight[0].numel()
                module.weight.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
                if module.bias is not None:
                    module.bias.normal_(0, 0.2, generator=generator)
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                if module.weight is not None:
                    module.weight.uniform_(0.5, 2, generator=generator)
                    module.bias.normal_(0.5, 0.5, generator=generator)
    return model.eval()


def error(y: Tensor, expected: Tensor) -> float:
    """||y - expected|| / ||expected||; NaN anywhere makes it NaN, which no comparison with a bound survives."""
    y, expected = y.detach().double(), expected.detach().double()
    return float((y - expected).norm() / expected.norm())


def bottleneck_layers(
    in_channels: int,
    hidden: int,
    out_channels: int,
    *,
    stride: int = 1,
    kernel_size: int = 3,
    dilation: int = 1,
    expand: bool = True,
    bias: bool = False,
    norm: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
    act: Callable[[], nn.Module] = nn.ReLU6,
    final: Callable[[], nn.Module] | None = None,
    padding: int | str | None = None,
    conv: Callable[..., nn.Conv2d] = nn.Conv2d,
) -> list[nn.Module]:
    """One flat list: [1x1, norm, act], depthwise, norm, act, 1x1, norm, [act]."""
    norm = norm or (lambda channels: nn.Identity())
    if padding is None:
        padding = dilation * (kernel_size - 1) // 2
    layers: list[nn.Module] = []
    if expand:
        layers += [nn.Conv2d(in_channels, hidden, 1, bias=bias), norm(hidden), act()]
    else:
        hidden = in_channels
    depthwise = partial(conv, hidden, hidden, kernel_size, stride, padding, dilation, groups=hidden, bias=bias)
    layers += [depthwise(), norm(hidden), act(), nn.Conv2d(hidden, out_channels, 1, bias=bias), norm(out_channels)]
    return layers + ([final()] if final else [])


class Flat(nn.Module):
    """torchvision's and a hundred repositories' way: one Sequential and a flag."""

    def __init__(self, in_channels: int = 8, hidden: int = 24, out_channels: int = 8, **kwargs: Any) -> None:
        super().__init__()
        self.identity = kwargs.get("stride", 1) == 1 and in_channels == out_channels
        self.conv = nn.Sequential(*bottleneck_layers(in_channels, hidden, out_channels, **kwargs))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.identity else self.conv(x)


class Named(nn.Module):
    """kuangliu's way: named attributes, functional activations, padding in forward on request."""

    def __init__(
        self,
        in_channels: int = 8,
        hidden: int = 24,
        out_channels: int = 8,
        stride: int = 1,
        act: Callable[[Tensor], Tensor] = F.relu,
        pad: tuple[int, int, int, int] | None = None,
    ) -> None:
        super().__init__()
        self.stride, self.act, self.pad = stride, act, pad
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, 0 if pad else 1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        y = self.act(self.bn2(self.conv2(F.pad(y, self.pad) if self.pad else y)))
        y = self.bn3(self.conv3(y))
        return y + self.shortcut(x) if self.stride == 1 else y


class SharedActivation(nn.Module):
    """ResNet's way: convolutions, norms and one activation, registered in that order."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 24, 1, bias=False)
        self.conv2 = nn.Conv2d(24, 24, 3, 1, 1, groups=24, bias=False)
        self.conv3 = nn.Conv2d(24, 8, 1, bias=False)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(24), nn.BatchNorm2d(24), nn.BatchNorm2d(8)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        y = self.act(self.bn2(self.conv2(y)))
        return x + self.bn3(self.conv3(y))


class SameConv2d(nn.Conv2d):
    """TensorFlow's "same": pads at run time, claims padding 0."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, k, s, d in zip(x.shape[:1:-1], self.kernel_size, self.stride, self.dilation, strict=True):
            total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Residual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(x)


def block_rows(model: nn.Module) -> list[mbv2.FusionRow]:
    """The rows of the model's blocks, without those of the layers around them."""
    return [row for row in mbv2.summary(model) if row.kind not in LAYER_KINDS]


class Net(nn.Module):
    """A stem, three blocks, a head: small enough to run often."""

    def __init__(self, block: Callable[..., nn.Module] = Flat) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.blocks = nn.Sequential(block(8, 8, 8, expand=False), block(8, 48, 16, stride=2), block(16, 96, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))
