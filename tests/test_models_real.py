"""Real networks: what is fused, what is refused and why, and that the outputs are right.

Accuracy is judged against the unfused network in fp64: no worse than twice the unfused network in fp32 (DESIGN.md,
section 10), block by block below 2e-6.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable

import pytest
import torch
from torch import nn
from wild import error, randomise

import mbv2_kernels as mbv2
from mbv2_kernels.fused_forward import FusedForward
from mbv2_kernels.patch import fused_parts
from mbv2_kernels.probe import DirectDepthwise
from mbv2_kernels.recognise import LAYER_KINDS

torchvision = pytest.importorskip("torchvision", reason="the networks of this file are torchvision's and timm's")
timm = pytest.importorskip("timm", reason="the networks of this file are torchvision's and timm's")

ALL_17 = "17 of 17 blocks fused, 2 of 2 layers around them"
EVEN = ((64, 64),)
EVEN_AND_ODD = ((64, 64), (65, 47))  # "same" padding differs


def calibrate(model: nn.Module) -> nn.Module:
    """BatchNorm statistics of the network's own activations, as in a trained one: errors do not blow up with depth."""
    randomise(model)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        model(torch.randn(4, 3, 64, 64))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def check_against_fp64(model: nn.Module, sizes: tuple[tuple[int, int], ...] = EVEN) -> mbv2.FusionReport:
    """Fuses `model`; each block and the whole network must be right. The report after running."""
    calibrate(model)
    plain = copy.deepcopy(model)
    exact = copy.deepcopy(model).double()
    mbv2.fuse(model)
    parts = fused_parts(model)
    exact_parts = {path: mbv2.unfuse(copy.deepcopy(part)).double() for path, part in parts.items()}
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    for path, part in parts.items():

        def keep(module: nn.Module, args: tuple[torch.Tensor], y: torch.Tensor, path: str = path) -> None:
            inputs[path], outputs[path] = args[0], y

        part.register_forward_hook(keep)
    with torch.no_grad():
        for size in sizes:
            x = torch.randn(1, 3, *size)
            y = model(x)
            with DirectDepthwise():  # torch's own fp64 depthwise convolution takes minutes here
                expected = exact(x.double())
                for path, given in inputs.items():
                    assert error(outputs[path], exact_parts[path](given.double())) < 2e-6, path
            assert error(y, expected) < max(2e-6, 2 * error(plain(x), expected))
    report = mbv2.summary(model)
    assert [row.path for row in report if row.fused] == list(inputs)
    assert {row.backend for row in report if row.fused} <= {"cpu"}
    return report


def reasons(rows: Iterable[mbv2.FusionRow]) -> Counter[str]:
    return Counter(row.reason.split(" (")[0] for row in rows if not row.fused)


def test_torchvision_mobilenet_v2() -> None:
    report = check_against_fp64(torchvision.models.mobilenet_v2(), EVEN_AND_ODD)
    assert str(report).splitlines()[-1] == ALL_17
    assert [row.path for row in report] == [f"features.{i}" for i in range(19)]
    assert {row.class_name for row in report[1:18]} == {"InvertedResidual"}
    kinds = ["stem", "depthwise_separable"] + ["inverted_residual"] * 16 + ["head"]
    assert [row.kind for row in report] == kinds
    mbv2.fuse(torchvision.models.mobilenet_v2(), strict=True)


@pytest.mark.parametrize(
    ("name", "blocks", "layers"),
    [
        ("mobilenetv2_100", 17, ["conv_stem", "conv_head"]),
        ("mobilenetv2_140", 17, ["conv_stem", "conv_head"]),
        ("mobilenetv2_050", 17, ["conv_stem", "conv_head"]),
        ("mobilenetv2_110d", 22, ["conv_stem", "conv_head"]),
        ("mobilenetv2_120d", 26, ["conv_stem", "conv_head"]),
        ("efficientnet_lite0", 16, ["conv_stem", "conv_head"]),
        ("tf_efficientnet_lite0", 16, ["conv_stem", "conv_head"]),
        ("mobilenetv1_100", 13, ["conv_stem"]),
    ],
)
def test_timm(name: str, blocks: int, layers: list[str]) -> None:
    """Its stem and head are attributes of the network itself, which calls them in a row."""
    report = check_against_fp64(timm.create_model(name), EVEN_AND_ODD if name == "tf_efficientnet_lite0" else EVEN)
    counts = f"{blocks} of {blocks} blocks fused, {len(layers)} of {len(layers)} layers around them"
    assert str(report).splitlines()[-1] == counts
    assert [row.path for row in report if row.kind in LAYER_KINDS] == layers


def test_timm_that_returns_features_has_no_method_to_take() -> None:
    model = timm.create_model("mobilenetv2_050", features_only=True).eval()
    (stem,) = (row for row in mbv2.summary(mbv2.fuse(model)) if row.kind == "stem")
    assert not stem.fused and stem.reason.startswith("no module of its own to swap: EfficientNetFeatures")


def test_what_is_special_about_each_timm_model() -> None:
    def configs(name: str) -> list[tuple[int, FusedForward]]:
        modules = mbv2.fuse(timm.create_model(name)).modules()
        forwards = [f for m in modules if type(f := vars(m).get("forward")) is FusedForward]
        return [(f.layers[1].conv.kernel_size[0], f) for f in forwards]

    lite = configs("tf_efficientnet_lite0")
    assert {k for k, _ in lite} == {3, 5}
    assert {f.config.padding for _, f in lite if f.config.stride == 2} == {-1}
    assert {f.eps()[1] for _, f in lite} == {1e-3}
    v1 = configs("mobilenetv1_100")
    assert {f.config.final_activation for _, f in v1} == {"relu6"}
    assert not any(f.config.residual for _, f in v1)


def test_torchvision_mnasnet() -> None:
    report = check_against_fp64(torchvision.models.mnasnet0_5())
    assert str(report).splitlines()[-1] == "16 of 17 blocks fused, 0 of 2 layers around them"
    assert [row.path for row in report if not row.fused] == ["layers.0", "layers.3", "layers.14"]
    assert report[1].reason == (
        "no module of its own to swap: Sequential 'layers' holds it together with 16 other depthwise convolutions"
    )


@pytest.mark.parametrize(
    ("build", "fused", "expected"),
    [
        (
            lambda: torchvision.models.mobilenet_v3_large(),
            3,
            {
                "squeeze-excite between depthwise and project": 8,
                "activation Hardswish is not computed by the kernel, only ReLU6, ReLU and none are": 4,
            },
        ),
        (lambda: torchvision.models.mobilenet_v3_small(), 2, {"squeeze-excite between depthwise and project": 9}),
        (lambda: torchvision.models.efficientnet_b0(), 0, {"squeeze-excite between depthwise and project": 16}),
        (
            lambda: timm.create_model("mobilenetv3_large_100"),
            3,
            {
                "squeeze-excite between depthwise and project": 8,
                "activation Hardswish is not computed by the kernel, only ReLU6, ReLU and none are": 4,
            },
        ),
        (lambda: timm.create_model("efficientnet_b0"), 0, {"squeeze-excite between depthwise and project": 16}),
    ],
)
def test_true_reasons(build: object, fused: int, expected: dict[str, int]) -> None:
    report = check_against_fp64(build())
    blocks = [row for row in report if row.kind not in LAYER_KINDS]
    layers = [row for row in report if row.kind in LAYER_KINDS]
    assert sum(row.fused for row in blocks) == fused
    assert reasons(blocks) == expected
    assert len(layers) == 2  # stem and head: with another activation, or without a module of their own
    for reason in reasons(layers):
        assert reason.startswith(("no module of its own to swap: ", "activation "))


def test_reason_names_the_module() -> None:
    report = mbv2.summary(timm.create_model("efficientnet_b0").eval())
    assert report[1].reason == "squeeze-excite between depthwise and project (se: SqueezeExcite)"


def test_dilated_backbone() -> None:
    """timm puts dilations where output_stride asks for them."""
    model = calibrate(timm.create_model("mobilenetv2_050", features_only=True, output_stride=8))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        mbv2.fuse(model, strict=True)
        for y, e in zip(model(x), expected, strict=True):
            assert error(y, e) < 1e-5
    forwards = [f for m in model.modules() if isinstance(f := vars(m).get("forward"), FusedForward)]
    assert {forward.config.dilation for forward in forwards} == {1, 2, 4}


def test_torchvision_quantizable() -> None:
    model = torchvision.models.quantization.mobilenet_v2(quantize=False)
    report = check_against_fp64(model)
    assert str(report).splitlines()[-1] == ALL_17
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        model.fuse_model()  # folds the BatchNorms and replaces layers: the original modules must run
        assert error(model(x), expected) < 1e-4
        assert not any(row.fused for row in mbv2.summary(model))
        mbv2.fuse(model)  # ConvReLU6 and Identity: recognised again
        assert error(model(x), expected) < 1e-4
    assert str(mbv2.summary(model)).splitlines()[-1] == ALL_17


def test_ssdlite() -> None:
    """Its extractor slices a block of the backbone; its heads are depthwise separable."""
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    randomise(model)
    x = [torch.rand(3, 64, 64)]
    with torch.no_grad():
        features = model.backbone(torch.randn(1, 3, 320, 320, generator=torch.Generator().manual_seed(1)))
        mbv2.fuse(model)
        fused = model.backbone(torch.randn(1, 3, 320, 320, generator=torch.Generator().manual_seed(1)))
        assert len(model(x)) == 1
    for ours, theirs in zip(fused.values(), features.values(), strict=True):
        assert error(ours, theirs) < 1e-4
    report = mbv2.summary(model)
    fused_paths = {row.path for row in report if row.fused}
    assert {f"backbone.extra.{i}" for i in range(4)} < fused_paths
    assert {f"head.classification_head.module_list.{i}" for i in range(6)} < fused_paths
    assert {row.backend for row in report if row.fused} == {"cpu"}


def test_ssdlite_slicing_of_mobilenet_v2() -> None:
    """The same extractor on MobileNetV2: `block[0]` apart from `block[1:]`, before and after fusing."""
    model = mbv2.fuse(randomise(torchvision.models.mobilenet_v2()))
    block = model.features[14].conv
    parts = nn.Sequential(nn.Sequential(*model.features[:14], block[0]), nn.Sequential(block[1:], *model.features[15:]))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model.features(x)
        assert error(parts(x), expected) < 1e-5
        mbv2.fuse(parts)
        assert error(parts(x), expected) < 1e-5
    rows = {row.path: row for row in mbv2.summary(parts)}
    assert len(rows) == 17 + 3 and all(row.fused for row in rows.values())
    assert rows["1.0"].kind == "depthwise_separable"
    assert [path for path, row in rows.items() if row.kind == "head"] == ["0.14", "1.4"]  # block[0] is one of them


def test_deeplab_like_dilation() -> None:
    """Output stride 8: strides replaced by dilations after construction, as segmentation code does."""
    model = torchvision.models.mobilenet_v2()
    rate = 1
    for index, block in enumerate(model.features[1:18], 1):
        for conv in (m for m in block.modules() if isinstance(m, nn.Conv2d) and m.groups > 1):
            if index in (7, 14):
                conv.stride, rate = (1, 1), rate * 2
            conv.dilation, conv.padding = (rate, rate), (rate, rate)
    report = check_against_fp64(model)
    assert str(report).splitlines()[-1] == ALL_17
    dilations = [model.features[i].forward.config.dilation for i in range(1, 18)]
    assert dilations == [1] * 6 + [2] * 7 + [4] * 4


def test_feature_extractor_of_torchvision() -> None:
    """It traces with torch.fx and keeps block internals reachable."""
    from torchvision.models.feature_extraction import create_feature_extractor

    model = mbv2.fuse(randomise(torchvision.models.mobilenet_v2()))
    x = torch.randn(1, 3, 64, 64)
    extractor = create_feature_extractor(model, {"features.2.conv.0": "expanded", "features.2": "block"})
    with torch.no_grad():
        y = extractor(x)
        assert error(y["block"], model.features[:3](x)) < 1e-5
    assert y["expanded"].shape == (1, 96, 32, 32)
