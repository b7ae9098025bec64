"""The tier that multiplies float32 numbers as sums of three bfloat16 ones: it is float32, and no part of it is wrong.

A float32 number has 24 bits, three times bfloat16's 8, so a = a1 + a2 + a3 exactly, and six of the nine products of
parts are added up: (1, 1), (1, 2), (2, 1), (1, 3), (2, 2) and (3, 1).
"""

from __future__ import annotations

import copy
import itertools
from typing import Any, NamedTuple

import pytest
import torch
from blocks import BOUNDS, double, make_config, make_weights, relative_error
from torch import Tensor
from torch.nn import functional as F

import mbv2_kernels as mbv2
from mbv2_kernels import _C, models, reference
from mbv2_kernels._bench.inputs import random_pictures, randomise_batch_norm
from mbv2_kernels.backends import tier_of

NAME, BASE = "avx512bf16x3", "avx512"
ACTIVATIONS = {"none": lambda v: v, "relu": torch.relu, "relu6": F.relu6}
(TIER,) = (tier for tier in _C.tiers() if tier["name"] == NAME)
pytestmark = [
    pytest.mark.skipif(not TIER["runnable"], reason=f"tier {NAME} cannot run here: {TIER['reason']}"),
    pytest.mark.usefixtures("no_cap"),
]

ops = torch.ops.mbv2

#: How many times the error of AVX-512's fused multiply-adds is allowed. Measured: at most 1.1.
SLACK = 1.5


def run(tier: str, x: Tensor, weights: list[Tensor | None], **options: Any) -> Tensor:
    _C.set_max_isa(tier)
    _C.reset_counters()
    y = ops.inverted_residual(x, *weights, *make_config(**options))
    assert _C.counters()[tier] == 1
    return y


def run_conv(tier: str, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    packed = ops.pack_conv(weight, bias, tier)
    return ops.conv_act_packed(x, packed, len(weight), 1, 1, 0, activation)


def own(weights: list[Tensor | None]) -> bool:
    """Whether a block has kernels of this tier's own: by its packed weights, behind the header."""
    return not torch.equal(*(ops.pack_inverted_residual(*weights, tier)[16:] for tier in (NAME, BASE)))


# ---- Accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expand", [True, False], ids=["expand", "no expand"])
@pytest.mark.parametrize(
    ("channels", "kernel", "size", "options"),
    [
        ((16, 96, 24), 3, (2, 15, 17), {"stride": 2}),
        ((24, 144, 24), 3, (2, 14, 14), {"residual": True}),
        ((32, 192, 32), 3, (1, 13, 11), {"residual": True}),
        ((33, 199, 33), 3, (2, 9, 9), {"residual": True}),
        ((64, 384, 64), 3, (2, 14, 14), {"residual": True}),
        ((64, 384, 96), 3, (1, 14, 14), {"activation": "relu"}),
        ((96, 576, 160), 3, (3, 14, 14), {"stride": 2}),
        ((160, 960, 320), 3, (2, 7, 7), {}),
        ((159, 953, 161), 3, (1, 7, 7), {"final_activation": "relu6"}),
        ((40, 240, 80), 5, (2, 14, 14), {"stride": 2, "padding": 2}),
        ((112, 672, 112), 5, (1, 15, 14), {"residual": True, "padding": 2}),
        ((80, 480, 112), 5, (1, 7, 9), {"dilation": 2, "padding": 4, "activation": "none"}),
        ((512, 512, 512), 3, (1, 7, 7), {"final_activation": "relu"}),
        ((17, 33, 15), 3, (1, 23, 29), {"activation": "none"}),
    ],
    ids=str,
)
def test_blocks_err_as_with_avx512(
    channels: tuple[int, int, int], kernel: int, size: tuple[int, int, int], options: dict[str, Any], expand: bool
) -> None:
    weights = make_weights(*channels, kernel, expand=expand)
    x = torch.randn(size[0], channels[0], *size[1:])
    expected = reference.inverted_residual(*double([x, *weights]), **{"padding": 1, **options})
    error, base = (relative_error(run(tier, x, weights, **options), expected) for tier in (NAME, BASE))
    assert error < SLACK * base < BOUNDS[torch.float32]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("channels", [(16, 96), (33, 65), (64, 47), (129, 31), (320, 1280), (1001, 48)], ids=str)
def test_convolutions_err_as_with_avx512(channels: tuple[int, int], activation: str) -> None:
    weight, bias = torch.randn(channels[1], channels[0], 1, 1) * channels[0] ** -0.5, torch.randn(channels[1])
    for size in ((2, 7, 7), (1, 17, 19)):
        x = torch.randn(size[0], channels[0], *size[1:]).contiguous(memory_format=torch.channels_last)
        expected = ACTIVATIONS[activation](F.conv2d(*double([x, weight, bias])))
        error, base = (relative_error(run_conv(tier, x, weight, bias, activation), expected) for tier in (NAME, BASE))
        assert error < SLACK * base < BOUNDS[torch.float32]


@pytest.mark.parametrize("network", [models.mobilenet_v1, models.mobilenet_v2])
def test_networks_err_as_with_avx512(network: Any) -> None:
    net = network().eval()
    randomise_batch_norm(net, 96)
    x = random_pictures(2, 96)
    with torch.no_grad():
        exact = copy.deepcopy(net).double()(x.double())
        net, errors = mbv2.fuse(net), {}
        for tier in (NAME, BASE):
            _C.set_max_isa(tier)
            errors[tier] = relative_error(net(x), exact)
            assert {row.tier for row in mbv2.summary(net) if row.fused} == {tier}
    assert errors[NAME] < SLACK * errors[BASE] < 4 * BOUNDS[torch.float32]


# ---- No part is wrong ------------------------------------------------------------------------------------------------


def numbers(shape: tuple[int, ...], parts: Tensor) -> Tensor:
    """Numbers from 1 to 2, either sign, with as many bits as `parts` parts hold, 8 each; of one part 1 and 2."""
    numbers = 1 + torch.stack([torch.randint(0, 2 ** (8 * n), shape) | 1 for n in range(3)], -1) / torch.tensor(
        [1.0, 2.0**8, 2.0**16]
    )
    signs = torch.randint(0, 2, shape) * 2 - 1
    chosen = numbers.gather(-1, (parts - 1).expand(shape)[..., None])[..., 0]
    return torch.where(parts == 1, torch.randint(1, 3, shape).float(), chosen) * signs


def exact_factors(depth: int, pixels: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [pixels][depth], w [channels][depth], bias: products, of n and at most 4 - n parts, are multiples of 2^-16, and
    all sums of theirs are below 2^8. So float32 adds them up exactly in any order."""
    parts = torch.randint(1, 4, (depth,))
    x, w = numbers((pixels, depth), parts), numbers((channels, depth), 4 - parts)
    if depth > 60:
        w[torch.rand(channels, depth).argsort(1) >= 60] = 0
    bias = torch.randint(-(2**17), 2**17, (channels,)) * 2.0**-16
    assert (x.abs() @ w.abs().T + bias.abs()).max() < 2**8
    return x, w, bias


def parts_of(t: Tensor) -> list[Tensor]:
    """Three numbers of 8 bits that add up to each of t's."""
    parts, rest = [], t
    for _ in range(3):
        parts.append((rest.view(torch.int32) & -65536).view(torch.float32))
        rest = rest - parts[-1]
    assert not rest.any()
    return [part.double() for part in parts]


#: Around the tiles' depth of 32 and its half, and their 16 rows and columns; more than goes through tiles at a time.
DEPTHS = (8, 16, 17, 32, 40, 48, 49, 64, 96, 128, 129, 144, 145, 240, 272, 320, 960)
#: 1, 12 (the most that are multiplied without tiles), 13, 15, 16, 17, 31, 32, 33, 48 and 49 pixels.
SIZES = ((1, 1), (3, 4), (1, 13), (3, 5), (4, 4), (1, 17), (31, 1), (4, 8), (3, 11), (6, 8), (7, 7))


def as_images(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """[n h w][channels] -> [n][channels][h][w]"""
    return pixels.view(-1, *size, pixels.shape[1]).permute(0, 3, 1, 2)


class Exact(NamedTuple):
    """A block of which one product is all there is: with a depthwise convolution that changes nothing."""

    x: Tensor
    weights: list[Tensor | None]
    expected: Tensor  # in float64


def exact_block(part: str, depth: int, channels: int, size: tuple[int, int], activation: str) -> Exact:
    """Its expand with a project that changes the order of channels, or its project without an expand."""
    x, w, bias = exact_factors(depth, size[0] * size[1], channels)
    depthwise = torch.zeros(channels if part == "expand" else depth, 1, 3, 3)
    depthwise[:, :, 1, 1] = 1
    activate, images, w = ACTIVATIONS[activation], as_images(x, size), w[..., None, None]
    if part == "expand":
        order = torch.randperm(channels)
        weights = [w, bias, depthwise, None, torch.eye(channels)[order][..., None, None], None]
        return Exact(images, weights, activate(F.conv2d(*double([images, w, bias])))[:, order])
    return Exact(images, [None, None, depthwise, None, w, bias], F.conv2d(*double([activate(images), w, bias])))


@pytest.mark.parametrize("depth", DEPTHS)
def test_each_part_matters(depth: int) -> None:
    """The proof that a part of a factor that is missing, or in another's place, changes results."""
    x, w, _ = exact_factors(depth, 16, 16)
    products = {(i, j): a @ b.T for i, a in enumerate(parts_of(x), 1) for j, b in enumerate(parts_of(w), 1)}
    assert torch.equal(sum(products.values()), x.double() @ w.double().T)
    for (i, j), product in products.items():
        assert product.ne(0).double().mean() > 0.4 if i + j <= 4 else not product.any()


@pytest.mark.parametrize("part", ["expand", "project"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_blocks_are_exact(depth: int, part: str) -> None:
    for size, channels in zip(SIZES, itertools.cycle((70, 64, 80, 65, 129))):
        for activation in ("none", "relu6"):
            block = exact_block(part, depth, channels, size, activation)
            assert own(block.weights)
            y = run(NAME, block.x, block.weights, activation=activation)
            assert torch.equal(y.double(), block.expected), f"{int((y != block.expected).sum())} of {y.numel()} differ"


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("depth", DEPTHS)
def test_convolutions_are_exact(depth: int, memory_format: torch.memory_format) -> None:
    for size, channels in zip((*SIZES, (19, 21)), itertools.cycle((17, 64, 33, 7, 80))):
        x, w, bias = exact_factors(depth, size[0] * size[1], channels)
        images, w = as_images(x, size).contiguous(memory_format=memory_format), w[..., None, None]
        y, expected = run_conv(NAME, images, w, bias), F.conv2d(*double([images, w, bias]))
        assert torch.equal(y.double(), expected), f"{int((y != expected).sum())} of {y.numel()} differ"


# ---- NaN, infinities, huge and tiny numbers --------------------------------------------------------------------------

LARGEST = torch.finfo(torch.float32).max


def same_specials(y: Tensor, expected: Tensor) -> None:
    """NaN and infinities where the other has them, and all else close."""
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    torch.testing.assert_close(y, expected, rtol=2e-5, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("value", "activation"),
    [
        *itertools.product((torch.nan, torch.inf, -torch.inf, 1e34), ACTIVATIONS),
        (LARGEST, "relu6"),
        (-LARGEST, "relu6"),
    ],
)
@pytest.mark.parametrize("expand", [True, False], ids=["expand", "no expand"])
def test_special_pixels_of_blocks(expand: bool, value: float, activation: str) -> None:
    for channels, size in itertools.product(((64, 384, 64), (33, 199, 47), (160, 320, 96)), ((7, 9), (16, 15))):
        weights = make_weights(*channels, expand=expand)
        x = torch.randn(2, channels[0], *size)
        for place in ((0, 0), (size[0] // 2, size[1] // 2), (size[0] - 1, 3)):
            x[1, 5, place[0], place[1]] = x[0, 31, place[0], place[1]] = value
        y, expected = (run(tier, x, weights, activation=activation) for tier in (NAME, BASE))
        if value == 1e34 and activation != "relu6":  # each pixel for itself: huge terms cancel out in some channels
            off, norms = (y - expected).double().norm(dim=1), expected.double().norm(dim=1)
            assert norms.max() > 1e33 and (off < 1e-5 * norms).all()
        else:
            same_specials(y, expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38, LARGEST, -LARGEST])
def test_special_pixels_of_convolutions(value: float) -> None:
    for depth, channels in ((17, 40), (64, 64), (320, 96)):
        weight = torch.randn(channels, depth, 1, 1) * depth**-0.5
        weight[0, 3] = 1
        weight[1, 3] = 4
        x = torch.randn(2, depth, 9, 11).contiguous(memory_format=torch.channels_last)
        x[0, 3, 4, 6] = x[1, 3, 8, 10] = value
        for activation in ACTIVATIONS:
            same_specials(*(run_conv(tier, x, weight, None, activation) for tier in (NAME, BASE)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, LARGEST])
def test_special_weights(value: float) -> None:
    x = torch.randn(1, 64, 7, 9).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(48, 64, 1, 1) / 8
    weight[5, 17] = weight[40, 63] = value
    same_specials(*(run_conv(tier, x, weight, None, "none") for tier in (NAME, BASE)))


def test_tiny_numbers() -> None:
    """Tiles take what is below 2^-126 for zero, parts of numbers included: the error is at most that of each part's."""
    depth, smallest = 64, torch.finfo(torch.float32).tiny
    for scale, weight_scale in ((1e-38, 1.0), (1e-40, 1.0), (1e-38, 1e30), (1e-20, 1e-20), (1e-30, 1.0), (1.0, 1e-38)):
        x = torch.randn(2, depth, 5, 7).contiguous(memory_format=torch.channels_last) * scale
        w = torch.randn(48, depth, 1, 1) * weight_scale
        y, expected = run_conv(NAME, x, w), F.conv2d(x.double(), w.double())
        terms = F.conv2d(x.double().abs(), w.double().abs())
        sums = x.double().abs().sum(1, keepdim=True) + w.double().abs().sum((1, 2, 3))[:, None, None]
        assert ((y - expected).abs() <= 2**-20 * terms + smallest * (3 * sums + 8 * depth)).all()
    weights = make_weights(64, 384, 64, bias=False)
    x = torch.randn(1, 64, 7, 7)
    for scale in (1e-38, 1e-41):
        y, expected = (run(tier, x * scale, weights) for tier in (NAME, BASE))
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-35)


# ---- Results do not depend on threads or the batch -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "size", "options"),
    [
        ((64, 384, 64), (14, 14), {"residual": True}),
        ((96, 576, 160), (15, 13), {"stride": 2}),  # from here on images of few pixels, several together
        ((160, 960, 320), (7, 7), {}),
        ((160, 950, 160), (7, 7), {"residual": True}),
        ((64, 64, 130), (5, 6), {"residual": False}),
        ((200, 200, 200), (4, 9), {"residual": True}),
        ((160, 960, 320), (3, 4), {}),  # no tiles
    ],
    ids=str,
)
def test_blocks_give_the_same_bits_in_any_batch(
    channels: tuple[int, int, int], size: tuple[int, int], options: dict[str, Any]
) -> None:
    torch.set_num_threads(1)
    weights = make_weights(*channels, expand=channels[0] != channels[1])
    for dtype in BOUNDS:
        images = torch.randn(18, channels[0] + 3, *size).to(dtype).contiguous(memory_format=torch.channels_last)
        # dense, and with gaps between images and between pixels
        for x in (images[:5, : channels[0]].clone(), images[::2, : channels[0]], images[:, : channels[0]]):
            alone = torch.cat([run(NAME, image[None].clone(), weights, **options) for image in x])
            for threads in (1, 2):
                torch.set_num_threads(threads)
                if len(x) % threads == 0:
                    assert torch.equal(run(NAME, x, weights, **options), alone)
            torch.set_num_threads(1)


@pytest.mark.parametrize("kind", ["convolution", "expand", "no expand"])
def test_products_give_the_same_bits_in_any_batch_and_with_any_threads(kind: str) -> None:
    """Blocks, too, but for the depthwise pass: with a kernel of 3 the order of its nine terms depends on where threads
    cut an image, with 5 it does not."""
    weights = make_weights(112, 672, 160, 5, expand=kind == "expand")
    for size, dtype in itertools.product(((7, 7), (9, 40)), BOUNDS):
        x = torch.randn(3, 112, *size).to(dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(320, 112, 1, 1)

        def result(x: Tensor, weight: Tensor = weight) -> Tensor:
            return run_conv(NAME, x, weight) if kind == "convolution" else run(NAME, x, weights, padding=2)

        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [result(x), torch.cat([result(image[None]) for image in x])]
        assert torch.equal(results[0], results[1])
        for other in results[2:]:
            if kind == "expand":  # threads may share out hidden channels
                assert relative_error(other, results[0]) < {torch.float32: 5e-7}.get(dtype, BOUNDS[dtype])
            else:
                assert torch.equal(results[0], other)


# ---- When it runs ----------------------------------------------------------------------------------------------------


def ran(x: Tensor, weights: list[Tensor | None]) -> tuple[set[str], Tensor]:
    _C.reset_counters()
    y = mbv2.inverted_residual(x, *(None if w is None else w.to(x.dtype) for w in weights))
    return {name for name, count in _C.counters().items() if count}, y


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("channels", [(64, 384, 64), (8, 24, 8), (33, 65, 17)], ids=str)
def test_storage(channels: tuple[int, int, int], dtype: torch.dtype) -> None:
    """float32 and float16 images run it without a cap; bfloat16 ones where the cap names it."""
    weights, x = make_weights(*channels), torch.randn(2, channels[0], 9, 7).to(dtype)
    expected = reference.inverted_residual(*double([x, *(None if w is None else w.to(dtype) for w in weights)]))
    for cap, tier in (
        (None, _C.active_bf16_tier() if dtype is torch.bfloat16 else NAME),
        (NAME, NAME),
        (BASE, BASE),
        (_C.bf16_tier()["name"], _C.active_bf16_tier() if dtype is torch.bfloat16 else NAME),
    ):
        _C.set_max_isa(cap)
        names, y = ran(x, weights)
        assert names == {tier} == {tier_of(dtype)}
        assert relative_error(y, expected) < BOUNDS[dtype]


def test_summary_and_status_name_it() -> None:
    net = mbv2.fuse(models.mobilenet_v2(width_mult=0.35, num_classes=10).eval())
    x = random_pictures(1, 32)

    def rows() -> dict[str, tuple[bool, bool, str]]:
        return {row.name: (row.runnable, row.active, row.reason) for row in mbv2.status().backends[0].tiers}

    with torch.no_grad():
        for cap, tier in ((None, NAME), (BASE, BASE), (NAME, NAME)):
            _C.set_max_isa(cap)
            for _ in range(3):
                net(x)
            assert {row.tier for row in mbv2.summary(net) if row.fused} == {tier}
            assert [name for name, row in rows().items() if row[1] and name in (NAME, BASE)] == [tier]
    assert rows()[NAME][0] and "bfloat16" in rows()[NAME][2]
    assert not rows()[BASE][2]


def test_blocks_of_few_channels_are_those_of_avx512() -> None:
    for channels in ((8, 24, 8), (16, 96, 24), (33, 65, 17)):
        weights, x = make_weights(*channels), torch.randn(1, channels[0], 9, 7)
        assert not own(weights)
        assert torch.equal(run(NAME, x, weights), run(BASE, x, weights))


def test_training_and_gradients_are_those_of_avx512() -> None:
    block = mbv2.FusedInvertedResidual(32, 32)
    x = torch.randn(2, 32, 9, 9)
    gradients: dict[str, list[Tensor]] = {}
    for tier in (NAME, BASE):
        _C.set_max_isa(tier)
        y = copy.deepcopy(block).train()(x)
        gradients[tier] = [y.detach(), *torch.autograd.grad(block.eval()(x).sum(), [*block.parameters()])]
    assert all(itertools.starmap(torch.equal, zip(*gradients.values(), strict=True)))
