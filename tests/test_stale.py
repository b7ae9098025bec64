"""Nothing that changes a block after `fuse` can leave old weights or an old structure at work."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn
from wild import Flat, Net, block_rows, error, randomise

import mbv2_kernels as mbv2

BOUND = 4e-6
X = (2, 3, 33, 36)


@pytest.fixture
def net() -> nn.Module:
    """A fused model that has run, so everything it may keep is kept."""
    net = mbv2.fuse(randomise(Net()), strict=True)
    with torch.no_grad():
        net(torch.randn(X))
    return net


def assert_follows(net: nn.Module, *, was: torch.Tensor | None = None, x: torch.Tensor | None = None) -> torch.Tensor:
    """The fused model computes what the unfused one computes now, and not what it did before."""
    x = torch.ones(X) if x is None else x
    with torch.no_grad():
        y = net(x)
        expected = mbv2.unfuse(copy.deepcopy(net))(x)
    assert error(y, expected) < (BOUND if x.dtype == torch.float32 else 3e-2)
    if was is not None:
        assert error(y, was) > 1e-2
    return y


def last_ran(net: nn.Module) -> list[str | None]:
    return [row.backend for row in block_rows(net)]


# --- parameters and buffers -------------------------------------------------------------------------------------------


def test_load_state_dict(net: nn.Module) -> None:
    was = assert_follows(net)
    net.load_state_dict(randomise(Net(), seed=1).state_dict())
    was = assert_follows(net, was=was)
    net.load_state_dict(randomise(Net(), seed=2).state_dict(), assign=True)
    assert_follows(net, was=was)
    assert last_ran(net) == ["cpu"] * 3


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
@pytest.mark.parametrize("foreach", [False, True])
def test_optimizer_step(net: nn.Module, optimizer: type[torch.optim.Optimizer], foreach: bool) -> None:
    steps = optimizer(net.blocks.parameters(), lr=0.05, foreach=foreach)
    was = assert_follows(net)
    for _ in range(2):
        steps.zero_grad()
        net(torch.randn(X)).square().sum().backward()
        steps.step()
        was = assert_follows(net, was=was)
    assert last_ran(net) == ["cpu"] * 3


@pytest.mark.parametrize("layer", range(8))
def test_in_place_edit_of_each_tensor(layer: int) -> None:
    block = mbv2.fuse(randomise(Flat(bias=True)))
    x = torch.randn(2, 8, 9, 9)
    for name, tensor in block.conv[layer].state_dict(keep_vars=True).items():
        if name == "num_batches_tracked":
            continue
        was = assert_follows(block, x=x)
        with torch.no_grad():
            tensor.mul_(2).add_(0.5)
        assert_follows(block, x=x, was=was)


def test_replaced_parameter_and_buffer(net: nn.Module) -> None:
    was = assert_follows(net)
    conv = net.blocks[1].conv
    conv[0].weight = nn.Parameter(conv[0].weight.detach() * 1.5)
    was = assert_follows(net, was=was)
    conv[7].running_mean = conv[7].running_mean + 3
    was = assert_follows(net, was=was)
    conv[3].bias = nn.Parameter(torch.ones(48))
    was = assert_follows(net, was=was)
    conv[4].weight = None
    conv[4].bias = None
    assert_follows(net, was=was)
    assert last_ran(net) == ["cpu"] * 3


def test_memory_reused_by_another_parameter(net: nn.Module) -> None:
    """A new parameter may get the address, shape and version of the one it replaces."""
    conv = net.blocks[1].conv[0]
    for step in range(20):
        shape = conv.weight.shape
        del conv.weight
        conv.weight = nn.Parameter(torch.full(shape, 0.1 * step))
        assert_follows(net)


def test_eps_is_read_anew(net: nn.Module) -> None:
    was = assert_follows(net)
    net.blocks[1].conv[1].eps = 3.0
    assert_follows(net, was=was)
    assert last_ran(net) == ["cpu"] * 3


def test_to_dtype_and_back(net: nn.Module) -> None:
    was = assert_follows(net)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        net.to(dtype)
        y = assert_follows(net, x=torch.ones(X, dtype=dtype))
        assert y.dtype == dtype
    assert 0 < error(y, was) < 3e-2  # the weights went through 16 bits
    assert last_ran(net) == ["cpu"] * 3


def test_channels_last_parameters(net: nn.Module) -> None:
    was = assert_follows(net)
    net.to(memory_format=torch.channels_last)
    assert error(assert_follows(net), was) < BOUND


@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_updates_the_statistics(net: nn.Module, momentum: float | None) -> None:
    """BatchNorm's kernel changes them without counting a version."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    was = assert_follows(net)
    net.train()(3 * torch.randn(X))
    assert_follows(net.eval(), was=was)
    assert last_ran(net) == ["cpu"] * 3


def test_training_of_a_slice_of_a_block(net: nn.Module) -> None:
    """The layers are trained past the block, which never sees a training call."""
    block = net.blocks[1]
    was = assert_follows(net)
    block.conv.train()
    block.conv(torch.randn(4, 8, 9, 9))
    block.conv.eval()
    assert_follows(net, was=was)
    assert last_ran(net) == ["cpu"] * 3


def test_compiled_evaluation_after_eager_training(net: nn.Module) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager")
    x = torch.ones(X)
    with torch.no_grad():
        was = compiled(x)
        net.train()(3 * torch.randn(X))
        net.eval()
        y = compiled(x)
        assert error(y, mbv2.unfuse(copy.deepcopy(net))(x)) < BOUND and error(y, was) > 1e-2
        net.blocks[1].conv[0].weight.mul_(2)
        assert error(compiled(x), mbv2.unfuse(copy.deepcopy(net))(x)) < BOUND


def test_compiled_training_then_evaluation(net: nn.Module) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager")
    x = torch.ones(X)
    with torch.no_grad():
        was = compiled(x)
    net.train()
    compiled(3 * torch.randn(X)).sum().backward()
    net.eval()
    with torch.no_grad():
        for y in (compiled(x), net(x)):
            assert error(y, mbv2.unfuse(copy.deepcopy(net))(x)) < BOUND and error(y, was) > 1e-2


def test_exported_program_follows_its_own_state(net: nn.Module) -> None:
    other = randomise(Net(), seed=1)
    program = torch.export.export(net, (torch.ones(X),)).module()
    with torch.no_grad():
        was = program(torch.ones(X))
        program.load_state_dict(other.state_dict())
        expected = other(torch.ones(X))
        assert error(program(torch.ones(X)), expected) < BOUND and error(expected, was) > 1e-2


# --- structure --------------------------------------------------------------------------------------------------------


def halve_stride(block: nn.Module) -> None:
    block.conv[3].stride = (1, 1)


def dilate(block: nn.Module) -> None:
    block.conv[3].dilation, block.conv[3].padding = (2, 2), (2, 2)


def pad_less(block: nn.Module) -> None:
    block.conv[3].padding = (0, 0)


def pad_with_reflections(block: nn.Module) -> None:
    block.conv[3].padding_mode = "reflect"
    block.conv[3]._reversed_padding_repeated_twice = [1, 1, 1, 1]


def another_activation(block: nn.Module) -> None:
    block.conv[2] = nn.Hardswish()


def same_activation_other_limit(block: nn.Module) -> None:
    block.conv[2].max_val = 1.0


def another_norm(block: nn.Module) -> None:
    block.conv[1] = nn.GroupNorm(4, 48)


def no_norm(block: nn.Module) -> None:
    block.conv[1] = nn.Identity()


def another_container(block: nn.Module) -> None:
    block.conv = nn.Sequential(*block.conv, nn.ReLU())


def one_more_layer(block: nn.Module) -> None:
    block.conv.append(nn.ReLU())


def one_layer_less(block: nn.Module) -> None:
    del block.conv[5]


def forward_on_a_layer(block: nn.Module) -> None:
    block.conv[5].forward = torch.tanh


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (halve_stride, "stride of Conv2d was changed since fuse()"),
        (dilate, "of Conv2d was changed since fuse()"),
        (pad_less, "padding of Conv2d was changed since fuse()"),
        (pad_with_reflections, "padding_mode of Conv2d was changed since fuse()"),
        (another_activation, "submodule '2' of Sequential was replaced since fuse()"),
        (same_activation_other_limit, "max_val of ReLU6 was changed since fuse()"),
        (another_norm, "submodule '1' of Sequential was replaced since fuse()"),
        (no_norm, "submodule '1' of Sequential was replaced since fuse()"),
        (another_container, "submodule 'conv' of Flat was replaced since fuse()"),
        (one_more_layer, "submodules of Sequential were added or removed since fuse()"),
        (one_layer_less, "of Sequential w"),
        (forward_on_a_layer, "the forward of ReLU6 was replaced on the instance since fuse()"),
    ],
)
def test_changed_structure_runs_the_original_with_one_warning(
    net: nn.Module, change: Callable[[nn.Module], None], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    was = assert_follows(net)
    change(net.blocks[1].eval())
    net.eval()
    caplog.clear()
    with torch.no_grad(), caplog.at_level(logging.WARNING, "mbv2_kernels"):
        y = net(torch.ones(X))
        assert torch.equal(net(torch.ones(X)), y)
    assert error(y, was) > 1e-3
    (record,) = caplog.records
    assert record.name == "mbv2_kernels" and told in record.message and "'blocks.1'" in record.message
    row = block_rows(net)[1]
    assert not row.fused and told in row.reason and row.backend == "original modules"
    assert last_ran(net) == ["cpu", "original modules", "cpu"]
    assert_follows(net)


def test_changed_residual_flag(net: nn.Module) -> None:
    was = assert_follows(net)
    net.blocks[2].identity = False
    assert_follows(net, was=was)
    row = block_rows(net)[2]
    assert not row.fused and row.reason == "identity of Flat was changed since fuse(): call fuse() again"
    assert block_rows(mbv2.fuse(net))[2].fused
    assert_follows(net, was=was)


def test_lost_statistics(net: nn.Module) -> None:
    norm = net.blocks[1].conv[4]
    norm.running_mean = norm.running_var = None
    assert_follows(net)
    assert block_rows(net)[1].reason == "a BatchNorm has lost its running statistics since fuse()"
