"""Which of the two Triton kernels runs, and why; what ops.py hands to the Gluon kernel. No GPU, nothing is compiled."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from mbv2_kernels.triton import gluon_configs, offline
from mbv2_kernels.triton.configs import Device, Problem
from mbv2_kernels.triton.gluon_configs import Pads, Tile, choose

B3 = offline.BLOCKS["b3"].problem(256)
ONE = Pads(1, 1, 1, 1)
H200 = Device(90, 132)


def test_an_unchecked_kernel_is_not_the_default() -> None:
    assert not gluon_configs.CHECKED, "a GPU has run it: state here on which and what it found"
    plan, reason = choose(B3, H200, (3, 8), ONE, 56 * 56)
    assert plan is None and "not been checked on compute capability 9.0" in reason


def test_asking_for_it() -> None:
    plan, reason = choose(B3, H200, (3, 8), ONE, 56 * 56, "gluon")
    assert plan is not None and plan.hopper and reason == "asked for"
    assert choose(B3, H200, (3, 8), ONE, 56 * 56, "triton") == (None, "asked for")


def test_a_checked_kernel_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gluon_configs.CHECKED, 90, "H200, Triton 3.8")
    plan, reason = choose(B3, H200, (3, 8), ONE, 56 * 56)
    assert plan is not None and reason == "checked on H200, Triton 3.8"
    assert choose(B3, Device(80, 108), (3, 8), ONE, 56 * 56)[0] is None


@pytest.mark.parametrize(
    ("problem", "device", "triton", "reason"),
    [
        (B3, H200, (3, 6), "Triton 3.6 is older than 3.8"),
        (B3, Device(100, 148), (3, 8), "not compiled for compute capability 10.0"),
        (B3._replace(element_size=4), H200, (3, 8), "float16 and bfloat16"),
        (B3._replace(kernel=7), H200, (3, 8), "not 7, 1"),
        (B3._replace(stride=3), H200, (3, 8), "not 3, 3"),
        (B3._replace(dilation=2), H200, (3, 8), "dilation 2"),
        (B3._replace(hidden_channels=136), H200, (3, 8), "136 hidden channels are no multiple of 16"),
        (B3._replace(hidden_channels=140), H200, (3, 8), "24, 140, 24 channels are not all multiples of 8"),
        (B3._replace(out_channels=512), H200, (3, 8), "at most 256, 320"),
        (B3._replace(in_channels=512), H200, (3, 8), "at most 256, 320"),
    ],
)
def test_what_it_leaves_to_its_twin(problem: Problem, device: Device, triton: tuple[int, int], reason: str) -> None:
    plan, why = choose(problem, device, triton, ONE, 56 * 56, "gluon")
    assert plan is None and reason in why


def test_offsets_that_need_64_bits_are_left_to_its_twin() -> None:
    huge = B3._replace(out_height=8000, out_width=8000)
    plan, why = choose(huge, H200, (3, 8), ONE, 8000 * 8000, "gluon")
    assert plan is None and "no tile fits" in why


@pytest.mark.parametrize("capability", sorted(gluon_configs.SHARED))
@pytest.mark.parametrize("block", offline.MOBILENET_V2, ids=lambda b: b.name)
def test_every_block_of_the_network_has_a_plan(block: offline.Block, capability: int) -> None:
    for batch in (1, 256):
        plan, why = choose(block.problem(batch), Device(capability, 100), (3, 8), ONE, block.size**2, "gluon")
        assert plan is not None, why
        limit = gluon_configs.SHARED[capability] - gluon_configs.SHARED_RESERVED
        assert gluon_configs.shared_bytes(block.problem(batch), plan.tile, plan.cut) <= limit
        assert plan.tile.outputs >= 16 * plan.tile.warps and plan.tile.block >= 16 * plan.tile.warps
        assert 1 <= plan.splits <= -(-block.hidden_channels // plan.tile.chunk)


def test_late_blocks_are_split_at_batch_1() -> None:
    for name in ("b8", "b12", "b15", "b17"):
        block = offline.BLOCKS[name]
        plan, _ = choose(block.problem(1), H200, (3, 8), ONE, block.size**2, "gluon")
        assert plan is not None and plan.programs * plan.splits >= 9


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_choice_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What `summary` shows and the log says: by default, by wish (a warning where it cannot be), by demand."""
    from mbv2_kernels.triton import ops

    monkeypatch.setattr(ops, "triton_version", lambda: (3, 8))
    monkeypatch.delenv(ops.KERNEL_VARIABLE, raising=False)
    ops._report.cache_clear()
    arguments = H200, ONE, 56 * 56
    plan, reason = ops._choose_gluon(B3, *arguments, None, True)
    assert plan is None and "not been checked" in reason
    monkeypatch.setenv(ops.KERNEL_VARIABLE, "gluon")
    plan, reason = ops._choose_gluon(B3, *arguments, None, True)
    assert plan is not None and reason == "asked for" and not caplog.records
    for _ in range(2):
        plan, reason = ops._choose_gluon(B3, *arguments, None, False)
    assert plan is None and "does not start at a multiple of 16 bytes" in reason
    assert [record.message for record in caplog.records] == [f"blocks run the Triton kernel: {reason}"]
    with pytest.raises(ValueError, match="dilation 2"):
        ops._choose_gluon(B3._replace(dilation=2), *arguments, "gluon", True)


class _Launch:
    """Stands in for the compiled kernel: records the grid and the arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: self.calls.append((grid, args, options))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("splits", [1, 3])
def test_arguments_of_a_launch(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    """Names, order, types and alignment of what the kernel is given, from weights that are none of that."""
    from mbv2_kernels.triton import ops

    if ops.triton_version() < gluon_configs.OLDEST_TRITON:
        pytest.skip("this Triton is too old for Gluon")
    from mbv2_kernels.triton import gluon_kernels, kernels

    first, second = _Launch(), _Launch()
    names = gluon_kernels.fused_block.arg_names
    monkeypatch.setattr(gluon_kernels, "fused_block", first)
    monkeypatch.setattr(kernels, "sum_splits", second)
    x = torch.randn(2, 16, 7, 7, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    w1 = torch.randn(49, 16, 1, 1)[1:]
    odd = torch.randn(48 * 16 + 1, dtype=torch.float16)[1:].view(16, 48, 1, 1)  # starts at an odd address
    taps = torch.randn(48, 1, 3, 3, dtype=torch.bfloat16)
    bias = torch.randn(48, dtype=torch.float16)
    y = torch.empty(2, 16, 7, 7, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    problem = Problem(2, 7, 7, 16, 48, 16, 3, 1, 1, True, 2)
    plan = gluon_configs.plan(problem, H200, ONE, 49, Tile(128, 4, 16, 64, 1), splits)
    assert plan is not None and plan.lead > 0
    ops._launch_gluon(x, (w1, bias, taps, None, odd, None), y, plan, 3, 1, 1, 1, "relu6", "none", True)
    ((grid, args, options),) = first.calls
    assert grid == (plan.programs, splits)
    given = dict(zip(names, args, strict=False)) | options
    assert set(given) == set(names) | {"num_warps"}
    assert torch.equal(given["w1_ptr"], w1.half()) and torch.equal(given["w2_ptr"], odd)
    assert torch.equal(given["wd_ptr"].reshape(9, 48), taps.reshape(48, 9).T.float())
    assert all(
        t.data_ptr() % 16 == 0 and t.is_contiguous() for t in (given["w1_ptr"], given["w2_ptr"], given["wd_ptr"])
    )
    assert given["b1_ptr"].dtype == torch.float32 and given["b2_ptr"] is None
    assert (given["pad_top"], given["pad_left"]) == (0, 0)  # a part is an image: its zeros are in the window
    assert given["y_ptr"] is y if splits == 1 else given["y_ptr"].shape == (splits * y.numel(),)
    assert len(second.calls) == (splits > 1)
