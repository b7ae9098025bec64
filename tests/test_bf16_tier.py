"""The tier for bfloat16: what it runs and what it leaves to the fp32 tiers, and that a cap of those turns it off."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from blocks import DTYPES, make_weights
from torch import Tensor, nn
from wild import Flat, Net, error, randomise

import mbv2_kernels as mbv2
from mbv2_kernels import _C, backends
from mbv2_kernels._bench.inputs import randomise_batch_norm

TIER = _C.bf16_tier()
FP32 = [tier["name"] for tier in _C.tiers() if tier["runnable"]]
pytestmark = pytest.mark.usefixtures("no_cap")
needs_tier = pytest.mark.skipif(not TIER["runnable"], reason=f"tier {TIER['name']} cannot run here: {TIER['reason']}")
X = (2, 3, 33, 36)

ops = torch.ops.mbv2


def calls_by_tier() -> set[str]:
    found = {name for name, count in _C.counters().items() if count}
    _C.reset_counters()
    return found


def net_of(dtype: torch.dtype) -> nn.Module:
    return mbv2.fuse(randomise(Net()).to(dtype), strict=True)


@torch.no_grad()
def run_thrice(net: nn.Module, x: Tensor) -> tuple[Tensor, set[str]]:
    """The third call is the shortest way there is."""
    _C.reset_counters()
    ys = [net(x) for _ in range(3)]
    assert torch.equal(ys[1], ys[2])
    return ys[2], calls_by_tier()


# ---- What runs it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bfloat16_and_nothing_else(dtype: torch.dtype) -> None:
    """By default, in networks (stem, blocks, head), in the functional form and in the op."""
    expected = {TIER["name"] if dtype is torch.bfloat16 and TIER["runnable"] else _C.active_tier()}
    assert {backends.tier_of(dtype)} == expected
    net = net_of(dtype)
    _, ran = run_thrice(net, torch.randn(X).to(dtype))
    assert ran == expected
    assert {row.tier for row in mbv2.summary(net) if row.fused} == expected
    x, weights = torch.randn(1, 8, 9, 9).to(dtype), make_weights(dtype=dtype)
    _C.reset_counters()
    mbv2.inverted_residual(x, *weights)
    assert calls_by_tier() == expected
    ops.inverted_residual(x, *weights, 1, 1, 1, "relu6", "none", False)
    assert calls_by_tier() == expected


@pytest.mark.parametrize("cap", FP32)
def test_off_under_a_cap_and_on_again(cap: str) -> None:
    """What was packed for either is kept, and runs again."""
    net, x = net_of(torch.bfloat16), torch.randn(X).bfloat16()
    default, ran = run_thrice(net, x)
    assert ran == {_C.active_bf16_tier()}
    packings = []
    for _ in range(2):
        _C.set_max_isa(cap)
        capped, ran = run_thrice(net, x)
        assert ran == {cap} == {row.tier for row in mbv2.summary(net) if row.fused}
        assert error(capped, default) < 3e-2
        packings.append(_C.mapped_memory()[1])
        _C.set_max_isa(TIER["name"])
        again, ran = run_thrice(net, x)
        assert ran == {_C.active_bf16_tier()} == {row.tier for row in mbv2.summary(net) if row.fused}
        assert torch.equal(again, default)
    assert packings[0] == packings[1]


@needs_tier
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_compute_as_under_a_cap(dtype: torch.dtype) -> None:
    net, x = net_of(dtype), torch.randn(X).to(dtype)
    y, _ = run_thrice(net, x)
    _C.set_max_isa(FP32[0])
    capped, _ = run_thrice(net, x)
    assert torch.equal(capped, y)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plans_of_chains_end_with_their_tier(dtype: torch.dtype) -> None:
    """A cap that changes the tier for bfloat16 only leaves the others' plans and shortcuts alone."""
    chain = mbv2.fuse(randomise(nn.Sequential(Flat(8, 24, 8), Flat(8, 48, 8)))).to(dtype)
    x = torch.randn(2, 8, 9, 7).to(dtype)
    run_thrice(chain, x)
    for cap in (FP32[0], None, TIER["name"], FP32[0]):
        was, plan = backends.tier_of(dtype), chain.forward.plan
        _C.set_max_isa(cap)
        same = backends.tier_of(dtype) == was
        assert (chain.forward.shortcut(x) is not None) == plan.holds(dtype) == same
        _, ran = run_thrice(chain, x)
        assert ran == {backends.tier_of(dtype)}
        assert (chain.forward.plan is plan) == same


@needs_tier
def test_whole_network_as_one_call() -> None:
    """Features in the tier for bfloat16; mean and classifier in the fp32 tier as ever."""
    net = mbv2.models.mobilenet_v2(width_mult=0.35, num_classes=10).eval()
    randomise_batch_norm(net, 64)
    net = mbv2.fuse(net.bfloat16())
    x = torch.randn(2, 3, 64, 64).bfloat16()
    y, ran = run_thrice(net, x)
    assert ran == {TIER["name"], _C.active_tier()}
    with torch.no_grad():
        exact, unfused = copy.deepcopy(mbv2.unfuse(net)).double()(x.double()), net(x)
    assert error(y, exact) < 2 * error(unfused, exact) < 0.2


@needs_tier
def test_autocast() -> None:
    net, x = net_of(torch.float32), torch.randn(X)
    _C.reset_counters()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        net(x)
    assert calls_by_tier() == {TIER["name"]}


@needs_tier
def test_compiled_code_follows_the_cap() -> None:
    net, x = net_of(torch.bfloat16), torch.randn(X).bfloat16()
    compiled = torch.compile(net, backend="aot_eager")
    with torch.no_grad():
        for cap in (None, FP32[0], None):
            _C.set_max_isa(cap)
            compiled(x)
            _C.reset_counters()
            y = compiled(x)
            assert calls_by_tier() == {_C.active_bf16_tier()}
            assert torch.equal(y, net(x))


# ---- What does not ---------------------------------------------------------------------------------------------------


@needs_tier
def test_backward_and_training_stay_in_float32() -> None:
    """The forward in eval mode is the same with and without gradients; its gradients do not depend on the tier."""
    block = randomise(mbv2.FusedInvertedResidual(8, 8)).bfloat16()
    x = torch.randn(2, 8, 9, 9).bfloat16()
    grad, gradients = torch.randn(2, 8, 9, 9).bfloat16(), []
    for cap in (None, FP32[0]):
        _C.set_max_isa(cap)
        _C.reset_counters()
        y = block(x)
        assert calls_by_tier() == {_C.active_bf16_tier()}
        gradients.append(torch.autograd.grad(y, [*block.parameters()], grad))
        assert TIER["name"] not in calls_by_tier()
        assert torch.equal(y.detach(), run_thrice(block, x)[0])
    assert all(itertools.starmap(torch.equal, zip(*gradients, strict=True)))
    _C.set_max_isa(None)
    for memory in ("fast", "lean"):
        net = mbv2.fuse(randomise(Net()).bfloat16(), memory=memory).train()
        _C.reset_counters()
        net(torch.randn(X).bfloat16()).float().sum().backward()
        assert calls_by_tier() <= {_C.active_tier()}


@needs_tier
def test_the_unpacked_convolution_stays_in_float32() -> None:
    """`conv_act` is a phase of training steps, too."""
    _C.reset_counters()
    ops.conv_act(torch.randn(1, 3, 8, 8).bfloat16(), torch.randn(4, 3, 3, 3), None, 2, 1, "relu6")
    assert calls_by_tier() == {_C.active_tier()}
