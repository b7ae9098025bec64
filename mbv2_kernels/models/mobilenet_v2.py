"""MobileNetV2 (Sandler et al., arXiv 1801.04381), parameter for parameter the layout of torchvision's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ._layers import ConvBNReLU6, ImageClassifier, check_arguments, initialise, scale_channels

# Table 2 of the paper: (t, c, n, s) = expansion factor, output channels, repetitions, stride of the first repetition.
BLOCKS: tuple[tuple[int, int, int, int], ...] = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280


class InvertedResidual(nn.Module):
    """The inverted residual block with a linear bottleneck (section 3.3, table 1), unfused.

    [N, in_channels, H, W] -> expand 1x1 to `round(in_channels * expand_ratio)`, BN, ReLU6 -> depthwise 3x3, BN, ReLU6
    -> project 1x1, BN, no activation -> [N, out_channels, ceil(H / stride), ceil(W / stride)]. The input is added when
    stride and channels allow. `expand_ratio` 1 has no expand layer.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expand_ratio: float):
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride!r}")
        hidden_channels = round(in_channels * expand_ratio)
        layers: list[nn.Module] = []
        if expand_ratio != 1:
            layers.append(ConvBNReLU6(in_channels, hidden_channels, kernel_size=1))
        layers += [
            ConvBNReLU6(hidden_channels, hidden_channels, stride=stride, groups=hidden_channels),
            nn.Conv2d(hidden_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        ]
        self.stride = stride
        self.use_res_connect = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return x + y if self.use_res_connect else y


class MobileNetV2(ImageClassifier):
    """[N, 3, H, W] -> [N, num_classes] logits; see `mobilenet_v2` for the arguments."""

    def __init__(
        self,
        width_mult: float = 1.0,
        num_classes: int = 1000,
        dropout: float = 0.2,
        *,
        inverted_residual_setting: Sequence[Sequence[int]] = BLOCKS,
        stem_stride: int = 2,
    ):
        super().__init__()
        check_arguments(width_mult, num_classes, dropout, stem_stride)
        if not inverted_residual_setting or any(len(row) != 4 for row in inverted_residual_setting):
            raise ValueError(
                "inverted_residual_setting must be rows of (expand_ratio, channels, repetitions, stride), "
                f"got {inverted_residual_setting!r}"
            )
        channels = scale_channels(STEM_CHANNELS, width_mult)
        features: list[nn.Module] = [ConvBNReLU6(3, channels, stride=stem_stride)]
        for expand_ratio, block_channels, repetitions, first_stride in inverted_residual_setting:
            out_channels = scale_channels(block_channels, width_mult)
            for repetition in range(repetitions):
                stride = first_stride if repetition == 0 else 1
                features.append(InvertedResidual(channels, out_channels, stride, expand_ratio))
                channels = out_channels
        # The last layer is not narrowed below width 1.0: the paper found that this helps small networks (section 6.1).
        self.last_channel = scale_channels(HEAD_CHANNELS, max(1.0, width_mult))
        features.append(ConvBNReLU6(channels, self.last_channel, kernel_size=1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(self.last_channel, num_classes))
        initialise(self)


def mobilenet_v2(
    width_mult: float = 1.0,
    num_classes: int = 1000,
    dropout: float = 0.2,
    *,
    inverted_residual_setting: Sequence[Sequence[int]] = BLOCKS,
    stem_stride: int = 2,
) -> MobileNetV2:
    """MobileNetV2 with random weights (arXiv 1801.04381, table 2), in plain PyTorch; `mbv2_kernels.fuse` makes it fast.

    Keys, order and shapes of its `state_dict` are those of `torchvision.models.mobilenet_v2`, so its weights load.
    Width 1.0 at 224x224: 3,504,872 parameters, 300.8 million multiply-adds (`models.count` gives them layer by layer).

    Args:
        width_mult: factor on all channels (the paper uses 0.35, 0.5, 0.75, 1.0, 1.4), rounded to multiples of 8.
        num_classes: length of the output.
        dropout: probability of dropout before the classifier.
        inverted_residual_setting: rows of (expand_ratio, channels, repetitions, stride); default table 2 of the paper.
        stem_stride: stride of the first convolution. For 32x32 images (CIFAR) take 1, and stride 1 in the second row of
            `inverted_residual_setting`.

    Raises:
        ValueError: an argument out of its range, named with what came.
    """
    return MobileNetV2(
        width_mult,
        num_classes,
        dropout,
        inverted_residual_setting=inverted_residual_setting,
        stem_stride=stem_stride,
    )
