"""Runs of fused children of a Sequential as one op call: the same results, and every child still asked."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_layers import ConvNormAct
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from wild import Flat, error, randomise

import mbv2_kernels as mbv2
from mbv2_kernels import set_backend
from mbv2_kernels.chain import FusedChain

X = (2, 3, 19, 22)
OP = torch.ops.mbv2.chain_packed.default
PACK = torch.ops.mbv2.pack_chain.default


class Calls(TorchDispatchMode):
    """Counts the ops of this package that the dispatcher sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mbv2" and "pack_" not in func.name():
            self.names.append(func.name().removeprefix("mbv2::"))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def net() -> nn.Module:
    """Stem, three blocks, head in one Sequential."""
    stem, head = ConvNormAct(3, 8, 3, stride=2, padding=1), ConvNormAct(16, 24, 1)
    blocks = [Flat(8, 8, 8, expand=False), Flat(8, 48, 16, stride=2), Flat(16, 96, 16)]
    return mbv2.fuse(randomise(nn.Sequential(stem, *blocks, head)))


@pytest.fixture(autouse=True)
def _automatic_backend() -> Iterator[None]:
    yield
    set_backend("auto")


@torch.no_grad()
def calls(net: nn.Module, x: Tensor | None = None) -> list[str]:
    """Which ops a call runs, after checking that it computes what the unfused network does."""
    x = torch.randn(X) if x is None else x
    net(x)  # packs
    with Calls() as seen:
        y = net(x)
    assert error(y, mbv2.unfuse(copy.deepcopy(net)).double()(x.double())) < (8e-6 if y.dtype == torch.float32 else 2e-2)
    return seen.names


def test_one_call(net: nn.Module) -> None:
    assert calls(net) == ["chain_packed"]
    assert {row.backend for row in mbv2.summary(net)} == {"cpu"} and len(mbv2.summary(net)) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(1, 3, 17, 20), (2, 3, 230, 410)])  # kept buffers, and memory of its own
def test_the_same_numbers_as_child_by_child(net: nn.Module, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    net = net.to(dtype)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(size).to(dtype, memory_format=memory_format)
        with torch.no_grad():
            chained, y = net(x), x
            for child in net:
                y = child(y)
            assert chained.equal(y) and chained.stride() == y.stride()
            assert net(x).equal(y)  # and the buffers hold nothing back


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_first_layer_is_that_of_this_call(net: nn.Module, dtype: torch.dtype) -> None:
    """Other threads compute it while one looks for changes: of this image and by these weights, or it is not used."""
    net, x = net.to(dtype), torch.randn(X).to(dtype)
    first, last = next(net[0].parameters()), next(net[-1].parameters())
    changes = (
        lambda: x,
        lambda: x.normal_(),
        lambda: first.mul_(1.5),
        lambda: last.mul_(0.5),
        lambda: x.transpose_(2, 3),
    )
    for threads in (2, 3, 1, 2):
        torch.set_num_threads(threads)
        for change in changes:
            for _ in range(3):
                net(x)  # a change makes a new plan
            change()
            chained, y = net(x), x
            for child in net:
                y = child(y)
            assert chained.equal(y), (threads, changes.index(change))


def test_a_hook_splits_the_run_and_fires(net: nn.Module) -> None:
    fired: list[tuple[int, ...]] = []
    handle = net[2].register_forward_hook(lambda m, args, y: fired.append(tuple(y.shape)))
    assert calls(net) == ["chain_packed", "inverted_residual_packed", "chain_packed"]
    assert fired[0] == (2, 16, 5, 6)
    handle.remove()
    inner = net[2].conv[0].register_forward_hook(lambda *_: fired.append(()))
    assert calls(net) == ["chain_packed", "chain_packed"] and fired[-1] == ()
    assert mbv2.summary(net)[2].reason == "hooks on Conv2d inside the block would not fire"
    inner.remove()
    assert calls(net) == ["chain_packed"] and mbv2.summary(net)[2].reason == ""


def test_nothing_that_changes_goes_unnoticed(net: nn.Module) -> None:
    for tensor in net.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.mul_(1.1).add_(0.05)
    assert calls(net) == ["chain_packed"]
    net[2].conv[3].stride = (1, 1)
    assert calls(net) == ["chain_packed", "chain_packed"]  # around the block that runs its original modules
    net[2].conv[3].stride = (2, 2)
    net[3].train()
    net(torch.randn(X))
    net[3].eval()
    assert calls(net) == ["chain_packed"]
    net[4] = nn.Identity()
    net.insert(1, nn.Dropout().eval())
    assert calls(net) == ["chain_packed", "chain_packed"]
    del net[1]
    assert calls(net) == ["chain_packed"]


def test_a_child_called_alone_a_slice_and_copies(net: nn.Module) -> None:
    x = torch.randn(X)
    with torch.no_grad():
        expected = net(x)
        assert net[2:](net[:2](x)).equal(expected)
        assert type(net[:2].forward) is not FusedChain  # a new Sequential
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert twin(x).equal(expected) and twin.forward.block is twin
            assert calls(twin) == ["chain_packed"]
    attributes = [sorted(vars(m)) for m in mbv2.unfuse(net).modules()]
    assert not any("forward" in names for names in attributes)


@pytest.mark.parametrize(
    "situation",
    [
        lambda net, x: net(x),  # gradients
        lambda net, x: torch.no_grad()(torch.autocast("cpu", torch.bfloat16)(net))(x),
        lambda net, x: torch.no_grad()(net.double())(x.double()),
    ],
)
def test_what_wants_every_call_gets_it(net: nn.Module, situation: Callable[[nn.Module, Tensor], Tensor]) -> None:
    with Calls() as seen:
        situation(net, torch.randn(X))
    assert "chain_packed" not in seen.names


def test_gradients_and_the_reference_backend(net: nn.Module) -> None:
    x = torch.randn(X, requires_grad=True)
    (gradient,) = torch.autograd.grad(net(x).square().sum(), x)
    (expected,) = torch.autograd.grad(mbv2.unfuse(copy.deepcopy(net))(x).square().sum(), x)
    assert error(gradient, expected.double()) < 1e-4
    with torch.no_grad():
        y = net(x)
        set_backend("reference")
        assert error(net(x), y) < 8e-6
    assert {row.backend for row in mbv2.summary(net)} == {"reference"}


def test_wrong_channels_raise_what_the_child_raises(net: nn.Module) -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match="expected input\\[2, 4, 9, 9\\] to have 3 channels"):
        net(torch.randn(2, 4, 9, 9))


def test_compile_has_one_op_for_each_child(net: nn.Module) -> None:
    torch._dynamo.reset()
    x = torch.randn(X)
    with torch.no_grad():
        assert torch.compile(net, fullgraph=True, backend="aot_eager")(x).equal(net(x))
    program = torch.export.export(net, (x,))
    assert sum("mbv2" in str(node.target) for node in program.graph.nodes) == 5


def test_stages_are_one_call_too(net: nn.Module) -> None:
    """Sequentials of Sequentials, as networks in stages are; hooks on a stage fire, and each stage is a chain alone."""
    net = mbv2.fuse(nn.Sequential(net[0], nn.Sequential(net[1:3], net[3]), nn.Sequential(), net[4]))
    assert calls(net) == ["chain_packed", "chain_packed"]  # an empty Sequential could get children
    del net[2]
    assert calls(net) == ["chain_packed"]
    fired: list[int] = []
    handle = net[1].register_forward_hook(lambda *_: fired.append(1))
    assert calls(net) == ["chain_packed"] * 3 and fired
    handle.remove()
    assert calls(net) == ["chain_packed"]
    net[1].append(nn.Dropout().eval())
    assert calls(net) == ["chain_packed", "chain_packed"]
    x = torch.randn(X)
    with torch.no_grad():
        assert calls(net[1][0], net[0](x)) == ["chain_packed"]


@pytest.mark.parametrize(
    "change",
    [
        lambda conv: setattr(conv.weight, "data", conv.weight.data.clone().mul_(2)),
        lambda conv: setattr(conv.weight, "data", conv.weight.data.as_strided((16, 48, 1, 1), (1, 16, 1, 1))),
        lambda conv: torch.utils.swap_tensors(conv.weight, nn.Parameter(2 * conv.weight.detach())),
        lambda conv: conv._parameters.update(weight=nn.Parameter(2 * conv.weight.detach())),
        lambda conv: (conv.weight.data.mul_(2), mbv2.fuse(nn.Identity())),  # what fuse() is for after such an edit
    ],
    ids=["data", "strides", "swap", "dict", "memo cleared"],
)
def test_other_memory_behind_the_same_parameter(net: nn.Module, change: Callable[[nn.Module], object]) -> None:
    """What no version counter shows; the first calls have made a plan that looks for nothing else."""
    assert calls(net) == ["chain_packed"]
    x = torch.randn(X)
    with torch.no_grad():
        was = net(x)
        change(net[2].conv[6])
        assert error(net(x), was) > 1e-2
    assert calls(net) == ["chain_packed"]


def test_a_class_that_gets_a_call_of_its_own(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    assert calls(net) == ["chain_packed"]
    seen: list[nn.Module] = []

    def call(self: nn.Module, x: Tensor) -> Tensor:
        seen.append(self)
        return nn.Module.__call__(self, x)

    monkeypatch.setattr(Flat, "__call__", call, raising=False)
    assert calls(net) == ["chain_packed", *["inverted_residual_packed"] * 3, "chain_packed"]
    assert {*map(id, net[1:4])} < {*map(id, seen)}
    monkeypatch.undo()
    assert calls(net) == ["chain_packed"]


def test_a_plan_is_kept_until_something_changes(net: nn.Module) -> None:
    """Else every call would ask all children: correct, and far slower than small images take."""
    calls(net)
    plan = net.forward.plan
    assert plan is not None
    calls(net)
    assert net.forward.plan is plan
    with torch.no_grad():
        net(torch.randn(1, 3, 30, 31))
        net[1].conv[0].weight.mul_(1.5)
        assert net.forward.plan is plan
        net(torch.randn(X))
    assert net.forward.plan not in (None, plan)


def test_parameters_without_versions_make_no_plan() -> None:
    with torch.inference_mode():
        net = mbv2.fuse(randomise(nn.Sequential(Flat(), Flat())))
        x = torch.randn(2, 8, 9, 9)
        was = net(x)
        assert net.forward.plan is None
        net[0].conv[0].weight.mul_(2)
        assert error(net(x), was) > 1e-2
        assert error(net(x), mbv2.unfuse(copy.deepcopy(net)).double()(x.double())) < 4e-6


def test_opcheck_and_wrong_steps() -> None:
    x, conv = torch.randn(2, 3, 9, 8), torch.ops.mbv2.pack_conv(torch.randn(5, 3, 3, 3), None)
    block = torch.ops.mbv2.pack_inverted_residual(
        torch.randn(12, 5, 1, 1), None, torch.randn(12, 1, 3, 3), None, torch.randn(5, 12, 1, 1), None
    )
    steps = [1, 0, 5, 3, 0, 2, 1, 1, 2, 0, 0, 0, 12, 5, 3, 1, 1, 1, 1, 2, 0, 1]
    torch.library.opcheck(PACK, ([conv, block], steps), test_utils=("test_schema", "test_faketensor"))
    chain = PACK([conv, block], steps)
    torch.library.opcheck(OP, (x, chain))
    assert OP(x[:0], chain).shape == (0, 5, 5, 4)
    for wrong, message in (
        (([], []), "non-empty list"),
        (([conv], steps), "steps must hold 11 numbers for each of 1"),
        (([conv, block], [2, *steps[1:]]), "a kind must be 0"),
        (([conv, block], [*steps[:8], 3, *steps[9:]]), "an activation must be 0, 1 or 2"),
        (([conv, block], [*steps[:3], 0, *steps[4:]]), "kernel_size must be 1 to"),
    ):
        with pytest.raises(RuntimeError, match=message):
            PACK(*wrong)
    for given, message in (
        ((x, PACK([block, conv], steps)), "packed does not hold"),
        ((x[0], chain), "x must have 4 dimensions"),
        ((x.double(), chain), "x must be float32"),
        ((x[:, :2], chain), "packed does not hold"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OP(*given)


def test_a_chain_is_no_tensor_like_others() -> None:
    """It stands for memory that the op reads: nothing but what pack_chain made is taken."""
    first, second = (
        PACK([torch.ops.mbv2.pack_conv(torch.randn(5, 3, 1, 1), None)], [1, 0, 5, 1, 0, 1, 0, 1, 2, 0, 0])
        for _ in range(2)
    )
    x = torch.randn(1, 3, 4, 4)
    one, other = OP(x, first), OP(x, second)
    assert not one.equal(other) and OP(x, first.clone()).equal(one)
    for wrong in (torch.zeros(1, dtype=torch.int64), torch.empty(0), first.repeat(2), first.double(), x):
        with pytest.raises(RuntimeError, match="chain must be what pack_chain returned"):
            OP(x, wrong)
    copy_of_second, written = second.clone(), first.clone()
    second.copy_(first)
    del second
    assert OP(x, first).equal(one)  # the end of the other one has left it alone
    with pytest.raises(RuntimeError, match="and not be gone"):
        OP(x, copy_of_second)
    del first
    with pytest.raises(RuntimeError, match="and not be gone"):
        OP(x, written)


def test_a_chain_for_other_sizes_and_threads() -> None:
    """The calls made for one image are not used for another, nor for another number of threads."""
    weight = torch.randn(24, 3, 3, 3)
    chain = PACK([torch.ops.mbv2.pack_conv(weight, None)], [1, 0, 24, 3, 0, 1, 1, 1, 0, 0, 0])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for shape in ((1, 3, 9, 8), (2, 3, 9, 8), (2, 3, 8, 9), (1, 3, 40, 41)):
                for dtype in (torch.float32, torch.bfloat16):
                    x = torch.randn(shape).to(dtype)
                    for given in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3)):
                        expected = nn.functional.conv2d(given.double(), weight.double(), padding=1)
                        assert error(OP(given, chain), expected) < (2e-6 if dtype == torch.float32 else 8e-3)
    finally:
        torch.set_num_threads(before)
