"""The classifier op, and networks that run as one call: what is computed, and what is still asked."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from blocks import BOUNDS
from test_chain import calls
from test_layers import ConvNormAct
from torch import Tensor, nn
from wild import Flat, error, randomise

import mbv2_kernels as mbv2
from mbv2_kernels import _C
from mbv2_kernels.network import MOST_IMAGES, FusedNetwork

TIERS = [tier["name"] for tier in _C.tiers() if tier["runnable"]]
X = (2, 3, 19, 22)

linear = torch.ops.mbv2.linear.default
classify = torch.ops.mbv2.chain_classify.default


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.max_isa()
    _C.set_max_isa(request.param)
    yield request.param
    _C.set_max_isa(before)


class Net(nn.Module):
    """torchvision's MobileNetV2 in small, `_forward_impl` to the letter."""

    def __init__(self) -> None:
        super().__init__()
        stem, head = ConvNormAct(3, 8, 3, stride=2, padding=1), ConvNormAct(16, 24, 1)
        self.features = nn.Sequential(stem, Flat(8, 8, 8, expand=False), Flat(8, 48, 16, stride=2), head)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(24, 37))

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = nn.functional.adaptive_avg_pool2d(x, (1, 1))
        x = torch.flatten(x, 1)
        x = self.classifier(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)


class Doubled(Net):
    """Looks the same, computes something else."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.features(2 * x)
        x = nn.functional.adaptive_avg_pool2d(x, (1, 1))
        x = torch.flatten(x, 1)
        x = self.classifier(x)
        return x


@pytest.fixture
def net() -> nn.Module:
    return mbv2.fuse(randomise(Net()))


# ---- The ops ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 1280, 1000), (2, 37, 9), (3, 5, 1), (9, 64, 24), (1, 1, 1)]
)
def test_linear(tier: str, dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> None:
    """Every remainder of vectors, of outputs that are computed together, and of what threads share."""
    x, weight, bias = (torch.randn(*s).to(dtype) for s in ((rows, inputs), (outputs, inputs), (outputs,)))
    for b in (bias, None):
        expected = torch.nn.functional.linear(x.double(), weight.double(), b if b is None else b.double())
        y = linear(x, weight, b)
        assert y.dtype is dtype and y.shape == (rows, outputs)
        assert error(y, expected) < BOUNDS[dtype]
    assert error(linear(x.t().contiguous().t(), weight.repeat(1, 2)[:, :inputs], bias), linear(x, weight, bias)) == 0


def test_linear_takes_nothing_that_does_not_fit() -> None:
    x, weight, bias = torch.randn(2, 8), torch.randn(3, 8), torch.randn(3)
    for wrong in (
        (x[0], weight, bias),
        (x, weight[:, :7], bias),
        (x, weight, bias[:2]),
        (x, weight.double(), bias),
        (x.double(), weight.double(), None),
        (x, weight, bias.half()),
    ):
        with pytest.raises(RuntimeError):
            linear(*wrong)
    assert linear(x[:0], weight, bias).shape == (0, 3) and linear(x, weight[:0], None).shape == (2, 0)


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    x, weight = torch.randn(2, 640), torch.randn(999, 640)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(linear(x, weight, None))
    assert all(a.equal(b) for a, b in itertools.pairwise(results))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_chain_classify(tier: str, dtype: torch.dtype) -> None:
    """Chain, mean and product in one op are what the three are one by one; more channels than vectors hold."""
    conv, weight, bias = torch.randn(85, 3, 1, 1), torch.randn(5, 85).to(dtype), torch.randn(5).to(dtype)
    chain = torch.ops.mbv2.pack_chain([torch.ops.mbv2.pack_conv(conv, None)], [1, 0, 85, 1, 0, 1, 0, 1, 2, 0, 0])
    x = torch.randn(2, 3, 7, 5).to(dtype)
    images = torch.ops.mbv2.chain_packed(x, chain)
    expected = images.double().mean((2, 3)) @ weight.double().t() + bias.double()
    assert error(classify(x, chain, weight, bias), expected) < 2 * BOUNDS[dtype]
    if tier == TIERS[0]:
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(classify, (x, chain, weight, bias), test_utils=tests)
        torch.library.opcheck(linear, (x[:, :, 0, 0], weight[:, :3], bias), test_utils=tests)


# ---- In models -------------------------------------------------------------------------------------------------------


def test_one_call(net: nn.Module) -> None:
    assert calls(net) == ["chain_classify"]
    report = mbv2.summary(net)
    assert {(row.fused, row.backend, row.tier) for row in report} == {(True, "cpu", _C.active_tier())}
    assert mbv2.summary(mbv2.fuse(randomise(Net()))).networks == ()  # nothing was called yet
    assert report.networks == ("",) and "one call from images to classes" in str(report)
    assert report.slower_networks == ()
    assert calls(net, torch.randn(1, 3, 32, 32).to(memory_format=torch.channels_last)) == ["chain_classify"]
    assert calls(net.bfloat16(), torch.randn(X).bfloat16()) == ["chain_classify"]


def test_many_images_and_gradients_are_left_to_torch(net: nn.Module) -> None:
    assert calls(net, torch.randn(MOST_IMAGES + 1, 3, 19, 22)) == ["chain_packed"]
    net(torch.randn(X)).sum().backward()
    assert net.classifier[1].weight.grad.abs().sum() > 0
    assert calls(net) == ["chain_classify"]


@pytest.mark.parametrize("where", ["features", "features.3", "classifier", "classifier.0", "classifier.1", None])
def test_every_hook_fires(net: nn.Module, where: str | None) -> None:
    inside = next(m for m in net.features[2].modules() if isinstance(m, nn.Conv2d))
    module = inside if where is None else net.get_submodule(where)
    calls(net)
    fired = []
    handle = module.register_forward_hook(lambda *_: fired.append(1))
    assert "chain_classify" not in calls(net) and fired
    ((path, reason),) = mbv2.summary(net).slower_networks
    assert mbv2.summary(net).networks == () and path == "" and (where or "features").partition(".")[0] in reason
    assert f"(root): not one call from images to classes: {reason}" in str(mbv2.summary(net))
    handle.remove()
    assert calls(net) == ["chain_classify"]


def test_what_changes_is_noticed(net: nn.Module) -> None:
    calls(net)
    with torch.no_grad():
        for tensor in net.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.mul_(1.1).add_(0.05)
    assert calls(net) == ["chain_classify"]
    net.load_state_dict(randomise(Net(), seed=3).state_dict())
    assert calls(net) == ["chain_classify"]
    net.classifier[1].weight = nn.Parameter(torch.randn(37, 24))
    assert calls(net) == ["chain_classify"]
    net.classifier[1] = nn.Linear(24, 7)
    assert calls(net) == ["chain_classify"]
    net.classifier = nn.Sequential(nn.Linear(24, 9), nn.ReLU())
    assert calls(net) == ["chain_packed"]
    assert mbv2.summary(net).slower_networks == (("", "classifier is more than a linear layer"),)
    net.classifier = nn.Linear(24, 6, bias=False)
    assert calls(net) == ["chain_classify"]
    net.classifier.forward = lambda x: x[:, :4]
    assert calls(net) == ["chain_packed"]


def test_dropout_drops_in_training(net: nn.Module) -> None:
    calls(net)
    net.classifier.train()
    x = torch.randn(X)
    with torch.no_grad():
        assert not net(x).equal(net(x))
    assert mbv2.summary(net).slower_networks == (("", "dropout is active"),)
    net.eval()
    assert calls(net) == ["chain_classify"]


def test_replaced_features(net: nn.Module) -> None:
    calls(net)
    net.features = randomise(nn.Sequential(nn.Conv2d(3, 24, 1), nn.Sigmoid()))
    assert calls(net) == []


def test_a_source_that_says_something_else_is_not_taken() -> None:
    net = mbv2.fuse(randomise(Doubled()))
    assert calls(net) == ["chain_packed"]
    assert "_forward_impl" not in vars(net)


def test_a_method_replaced_after_its_source_was_written() -> None:
    """The code that runs counts, not the text in the file."""

    class Patched(Net):
        pass

    Patched._forward_impl = lambda self, x: self.classifier(self.features(2 * x).mean((2, 3)))  # type: ignore[method-assign]
    assert calls(mbv2.fuse(randomise(Patched()))) == ["chain_packed"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_are_networks_of_their_own(net: nn.Module, copied: Callable[[nn.Module], nn.Module]) -> None:
    calls(net)
    other = copied(net)
    assert isinstance(vars(other)["_forward_impl"], FusedNetwork) and vars(other)["_forward_impl"].block is other
    with torch.no_grad():
        other.classifier[1].weight.zero_()
    assert calls(other) == calls(net) == ["chain_classify"]


def test_unfuse(net: nn.Module) -> None:
    keys = list(net.state_dict())
    mbv2.unfuse(net)
    assert "_forward_impl" not in vars(net) and mbv2.summary(net).networks == ()
    assert calls(net) == [] and list(net.state_dict()) == keys


def test_compiled(net: nn.Module) -> None:
    """torch.compile sees the modules, and its own linear layer."""
    x = torch.randn(X)
    with torch.no_grad():
        expected = net(x)
        assert error(torch.compile(net, backend="aot_eager", fullgraph=True)(x), expected.double()) < 1e-5
