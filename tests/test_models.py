"""The reference networks: layouts, counts, and the numbers that the papers state."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import mbv2_kernels as mbv2
from mbv2_kernels import models
from mbv2_kernels.models._layers import scale_channels
from mbv2_kernels.models.mobilenet_v2 import BLOCKS, InvertedResidual

WIDTHS = (0.35, 0.5, 0.75, 1.0, 1.4)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small networks gain nothing from a second thread, and on a busy machine lose much."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_v2_has_the_size_the_paper_states() -> None:
    cost = models.count(models.mobilenet_v2())
    assert cost.parameters == 3_504_872
    assert cost.multiply_adds == 300_774_272  # 300 M in table 4 of arXiv 1801.04381
    assert len(cost.layers) == 53  # 52 convolutions and the classifier
    assert cost.multiply_adds == sum(layer.multiply_adds for layer in cost.layers)


@pytest.mark.parametrize(
    ("width", "parameters", "multiply_adds", "stated"),
    [
        (1.0, 4_231_976, 568_740_352, (4.2e6, 569e6)),
        (0.75, 2_585_560, 325_400_448, (2.6e6, 325e6)),
        (0.5, 1_331_592, 149_497_088, (1.3e6, 149e6)),
        (0.25, 470_072, 41_030_272, (0.5e6, 41e6)),
    ],
)
def test_v1_has_the_size_the_paper_states(
    width: float, parameters: int, multiply_adds: int, stated: tuple[float, float]
) -> None:
    cost = models.count(models.mobilenet_v1(width))
    assert (cost.parameters, cost.multiply_adds) == (parameters, multiply_adds)
    # table 6 of arXiv 1704.04861, rounded there to 0.1 million parameters and a million multiply-adds
    assert cost.parameters == pytest.approx(stated[0], abs=0.05e6)
    assert cost.multiply_adds == pytest.approx(stated[1], abs=0.51e6)
    # the MobileNetV2 paper quotes 575 M for width 1.0
    assert width != 1.0 or cost.multiply_adds == pytest.approx(575e6, rel=0.012)


@pytest.mark.parametrize("width", WIDTHS)
def test_v2_is_torchvisions_in_every_width(width: float) -> None:
    torchvision = pytest.importorskip("torchvision", reason="compares with torchvision's mobilenet_v2")
    ours, theirs = models.mobilenet_v2(width), torchvision.models.mobilenet_v2(width_mult=width)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    assert {key: value.shape for key, value in mine.items()} == {key: value.shape for key, value in other.items()}
    assert models.count(ours).multiply_adds == models.count(theirs).multiply_adds


def test_v2_computes_what_torchvisions_does() -> None:
    torchvision = pytest.importorskip("torchvision", reason="compares with torchvision's mobilenet_v2")
    torch.manual_seed(0)
    theirs = torchvision.models.mobilenet_v2(num_classes=7).eval()
    ours = models.mobilenet_v2(num_classes=7).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_v1_has_the_size_of_timms() -> None:
    timm = pytest.importorskip("timm", reason="compares with timm's mobilenetv1_100")
    theirs = timm.create_model("mobilenetv1_100")
    assert models.count(theirs).multiply_adds == models.count(models.mobilenet_v1()).multiply_adds
    assert sum(p.numel() for p in theirs.parameters()) == 4_231_976


def test_v2_has_the_blocks_of_table_2() -> None:
    blocks = [module for module in models.mobilenet_v2().modules() if isinstance(module, InvertedResidual)]
    assert len(blocks) == 17
    assert sum(block.use_res_connect for block in blocks) == 10
    assert sum(block.stride == 2 for block in blocks) == 4


def test_cifar_settings_keep_the_resolution() -> None:
    setting = [list(row) for row in BLOCKS]
    setting[1][3] = 1
    model = models.mobilenet_v2(num_classes=10, inverted_residual_setting=setting, stem_stride=1)
    head = next(layer for layer in models.count(model, (2, 3, 32, 32)).layers if layer.path == "features.18.0")
    assert head.output_shape == (2, 1280, 4, 4)
    v1 = models.mobilenet_v1(num_classes=10, stem_stride=1)
    assert models.count(v1, (1, 3, 32, 32)).layers[-2].output_shape == (1, 1024, 2, 2)


@pytest.mark.parametrize("build", [models.mobilenet_v1, models.mobilenet_v2])
def test_initialisation_is_the_reference_implementations(build) -> None:
    torch.manual_seed(0)
    model = build()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert module.weight.abs().max() <= 0.18  # cut at two deviations
            if module.weight.numel() > 5000:
                # a normal distribution cut at two deviations keeps 0.8796 of its deviation
                assert module.weight.std().item() == pytest.approx(0.09 * 0.8796, rel=0.03)
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and not module.bias.any()
            assert module.eps == 1e-5 and module.momentum == 0.1


@pytest.mark.parametrize(
    ("channels", "width", "expected"),
    [(32, 1.0, 32), (32, 0.35, 16), (16, 0.35, 8), (24, 0.5, 16), (24, 0.75, 24), (1, 1.0, 8), (90, 0.1, 16)],
)
def test_channels_are_multiples_of_8_and_never_below_90_percent(channels: int, width: float, expected: int) -> None:
    assert scale_channels(channels, width) == expected
    assert scale_channels(channels, width) >= 0.9 * channels * width


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width_mult": 0.0}, "width_mult must be greater than 0, got 0.0"),
        ({"width_mult": float("nan")}, "width_mult must be greater than 0, got nan"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"dropout": 1.5}, "dropout must be a probability from 0 to 1, got 1.5"),
        ({"stem_stride": 3}, "stem_stride must be 1 or 2, got 3"),
    ],
)
@pytest.mark.parametrize("build", [models.mobilenet_v1, models.mobilenet_v2])
def test_arguments_out_of_range_are_named(build, arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**arguments)


def test_settings_of_the_wrong_form_are_named() -> None:
    with pytest.raises(ValueError, match="inverted_residual_setting must be rows"):
        models.mobilenet_v2(inverted_residual_setting=[(6, 24, 2)])
    with pytest.raises(ValueError, match="stride must be 1 or 2, got 3"):
        models.mobilenet_v2(inverted_residual_setting=[(6, 24, 1, 3)])
    with pytest.raises(ValueError, match="block_setting must be rows"):
        models.mobilenet_v1(block_setting=[])


def test_count_formula_and_a_layer_that_runs_twice() -> None:
    conv = nn.Conv2d(4, 8, (3, 5), stride=2, padding=1, groups=2)
    model = nn.Sequential(conv, nn.Conv2d(8, 8, 1, bias=False))
    shared = nn.Sequential(model, model[1])
    cost = models.count(shared, (3, 4, 9, 11))
    pixels = 3 * 5 * 5
    first, point = pixels * 8 * (4 // 2) * 15, pixels * 8 * 8
    assert [layer.multiply_adds for layer in cost.layers] == [first, point, point]
    assert cost.layers[0].output_shape == (3, 8, 5, 5)
    assert cost.parameters == 8 * 2 * 15 + 8 + 8 * 8  # the shared layer once


def test_count_leaves_the_model_alone() -> None:
    model = models.mobilenet_v2(0.35).train()
    before = copy.deepcopy(model.state_dict())
    text = str(models.count(model, (1, 3, 32, 32)))
    assert model.training and all(not module._forward_hooks for module in model.modules())
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert "features.18.0" in text and f"{1_677_128:,}" in text


def test_count_sees_through_fused_blocks(caplog: pytest.LogCaptureFixture) -> None:
    model = models.mobilenet_v2(0.35).eval()
    unfused = models.count(model, (1, 3, 64, 64))
    fused = mbv2.fuse(model)
    assert any(row.fused for row in mbv2.summary(fused))
    assert models.count(fused, (1, 3, 64, 64)) == unfused
    assert not caplog.records  # no talk of blocks that fall back to their own modules
    assert any(row.fused for row in mbv2.summary(fused))
