"""A block that is called alone comes down to one op, too, and nothing that changes goes unnoticed."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_chain import Calls
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from wild import Flat, error, randomise

import mbv2_kernels as mbv2
from mbv2_kernels import _C, set_backend
from mbv2_kernels.backends import tier_of

X = (2, 8, 9, 7)
SHORT = "chain_packed"


@pytest.fixture
def block() -> nn.Module:
    """A fused block that has been called as often as it takes."""
    block = mbv2.fuse(randomise(Flat(8, 48, 8)))
    settle(block)
    return block


@pytest.fixture(autouse=True)
def _automatic_backend() -> Iterator[None]:
    yield
    set_backend("auto")


@torch.no_grad()
def settle(block: nn.Module) -> None:
    for _ in range(3):
        block(torch.randn(X).to(next(block.parameters()).dtype))


@torch.no_grad()
def ran(block: nn.Module, x: Tensor | None = None) -> list[str]:
    """Which ops a call runs, after checking that it computes what the unfused block does."""
    x = torch.randn(X) if x is None else x
    with Calls() as seen:
        y = block(x)
    assert error(y, mbv2.unfuse(copy.deepcopy(block)).double()(x.double())) < (
        4e-6 if y.dtype == torch.float32 else 2e-2
    )
    return seen.names


def test_one_op(block: nn.Module) -> None:
    assert ran(block) == [SHORT]
    assert ran(block, torch.randn(1, 8, 5, 5).to(memory_format=torch.channels_last)) == [SHORT]
    (row,) = mbv2.summary(block)
    assert (row.backend, row.tier, row.reason) == ("cpu", _C.active_tier(), "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_numbers_as_the_long_way(dtype: torch.dtype) -> None:
    block = mbv2.fuse(randomise(Flat(8, 48, 8))).to(dtype)
    x = torch.randn(X).to(dtype)
    with torch.no_grad():
        first = block(x)
        settle(block)
        assert ran(block, x) == [SHORT]
        assert block(x).equal(first) and block(x).stride() == first.stride()


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda b: b.conv[3].weight.mul_(2),
    "statistics": lambda b: b.conv[4].running_var.mul_(4),
    "data": lambda b: setattr(b.conv[0].weight, "data", b.conv[0].weight.data * 2),
    "strides": lambda b: setattr(
        b.conv[0].weight, "data", b.conv[0].weight.data.as_strided((48, 8, 1, 1), (1, 48, 1, 1))
    ),
    "swap": lambda b: torch.utils.swap_tensors(b.conv[6].weight, nn.Parameter(2 * b.conv[6].weight.detach())),
    "dict": lambda b: b.conv[6]._parameters.update(weight=nn.Parameter(2 * b.conv[6].weight.detach())),
    "memo": lambda b: (b.conv[6].weight.data.mul_(2), mbv2.fuse(nn.Identity())),
    "eps": lambda b: setattr(b.conv[1], "eps", 2.0),
    "state dict": lambda b: b.load_state_dict(randomise(Flat(8, 48, 8), seed=5).state_dict()),
    "bias": lambda b: setattr(b.conv[0], "bias", nn.Parameter(torch.ones(48))),
    "geometry": lambda b: vars(b.conv[3]).update(padding=(2, 2), dilation=(2, 2)),
    "activation": lambda b: setattr(b.conv[2], "max_val", 0.5),
    "layer": lambda b: b.conv.__setitem__(2, nn.Hardtanh(-1, 1)),
    "hook": lambda b: b.conv[2].register_forward_hook(lambda m, args, y: 3 * y),
    "forward": lambda b: setattr(b.conv[2], "forward", torch.tanh),
    "flag": lambda b: setattr(b, "identity", False),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_is_noticed_at_once(block: nn.Module, change: Callable[[nn.Module], object]) -> None:
    x = torch.ones(X)
    was = block(x)
    change(block)
    y = block(x)
    assert error(y, was.double()) > 1e-3
    plain = mbv2.unfuse(copy.deepcopy(block))
    assert error(y, plain(x).double()) < 4e-6
    settle(block)
    assert error(block(x), plain(x).double()) < 4e-6


def test_training_gradients_and_back(block: nn.Module) -> None:
    x = torch.randn(X, requires_grad=True)
    y = block(x)
    assert y.requires_grad and ran(block) == [SHORT]
    block.train()
    with torch.no_grad():
        block(5 * x)
    block.eval()
    assert ran(block) != [SHORT]  # the statistics are others
    settle(block)
    assert ran(block) == [SHORT]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones(X))
        with torch.no_grad(), Calls() as seen:
            block(dual)
        assert SHORT not in seen.names


@torch.no_grad()
def test_other_inputs_go_the_long_way(block: nn.Module) -> None:
    with pytest.raises(RuntimeError, match="to have 8 channels"):
        block(torch.randn(2, 7, 9, 7))
    with pytest.raises(ValueError, match="expected 4D input"):
        block(torch.randn(8, 9, 7))
    with pytest.raises(RuntimeError, match="type"):
        block(torch.randn(X).double())
    with pytest.raises((RuntimeError, NotImplementedError)):
        block(torch.randn(X).to_sparse())
    assert mbv2.summary(block)[0].backend == "original modules"
    settle(block)
    assert ran(block) == [SHORT] and mbv2.summary(block)[0].backend == "cpu"
    assert SHORT not in ran(block, nn.Parameter(torch.randn(X)))  # only plain tensors
    with torch.autocast("cpu", torch.bfloat16), Calls() as seen:
        assert block(torch.randn(X)).dtype == torch.float32  # the residual is added to x
    assert SHORT not in seen.names


@torch.no_grad()
def test_backend_and_tier_are_noticed(block: nn.Module) -> None:
    set_backend("reference")
    assert ran(block) == [] and mbv2.summary(block)[0].backend == "reference"
    set_backend("auto")
    settle(block)
    assert ran(block) == [SHORT]
    before = _C.max_isa()
    try:
        _C.set_max_isa("portable")
        _C.reset_counters()
        block(torch.randn(X))
        assert {name for name, calls in _C.counters().items() if calls} == {"portable"}
        assert mbv2.summary(block)[0].tier == "portable"
    finally:
        _C.set_max_isa(before)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cap_that_changes_the_tier_for_bfloat16_only(dtype: torch.dtype) -> None:
    """It ends the shortcuts of bfloat16 and no others, where there is such a tier."""
    block = mbv2.fuse(randomise(Flat(8, 48, 8))).to(dtype)
    settle(block)
    before, fastest = _C.max_isa(), _C.active_tier()
    x = torch.randn(X).to(dtype)
    try:
        for cap in (None, fastest, None, _C.bf16_tier()["name"], fastest, fastest):
            was = tier_of(dtype)
            _C.set_max_isa(cap)
            assert _C.active_tier() == fastest
            assert (block.forward._shortcut(x) is not None) == (tier_of(dtype) == was)
            _C.reset_counters()
            block(x)
            assert {name for name, calls in _C.counters().items() if calls} == {tier_of(dtype)}
            assert mbv2.summary(block)[0].tier == tier_of(dtype)
            settle(block)
            assert ran(block, x) == [SHORT]
    finally:
        _C.set_max_isa(before)


@torch.no_grad()
def test_modes_see_the_op(block: nn.Module) -> None:
    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    with Functions():
        block(torch.randn(X))
    assert any("chain_packed" in name for name in seen)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        block(torch.randn(X))
    assert any("mbv2::chain_packed" in event.key for event in profile.key_averages())


@torch.no_grad()
def test_copies_have_none_and_get_their_own(block: nn.Module) -> None:
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        twin.conv[0].weight.mul_(2)
        assert error(twin(torch.ones(X)), block(torch.ones(X)).double()) > 1e-3
        settle(twin)
        settle(block)
        assert ran(twin) == [SHORT] == ran(block)


def test_a_block_is_freed_with_its_shortcut() -> None:
    """Python's garbage collector does not see into the shortcut: it must keep no module alive."""
    block = mbv2.fuse(randomise(Flat(8, 48, 8)))
    settle(block)
    modules = [weakref.ref(module) for module in block.modules()]
    used = _C.mapped_memory()[1]
    del block
    gc.collect()
    assert all(module() is None for module in modules) and _C.mapped_memory()[1] < used


def test_inference_mode(block: nn.Module) -> None:
    with torch.inference_mode():
        y = block(torch.randn(X))
    assert y.is_inference() and ran(block) == [SHORT]
