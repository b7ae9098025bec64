"""Blocks for the tests: random weights, random BatchNorms, and the error of a result against float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mbv2_kernels import reference
from mbv2_kernels.fold import BlockTensors
from mbv2_kernels.functional import BlockConfig

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: DESIGN section 10: relative errors in the 2-norm, forward and gradients.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
GRADIENT_BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
EPS = (1e-5, 1e-3, 1e-5)

# What the AVX-512 tier does otherwise than its elders, for every tier.
#
#: Output channels of few enough vectors for paired panels (csrc/core/pack.cpp) and one too many, with hidden channels
#: that are odd, and even with every rest of the unrolled loop over pairs.
PAIRED_OUT = (1, 3, 8, 9, 16, 17, 23, 24, 25)
PAIRED_HIDDEN = (2, 23, 24, 26, 28, 30)
#: Paired panels wherever sums go: Cin, hidden and Cout; the image's size; options.
PAIRED: dict[str, tuple[tuple[int, int, int], tuple[int, int], dict[str, Any]]] = {
    "chunks": ((5, 400, 24), (6, 7), {}),
    "chunks, odd": ((5, 401, 24), (6, 7), {}),
    "chunks, residual": ((9, 400, 9), (6, 7), {"residual": True}),
    "chunks, final activation": ((5, 402, 17), (6, 7), {"final_activation": "relu6"}),
    "residual": ((24, 48, 24), (9, 9), {"residual": True}),
    "residual, one vector": ((16, 46, 16), (9, 9), {"residual": True}),
    "final activation": ((8, 48, 23), (9, 9), {"stride": 2, "final_activation": "relu6"}),
    "bands": ((4, 26, 24), (64, 65), {}),
    "bands, chunks": ((3, 200, 20), (64, 65), {}),
    "hidden channels shared out": ((64, 384, 24), (4, 4), {"threads": 2}),
    "hidden channels shared out, residual": ((24, 386, 24), (4, 4), {"threads": 2, "residual": True}),
    "hidden channels shared out, one vector": ((64, 384, 7), (4, 4), {"threads": 2, "final_activation": "relu"}),
    "rows shared out": ((8, 32, 24), (21, 21), {"threads": 2}),
}
#: Outputs of a depthwise pass for every size of its patches, and of groups that several of them make up; one of several
#: groups.
PATCHES = {
    3: [(height, width) for height in range(1, 5) for width in range(1, 11)]
    + [(h, 9) for h in range(5, 9)]
    + [(23, 50)],
    5: [(2, width) for width in range(1, 13)] + [(height, 9) for height in range(1, 9)],
}


def make_weights(
    in_channels: int = 8,
    hidden: int = 24,
    out_channels: int = 8,
    kernel_size: int = 3,
    *,
    expand: bool = True,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor | None]:
    """The six folded weights; activations reach both edges of a ReLU6."""
    if not expand:
        hidden = in_channels

    def weight(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape) * scale).to(dtype)

    def bias_of(channels: int) -> Tensor | None:
        return torch.randn(channels).to(dtype) if bias else None

    return [
        weight(hidden, in_channels, 1, 1, scale=3 * in_channels**-0.5) if expand else None,
        bias_of(hidden) if expand else None,
        weight(hidden, 1, kernel_size, kernel_size, scale=3 / kernel_size),
        bias_of(hidden),
        weight(out_channels, hidden, 1, 1, scale=hidden**-0.5),
        bias_of(out_channels),
    ]


def make_block(
    in_channels: int = 8,
    hidden: int = 24,
    out_channels: int = 8,
    kernel_size: int = 3,
    *,
    expand: bool = True,
    conv_bias: bool = False,
    norm: bool = True,
    affine: bool = True,
    dtype: torch.dtype = torch.float32,
    requires_grad: bool = False,
) -> BlockTensors:
    """The 18 tensors of a block with BatchNorms."""
    weights = make_weights(in_channels, hidden, out_channels, kernel_size, expand=expand, bias=conv_bias, dtype=dtype)
    tensors: list[Tensor | None] = []
    for weight, bias in zip(weights[::2], weights[1::2], strict=True):
        if weight is None:
            tensors += [None] * 6
            continue
        channels = weight.shape[0]
        gamma = (torch.rand(channels) + 0.5).to(dtype) if norm and affine else None
        beta = torch.randn(channels).to(dtype) if norm and affine else None
        mean = torch.randn(channels).to(dtype) * 0.2 if norm else None
        var = (torch.rand(channels) + 0.5).to(dtype) if norm else None
        tensors += [weight, bias, gamma, beta, mean, var]
    block = BlockTensors(*tensors)
    return with_grad(block) if requires_grad else block


def with_grad(tensors: BlockTensors) -> BlockTensors:
    """Fresh leaves; the running statistics, which are no parameters, stay without gradient."""
    statistics = ("mean", "var")
    return BlockTensors(
        *(
            None if t is None else t.detach().clone().requires_grad_(not field.endswith(statistics))
            for field, t in tensors._asdict().items()
        )
    )


def make_config(
    stride: int = 1,
    padding: int = 1,
    dilation: int = 1,
    activation: str = "relu6",
    final_activation: str = "none",
    residual: bool = False,
) -> BlockConfig:
    return BlockConfig(stride, padding, dilation, activation, final_activation, residual)


def unfused(x: Tensor, tensors: BlockTensors, eps: tuple[float, float, float], config: BlockConfig) -> Tensor:
    """The block as a network without this package runs it: convolutions and BatchNorms in eval mode."""
    hidden = x
    for i, activation in ((0, config.activation), (6, config.activation), (12, config.final_activation)):
        weight, bias, gamma, beta, mean, var = tensors[i : i + 6]
        if weight is None:
            continue
        arguments: dict[str, Any] = {}
        if i == 6:
            pads = (
                reference.padding_amounts(s, weight.shape[-1], *config[:3]) for s in (hidden.shape[3], hidden.shape[2])
            )
            hidden = torch.nn.functional.pad(hidden, [amount for pair in pads for amount in pair])
            arguments = {"stride": config.stride, "dilation": config.dilation, "groups": weight.shape[0]}
        hidden = torch.nn.functional.conv2d(hidden, weight, bias, **arguments)
        if mean is not None:
            hidden = torch.nn.functional.batch_norm(hidden, mean, var, gamma, beta, False, 0.0, eps[i // 6])
        if activation != "none":
            hidden = getattr(torch.nn.functional, activation)(hidden)
    return hidden + x if config.residual else hidden


def double(tensors: Any) -> list[Any]:
    return [t.detach().double() if isinstance(t, Tensor) else t for t in tensors]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.detach().double() - expected.detach()).norm() / expected.detach().norm())
