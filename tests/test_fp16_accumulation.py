"""The fp16 tier, and the switch that lets float16 inference use it: off by default, exact enough, never stale."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from blocks import make_weights, relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from wild import Net, randomise

import mbv2_kernels as mbv2
from mbv2_kernels import _C, backends, cli, reference
from mbv2_kernels._bench.inputs import randomise_batch_norm
from mbv2_kernels._bench.verify import FP16_ACCUMULATION_BOUND, FP16_ACCUMULATION_SLACK

TIER = _C.fp16_tier()
HERE = mbv2.backends.fp16_accumulation_missing() is None
needs_tier = pytest.mark.skipif(not HERE, reason=f"no fp16 arithmetic here: {backends.fp16_accumulation_missing()}")
#: A rounding of every product's sum, and x, weights, e and d as fp16: twice what was measured on these random blocks.
BOUND = 4e-3

ops = torch.ops.mbv2


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    cap = _C.max_isa()
    yield
    mbv2.set_fp16_accumulation(False)
    mbv2.set_backend("auto")
    _C.set_max_isa(cap)


def calls_by_tier() -> dict[str, int]:
    found = {name: count for name, count in _C.counters().items() if count}
    _C.reset_counters()
    return found


def rounded(weights: list[Tensor | None]) -> list[Tensor | None]:
    return [None if w is None else w.half().double() for w in weights]


# ---- The tier --------------------------------------------------------------------------------------------------------


def run_packed(x: Tensor, weights: list[Tensor | None], *config: Any) -> Tensor:
    packed = ops.pack_inverted_residual(*weights, TIER["name"])
    w_expand, _, w_depthwise, _, w_project, _ = weights
    assert w_depthwise is not None and w_project is not None
    dims = w_depthwise.shape[0], w_project.shape[0], w_depthwise.shape[-1], w_expand is not None
    _C.reset_counters()
    y = ops.inverted_residual_packed(x, packed, *dims, *config)
    assert calls_by_tier() == {TIER["name"]: 1}
    return y


# Channels at the vector's width of 32 and beside it, depths at the limit of a part (40) and beside it.
@needs_tier
@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize(
    "channels", [(1, 1, 1), (16, 96, 24), (31, 33, 32), (40, 64, 41), (41, 65, 97), (160, 320, 160)]
)
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (5, 2, 1), (3, 1, 2), (7, 1, 1)])
def test_block_against_float64(
    channels: tuple[int, int, int], expand: bool, kernel: int, stride: int, dilation: int
) -> None:
    weights = make_weights(*channels, kernel, expand=expand)
    padding = dilation * (kernel - 1) // 2
    for size in ((7, 5), (15, 16)):
        x = torch.randn(2, channels[0], *size).half()
        for activation, memory_format in itertools.product(
            ("relu6", "none"), (torch.contiguous_format, torch.channels_last)
        ):
            config = (stride, padding, dilation, activation, "none", False)
            y = run_packed(x.contiguous(memory_format=memory_format), weights, *config)
            expected = reference.inverted_residual(
                x.double(), *rounded(weights), stride=stride, padding=padding, dilation=dilation, activation=activation
            )
            assert y.dtype is torch.float16 and y.is_contiguous(memory_format=torch.channels_last)
            assert relative_error(y, expected) < BOUND


@needs_tier
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("channels", "size"), [((64, 384, 64), 4), ((8, 32, 8), 21), ((24, 144, 24), 56)])
def test_residual_and_threads(channels: tuple[int, int, int], size: int, threads: int) -> None:
    """Hidden channels shared out, rows shared out, and several bands."""
    torch.set_num_threads(threads)
    weights, x = make_weights(*channels), torch.randn(1, channels[0], size, size).half()
    y = run_packed(x, weights, 1, 1, 1, "relu6", "none", True)
    assert relative_error(y, reference.inverted_residual(x.double(), *rounded(weights), residual=True)) < BOUND


@needs_tier
@pytest.mark.parametrize("out_channels", [1, 16, 31, 32, 33, 70])
@pytest.mark.parametrize(
    ("in_channels", "kernel", "stride", "padding"),
    [(3, 3, 2, 1), (3, 3, 1, 1), (5, 1, 1, 0), (320, 1, 1, 0), (41, 3, 1, 1), (2, 7, 3, 3)],
)
def test_convolution_against_float64(
    in_channels: int, out_channels: int, kernel: int, stride: int, padding: int
) -> None:
    weight, bias = torch.randn(out_channels, in_channels, kernel, kernel), torch.randn(out_channels)
    weight *= (in_channels * kernel * kernel) ** -0.5
    packed = ops.pack_conv(weight, bias, TIER["name"])
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, in_channels, 19, 17).half().contiguous(memory_format=memory_format)
        y = ops.conv_act_packed(x, packed, out_channels, kernel, stride, padding, "relu6")
        expected = F.relu6(F.conv2d(x.double(), weight.half().double(), bias.half().double(), stride, padding))
        assert relative_error(y, expected) < BOUND


@needs_tier
def test_long_sums_round_no_more_than_short_ones() -> None:
    """Sums in parts: without them the error would grow with the root of the depth, fivefold here."""
    errors = []
    for depth in (40, 1000):
        weight, x = torch.randn(64, depth, 1, 1) * depth**-0.5, torch.randn(1, depth, 16, 16).half()
        y = ops.conv_act_packed(x, ops.pack_conv(weight, None, TIER["name"]), 64, 1, 1, 0, "none")
        errors.append(relative_error(y, F.conv2d(x.double(), weight.half().double())))
    assert errors[1] < 2 * errors[0] < 4e-3


@needs_tier
def test_nan_and_infinity() -> None:
    """As in every tier: relu6 of NaN is NaN, of infinities 6 and 0; what exceeds 65504 is infinite."""
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0, 65504.0, -65504.0]).half().view(1, 1, 1, 6)
    eye = torch.ones(1, 1, 1, 1)
    for activation, expected in (
        ("relu6", [math.nan, 6, 0, 1, 6, 0]),
        ("relu", [math.nan, math.inf, 0, 1, 65504, 0]),
        ("none", [math.nan, math.inf, -math.inf, 1, 65504, -65504]),
    ):
        y = ops.conv_act_packed(x, ops.pack_conv(eye, None, TIER["name"]), 1, 1, 1, 0, activation)
        torch.testing.assert_close(y.flatten(), torch.tensor(expected).half(), rtol=0, atol=0, equal_nan=True)
    y = ops.conv_act_packed(x, ops.pack_conv(2 * eye, None, TIER["name"]), 1, 1, 1, 0, "none")
    assert y.flatten()[4:].tolist() == [math.inf, -math.inf]
    block = run_packed(x, [eye, None, eye, None, eye, None], 1, 0, 1, "relu6", "none", False)
    torch.testing.assert_close(
        block.flatten(), torch.tensor([math.nan, 6, 0, 1, 6, 0]).half(), rtol=0, atol=0, equal_nan=True
    )


@needs_tier
def test_weights_too_large_are_refused() -> None:
    weight = torch.tensor([65504.0, 65519.0, 1e-8]).view(3, 1, 1, 1)
    ops.pack_conv(weight, None, TIER["name"])  # rounded to the largest; to 0
    for value in (65520.0, 1e30, -1e30):
        with pytest.raises(RuntimeError, match="65504"):
            ops.pack_conv(weight + value - weight, None, TIER["name"])
        with pytest.raises(RuntimeError, match="65504"):
            ops.pack_inverted_residual(
                None, None, weight, torch.full((3,), value), torch.ones(2, 3, 1, 1), None, TIER["name"]
            )
    ops.pack_conv(torch.full((1, 1, 1, 1), math.inf), None, TIER["name"])  # what is infinite before stays so


# ---- The switch ------------------------------------------------------------------------------------------------------


def test_off_by_default() -> None:
    assert mbv2.get_fp16_accumulation() is False
    net = mbv2.fuse(randomise(Net()).half())
    _C.reset_counters()
    with torch.no_grad():
        net(torch.randn(1, 3, 32, 32).half())
    assert set(calls_by_tier()) == {_C.active_tier()}


def test_wrong_type() -> None:
    with pytest.raises(TypeError, match="allowed must be a bool, got 1"):
        mbv2.set_fp16_accumulation(1)  # type: ignore[arg-type]


def test_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = {**TIER, "runnable": False, "reason": "the CPU or the operating system lacks avx512fp16"}
    monkeypatch.setattr(_C, "fp16_tier", lambda: lacking)
    with pytest.raises(RuntimeError, match=r"cannot run here: tier avx512fp16: the CPU .* lacks avx512fp16"):
        mbv2.set_fp16_accumulation(True)
    assert not mbv2.get_fp16_accumulation()
    mbv2.set_fp16_accumulation(False)
    row = mbv2.status().backends[0].tiers[-1]
    assert (row.name, row.runnable, row.active) == ("avx512fp16", False, False) and "lacks avx512fp16" in row.reason


@needs_tier
def test_respects_the_cap() -> None:
    for cap in ("avx512", "avx512bf16x3", "avx512amx"):
        _C.set_max_isa(cap)
        mbv2.set_fp16_accumulation(True)
    _C.set_max_isa("avx2")
    with pytest.raises(RuntimeError, match=r"held to avx2 at most \(MBV2_MAX_ISA\)"):
        mbv2.set_fp16_accumulation(True)


@pytest.fixture
def net() -> nn.Module:
    return mbv2.fuse(randomise(Net()).half(), strict=True)


X = (2, 3, 33, 36)


def run_thrice(net: nn.Module, x: Tensor) -> tuple[Tensor, set[str]]:
    """The third call is the shortest way there is. (torch takes mean and classifier of a network's first.)"""
    _C.reset_counters()
    with torch.no_grad():
        ys = [net(x) for _ in range(3)]
    assert torch.equal(ys[1], ys[2]) and relative_error(ys[0], ys[1]) < 1e-3
    return ys[2], set(calls_by_tier())


def exact(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return mbv2.unfuse(copy.deepcopy(net)).double()(x.double())


@needs_tier
def test_on_and_off_again(net: nn.Module) -> None:
    x, active = torch.randn(X).half(), _C.active_tier()
    off, ran = run_thrice(net, x)
    assert ran == {active}
    for _ in range(2):
        mbv2.set_fp16_accumulation(True)
        on, ran = run_thrice(net, x)
        assert ran == {TIER["name"]} and not torch.equal(on, off)
        assert {row.tier for row in mbv2.summary(net) if row.fused} == {TIER["name"]}
        assert relative_error(on, exact(net, x)) < FP16_ACCUMULATION_BOUND
        mbv2.set_fp16_accumulation(False)
        again, ran = run_thrice(net, x)
        assert ran == {active} and torch.equal(again, off)
        assert {row.tier for row in mbv2.summary(net) if row.fused} == {active}
    for allowed in (False, True):
        mbv2.set_fp16_accumulation(allowed)
        row = mbv2.status().backends[0].tiers[-1]
        assert (row.name, row.active) == (TIER["name"], allowed)


@needs_tier
def test_whole_network_as_one_call() -> None:
    """Features, mean and classifier: the last two compute in float32 as ever."""
    net = mbv2.models.mobilenet_v2(width_mult=0.35, num_classes=10).eval()
    randomise_batch_norm(net, 64)
    net = mbv2.fuse(net.half())
    x = torch.randn(2, 3, 64, 64).half()
    mbv2.set_fp16_accumulation(True)
    y, ran = run_thrice(net, x)
    assert ran == {TIER["name"], _C.active_tier()}
    with torch.no_grad():
        unfused = mbv2.unfuse(copy.deepcopy(net))(x)
    assert relative_error(y, exact(net, x)) < FP16_ACCUMULATION_SLACK * relative_error(unfused, exact(net, x)) < 0.1


@needs_tier
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_not_affected(dtype: torch.dtype) -> None:
    net, x = mbv2.fuse(randomise(Net()).to(dtype)), torch.randn(X).to(dtype)
    off, before = run_thrice(net, x)
    mbv2.set_fp16_accumulation(True)
    on, ran = run_thrice(net, x)
    assert ran == before == {backends.tier_of(dtype)} and torch.equal(on, off)


@needs_tier
def test_weights_that_change_are_packed_anew(net: nn.Module) -> None:
    mbv2.set_fp16_accumulation(True)
    x = torch.randn(X).half()
    was, _ = run_thrice(net, x)
    net.load_state_dict(randomise(Net(), seed=1).half().state_dict())
    now, ran = run_thrice(net, x)
    assert ran == {TIER["name"]}
    assert relative_error(now, exact(net, x)) < FP16_ACCUMULATION_BOUND < relative_error(was, exact(net, x))
    # ... also those that changed while the other arithmetic ran
    mbv2.set_fp16_accumulation(False)
    net.load_state_dict(randomise(Net(), seed=2).half().state_dict())
    run_thrice(net, x)
    mbv2.set_fp16_accumulation(True)
    then, _ = run_thrice(net, x)
    assert relative_error(then, exact(net, x)) < FP16_ACCUMULATION_BOUND < relative_error(now, exact(net, x))


@needs_tier
def test_copies(net: nn.Module) -> None:
    mbv2.set_fp16_accumulation(True)
    x = torch.randn(X).half()
    y, _ = run_thrice(net, x)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        again, ran = run_thrice(other, x)
        assert torch.equal(again, y) and ran == {TIER["name"]}


@needs_tier
def test_from_several_threads(net: nn.Module) -> None:
    mbv2.set_fp16_accumulation(True)
    x = torch.randn(X).half()
    expected, _ = run_thrice(net, x)
    results: list[Tensor] = []

    def work() -> None:
        with torch.no_grad():
            results.extend(net(x) for _ in range(8))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 32 and all(torch.equal(y, expected) for y in results)


@needs_tier
def test_backward_and_training_stay_in_float32() -> None:
    """The forward in eval mode is the same with and without gradients; its gradients do not depend on the switch."""
    block = randomise(mbv2.FusedInvertedResidual(8, 8)).half()
    x = torch.randn(2, 8, 9, 9).half()
    grad, gradients = torch.randn(2, 8, 9, 9).half(), []
    for allowed in (False, True):
        mbv2.set_fp16_accumulation(allowed)
        y = block(x)
        assert torch.equal(y.detach(), run_thrice(block, x)[0])
        gradients.append(torch.autograd.grad(y, [*block.parameters()], grad))
    assert all(map(torch.equal, *gradients))
    block.train()
    _C.reset_counters()
    block(x).float().sum().backward()
    assert TIER["name"] not in calls_by_tier()


@needs_tier
def test_autocast() -> None:
    net, x = mbv2.fuse(randomise(Net())), torch.randn(X)
    mbv2.set_fp16_accumulation(True)
    _C.reset_counters()
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        y = net(x)
    assert TIER["name"] in calls_by_tier() and relative_error(y, exact(net, x)) < 2e-2


@needs_tier
def test_functional_form() -> None:
    weights, x = make_weights(), torch.randn(1, 8, 9, 9).half()
    mbv2.set_fp16_accumulation(True)
    _C.reset_counters()
    y = mbv2.inverted_residual(x, *(None if w is None else w.half() for w in weights))
    assert set(calls_by_tier()) == {TIER["name"]}
    assert relative_error(y, reference.inverted_residual(x.double(), *rounded(weights))) < BOUND


@needs_tier
def test_compiled_code_follows_the_switch(net: nn.Module) -> None:
    x = torch.randn(X).half()
    compiled = torch.compile(net, backend="aot_eager")
    with torch.no_grad():
        compiled(x)
        for allowed in (True, False):
            mbv2.set_fp16_accumulation(allowed)
            _C.reset_counters()
            y = compiled(x)
            assert set(calls_by_tier()) == {TIER["name"] if allowed else _C.active_tier()}
            assert torch.equal(y, net(x))


# ---- The command line ------------------------------------------------------------------------------------------------

SMALL = ("--model", "builtin:mobilenet_v2", "--size", "32", "--dtype", "float16", "--fp16-accumulation")


@needs_tier
def test_verify_shows_both_errors(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "verify.json"
    assert cli.main(["verify", *SMALL, "--batch", "1", "--json", str(file)]) == 0
    assert "float32 sums" in capsys.readouterr().out
    content = json.loads(file.read_text())
    for row in (content["network"], *content["blocks"]):
        assert 0 < row["float32_error"] < row["error"] <= row["limit"]
    assert {block["limit"] for block in content["blocks"]} == {FP16_ACCUMULATION_BOUND}
    assert {block["tier"] for block in content["blocks"]} == {TIER["name"]}
    assert not mbv2.get_fp16_accumulation()


@needs_tier
def test_bench_times_both(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    options = ("--only", "network", "--no-compile", "--seconds", "0.01", "--json", str(file))
    assert cli.main(["bench", *SMALL, *options]) == 0
    errors = json.loads(file.read_text())["network"]["errors"]
    assert errors["fused"] < errors["fused fp16 sums"] < FP16_ACCUMULATION_SLACK * errors["eager"]
    assert "fused fp16 sums" in capsys.readouterr().out
    assert not mbv2.get_fp16_accumulation()


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_only_for_float16(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--fp16-accumulation", "--dtype", "bfloat16"]) == 2
    assert "with --dtype float16" in capsys.readouterr().err


def test_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "fp16_accumulation_missing", lambda: "tier avx512fp16: no such CPU")
    assert cli.main(["bench", *SMALL]) == 2
    assert "cannot run here: tier avx512fp16: no such CPU" in capsys.readouterr().err
