"""The dense convolution with its activation (stem, head): every tier against float64, and the op's manners."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mbv2_kernels import _C

TIERS = [t["name"] for t in _C.tiers() if t["runnable"]]
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
ACTIVATIONS = {"none": lambda y: y, "relu": torch.relu, "relu6": F.relu6}


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> str:
    before = _C.max_isa()
    _C.set_max_isa(request.param)
    yield request.param
    _C.set_max_isa(before)


def expected(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, activation: str) -> Tensor:
    x, kernel = x.double(), weight.shape[-1]
    if padding == -1:  # "same", as TensorFlow has it
        totals = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in (x.shape[3], x.shape[2])]
        x = F.pad(x, [v for total in totals for v in (total // 2, total - total // 2)])
        padding = 0
    y = F.conv2d(x, weight.double(), None if bias is None else bias.double(), stride, padding)
    return ACTIVATIONS[activation](y)


def relative(y: Tensor, reference: Tensor) -> float:
    return float((y.double() - reference).norm() / reference.norm())


# Output channels at the vectors' widths and one beside them; the stem's and the head's own forms among the geometries.
@pytest.mark.parametrize("out_channels", [1, 7, 8, 9, 15, 16, 17, 32, 33, 70])
@pytest.mark.parametrize(
    ("in_channels", "kernel", "stride", "padding"),
    [
        (3, 3, 2, 1),
        (3, 3, 2, -1),
        (3, 3, 1, 1),
        (5, 1, 1, 0),
        (33, 1, 1, 0),
        (4, 5, 1, 2),
        (3, 2, 2, 0),
        (6, 1, 2, 0),
        (2, 7, 3, 3),
    ],
)
def test_against_float64(
    tier: str, in_channels: int, out_channels: int, kernel: int, stride: int, padding: int
) -> None:
    generator = torch.Generator().manual_seed(out_channels)
    weight = torch.randn(out_channels, in_channels, kernel, kernel, generator=generator)
    bias = torch.randn(out_channels, generator=generator)
    formats = (torch.contiguous_format, torch.channels_last)
    for (height, width), dtype, memory_format in itertools.product([(9, 7), (16, 31)], BOUNDS, formats):
        x = torch.randn(2, in_channels, height, width, generator=generator).to(dtype, memory_format=memory_format)
        y = torch.ops.mbv2.conv_act(x, weight, bias, stride, padding, "relu6")
        reference = expected(x, weight, bias, stride, padding, "relu6")
        assert y.dtype == dtype and y.shape == reference.shape
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert relative(y, reference) < BOUNDS[dtype]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kernel", [1, 3])
def test_any_strides_and_threads(tier: str, kernel: int, activation: str) -> None:
    base = torch.randn(3, 12, 11, 13)
    weight, bias = torch.randn(20, 8, kernel, kernel), None
    views = [base[:, 2:10], base.to(memory_format=torch.channels_last)[:, 2:10], base[:, 2:10].contiguous()]
    views.append(base.transpose(2, 3).contiguous().transpose(2, 3)[:, 2:10])
    threads = torch.get_num_threads()
    for x, count in itertools.product(views, (1, 2, 3)):
        torch.set_num_threads(count)
        y = torch.ops.mbv2.conv_act(x, weight, bias, 1, kernel // 2, activation)
        torch.set_num_threads(threads)
        assert relative(y, expected(x, weight, bias, 1, kernel // 2, activation)) < BOUNDS[torch.float32]


def test_the_tier_asked_for_runs(tier: str) -> None:
    _C.reset_counters()
    torch.ops.mbv2.conv_act(torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3), None, 2, 1, "relu6")
    assert {name: count for name, count in _C.counters().items() if count} == {tier: 1}


def test_nan_and_infinity_pass_the_clamp(tier: str) -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.0]).reshape(1, 1, 2, 2)
    y = torch.ops.mbv2.conv_act(x, torch.ones(1, 1, 1, 1), None, 1, 0, "relu6").flatten()
    assert torch.equal(y.isnan(), torch.tensor([True, False, False, False]))
    assert y[1:].tolist() == [6.0, 0.0, 3.0]


def test_empty_batch() -> None:
    y = torch.ops.mbv2.conv_act(torch.empty(0, 3, 8, 8), torch.randn(4, 3, 3, 3), None, 2, 1, "relu6")
    assert y.shape == (0, 4, 4, 4)


def test_opcheck() -> None:
    x, weight, bias = torch.randn(2, 3, 9, 8), torch.randn(5, 3, 3, 3), torch.randn(5)
    torch.library.opcheck(torch.ops.mbv2.conv_act.default, (x, weight, bias, 2, 1, "relu6"))
    torch.library.opcheck(torch.ops.mbv2.pack_conv.default, (weight, bias))
    packed = torch.ops.mbv2.pack_conv(weight, bias)
    torch.library.opcheck(torch.ops.mbv2.conv_act_packed.default, (x, packed, 5, 3, 2, -1, "none"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(3, 8, 8)}, "x must have 4 dimensions"),
        ({"x": torch.randn(1, 4, 8, 8)}, "packed does not hold"),
        ({"x": torch.randn(1, 3, 8, 8, dtype=torch.float64)}, "x must be float32"),
        ({"x": torch.randn(1, 3, 1, 1), "padding": 0}, "smaller than the kernel"),
        ({"weight": torch.randn(4, 3, 3, 2)}, "weight must be"),
        ({"bias": torch.randn(5)}, "bias must have 4 elements"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"padding": -2}, "padding must be at least 0"),
        ({"activation": "gelu"}, "activation must be"),
    ],
)
def test_wrong_arguments_raise(change: dict[str, object], message: str) -> None:
    arguments = {
        "x": torch.randn(1, 3, 8, 8),
        "weight": torch.randn(4, 3, 3, 3),
        "bias": torch.randn(4),
        "stride": 2,
        "padding": 1,
        "activation": "relu6",
        **change,
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mbv2.conv_act(*arguments.values())


def test_weights_packed_for_something_else_are_refused() -> None:
    x, packed = torch.randn(1, 3, 8, 8), torch.ops.mbv2.pack_conv(torch.randn(4, 3, 3, 3), None)
    for wrong in (
        packed[:-1],
        torch.zeros_like(packed),
        packed.double(),
        torch.ops.mbv2.pack_conv(torch.randn(4, 3, 1, 1), None),
    ):
        with pytest.raises(RuntimeError, match="packed does not hold"):
            torch.ops.mbv2.conv_act_packed(x, wrong, 4, 3, 2, 1, "relu6")
