"""The dense layers around the blocks (stem, head): what `fuse` takes, what it computes, what keeps the original."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from blocks import BOUNDS, GRADIENT_BOUNDS
from torch import Tensor, nn
from wild import Flat, SameConv2d, error, randomise

import mbv2_kernels as mbv2
from mbv2_kernels import set_backend
from mbv2_kernels.backends import LayerConfig
from mbv2_kernels.fused_forward import FusedLayer

X = (2, 3, 19, 22)
OP = torch.ops.mbv2.conv_bn_act.default


class ConvNormAct(nn.Sequential):
    """The wrapper that most networks have, under one name or another."""

    def __init__(self, *shape: int, act: Callable[[], nn.Module] = nn.ReLU6, conv: type = nn.Conv2d, **kw: int) -> None:
        super().__init__(conv(*shape, bias=False, **kw), nn.BatchNorm2d(shape[1]), act())


class Functional(nn.Module):
    """Named attributes, the activation called as a function."""

    def __init__(self, *shape: int, **kw: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(*shape, bias=True, **kw), nn.BatchNorm2d(shape[1])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Net(nn.Module):
    """A stem, a block, a head and a classifier, as MobileNetV2 has them."""

    def __init__(self, stem: nn.Module | None = None, head: nn.Module | None = None) -> None:
        super().__init__()
        stem = stem or ConvNormAct(3, 8, 3, stride=2, padding=1)
        self.features = nn.Sequential(stem, Flat(), head or ConvNormAct(8, 24, 1))
        self.classifier = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


@pytest.fixture
def net() -> nn.Module:
    return mbv2.fuse(randomise(Net()))


@pytest.fixture(autouse=True)
def _automatic_backend() -> Iterator[None]:
    yield
    set_backend("auto")


def layer_rows(net: nn.Module) -> dict[str, mbv2.FusionRow]:
    return {row.path: row for row in mbv2.summary(net) if row.kind in ("stem", "head")}


def assert_right(net: nn.Module, x: Tensor | None = None) -> None:
    """Against the unfused network in float64."""
    x = torch.randn(X) if x is None else x
    with torch.no_grad():
        y = net(x)
        assert error(y, mbv2.unfuse(copy.deepcopy(net)).double()(x.double())) < 4e-6


# --- what is taken ----------------------------------------------------------------------------------------------------


def test_stem_and_head_are_fused_and_right(net: nn.Module) -> None:
    assert_right(net)
    rows = layer_rows(net)
    assert [(path, row.kind, row.fused) for path, row in rows.items()] == [
        ("features.0", "stem", True),
        ("features.2", "head", True),
    ]
    assert {(row.backend, row.tier) for row in rows.values()} == {("cpu", mbv2._C.active_tier())}


@pytest.mark.parametrize(
    ("stem", "config"),
    [
        (lambda: ConvNormAct(3, 8, 3, stride=2, padding=1), (2, 1, "relu6")),
        (lambda: ConvNormAct(3, 8, 3, stride=1, padding=0, act=nn.ReLU), (1, 0, "relu")),
        (lambda: ConvNormAct(3, 8, 5, stride=2, padding=2, act=nn.Identity), (2, 2, "none")),
        (lambda: ConvNormAct(3, 8, 3, stride=2, conv=SameConv2d), (2, -1, "relu6")),
        (lambda: Functional(3, 8, 3, stride=2, padding=1), (2, 1, "relu")),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Identity(), nn.ReLU6()), (2, 1, "relu6")),  # folded norm
        (lambda: nn.Sequential(Functional(3, 8, 3, stride=2, padding=1), nn.Dropout(0.1)), (2, 1, "relu")),
    ],
)
def test_forms_of_stems(stem: Callable[[], nn.Module], config: tuple[object, ...]) -> None:
    """Read from the modules where they tell, else seen in a run: functional activations, padding in forward."""
    net = mbv2.fuse(randomise(Net(stem())))
    assert_right(net)
    assert_right(net, torch.randn(1, 3, 20, 17))
    forward = net.features[0].forward
    assert isinstance(forward, FusedLayer) and forward.config == LayerConfig(*config)


def test_an_activation_outside_the_module_stays_outside() -> None:
    """Sequential(conv, norm) is what is swapped where a Hardswish follows it."""
    stem = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)), nn.Hardswish())
    net = mbv2.fuse(randomise(Net(stem)))
    assert_right(net)
    assert layer_rows(net)["features.0.0"].fused and "forward" not in vars(net.features[0])


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stem", "reason"),
    [
        (lambda: ConvNormAct(3, 8, 3, act=nn.Hardswish), "activation Hardswish is not computed by the kernel"),
        (lambda: ConvNormAct(3, 8, 3, dilation=2), "stem dilation 2 is not computed by the kernel, only 1"),
        (lambda: ConvNormAct(3, 8, 4, stride=2), "stem kernel_size 4 is not computed by the kernel"),
        (lambda: ConvNormAct(3, 8, 3, stride=3), "stem stride 3 is not computed by the kernel"),
    ],
)
def test_true_reasons(stem: Callable[[], nn.Module], reason: str) -> None:
    net = mbv2.fuse(randomise(Net(stem())))
    row = layer_rows(net)["features.0"]
    assert not row.fused and row.reason.startswith(reason)
    assert "forward" not in vars(net.features[0])
    mbv2.fuse(net, strict=True)  # strict speaks of blocks


def test_a_forward_that_computes_something_else() -> None:
    class Scaled(ConvNormAct):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * super().forward(x)

    row = layer_rows(mbv2.fuse(randomise(Net(Scaled(3, 8, 3)))))["features.0"]
    assert not row.fused and "something else than convolution, norm, activation" in row.reason


def test_other_layers_are_no_candidates() -> None:
    """A convolution alone is no stem or head; without a depthwise convolution the network is none of ours."""
    net = Net(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout()), nn.Conv2d(8, 24, 1))
    assert layer_rows(mbv2.fuse(net.eval())) == {}
    plain = nn.Sequential(ConvNormAct(3, 8, 3), ConvNormAct(8, 8, 1)).eval()
    assert len(mbv2.summary(mbv2.fuse(plain))) == 0


def test_a_model_that_is_one_layer_is_fused() -> None:
    """As benchmarks take a network apart: each layer alone must run what it runs in the network."""
    alone = nn.Sequential(ConvNormAct(3, 8, 3)).eval()
    rows = list(mbv2.summary(mbv2.fuse(alone)))
    assert [(row.kind, row.fused) for row in rows] == [("stem", True)]


def test_layers_of_refused_blocks_are_not_listed_as_heads() -> None:
    net = Net()
    net.features[1] = Flat(act=nn.Hardswish)
    mbv2.fuse(net.eval())
    assert list(layer_rows(net)) == ["features.0", "features.2"]


# --- what brings the original modules back ----------------------------------------------------------------------------


def test_hooks_and_replaced_modules_run_the_original(net: nn.Module) -> None:
    stem, x = net.features[0], torch.randn(X)

    def ran() -> tuple[str | None, str]:
        with torch.no_grad():
            net(x)
        row = layer_rows(net)["features.0"]
        return row.backend, row.reason

    assert ran() == ("cpu", "")
    fired: list[int] = []
    handle = stem[0].register_forward_hook(lambda *_: fired.append(1))
    assert ran() == ("original modules", "hooks on Conv2d inside the block would not fire") and fired
    handle.remove()
    outside = stem.register_forward_hook(lambda *_: fired.append(2))
    assert ran() == ("cpu", "") and fired == [1, 2]  # a hook on the layer itself fires
    outside.remove()
    stem.train()
    assert ran() == ("cpu", "")  # gradients and statistics: tests/test_training.py
    stem.eval()
    stem[0].stride = (1, 1)
    assert ran()[1] == "stride of Conv2d was changed since fuse(): call fuse() again"
    stem[0].stride = (2, 2)
    assert ran() == ("cpu", "")
    stem[2] = nn.Hardswish()
    assert ran()[1].startswith("submodule '2' of ConvNormAct was replaced")
    assert_right(net)


@pytest.mark.parametrize("path", ["features.0", "features.2"])
def test_no_edit_goes_unnoticed(net: nn.Module, path: str) -> None:
    layer, x = net.get_submodule(path), torch.randn(X)
    edits = [t for t in layer.state_dict(keep_vars=True).values() if t.is_floating_point()]
    with torch.no_grad():
        for tensor in edits:
            before = net(x)
            tensor.mul_(1.5).add_(0.25)
            assert error(net(x), before) > 1e-5
            assert_right(net)
        layer[1].eps = 0.5
        assert_right(net)
        net.load_state_dict(randomise(Net(), seed=3).state_dict())
        assert_right(net)
    layer.train()
    net(x)  # updates running statistics
    layer.eval()
    assert_right(net)
    assert layer_rows(net)[path].backend == "cpu"


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_and_unfuse(net: nn.Module, clone: Callable[[nn.Module], nn.Module]) -> None:
    x = torch.randn(X)
    with torch.no_grad():
        expected, twin = net(x), clone(net)
        assert twin(x).equal(expected)
        assert twin.features[0].forward.block is twin.features[0]
        twin.features[0][0].weight.mul_(2)
        assert_right(twin)
        assert net(x).equal(expected)
        assert not any("forward" in vars(m) for m in mbv2.unfuse(net).modules())


# --- dtypes, gradients, compilers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(net: nn.Module, dtype: torch.dtype) -> None:
    stem, x = net.features[0], torch.randn(X)
    exact = mbv2.unfuse(copy.deepcopy(stem)).double()(x.to(dtype).double())
    with torch.no_grad():
        with torch.autocast("cpu", dtype):
            y = stem(x)
        assert y.dtype == dtype and error(y, exact) < BOUNDS[dtype]
        half = copy.deepcopy(stem).to(dtype)
        exact = mbv2.unfuse(copy.deepcopy(half)).double()(x.to(dtype).double())
        y = half(x.to(dtype))
        assert y.dtype == dtype and error(y, exact) < BOUNDS[dtype]


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("padding", [0, -1])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_gradients(kernel: int, padding: int, activation: str) -> None:
    """For x and every parameter, against autograd through the unfused layer in float64."""
    torch.manual_seed(kernel)
    conv, norm = nn.Conv2d(3, 6, kernel, 2), nn.BatchNorm2d(6)
    tensors = [conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var]
    tensors = [t.detach().clone().uniform_(0.5, 2) for t in tensors]
    leaves = [torch.randn(2, 3, 8, 9), *tensors[:4]]

    def run(compute: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        mine = [t.to(dtype).requires_grad_() for t in leaves]
        y = compute(mine[0], *mine[1:], *(t.to(dtype) for t in tensors[4:]))
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).to(dtype).view_as(y)
        return [y, *torch.autograd.grad(y, mine, weights)]

    def unfused(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, *stats: Tensor) -> Tensor:
        if padding == -1:
            totals = [max((-(-size // 2) - 1) * 2 + kernel - size, 0) for size in (x.shape[3], x.shape[2])]
            x = F.pad(x, [v for total in totals for v in (total // 2, total - total // 2)])
        y = F.batch_norm(F.conv2d(x, weight, bias, 2), *stats, gamma, beta, eps=0.1)
        return {"none": torch.clone, "relu": F.relu, "relu6": F.relu6}[activation](y)

    fused = run(lambda *t: OP(*t, 0.1, 2, padding, activation), torch.float32)
    for got, wanted in zip(fused, run(unfused, torch.float64), strict=True):
        assert error(got, wanted) < GRADIENT_BOUNDS[torch.float32]


def test_fine_tuning_with_frozen_statistics(net: nn.Module) -> None:
    x = torch.randn(X)
    plain = mbv2.unfuse(copy.deepcopy(net))
    net(x).square().sum().backward()
    plain(x).square().sum().backward()
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        assert error(ours.grad, theirs.grad.double()) < 1e-4  # through three layers and their clamps
    assert {row.backend for row in mbv2.summary(net)} == {"cpu"}


def test_opcheck() -> None:
    tensors = [torch.randn(4, 3, 3, 3), None, *(torch.rand(4) + 0.5 for _ in range(4))]
    torch.library.opcheck(OP, (torch.randn(2, 3, 8, 9), *tensors, 1e-5, 2, 1, "relu6"))
    for tensor in (t for t in tensors[:4] if t is not None):
        tensor.requires_grad_()
    torch.library.opcheck(OP, (torch.randn(2, 3, 8, 9, requires_grad=True), *tensors, 1e-5, 2, -1, "relu"))


def test_compile_and_export(net: nn.Module) -> None:
    torch._dynamo.reset()
    x = torch.randn(X)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        assert compiled(x).equal(net(x))
        net.features[2][0].weight.mul_(2)
        assert compiled(x).equal(net(x))
    program = torch.export.export(net, (x,))
    assert sum(node.target is OP for node in program.graph.nodes) == 2
    with torch.no_grad():
        assert error(program.module()(x), net(x)) < 1e-6


def test_the_reference_backend(net: nn.Module) -> None:
    x = torch.randn(X)
    with torch.no_grad():
        expected = net(x)
        set_backend("reference")
        assert error(net(x), expected) < 4e-6
    assert {row.backend for row in mbv2.summary(net)} == {"reference"}
