"""What the two reference networks share: channel rounding, layers, the way to the classes, initialisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def scale_channels(channels: int, width_mult: float, divisor: int = 8) -> int:
    """`channels * width_mult` as a multiple of `divisor`, never below `divisor` nor below 90 % of the exact value.

    Multiples of 8 keep every layer on whole SIMD vectors; the 90 % rule keeps narrow networks from losing a large part
    of a layer to rounding (12 -> 16, not 8).
    """
    exact = channels * width_mult
    rounded = max(divisor, int(exact + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * exact else rounded


class ConvBNReLU6(nn.Sequential):
    """Convolution without bias, BatchNorm, ReLU6: [N, in, H, W] -> [N, out, ceil(H / stride), ceil(W / stride)]."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, groups: int = 1):
        super().__init__(
            nn.Conv2d(
                in_channels, out_channels, kernel_size, stride, (kernel_size - 1) // 2, groups=groups, bias=False
            ),
            nn.BatchNorm2d(out_channels),
            nn.ReLU6(inplace=True),
        )


class ImageClassifier(nn.Module):
    """Features, their mean over all pixels, classifier: [N, 3, H, W] -> [N, num_classes] logits."""

    features: nn.Sequential
    classifier: nn.Sequential

    def _forward_impl(self, x: Tensor) -> Tensor:
        # Name and lines are torchvision's, and `fuse` reads them (mbv2_kernels/composition.py).
        x = self.features(x)
        x = nn.functional.adaptive_avg_pool2d(x, (1, 1))
        x = torch.flatten(x, 1)
        x = self.classifier(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)


def initialise(model: nn.Module) -> None:
    """Weights from a normal distribution of standard deviation 0.09 cut at two deviations, biases 0, BatchNorm 1 and 0.

    This is what the authors' TF-Slim code does in both networks, for convolutions, depthwise convolutions and the
    classifier alike (`stddev=0.09` of `mobilenet_v1_arg_scope` and of mobilenet's `training_scope`).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.09, a=-0.18, b=0.18)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def check_arguments(width_mult: float, num_classes: int, dropout: float, stem_stride: int) -> None:
    """Raise `ValueError` naming the first argument that no network can be built from."""
    if not width_mult > 0:
        raise ValueError(f"width_mult must be greater than 0, got {width_mult!r}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes!r}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be a probability from 0 to 1, got {dropout!r}")
    if stem_stride not in (1, 2):
        raise ValueError(f"stem_stride must be 1 or 2, got {stem_stride!r}")
