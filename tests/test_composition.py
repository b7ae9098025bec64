"""Stems and heads that are attributes of the network itself, which calls them in a row in `forward_features` (timm)."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_chain import Calls
from torch import Tensor, nn
from wild import Flat, error, randomise

import mbv2_kernels as mbv2
from mbv2_kernels.chain import FusedFeatures

X = (2, 3, 19, 22)


class NormAct(nn.BatchNorm2d):
    """timm's way: the activation sits in the norm."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class NormsAreLeaves(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, NormAct) or super().is_leaf_module(m, module_qualified_name)


class Net(nn.Module):
    """timm's EfficientNet in small: stages in a Sequential, stem and head around them."""

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.conv_stem, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), NormAct(8)
        stage = nn.Sequential(Flat(8, 48, 16, stride=2), Flat(16, 96, 16))
        self.blocks = nn.Sequential(nn.Sequential(Flat(8, 8, 8, expand=False)), stage)
        self.conv_head, self.bn2 = nn.Conv2d(16, 24, 1, bias=False), NormAct(24)
        self.classifier = nn.Linear(24, 5)

    def forward_features(self, x: Tensor) -> Tensor:
        """As timm writes it."""
        x = self.conv_stem(x)
        x = self.bn1(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():  # noqa: SIM108
            x = self.blocks(2 * x)  # never to be taken for the other branch
        else:
            x = self.blocks(x)
        x = self.conv_head(x)
        x = self.bn2(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.forward_features(x).mean((2, 3)))


@pytest.fixture
def net() -> nn.Module:
    return mbv2.fuse(randomise(Net()), strict=True)


def rows(net: nn.Module) -> dict[str, mbv2.FusionRow]:
    return {row.path: row for row in mbv2.summary(net) if row.kind in ("stem", "head")}


def assert_right(net: nn.Module, x: Tensor | None = None, *, was: Tensor | None = None) -> Tensor:
    """Against the unfused network in float64; and not what it was before."""
    x = torch.randn(X, generator=torch.Generator().manual_seed(0)) if x is None else x
    with torch.no_grad():
        y = net(x)
        assert error(y, mbv2.unfuse(copy.deepcopy(net)).double()(x.double())) < 4e-6
        assert was is None or error(y, was) > 1e-3
        assert net(x).equal(y)  # by the plan that the first call has made
    return y


def ran(net: nn.Module) -> list[str]:
    with torch.no_grad(), Calls() as seen:
        net(torch.randn(X))
    return seen.names


def test_the_whole_of_it_is_one_call(net: nn.Module) -> None:
    keys = list(net.state_dict())
    assert_right(net)
    assert ran(net) == ["chain_packed"]
    assert [(path, r.class_name, r.kind, r.fused, r.backend) for path, r in rows(net).items()] == [
        ("conv_stem", "Conv2d", "stem", True, "cpu"),
        ("conv_head", "Conv2d", "head", True, "cpu"),
    ]
    assert list(net.state_dict()) == keys == list(Net().state_dict())
    assert [p for p, _ in net.named_modules()] == [p for p, _ in Net().named_modules()]


def test_the_layers_called_alone_are_what_they_were(net: nn.Module) -> None:
    """Only the network's own method is known to call one after the other: slices of it compute as ever."""
    x, plain = torch.randn(X), mbv2.unfuse(copy.deepcopy(net))
    with torch.no_grad():
        assert net.conv_stem(x).equal(plain.conv_stem(x))
        assert error(nn.Sequential(net.conv_stem, nn.Identity(), net.bn1)(x), plain.bn1(plain.conv_stem(x))) == 0


@pytest.mark.parametrize("path", ["conv_stem", "bn1", "bn1.act", "conv_head", "bn2"])
def test_hooks_fire(net: nn.Module, path: str) -> None:
    assert_right(net)
    fired: list[tuple[int, ...]] = []
    handle = net.get_submodule(path).register_forward_hook(lambda m, args, y: fired.append(tuple(y.shape)))
    assert_right(net)
    assert fired and fired[0][1] == net.get_submodule(path.partition(".")[0]).weight.shape[0]
    row = rows(net)["conv_stem" if "1" in path or "stem" in path else "conv_head"]
    assert row.backend == "original modules" and "inside the block would not fire" in row.reason
    handle.remove()
    assert_right(net)
    assert ran(net) == ["chain_packed"]


def test_a_hook_on_the_blocks_fires(net: nn.Module) -> None:
    assert_right(net)
    fired: list[int] = []
    for module in (net.blocks, net.blocks[1]):
        module.register_forward_hook(lambda *_: fired.append(1))
    with torch.no_grad():
        net(torch.randn(X))
    assert len(fired) == 2
    assert_right(net)


def test_global_hooks_and_fx_see_the_networks_own_modules_only(net: nn.Module) -> None:
    """The Sequentials that stand for convolution and norm have no name in the network."""
    was, own = assert_right(net), set(net.modules())
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(module))
    with torch.no_grad():
        y = net(torch.randn(X, generator=torch.Generator().manual_seed(0)))
    handle.remove()
    assert set(seen) <= own and {net.conv_stem, net.bn1, net.bn2} < set(seen) and error(y, was) < 4e-6
    assert rows(net)["conv_stem"].reason.startswith("global module hooks")
    assert_right(net)
    assert rows(net)["conv_stem"].reason == "" and ran(net) == ["chain_packed"]
    called = {node.target for node in NormsAreLeaves().trace(net).nodes if node.op == "call_module"}
    assert {"conv_stem", "bn1", "conv_head", "bn2"} < called


@pytest.mark.parametrize("name", ["conv_stem", "bn1", "conv_head", "bn2"])
def test_changed_weights_are_noticed(net: nn.Module, name: str) -> None:
    was = assert_right(net)
    for tensor in net.get_submodule(name).state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.mul_(1.3).add_(0.1)
            was = assert_right(net, was=was)
    assert ran(net) == ["chain_packed"]


def test_training_is_fused_and_leaves_nothing_stale(net: nn.Module) -> None:
    was, plain = assert_right(net), mbv2.unfuse(copy.deepcopy(net)).train()
    x = 3 * torch.randn(X)
    assert error(net.train()(x), plain(x)) < 1e-4
    assert all(row.backend == "cpu" and row.reason == "" for row in rows(net).values())
    assert_right(net.eval(), was=was)
    net(x).square().sum().backward()
    plain.load_state_dict(net.state_dict())
    plain.eval()(x).square().sum().backward()
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None


def test_replaced_modules_and_the_flag(net: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    was = assert_right(net)
    net.grad_checkpointing = True
    assert_right(net, was=was)
    assert rows(net)["conv_stem"].reason == "grad_checkpointing of Net is set"
    net.grad_checkpointing = False
    assert_right(net)
    caplog.clear()
    net.bn1 = nn.GroupNorm(2, 8)
    with caplog.at_level(logging.WARNING, "mbv2_kernels"):
        assert_right(net, was=was)
    told = "submodule 'bn1' of Net was replaced since fuse(): call fuse() again"
    assert all(told in record.message for record in caplog.records) and len(caplog.records) == 2
    assert {(r.fused, r.reason, r.backend) for r in rows(net).values()} == {(False, told, "original modules")}
    mbv2.fuse(net)
    assert_right(net)
    assert list(rows(net)) == ["conv_head"] and rows(net)["conv_head"].backend == "cpu"
    net.classifier = nn.Linear(24, 7)
    assert_right(net)
    assert rows(net)["conv_head"].fused


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_are_on_their_own(net: nn.Module, clone: Callable[[nn.Module], nn.Module]) -> None:
    was, twin = assert_right(net), clone(net)
    with torch.no_grad():
        twin.bn1.weight.mul_(2)
    assert_right(twin, was=was)
    assert assert_right(net).equal(was)
    mbv2.unfuse(twin)
    assert not any({"forward", "forward_features"} & set(vars(m)) for m in twin.modules())
    assert isinstance(net.forward_features, FusedFeatures)


def test_16_bits_autocast_compile_and_export(net: nn.Module) -> None:
    torch._dynamo.reset()
    x = torch.randn(X)
    with torch.no_grad():
        exact = mbv2.unfuse(copy.deepcopy(net))(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert error(net(x), exact) < 3e-2
        assert error(copy.deepcopy(net).bfloat16()(x.bfloat16()), exact) < 3e-2
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        assert error(compiled(x), exact) < 4e-6
        net.bn1.weight.mul_(2)
        exact = mbv2.unfuse(copy.deepcopy(net))(x)
        assert error(compiled(x), exact) < 4e-6
    program = torch.export.export(net, (x,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("mbv2.conv_bn_act" in t for t in targets) == 2 and not any("batch_norm" in t for t in targets)
    with torch.no_grad():
        assert error(program.module()(x), exact) < 4e-6


def test_filters_add_and_keep(net: nn.Module) -> None:
    net = mbv2.fuse(mbv2.unfuse(net), filter_fn=lambda module, path: path == "conv_stem")
    assert [row.fused for row in rows(net).values()] == [True, False]
    assert_right(net)
    mbv2.fuse(net, filter_fn=lambda module, path: path == "conv_head")
    assert [row.fused for row in rows(net).values()] == [True, True]
    assert_right(net)


def more_than_calls(self: Net, x: Tensor) -> Tensor:
    x = self.conv_stem(x)
    x = self.bn1(x) + 1
    return x


def two_values(self: Net, x: Tensor) -> Tensor:
    x = self.conv_stem(x)
    y = self.bn1(x)
    return y


def with_an_option(self: Net, x: Tensor, scale: float = 1.0) -> Tensor:
    x = self.conv_stem(x)
    x = self.bn1(x)
    return x


def another_branch(self: Net, x: Tensor) -> Tensor:
    x = self.conv_stem(x)
    if self.training:  # noqa: SIM108
        x = self.bn1(x)
    else:
        x = self.bn1(x)
    return x


@pytest.mark.parametrize("method", [more_than_calls, two_values, with_an_option, another_branch])
def test_a_method_that_does_more_is_left_alone(method: Callable[[Net, Tensor], Tensor]) -> None:
    method.__name__ = "forward_features"
    other = type("Other", (Net,), {"forward_features": method})
    net = randomise(other())
    mbv2.fuse(net)
    reasons = {row.reason for row in rows(net).values()}
    assert len(reasons) == 1 and "forward_features of Other" in reasons.pop()
    assert "forward_features" not in vars(net)


def test_a_method_whose_source_is_not_what_runs_is_left_alone() -> None:
    class Changed(Net):
        def forward_features(self, x: Tensor) -> Tensor:
            x = self.conv_stem(x)
            x = self.bn1(x)
            return x

    Changed.forward_features.__code__ = more_than_calls.__code__.replace(
        co_firstlineno=Changed.forward_features.__code__.co_firstlineno, co_name="forward_features"
    )
    (reason,) = {row.reason for row in rows(mbv2.fuse(randomise(Changed()))).values()}
    assert reason == "the source of forward_features of Changed is not that of the code that runs"


def test_a_replaced_method_is_left_alone() -> None:
    net = randomise(Net())
    net.forward_features = lambda x: net.bn1(net.conv_stem(x))
    net.conv_head, net.bn2 = nn.Identity(), nn.Identity()
    mbv2.fuse(net)
    assert rows(net)["conv_stem"].reason == "forward_features of Net was replaced on the instance by other code"


# ---- From images to classes ------------------------------------------------------------------------------------------


class Pool(nn.Module):
    """timm's SelectAdaptivePool2d, for the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(x)
        x = self.flatten(x)
        return x


class WithHead(Net):
    """timm's EfficientNet from images to classes, `forward` and `forward_head` to the letter."""

    def __init__(self) -> None:
        super().__init__()
        self.global_pool, self.drop_rate = Pool(), 0.0

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x)
        if self.drop_rate > 0.:  # fmt: skip
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        x = self.forward_head(x)
        return x


class Scaled(WithHead):
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(2 * x)
        if self.drop_rate > 0.:  # fmt: skip
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.classifier(x)


class LogitsLeftOut(WithHead):
    """The same source, another default."""

    def forward_head(self, x: Tensor, pre_logits: bool = True) -> Tensor:
        x = self.global_pool(x)
        if self.drop_rate > 0.:  # fmt: skip
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.classifier(x)


class Twice(WithHead):
    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        x = self.forward_head(x)
        return 2 * x


@torch.no_grad()
def settle(net: nn.Module) -> None:
    """The first call plans the features, the second the whole: sums in another order."""
    x = torch.randn(X)
    expected = mbv2.unfuse(copy.deepcopy(net)).double()(x.double())
    for _ in range(3):
        assert error(net(x), expected) < 4e-6


@pytest.fixture
def whole() -> nn.Module:
    whole = mbv2.fuse(randomise(WithHead()), strict=True)
    settle(whole)
    return whole


def test_features_mean_and_classifier_are_one_call(whole: nn.Module) -> None:
    assert ran(whole) == ["chain_classify"]
    report = mbv2.summary(whole)
    assert (report.networks, report.slower_networks) == (("",), ())
    with torch.no_grad(), Calls() as seen:
        assert whole.forward_features(torch.randn(X)).shape == (2, 24, 5, 6)
    assert seen.names == ["chain_packed"]
    for twin in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        settle(twin)
        assert ran(twin) == ["chain_classify"] and twin.forward.block is twin
    mbv2.unfuse(whole)
    assert ran(whole) == [] and not {"forward", "forward_features"} & set(vars(whole))


@pytest.mark.parametrize("other", [Scaled, LogitsLeftOut, Twice])
def test_a_head_that_says_something_else_is_not_taken(other: type[nn.Module]) -> None:
    net = mbv2.fuse(randomise(other()))
    settle(net)
    assert ran(net) == ["chain_packed"] and "forward" not in vars(net)


def replace_head(net: nn.Module) -> None:
    net.forward_head = lambda x: x.amax((2, 3))


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda m, args, y: 2 * y)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (replace_head, "forward_head was replaced"),
        (lambda net: setattr(net.global_pool, "pool", nn.AdaptiveMaxPool2d(1)), "the pooling layer was replaced"),
        (lambda net: setattr(net, "global_pool", nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())), "was replaced"),
        (lambda net: setattr(net.global_pool.pool, "output_size", (1, 1)), None),
        (lambda net: setattr(net, "classifier", nn.Sequential(nn.Linear(24, 5), nn.Tanh())), "more than a linear"),
        (lambda net: hook(net.global_pool.flatten), "hooks on"),
        (lambda net: hook(net.global_pool), "hooks on"),
        (lambda net: hook(net.classifier), "hooks on"),
        (lambda net: hook(net.bn2), "forward_features did not run as planned"),
        (lambda net: setattr(net, "grad_checkpointing", True), "forward_features did not run as planned"),
        (lambda net: net.classifier.weight.mul_(2), None),
    ],
)
@torch.no_grad()
def test_what_changes_behind_the_features_is_noticed(
    whole: nn.Module, change: Callable[[nn.Module], object], told: str | None
) -> None:
    x = torch.randn(X)
    change(whole)
    y = whole(x)
    plain = mbv2.unfuse(copy.deepcopy(whole))
    assert error(y, plain(x).double()) < 4e-6
    assert error(whole(x), plain(x).double()) < 4e-6
    report = mbv2.summary(whole)
    assert (ran(whole) == ["chain_classify"]) is (told is None)
    assert [path for path, reason in report.slower_networks if told and told in reason] == ([""] if told else [])


@torch.no_grad()
def test_dropout_in_the_head_drops_in_training(whole: nn.Module) -> None:
    x = torch.randn(X)
    whole.drop_rate = 0.5
    assert ran(whole) == ["chain_classify"]
    whole.training = True  # the network's own flag, and of no module in it
    assert not whole(x).equal(whole(x))
    assert mbv2.summary(whole).slower_networks == (("", "dropout is active"),)
    whole.drop_rate = 0.0
    settle(whole)
    assert ran(whole) == ["chain_classify"]


def test_compiled_and_exported_see_every_module(whole: nn.Module) -> None:
    x = torch.randn(X)
    with torch.no_grad():
        expected = whole(x).double()
        assert error(torch.compile(whole, backend="aot_eager", fullgraph=True)(x), expected) < 1e-5
    program = torch.export.export(whole, (x,))
    assert error(program.module()(x), expected) < 1e-5


def test_a_freed_network_is_collected() -> None:
    """What is watched refers to its modules weakly."""
    net = mbv2.fuse(randomise(WithHead()))
    settle(net)
    assert ran(net) == ["chain_classify"]
    modules = [weakref.ref(module) for module in net.modules()]
    del net
    gc.collect()
    assert all(module() is None for module in modules)
