"""MobileNetV1 (Howard et al., arXiv 1704.04861)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ._layers import ConvBNReLU6, ImageClassifier, check_arguments, initialise, scale_channels

# Table 1 of the paper: (output channels, stride) of the 13 depthwise separable blocks. The table prints stride 2 at the
# last depthwise layer too, but also 7x7 as its output: stride 1 is what its sizes, and the authors' code, say.
BLOCKS: tuple[tuple[int, int], ...] = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (1024, 2),
    (1024, 1),
)
STEM_CHANNELS = 32


class DepthwiseSeparable(nn.Sequential):
    """Depthwise 3x3, BN, ReLU6, then pointwise 1x1, BN, ReLU6 (figure 3, right), unfused.

    [N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]. The paper draws ReLU; ReLU6 is what
    the authors' code uses, and what the MobileNetV2 paper calls MobileNetV1 (its figure 4b).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__(
            ConvBNReLU6(in_channels, in_channels, stride=stride, groups=in_channels),
            ConvBNReLU6(in_channels, out_channels, kernel_size=1),
        )


class MobileNetV1(ImageClassifier):
    """[N, 3, H, W] -> [N, num_classes] logits; see `mobilenet_v1` for the arguments."""

    def __init__(
        self,
        width_mult: float = 1.0,
        num_classes: int = 1000,
        dropout: float = 0.001,
        *,
        block_setting: Sequence[Sequence[int]] = BLOCKS,
        stem_stride: int = 2,
    ):
        super().__init__()
        check_arguments(width_mult, num_classes, dropout, stem_stride)
        if not block_setting or any(len(row) != 2 for row in block_setting):
            raise ValueError(f"block_setting must be rows of (channels, stride), got {block_setting!r}")
        channels = scale_channels(STEM_CHANNELS, width_mult)
        features: list[nn.Module] = [ConvBNReLU6(3, channels, stride=stem_stride)]
        for block_channels, stride in block_setting:
            out_channels = scale_channels(block_channels, width_mult)
            features.append(DepthwiseSeparable(channels, out_channels, stride))
            channels = out_channels
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(channels, num_classes))
        initialise(self)


def mobilenet_v1(
    width_mult: float = 1.0,
    num_classes: int = 1000,
    dropout: float = 0.001,
    *,
    block_setting: Sequence[Sequence[int]] = BLOCKS,
    stem_stride: int = 2,
) -> MobileNetV1:
    """MobileNetV1 with random weights (arXiv 1704.04861, table 1), in plain PyTorch; `mbv2_kernels.fuse` makes it fast.

    Width 1.0 at 224x224: 4,231,976 parameters, 568.7 million multiply-adds (569 in the paper's table 6; the MobileNetV2
    paper quotes 575).

    Args:
        width_mult: factor on all channels (the paper uses 0.25, 0.5, 0.75, 1.0), rounded to multiples of 8.
        num_classes: length of the output.
        dropout: probability of dropout before the classifier (the authors' code keeps 0.999).
        block_setting: rows of (channels, stride); default table 1 of the paper.
        stem_stride: stride of the first convolution.

    Raises:
        ValueError: an argument out of its range, named with what came.
    """
    return MobileNetV1(width_mult, num_classes, dropout, block_setting=block_setting, stem_stride=stem_stride)
