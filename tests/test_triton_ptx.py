"""The compiled kernels, executed: what Triton and its PTX back end made of them for GPUs that are not here runs on the
CPU (ptx_machine.py), every thread of it, with the arguments that ops.py passes. Right against fp64 and, of shared
memory, without a race. For bfloat16 in plain Triton there is no other way, its interpreter gets that wrong.

The Gluon kernels are those of test_gluon_offline.py (MBV2_OFFLINE_ALL=1: every block, some minutes); of a full-size
block the first and the last program run. What is left to a GPU: ptxas, races in global memory, and every time.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import BOUNDS, make_weights
from ptx_machine import Program, PtxError
from test_gluon_offline import KEYS, Key

from mbv2_kernels import reference
from mbv2_kernels.triton import gluon_configs, gluon_offline, offline, ops

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if tuple(map(int, gluon_offline.triton_version().split("."))) < gluon_configs.OLDEST_TRITON:
    pytest.skip(f"Triton {gluon_offline.triton_version()} is too old for Gluon", allow_module_level=True)
if ops.interpreted():
    pytest.skip("Triton was imported as an interpreter: nothing compiles", allow_module_level=True)


@functools.cache
def compiled(name: str, sm: int, dtype: str, half: bool, batch: int = 256) -> tuple[str, int, gluon_configs.Plan]:
    """Of a batch of 1 split as the tables say."""
    splits = None if batch == 1 else 1
    kernel, plan = gluon_offline.compile_block(offline.BLOCKS[name], sm, dtype, batch, half=half, splits=splits)
    return kernel.asm["ptx"], kernel.metadata.shared, plan


def draw(block: offline.Block, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[Any], torch.Tensor]:
    """x, folded weights and a y of NaN for one image of size x size pixels."""
    x = torch.randn(1, block.in_channels, size, size).to(dtype)
    weights = make_weights(
        block.in_channels, block.hidden_channels, block.out_channels, block.kernel, expand=block.expand, dtype=dtype
    )
    out = -(-size // block.stride)
    y = torch.full((1, block.out_channels, out, out), float("nan"), dtype=dtype)
    return *(t.contiguous(memory_format=torch.channels_last) for t in (x, y)), weights  # type: ignore[return-value]


def exact(block: offline.Block, x: torch.Tensor, weights: list[Any]) -> torch.Tensor:
    return reference.inverted_residual(
        x.double(), *[None if w is None else w.double() for w in weights], stride=block.stride,
        padding=block.kernel // 2, activation=block.activation, final_activation=block.final_activation,
        residual=block.residual,
    )  # fmt: skip


class Kernel:
    """Stands for a compiled kernel in ops.py: a launch runs `programs` of its grid. `constants`: arguments (by their
    place) that were compiled in, as None is."""

    def __init__(self, ptx: str, shared: int, programs: Callable[[int], set[int]], constants: dict[int, int] = {}):  # noqa: B006
        self.program, self.shared, self.programs, self.constants = Program(ptx), shared, programs, constants

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            assert all(arguments[place] == value for place, value in self.constants.items())
            given = [a for place, a in enumerate(arguments) if a is not None and place not in self.constants]
            for number, split in itertools.product(sorted(self.programs(grid[0])), range(grid[1])):
                self.program.run((number, split), given, self.shared)

        return launch


def run(
    monkeypatch: pytest.MonkeyPatch, key: Key, edit: Callable[[str], str] = lambda ptx: ptx,
    programs: Callable[[int], set[int]] = lambda count: {0, count - 1}, batch: int = 256,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(y of the Gluon kernel, NaN where no program ran; y in fp64)."""
    from mbv2_kernels.triton import gluon_kernels

    ptx, shared, plan = compiled(*key, batch)
    block = offline.BLOCKS[key[0]]
    x, y, weights = draw(block, block.size, getattr(torch, key[2]))
    monkeypatch.setattr(gluon_kernels, "fused_block", Kernel(edit(ptx), shared, programs))
    # compiled for a large batch; one image needs as many programs as it has parts
    plan = plan._replace(programs=-(-plan.parts_y * plan.parts_x // plan.cut.parts))
    pad = block.kernel // 2
    ops._launch_gluon(
        x, tuple(weights), y, plan, block.kernel, block.stride, pad, pad, block.activation, block.final_activation,
        block.residual,
    )  # fmt: skip
    return y, exact(block, x, weights)


OTHERS: list[Key] = [("k5s1", 90, "float16", False), ("v1_128_128_s1", 89, "bfloat16", False)]


@pytest.mark.parametrize("key", KEYS + OTHERS, ids=lambda key: "-".join(map(str, key)))
def test_right_and_without_races(monkeypatch: pytest.MonkeyPatch, key: Key) -> None:
    y, want = run(monkeypatch, key)
    computed = ~y.isnan()
    bound = BOUNDS[y.dtype]
    error = (y.double() - want)[computed]
    print(f"{'-'.join(map(str, key))}: {int(computed.sum())} outputs, error {error.norm() / want[computed].norm():.1e}")
    assert computed[0, :, 0, 0].all() and computed[-1, :, -1, -1].all() and computed.any(1).equal(computed.all(1))
    assert error.norm() < bound * want[computed].norm()
    assert error.abs().max() < 4 * bound * want[computed].abs().max()


def test_a_split_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image of a late block: programs that share its hidden channels leave fp32 sums."""

    def sum_splits(
        partial: torch.Tensor, b3: Any, x: torch.Tensor, y: torch.Tensor, splits: int, final: str, residual: bool
    ) -> None:
        assert splits > 1 and residual
        y.copy_((partial.view(splits, *y.shape[2:], y.shape[1]).sum(0) + b3).permute(2, 0, 1) + x)

    monkeypatch.setattr(ops, "_sum_splits", sum_splits)
    y, want = run(monkeypatch, ("b15", 90, "float16", False), batch=1)
    assert (y.double() - want).norm() < BOUNDS[y.dtype] * want.norm()


def _without(ptx: str, instruction: str, at: int) -> str:
    """The PTX without the last such instruction at or before the `at`th one of its text."""
    place = [m.start() for m in re.finditer(instruction, ptx)][at]
    return ptx[:place] + "mov.u32 %nothing, 0" + ptx[place:][ptx[place:].index(";") :]


FAULTS = {
    "no barrier behind the table": lambda ptx: _without(ptx, r"bar\.sync", 0),
    "no barrier 2": lambda ptx: _without(ptx, r"bar\.sync", -1),
    "no fence": lambda ptx: _without(ptx, r"fence\.proxy", 0),
    "no wait for copies": lambda ptx: re.sub(r"cp\.async\.wait_group\s+0;", "mov.u32 %nothing, 0;", ptx),
    "a wrong swizzle": lambda ptx: ptx.replace("-9223371899415822336", "-4611685949707911168"),  # 32 for 64 bytes
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_ptx_is_noticed(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """The checks above can fail."""
    key = ("b3", 90, "float16", False)
    assert FAULTS[fault](compiled(*key)[0]) != compiled(*key)[0]
    try:
        y, want = run(monkeypatch, key, FAULTS[fault], lambda count: {0})
    except PtxError:
        return
    computed = ~y.isnan()
    assert not (y.double() - want)[computed].norm() < BOUNDS[y.dtype] * want[computed].norm()


@pytest.mark.parametrize(("name", "sm", "size"), [("b3", 90, 10), ("b15", 80, 5), ("b1", 89, 9), ("k5s2", 90, 9)])
def test_bfloat16_in_plain_triton(monkeypatch: pytest.MonkeyPatch, name: str, sm: int, size: int) -> None:
    """The twin, on images smaller than those it was compiled for: one program works through all tiles."""
    from mbv2_kernels.triton import kernels

    block = offline.BLOCKS[name]
    kernel, plan = offline.compile_block(block, sm, "bfloat16")
    x, y, weights = draw(block, size, torch.bfloat16)
    out = y.shape[-1]
    tiles_y, tiles_x = -(-out // plan.tile_height), -(-out // plan.tile_width)
    plan = plan._replace(tiles_y=tiles_y, tiles_x=tiles_x, tiles=tiles_y * tiles_x * plan.column_groups, programs=1)
    unit_stride = kernels.fused_block.arg_names.index("wd_stride_c")
    ran = Kernel(kernel.asm["ptx"], kernel.metadata.shared, lambda count: {0}, {unit_stride: 1})
    monkeypatch.setattr(kernels, "fused_block", ran)
    w1, b1, wd, b2, w2, b3 = ops.prepare_weights(torch.bfloat16, *weights)
    taps = wd.reshape(block.hidden_channels, -1)  # type: ignore[union-attr]
    matrices = (None if w1 is None else w1.flatten(1), b1, taps, b2, w2.flatten(1), b3)  # type: ignore[union-attr]
    pad = block.kernel // 2
    ops._launch(
        x, *matrices, y, plan, block.kernel, block.stride, 1, pad, pad, block.activation, block.final_activation,
        block.residual, True,
    )  # fmt: skip
    want = exact(block, x, weights)
    assert (y.double() - want).norm() < BOUNDS[torch.bfloat16] * want.norm()
    assert (y.double() - want).abs().max() < 4 * BOUNDS[torch.bfloat16] * want.abs().max()
