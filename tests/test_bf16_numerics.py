"""The bf16 tier's results, to the last bit: no tap, channel, pixel or padding of its tiles is wrong.

Most tests compute with numbers so short that every sum in float32 is exact in whatever order it is added up (`exact`
proves it). What the tier rounds (weights of 1x1 convolutions, e, d and y) is rounded in the reference, too, so that
results must be equal. What is left is rounding itself: random numbers, against float64.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from blocks import BOUNDS, make_weights, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

import mbv2_kernels as mbv2
from mbv2_kernels import _C, models, reference
from mbv2_kernels._bench.inputs import random_pictures, randomise_batch_norm

TIER = _C.bf16_tier()
pytestmark = [
    pytest.mark.skipif(not TIER["runnable"], reason=f"tier {TIER['name']} cannot run here: {TIER['reason']}"),
    pytest.mark.usefixtures("no_cap"),
]

ACTIVATIONS = {"none": lambda v: v, "relu": torch.relu, "relu6": F.relu6}
#: Around the tiles' 16 rows and columns and their depth of 32, and the widest of MobileNetV2.
CHANNELS = (8, 15, 16, 17, 24, 31, 32, 33, 40, 64, 65, 96, 144, 160, 960)
#: 1, 15, 16, 17, 31, 32, 33, 48 and 49 pixels.
SIZES = ((1, 1), (3, 5), (4, 4), (1, 17), (31, 1), (4, 8), (3, 11), (6, 8), (7, 7))

ops = torch.ops.mbv2


class Config(NamedTuple):
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    activation: str = "relu6"
    final_activation: str = "none"
    residual: bool = False


PLAIN = Config()


def run(x: Tensor, weights: list[Tensor | None], config: Config) -> Tensor:
    packed = ops.pack_inverted_residual(*weights, TIER["name"])
    w_expand, _, w_depthwise, _, w_project, _ = weights
    assert w_depthwise is not None and w_project is not None
    dims = w_depthwise.shape[0], w_project.shape[0], w_depthwise.shape[-1], w_expand is not None
    y = ops.inverted_residual_packed(x, packed, *dims, *config)
    assert y.dtype is torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    return y


def bf16(t: Tensor) -> Tensor:
    """Rounded, in float64."""
    return t.bfloat16().double()


def exact(unit: float, x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """A convolution whose terms are multiples of `unit`, and whose every partial sum float32 holds."""
    largest = x.nan_to_num(0, 0, 0).abs().amax((0, 2, 3))[None, :, None, None]
    most = F.conv2d(largest, weight.abs().sum((2, 3), keepdim=True), groups=options.get("groups", 1)).flatten()
    assert (most if bias is None else most + bias.abs()).max() < 2**24 * unit
    return F.conv2d(x, weight, bias, **options)


def rounding_block(
    x: Tensor,
    weights: list[Tensor | None],
    config: Config,
    units: tuple[float, float, float] = (math.inf,) * 3,
    *,
    round_depthwise: bool = False,
) -> Tensor:
    """The block in float64, rounded where the tier rounds; y itself is not. round_depthwise: its weights are, too."""
    w1, b1, wd, b2, w2, b3 = (None if w is None else w.double() for w in weights)
    assert wd is not None and w2 is not None
    activate = ACTIVATIONS[config.activation]
    e = x = x.double()
    if w1 is not None:
        e = bf16(activate(exact(units[0], x, bf16(w1), b1)))
    kernel, stride = wd.shape[-1], config.stride
    pads = [reference.padding_amounts(size, kernel, *config[:3]) for size in (x.shape[3], x.shape[2])]
    e = F.pad(e, [amount for pair in pads for amount in pair])
    wd = bf16(wd) if round_depthwise else wd
    d = exact(units[1], e, wd, b2, stride=stride, dilation=config.dilation, groups=len(wd))
    y = ACTIVATIONS[config.final_activation](exact(units[2], bf16(activate(d)), bf16(w2), b3))
    return y + x if config.residual else y


class Short(NamedTuple):
    """A block, its input, and what the terms of its three sums are multiples of."""

    x: Tensor
    weights: list[Tensor | None]
    units: tuple[float, float, float]

    def expected(self, config: Config) -> Tensor:
        return rounding_block(self.x, self.weights, config, self.units).bfloat16()


def short(shape: tuple[int, ...], limit: int, unit: float) -> Tensor:
    """Multiples of `unit`, up to `limit` of them."""
    return torch.randint(-limit, limit + 1, shape) * unit


def power_below(number: float) -> float:
    return 2.0 ** math.floor(math.log2(number))


def unrounded(weight: Tensor) -> Tensor:
    """Up to a third of the way to the next bf16 number, either way: what rounds to `weight`."""
    return weight * (1 + (torch.rand(weight.shape) - 0.5) * 2**-9 * 1.3)


def short_block(
    in_channels: int,
    hidden: int,
    out_channels: int,
    kernel: int,
    size: tuple[int, ...],
    *,
    expand: bool = True,
    bias: bool = True,
) -> Short:
    """Numbers of few bits. e and d have more than the 8 of bf16, and reach both edges of a ReLU6."""
    if not expand:
        hidden = in_channels
    w1_unit = power_below(2 / in_channels**0.5) / 4 if expand else 1.0
    x_unit = max(2**-7 / w1_unit, 2**-5) if expand else 2**-4
    x_unit = min(x_unit, 2**-2)
    wd_unit, w2_unit = power_below(3 / kernel) / 4, power_below(4 / hidden**0.5) / 8
    x = short((size[0], in_channels, *size[1:]), int(2 / x_unit), x_unit)
    units = (x_unit * w1_unit, x_unit * w1_unit * wd_unit, x_unit * w1_unit * wd_unit * w2_unit)
    weights = [
        unrounded(short((hidden, in_channels, 1, 1), 4, w1_unit)) if expand else None,
        short((hidden,), 8, 2**-2) if expand and bias else None,
        short((hidden, 1, kernel, kernel), 4, wd_unit),
        short((hidden,), 8, 2**-2) if bias else None,
        unrounded(short((out_channels, hidden, 1, 1), 4, w2_unit)),
        short((out_channels,), 8, 2**-2) if bias else None,
    ]
    return Short(x.bfloat16(), weights, units)


# ---- Blocks, to the last bit -----------------------------------------------------------------------------------------


def check(block: Short, config: Config = PLAIN, *views: Tensor) -> None:
    """views: `block.x` as it may lie in memory."""
    expected = block.expected(config)
    for x in views or (block.x,):
        y = run(x, block.weights, config)
        assert torch.equal(y, expected), f"{int((y != expected).sum())} of {y.numel()} differ"


@pytest.mark.parametrize("expand", [True, False], ids=["expand", "no expand"])
@pytest.mark.parametrize("index", range(len(CHANNELS)))
def test_channels_and_pixels(index: int, expand: bool) -> None:
    channels = [CHANNELS[(index + offset) % len(CHANNELS)] for offset in (0, 4, 9)]
    for size in SIZES:
        check(short_block(*channels, 3, (1, *size), expand=expand))


@pytest.mark.parametrize("expand", [True, False], ids=["expand", "no expand"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 1), (5, 1), (7, 1), (3, 2), (5, 2)])
def test_windows(kernel: int, dilation: int, stride: int, expand: bool) -> None:
    for channels, size in itertools.product(((17, 40, 24), (32, 64, 33)), ((2, 3), (7, 9), (12, 23))):
        for padding in {0, dilation * (kernel - 1) // 2, reference.SAME}:
            if padding != 0 or min(size) > dilation * (kernel - 1):
                check(short_block(*channels, kernel, (2, *size), expand=expand), Config(stride, padding, dilation))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("final_activation", ACTIVATIONS)
def test_activations_and_residual(activation: str, final_activation: str, bias: bool) -> None:
    config = Config(activation=activation, final_activation=final_activation)
    for channels, expand in itertools.product(((24, 72, 24), (32, 64, 32), (40, 40, 40)), (True, False)):
        block = short_block(*channels, 3, (2, 6, 7), expand=expand, bias=bias)
        check(block, config)
        if final_activation == "none":
            check(block, config._replace(residual=True))


LARGE = {
    "groups of rows": ((16, 96, 24), (1, 40, 45), Config(stride=2)),
    "groups of rows, residual": ((24, 144, 24), (1, 38, 41), Config(residual=True)),
    "rows in groups of one": ((8, 40, 9), (1, 3, 460), Config()),
    "groups as the cache allows": ((24, 160, 16), (1, 56, 56), Config()),
    "kernel 5": ((16, 64, 16), (1, 33, 34), Config(padding=2, residual=True)),
    "several chunks": ((64, 384, 64), (1, 14, 14), Config(residual=True)),
    "widest": ((160, 960, 320), (2, 7, 7), Config()),
    "batch": ((33, 65, 17), (5, 9, 10), Config(stride=2)),
    "fewer rows than threads": ((32, 96, 32), (1, 1, 40), Config(residual=True)),
}


@pytest.mark.parametrize("expand", [True, False], ids=["expand", "no expand"])
@pytest.mark.parametrize("name", LARGE)
def test_groups_and_threads(name: str, expand: bool) -> None:
    """Exact, on one thread and on two; and what is not exact is the same on both."""
    channels, size, config = LARGE[name]
    if not expand and config.residual and channels[0] != channels[2]:
        config = config._replace(residual=False)
    kernel = 2 * config.padding + 1
    block = short_block(*channels, kernel, size, expand=expand)
    x, weights = torch.randn(size[0], channels[0], *size[1:]).bfloat16(), make_weights(*channels, kernel, expand=expand)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        check(block, config)
        results.append(run(x, weights, config))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def inside(x: Tensor, before: tuple[int, int, int], behind: tuple[int, int, int]) -> Tensor:
    """x as a part of a larger channels_last tensor; what surrounds it, channels, rows and columns, is NaN."""
    sizes = [sum(each) for each in zip(before, x.shape[1:], behind, strict=True)]
    whole = torch.full((len(x), *sizes), torch.nan, dtype=x.dtype).to(memory_format=torch.channels_last)
    part = whole[(slice(None), *(slice(b, b + n) for b, n in zip(before, x.shape[1:], strict=True)))]
    return part.copy_(x)


@pytest.mark.parametrize("expand", [True, False], ids=["expand", "no expand"])
@pytest.mark.parametrize("channels", [8, 16, 31, 32, 40, 64])
def test_any_strides(channels: int, expand: bool) -> None:
    """What lies between x's pixels, rows and images is NaN and does not matter."""
    for size, residual in itertools.product(((2, 5, 7), (1, 16, 3), (2, 1, 1)), (True, False)):
        block = short_block(channels, 2 * channels, channels, 3, size, expand=expand)
        config = Config(residual=residual)
        views = [
            block.x.contiguous(),
            block.x.contiguous(memory_format=torch.channels_last),
            block.x.transpose(2, 3).contiguous(memory_format=torch.channels_last).transpose(2, 3),
            inside(block.x, (0, 0, 0), (1, 0, 0)),
            inside(block.x, (3, 0, 0), (2, 0, 0)),
            inside(block.x, (32, 0, 0), (32, 0, 0)),
            inside(block.x, (0, 0, 1), (0, 0, 2)),
            inside(block.x, (1, 2, 3), (4, 1, 2)),
            inside(block.x, (0, 1, 0), (0, 1, 0)),
        ]
        check(block, config, *views)


@pytest.mark.parametrize("expand", [True, False])
def test_empty_batch(expand: bool) -> None:
    y = run(torch.empty(0, 16, 6, 7).bfloat16(), make_weights(16, 24, 9, expand=expand), Config(stride=2))
    assert y.shape == (0, 9, 3, 4)


# A weight of each kind; of the depthwise ones the first tap and one in the second half of 32 channels.
WEIGHTS = ((0, (5, 3)), (1, (7,)), (2, (0, 0, 0, 0)), (2, (31, 0, 2, 1)), (3, (16,)), (4, (16, 39)), (5, (2,)))


@pytest.mark.parametrize(("which", "place"), WEIGHTS)
@pytest.mark.parametrize("channels", [(24, 40, 17), (160, 960, 320)])
def test_one_wrong_weight_is_found(channels: tuple[int, int, int], which: int, place: tuple[int, ...]) -> None:
    """The proof that comparing bits finds one weight that is off by a twentieth, of up to 960 channels."""
    block, config = short_block(*channels, 3, (1, 7, 7)), Config(activation="none")
    weight = block.weights[which]
    assert weight is not None
    if weight[place] == 0:
        weight[place] = weight.abs().max()
    check(block, config)
    expected = block.expected(config)
    weight[place] *= 1.05
    assert not torch.equal(run(block.x, block.weights, config), expected)


# ---- NaN and infinities ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("channels", [(8, 24, 17), (32, 64, 32), (24, 40, 24), (15, 33, 8)])
@pytest.mark.parametrize("expand", [True, False], ids=["expand", "no expand"])
def test_nan_and_infinity(expand: bool, channels: tuple[int, int, int], activation: str) -> None:
    """They reach what the reference says and nothing else; a ReLU6 keeps NaN and makes 6 and 0 of infinities."""
    for value in (torch.nan, torch.inf, -torch.inf):
        for size, place in (((7, 9), (3, 4)), ((7, 9), (0, 8)), ((2, 3), (1, 0)), ((16, 40), (11, 20))):
            block = short_block(*channels, 3, (2, *size), expand=expand)
            for weight in block.weights[::2]:
                if weight is not None:
                    weight[weight == 0] = weight.abs().max()  # 0 times infinity is NaN
            block.x[1, 5, place[0], place[1]] = value
            y, config = run(block.x, block.weights, Config(activation=activation)), Config(activation=activation)
            torch.testing.assert_close(y, block.expected(config), rtol=0, atol=0, equal_nan=True)


# ---- Convolutions, to the last bit -----------------------------------------------------------------------------------


def run_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, activation: str) -> Tensor:
    packed = ops.pack_conv(weight, bias, TIER["name"])
    y = ops.conv_act_packed(x, packed, weight.shape[0], weight.shape[-1], stride, padding, activation)
    assert y.dtype is torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    return y


def check_conv(
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: int,
    padding: int,
    size: tuple[int, int, int],
    activation: str = "relu6",
    *,
    bias: bool = True,
) -> None:
    unit = power_below(4 / (in_channels**0.5 * kernel)) / 8
    x = short((size[0], in_channels, *size[1:]), 32, 2**-4).bfloat16()
    weight = unrounded(short((out_channels, in_channels, kernel, kernel), 4, unit))
    shift = short((out_channels,), 8, 2**-2) if bias else None
    pads = [reference.padding_amounts(n, kernel, stride, padding, 1) for n in (size[2], size[1])]
    padded = F.pad(x.double(), [amount for pair in pads for amount in pair])
    exactly = exact(unit / 16, padded, bf16(weight), None if shift is None else shift.double(), stride=stride)
    expected = ACTIVATIONS[activation](exactly).bfloat16()
    views = (
        x.contiguous(),
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        inside(x, (2, 1, 1), (1, 0, 1)),
        inside(x.transpose(1, 3), (1, 1, 2), (1, 0, 1)).transpose(1, 3),
    )
    for view, threads in itertools.product(views, (1, 2)):
        torch.set_num_threads(threads)
        y = run_conv(view, weight, shift, stride, padding, activation)
        assert torch.equal(y, expected), f"{int((y != expected).sum())} of {y.numel()} differ"


@pytest.mark.parametrize("out_channels", [8, 16, 24, 32, 33, 47])
def test_stems(out_channels: int) -> None:
    """3x3, stride 2, from pictures: planes and pixels, even and odd sizes, more pixels than a run of 512."""
    for size, padding in itertools.product(((2, 8, 8), (1, 33, 35), (1, 15, 20), (3, 1, 2), (1, 64, 70)), (1, -1)):
        check_conv(3, out_channels, 3, 2, padding, size)


@pytest.mark.parametrize("in_channels", CHANNELS[:-1])
def test_heads(in_channels: int) -> None:
    """1x1: as many pixels as a tile has rows and one beside it, over several images."""
    for size, out_channels in itertools.product(((1, 1, 1), (3, 4, 4), (2, 7, 7), (1, 25, 23)), (17, 64)):
        check_conv(in_channels, out_channels, 1, 1, 0, size)


def test_widest_head() -> None:
    check_conv(320, 1280, 1, 1, 0, (2, 7, 7))
    check_conv(960, 40, 1, 1, 0, (1, 1, 1))


@pytest.mark.parametrize(
    ("in_channels", "kernel", "stride", "padding"),
    [
        (3, 3, 1, 1),
        (1, 3, 2, 1),
        (4, 3, 1, 0),
        (4, 3, 3, 1),
        (3, 2, 2, 0),
        (6, 1, 2, 0),
        (33, 1, 2, 0),
        (5, 1, 1, 1),
        (4, 5, 1, 2),
        (3, 5, 2, -1),
        (2, 7, 3, 3),
        (16, 3, 1, 1),
        (11, 3, 2, 1),
        (64, 3, 1, 1),
    ],
)
def test_any_convolution(in_channels: int, kernel: int, stride: int, padding: int) -> None:
    for size, out_channels in itertools.product(((2, 7, 9), (1, 8, 17)), (7, 40)):
        for activation, bias in itertools.product(ACTIVATIONS, (True, False)):
            check_conv(in_channels, out_channels, kernel, stride, padding, size, activation, bias=bias)


def test_convolution_of_an_empty_batch() -> None:
    for kernel, size in ((1, 5), (3, 4)):
        y = run_conv(torch.empty(0, 3, 8, 8).bfloat16(), torch.randn(4, 3, kernel, kernel), None, 2, 1, "relu6")
        assert y.shape == (0, 4, size, size)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_in_convolutions(activation: str, kernel: int) -> None:
    weight = torch.randn(33, 5, kernel, kernel).bfloat16().float()
    for value, memory_format in itertools.product(
        (torch.nan, torch.inf, -torch.inf), (torch.contiguous_format, torch.channels_last)
    ):
        x = torch.randn(2, 5, 9, 11).bfloat16()
        x[1, 3, 4, 6] = x[0, 1, 0, 10] = value
        expected = ACTIVATIONS[activation](F.conv2d(x.double(), weight.double(), padding=kernel // 2))
        y = run_conv(x.contiguous(memory_format=memory_format), weight, None, 1, kernel // 2, activation).double()
        assert torch.equal(y.isnan(), expected.isnan())
        infinite = expected.isinf()
        assert torch.equal(y[infinite], expected[infinite])
        finite = expected.isfinite()
        assert relative_error(y[finite], expected[finite]) < BOUNDS[torch.bfloat16]


# ---- Rounding --------------------------------------------------------------------------------------------------------

#: Beyond the rounding of y (1.7e-3): sums in float32 now and then lie on the other side of a tie than those in float64,
#: and one e or d is a unit in the last place off. Measured: 3.3e-5 at most; with depthwise weights rounded, too, 1.2e-3
#: at least.
BEYOND_ROUNDING = 2e-4
ROUND_DEPTHWISE = False  # whether the tier rounds depthwise weights


def beyond_rounding(y: Tensor, expected: Tensor) -> float:
    """By how much y is farther from `expected` than the nearest bf16 number, relative."""
    farther = (y.double() - expected).abs() - (bf16(expected) - expected).abs()
    return float(farther.norm() / expected.norm())


@pytest.mark.parametrize("expand", [True, False], ids=["expand", "no expand"])
@pytest.mark.parametrize(
    ("channels", "kernel", "size", "config"),
    [
        ((16, 96, 24), 3, (2, 24, 25), Config(stride=2)),
        ((24, 144, 24), 3, (2, 14, 14), Config(residual=True)),
        ((64, 384, 64), 3, (2, 14, 14), Config(residual=True)),
        ((160, 960, 320), 3, (2, 7, 7), Config()),
        ((40, 240, 80), 5, (2, 14, 14), Config(padding=2, stride=2)),
        ((15, 33, 17), 3, (2, 14, 14), Config(activation="relu", final_activation="relu6")),
    ],
    ids=str,
)
def test_random_numbers(
    channels: tuple[int, int, int], kernel: int, size: tuple[int, int, int], config: Config, expand: bool
) -> None:
    weights = make_weights(*channels, kernel, expand=expand)
    x = torch.randn(size[0], channels[0], *size[1:]).bfloat16()
    y = run(x, weights, config)
    doubles = (None if w is None else w.double() for w in weights)
    exactly = reference.inverted_residual(x.double(), *doubles, **config._asdict())
    assert relative_error(y, exactly) < BOUNDS[torch.bfloat16]
    errors = [
        beyond_rounding(y, rounding_block(x, weights, config, round_depthwise=r))
        for r in (ROUND_DEPTHWISE, not ROUND_DEPTHWISE)
    ]
    assert errors[0] < BEYOND_ROUNDING < errors[1] / 4


@pytest.mark.parametrize("network", [models.mobilenet_v1, models.mobilenet_v2])
def test_networks_err_as_unfused_ones(network: Callable[..., nn.Module]) -> None:
    net = network(width_mult=0.5, num_classes=10).eval()
    randomise_batch_norm(net, 64)
    net, x = net.bfloat16(), random_pictures(4, 64).bfloat16()
    with torch.no_grad():
        exactly, unfused = copy.deepcopy(net).double()(x.double()), net(x)
        y = mbv2.fuse(net)(x)
    assert {row.tier for row in mbv2.summary(net) if row.fused} == {TIER["name"]}
    assert relative_error(y, exactly) < 2 * relative_error(unfused, exactly) < 0.2
