"""Which modules `fuse` takes, which it refuses, and the reasons it gives."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from wild import Flat, Named, Residual, SameConv2d, SharedActivation, bottleneck_layers, error, randomise

import mbv2_kernels as mbv2
from mbv2_kernels import probe
from mbv2_kernels.recognise import candidates


def fuse_one(block: nn.Module, *, channels: int = 8, path: str = "", size: tuple[int, int] = (9, 12)) -> mbv2.FusionRow:
    """Fuses a model with one block, asserts that it runs fused and right at odd and even sizes; its row."""
    randomise(block)
    exact = copy.deepcopy(block).double()
    mbv2.fuse(block, strict=True)
    for h, w in (size, (size[1], size[0] + 1), (17, 18)):
        x = torch.randn(2, channels, h, w)
        with torch.no_grad():
            y = block(x)
            with probe.DirectDepthwise():  # fast in fp64; a test of its own below
                expected = exact(x.double())
        assert error(y, expected) < 2e-6
    (row,) = mbv2.summary(block)
    assert row.fused and row.path == path and row.reason == "" and row.backend == "cpu" and row.tier
    return row


def config_of(block: nn.Module) -> tuple[object, ...]:
    (candidate,) = candidates(block)
    assert candidate.structure is not None, candidate.reason
    return candidate.structure.config


def refusal(block: nn.Module) -> str:
    """The reason why the only candidate of `block` is refused, after checking that fuse leaves it exactly alone."""
    block.eval()
    (candidate,) = candidates(block)
    assert candidate.structure is None
    before = [vars(m).get("forward") for m in block.modules()]
    mbv2.fuse(block)
    assert [vars(m).get("forward") for m in block.modules()] == before
    (row,) = mbv2.summary(block)
    assert not row.fused and row.reason == candidate.reason
    return row.reason


# --- blocks that are taken -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_kernel_stride_dilation(kernel_size: int, stride: int, dilation: int) -> None:
    block = Flat(stride=stride, kernel_size=kernel_size, dilation=dilation)
    row = fuse_one(block)
    assert row.kind == "inverted_residual"
    padding = dilation * (kernel_size - 1) // 2
    assert config_of(mbv2.unfuse(block)) == (stride, padding, dilation, "relu6", "none", stride == 1)


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, partial(nn.Hardtanh, 0.0, 6.0), nn.Identity])
def test_activation_modules(act: type[nn.Module]) -> None:
    fuse_one(Flat(act=act))


@pytest.mark.parametrize(("act", "name"), [(F.relu, "relu"), (F.relu6, "relu6"), (torch.clone, "none")])
def test_functional_activations(act: object, name: str) -> None:
    block = Named(act=act)
    fuse_one(block)
    assert config_of(mbv2.unfuse(block)).activation == name


@pytest.mark.parametrize("act", [nn.ReLU6(inplace=True), nn.ReLU()])
def test_one_activation_module_used_everywhere(act: nn.Module) -> None:
    fuse_one(SharedActivation(act))


def test_activation_class_of_a_stranger() -> None:
    class ClampToSix(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clamp(0, 6)

    block = Flat(act=ClampToSix)
    fuse_one(block)
    assert config_of(mbv2.unfuse(block)).activation == "relu6"


def test_no_expand_layer() -> None:
    assert fuse_one(Flat(8, 8, 8, expand=False)).kind == "depthwise_separable"


def test_expand_layer_kept_at_t_1() -> None:
    assert fuse_one(Flat(8, 8, 8)).kind == "inverted_residual"


def test_no_residual_although_the_shapes_allow_it() -> None:
    block = Flat()
    block.identity = False
    fuse_one(block)
    assert not config_of(mbv2.unfuse(block)).residual


def test_flag_that_other_code_calls_something_else() -> None:
    block = Flat()
    assert config_of(randomise(block)).residual


@pytest.mark.parametrize("final", [nn.ReLU, nn.ReLU6])
def test_mobilenet_v1_block_in_a_flat_sequential(final: type[nn.Module]) -> None:
    block = nn.Sequential(*bottleneck_layers(8, 8, 12, expand=False, final=final, stride=2))
    assert fuse_one(block).kind == "depthwise_separable"


def test_mobilenet_v1_stack_of_sequentials() -> None:
    net = nn.Sequential(
        *[nn.Sequential(*bottleneck_layers(8, 8, 8, expand=False, act=nn.ReLU, final=nn.ReLU)) for _ in range(3)]
    )
    randomise(net)
    mbv2.fuse(net, strict=True)
    assert [row.path for row in mbv2.summary(net)] == ["0", "1", "2"]


def test_functional_final_activation() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False)
            self.bn1 = nn.BatchNorm2d(8)
            self.conv2 = nn.Conv2d(8, 16, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(16)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))

    block = Block()
    fuse_one(block)
    assert config_of(mbv2.unfuse(block))[3:] == ("relu", "relu", False)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_same_padding_convolution(kernel_size: int, stride: int) -> None:
    """Reports padding 0 and pads asymmetrically at run time."""
    block = Flat(conv=SameConv2d, padding=0, kernel_size=kernel_size, stride=stride)
    fuse_one(block)
    # At stride 1 "same" is the centred padding.
    assert config_of(mbv2.unfuse(block)).padding == (-1 if stride == 2 else kernel_size // 2)


def test_padding_done_in_forward() -> None:
    fuse_one(Named(pad=(1, 1, 1, 1)))


def test_padding_as_a_word() -> None:
    fuse_one(Flat(padding="same"))
    fuse_one(Flat(padding="valid", out_channels=12))


def test_convolution_bias_and_no_norm() -> None:
    fuse_one(Flat(bias=True))
    fuse_one(Flat(bias=True, norm=None))
    fuse_one(Flat(norm=None))


def test_norm_only_where_there_is_one() -> None:
    layers = [m for i, m in enumerate(bottleneck_layers(8, 24, 12, bias=True)) if i not in (1, 7)]  # after depthwise
    assert sum(isinstance(m, nn.BatchNorm2d) for m in layers) == 1
    fuse_one(nn.Sequential(*layers))


@pytest.mark.parametrize(
    "norm",
    [
        partial(nn.BatchNorm2d, eps=1e-3, momentum=0.003),
        partial(nn.BatchNorm2d, eps=0.1, momentum=None),
        partial(nn.BatchNorm2d, affine=False),
        nn.SyncBatchNorm,
    ],
)
def test_norm_variants(norm: type[nn.Module]) -> None:
    fuse_one(Flat(norm=norm))


def test_frozen_batch_norm_in_training_mode_too() -> None:
    ops = pytest.importorskip("torchvision.ops", reason="FrozenBatchNorm2d is torchvision's")
    block = Flat(norm=ops.FrozenBatchNorm2d)
    fuse_one(block)
    block.train()
    block(torch.randn(1, 8, 9, 9))
    assert mbv2.summary(block)[0].backend == "cpu"


def test_dropout_and_stochastic_depth_are_allowed() -> None:
    ops = pytest.importorskip("torchvision.ops", reason="StochasticDepth is torchvision's")
    layers = bottleneck_layers(8, 24, 8)
    fuse_one(Residual(nn.Sequential(*layers[:6], nn.Dropout2d(0.1), *layers[6:], ops.StochasticDepth(0.2, "row"))))


def test_residual_in_a_parent() -> None:
    """The wrapper that adds x is swapped, not what it wraps."""
    fuse_one(Residual(nn.Sequential(*bottleneck_layers(8, 24, 8))))

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*bottleneck_layers(8, 24, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    block = Residual(Inner())
    fuse_one(block)
    assert config_of(mbv2.unfuse(block)).residual


def test_parent_that_does_more_is_left_alone() -> None:
    class Scaled(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0.5 * self.fn(x)

    block = Flat()
    block.identity = False
    fuse_one(Scaled(block), path="fn")


def test_sequential_inside_a_block_that_does_more() -> None:
    """What the block's own forward does with the Sequential stays its business."""

    class Scaled(Flat):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0.5 * self.conv(x)

    fuse_one(Scaled(), path="conv")


def test_block_as_root_has_the_empty_path() -> None:
    assert fuse_one(Flat(), path="").class_name == "Flat"


def test_a_block_used_twice_is_one_row() -> None:
    block = Flat()
    net = randomise(nn.Sequential(block, nn.ReLU(), block))
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        expected = net(x)
        mbv2.fuse(net, strict=True)
        assert error(net(x), expected) < 4e-6
    assert [row.path for row in mbv2.summary(net)] == ["0"]


def test_a_convolution_shared_by_two_blocks() -> None:
    net = nn.Sequential(Flat(), Flat())
    net[1].conv[3] = net[0].conv[3]
    randomise(net)
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        expected = net(x)
        assert error(mbv2.fuse(net)(x), expected) < 4e-6
        net[0].conv[3].weight.mul_(2)
        doubled = net(x)
        assert error(doubled, mbv2.unfuse(net)(x)) < 4e-6 and error(doubled, expected) > 1e-2


def test_parametrized_convolution() -> None:
    block = Flat()
    nn.utils.parametrizations.weight_norm(block.conv[3])
    nn.utils.parametrizations.weight_norm(block.conv[6])
    fuse_one(block)


def test_meta_and_half_and_double_blocks_are_recognised() -> None:
    with torch.device("meta"):
        meta = Flat().eval()
    assert config_of(meta).residual
    assert config_of(Flat().bfloat16()).residual and config_of(Flat().double()).residual


def test_wild_values_do_not_confuse_the_check() -> None:
    """Whatever the weights are (zeros after zero-init, NaN), structure alone decides."""
    block = Flat()
    nn.init.zeros_(block.conv[7].weight)
    nn.init.constant_(block.conv[0].weight, float("nan"))
    assert config_of(block) == (1, 1, 1, "relu6", "none", True)


def test_nothing_is_touched_while_looking() -> None:
    block = Flat().train()
    before = {k: v.clone() for k, v in block.state_dict().items()}
    state = torch.get_rng_state()
    fired: list[int] = []
    block.register_forward_hook(lambda *_: fired.append(1))
    candidates(block)
    assert torch.equal(state, torch.get_rng_state()) and not fired and block.training
    assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())


def test_direct_depthwise_is_a_convolution() -> None:
    """The check computes depthwise convolutions itself; that must be a convolution."""
    x, b = torch.randn(2, 6, 11, 12, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    for k, s, p, d in ((3, 1, 1, 1), (3, 2, 0, 1), (5, 2, 2, 1), (3, 1, 4, 4), (5, 1, (1, 3), 2)):
        w = torch.randn(6, 1, k, k, dtype=torch.float64)
        expected = F.conv2d(x, w, b, s, p, d, groups=6)
        with probe.DirectDepthwise(), torch.no_grad():
            y = F.conv2d(x, w, b, s, p, d, groups=6)
        torch.testing.assert_close(y, expected)


# --- blocks that are refused -----------------------------------------------------------------------------------------


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


def test_squeeze_excite() -> None:
    layers = bottleneck_layers(8, 24, 8)
    reason = refusal(nn.Sequential(*layers[:6], SqueezeExcite(24), *layers[6:]))
    assert reason == "squeeze-excite between depthwise and project (6: SqueezeExcite)"


@pytest.mark.parametrize("act", [nn.Hardswish, nn.SiLU, nn.PReLU, nn.LeakyReLU, nn.GELU])
def test_other_activations(act: type[nn.Module]) -> None:
    assert f"activation {act.__name__} is not computed by the kernel" in refusal(Flat(act=act))


def test_functional_hardswish() -> None:
    assert "computes something else" in refusal(Named(act=F.hardswish))


def test_two_kinds_of_activation() -> None:
    layers = bottleneck_layers(8, 24, 12)
    layers[5] = nn.ReLU()
    assert "different activations inside the block (ReLU, ReLU6)" in refusal(nn.Sequential(*layers))


@pytest.mark.parametrize("norm", [partial(nn.GroupNorm, 4), nn.InstanceNorm2d])
def test_other_norms(norm: type[nn.Module]) -> None:
    assert "only BatchNorm folds" in refusal(Flat(norm=norm))


def test_no_running_statistics() -> None:
    assert "track_running_stats=False" in refusal(Flat(norm=partial(nn.BatchNorm2d, track_running_stats=False)))


def test_lists_the_geometry_it_cannot_do() -> None:
    def with_depthwise(conv: nn.Conv2d) -> nn.Module:
        layers = bottleneck_layers(8, 24, 12)
        layers[3] = conv
        layers[4] = nn.BatchNorm2d(conv.out_channels)
        layers[6] = nn.Conv2d(conv.out_channels, 12, 1)
        return nn.Sequential(*layers)

    conv = partial(nn.Conv2d, 24, 24, groups=24)
    assert "channel multiplier 2" in refusal(with_depthwise(nn.Conv2d(24, 48, 3, groups=24)))
    assert "kernel_size (3, 5) is not square" in refusal(with_depthwise(conv(kernel_size=(3, 5))))
    assert "kernel_size 9" in refusal(with_depthwise(conv(kernel_size=9)))
    assert "kernel_size 4" in refusal(with_depthwise(conv(kernel_size=4)))
    assert "stride (2, 1)" in refusal(with_depthwise(conv(kernel_size=3, stride=(2, 1))))
    assert "stride 3" in refusal(with_depthwise(conv(kernel_size=3, stride=3)))
    assert "padding (1, 0)" in refusal(with_depthwise(conv(kernel_size=3, padding=(1, 0))))
    assert "'reflect'" in refusal(with_depthwise(conv(kernel_size=3, padding=1, padding_mode="reflect")))


def test_pointwise_geometry() -> None:
    layers = bottleneck_layers(8, 24, 12)
    layers[6] = nn.Conv2d(24, 12, 1, groups=4)
    assert "project convolution has kernel_size (1, 1) and groups 4" in refusal(nn.Sequential(*layers))
    layers[6] = nn.Conv2d(24, 12, 1, stride=2)
    assert "project convolution has stride (2, 2)" in refusal(nn.Sequential(*layers))
    layers = bottleneck_layers(8, 24, 12)
    layers[0] = nn.Conv2d(8, 24, 3, padding=1)
    assert "expand convolution has kernel_size (3, 3)" in refusal(nn.Sequential(*layers))
    layers[0] = nn.Conv2d(8, 24, 1, padding=1)
    assert "expand convolution has padding (1, 1)" in refusal(nn.Sequential(*layers))


def test_convolution_on_the_shortcut() -> None:
    block = Named(out_channels=12)
    block.shortcut = nn.Sequential(nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12))
    assert "2 convolutions after the depthwise one" in refusal(block)


def test_two_depthwise_convolutions_in_one_block() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.rest = Flat()

        def forward(self, x: Tensor) -> Tensor:
            return self.rest(self.start(x))

    net = nn.Sequential(nn.Conv2d(8, 8, 1), Block(), nn.Conv2d(8, 8, 1)).eval()
    rows = {row.path: row for row in mbv2.summary(net)}
    assert rows["1"].reason == "it holds 2 depthwise convolutions (1.start, 1.rest.conv.3)"
    assert rows["1.rest"].reason.startswith("can be fused")


def test_blocks_flattened_into_one_sequential() -> None:
    net = nn.Sequential(*bottleneck_layers(8, 24, 12), *bottleneck_layers(12, 48, 12)).eval()
    rows = list(mbv2.summary(mbv2.fuse(net)))
    assert [row.path for row in rows] == ["3", "11"]
    told = "no module of its own to swap: Sequential '' holds it together with 1 other depthwise convolutions"
    assert {row.reason for row in rows} == {told}


def test_lonely_depthwise_convolution() -> None:
    assert refusal(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8))) == "no 1x1 convolution stands beside it"


def test_forward_that_does_something_else() -> None:
    class Scaled(Named):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * super().forward(x)

    assert "its forward computes something else" in refusal(Scaled())


def test_parameter_of_its_own_that_is_one_today() -> None:
    """Multiplying by 1.0 changes nothing until training moves it."""

    class LayerScale(Named):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.gamma * super().forward(x)

    assert "a tensor of its own (gamma)" in refusal(LayerScale())


def test_forward_that_wants_more_than_x() -> None:
    class WithMask(Named):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return super().forward(x) * mask

    assert "it could not be run on a small image: TypeError" in refusal(WithMask())


def test_forward_that_returns_a_tuple() -> None:
    class Pair(Named):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, super().forward(x)

    assert "returns tuple, not one tensor" in refusal(Pair())


def test_forward_that_edits_its_input() -> None:
    class InPlace(Named):
        def forward(self, x: Tensor) -> Tensor:
            return x.copy_(super().forward(x))

    assert "changes its input in place" in refusal(InPlace())


def test_convolution_subclass_with_more_inside() -> None:
    class Scaled(nn.Conv2d):
        def __init__(self, *args: int, **kwargs: int) -> None:
            super().__init__(*args, **kwargs)
            self.gain = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.gain

    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    assert "holds more than a conv layer" in refusal(Flat(conv=Scaled))
    assert "its forward computes something else" in refusal(Flat(conv=Standardised))


def test_forward_replaced_on_an_instance() -> None:
    block = Named()
    block.forward = lambda x: x
    forward = block.forward
    assert "replaced on the instance by other code" in refusal(block)
    assert block.forward is forward
    block = Named()
    block.bn1.forward = lambda x: x
    assert "the forward of bn1 was replaced on the instance" in refusal(block)


def test_lazy_convolution() -> None:
    layers = bottleneck_layers(8, 24, 12)
    layers[0] = nn.LazyConv2d(24, 1)
    (candidate,) = candidates(nn.Sequential(*layers))
    assert "is not initialised" in candidate.reason or "lazy" in candidate.reason


def test_float_functional_is_exact_until_it_observes() -> None:
    from torch.ao.nn.quantized import FloatFunctional

    class Quantizable(Flat):
        def __init__(self) -> None:
            super().__init__()
            self.add = FloatFunctional()

        def forward(self, x: Tensor) -> Tensor:
            return self.add.add(x, self.conv(x))

    fuse_one(Quantizable())

    prepared = Quantizable().eval()
    prepared.qconfig = torch.ao.quantization.get_default_qconfig("x86")
    torch.ao.quantization.prepare(prepared, inplace=True)
    mbv2.fuse(prepared)
    prepared(torch.randn(1, 8, 9, 9))
    (row,) = mbv2.summary(prepared)
    assert not row.fused


def test_graph_module_has_no_module_to_swap() -> None:
    graph = torch.fx.symbolic_trace(nn.Sequential(Flat(), Flat(stride=2))).eval()
    rows = list(mbv2.summary(mbv2.fuse(graph)))
    assert len(rows) == 2 and not any(row.fused for row in rows)
