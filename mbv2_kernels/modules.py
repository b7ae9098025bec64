"""The inverted residual block as a module, to build new networks from."""

from __future__ import annotations

from torch import Tensor, nn

from .backends import BlockConfig
from .fused_forward import FusedForward
from .recognise import KERNEL_SIZES, STRIDES, BlockStructure, ConvNorm
from .training_forward import MEMORY

_ACTIVATIONS = ("relu6", "relu")


class FusedInvertedResidual(nn.Module):
    """Expand, depthwise, project with BatchNorms, run as one kernel.

        [N, in_channels, H, W]
          conv 1x1, BatchNorm, activation      -> round(in_channels * expand_ratio) channels; not if expand_ratio is 1
          depthwise k x k, BatchNorm, activation, zero padding dilation * (k - 1) / 2
          conv 1x1, BatchNorm                  -> [N, out_channels, ceil(H / stride), ceil(W / stride)]
          + x                                  if stride is 1 and in_channels == out_channels

    Parameters, buffers and the keys of `state_dict` are those of torchvision's `InvertedResidual` (`conv.0.0.weight`,
    ...). The block behaves like any block that `fuse` has swapped; `unfuse` and `summary` know it. A subclass with a
    `forward` of its own keeps that forward.

    Args:
        in_channels, out_channels: positive.
        stride: 1 or 2, of the depthwise convolution.
        expand_ratio: at least as large that one hidden channel remains; 1 means no expand layer.
        kernel_size: 3, 5 or 7.
        dilation: of the depthwise convolution.
        activation: "relu6" or "relu", after expand and depthwise.
        eps, momentum: of the three BatchNorms; momentum None averages over all batches.
        memory: what training keeps for backward, "fast" or "lean", see `fuse`.

    Raises TypeError or ValueError, naming the argument.

    Source: Sandler et al., MobileNetV2 (arXiv 1801.04381v4), section 3.3 and table 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        expand_ratio: float = 6,
        kernel_size: int = 3,
        dilation: int = 1,
        activation: str = "relu6",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        memory: str = "fast",
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("dilation", dilation)):
            _check_int(name, value)
        _check_int("stride", stride, STRIDES)
        _check_int("kernel_size", kernel_size, KERNEL_SIZES)
        _check_number("expand_ratio", expand_ratio)
        _check_number("eps", eps)
        if momentum is not None:
            _check_number("momentum", momentum)
        if activation not in _ACTIVATIONS:
            raise ValueError(f'activation must be "relu6" or "relu", got {activation!r}')
        if memory not in MEMORY:
            raise ValueError(f"memory must be one of {', '.join(MEMORY)}, got {memory!r}")
        hidden_channels = round(in_channels * expand_ratio)
        if hidden_channels < 1:
            raise ValueError(f"expand_ratio must leave a hidden channel, got {expand_ratio} of {in_channels} channels")

        def conv_norm(conv: nn.Conv2d) -> ConvNorm:
            return ConvNorm(conv, nn.BatchNorm2d(conv.out_channels, eps=eps, momentum=momentum))

        def conv_norm_act(layer: ConvNorm) -> nn.Sequential:
            act = nn.ReLU6(inplace=True) if activation == "relu6" else nn.ReLU(inplace=True)
            return nn.Sequential(*_modules(layer), act)

        expand = None
        if expand_ratio != 1:
            expand = conv_norm(nn.Conv2d(in_channels, hidden_channels, 1, bias=False))
        padding = dilation * (kernel_size - 1) // 2
        depthwise = conv_norm(
            nn.Conv2d(
                hidden_channels,
                hidden_channels,
                kernel_size,
                stride,
                padding,
                dilation,
                groups=hidden_channels,
                bias=False,
            )
        )
        project = conv_norm(nn.Conv2d(hidden_channels, out_channels, 1, bias=False))
        first = [] if expand is None else [conv_norm_act(expand)]
        self.conv = nn.Sequential(*first, conv_norm_act(depthwise), *_modules(project))
        self.stride = stride
        self.out_channels = out_channels
        self.use_res_connect = stride == 1 and in_channels == out_channels

        if type(self).forward is FusedInvertedResidual.forward:
            config = BlockConfig(stride, padding, dilation, activation, "none", self.use_res_connect)
            structure = BlockStructure(self, expand, depthwise, project, (), config)
            self.forward = FusedForward(structure, type(self).__name__, memory)  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        """The block layer by layer: what `unfuse` leaves."""
        y = self.conv(x)
        return x + y if self.use_res_connect else y


def _modules(layer: ConvNorm) -> list[nn.Module]:
    return [module for module in layer if module is not None]


def _check_int(name: str, value: object, choices: tuple[int, ...] = ()) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if choices and value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value}")
    if value < 1:
        raise ValueError(f"{name} must be positive, got {value}")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
