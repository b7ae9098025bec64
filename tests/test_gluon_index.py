"""The Gluon kernel's index arithmetic, on any machine: its functions of indices (triton/gluon_index.py, which the
kernel compiles) run here over arrays.

What is caught: a wrong pixel, slot or mask, a slot that is read before it is written, an output that is written twice
or never, an address outside the allocation, at odd sizes, strides, several parts and images a program, splits. Unlike
test_gluon_kernel.py, which runs the kernel's own code, this affords the network's full sizes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from mbv2_kernels.triton import gluon_configs, gluon_index, offline
from mbv2_kernels.triton.configs import Device, Problem
from mbv2_kernels.triton.gluon_configs import Pads, Plan, Tile

UNWRITTEN = -2


class DeviceInts(np.ndarray):
    """Integers whose // and % refuse what the device would compute differently: anything negative."""

    def __floordiv__(self, other: Any) -> Any:
        assert (np.asarray(self) >= 0).all() and other > 0
        return super().__floordiv__(other)

    def __mod__(self, other: Any) -> Any:
        assert (np.asarray(self) >= 0).all() and other > 0
        return super().__mod__(other)


def arange(stop: int, start: int = 0) -> DeviceInts:
    return np.arange(start, stop, dtype=np.int64).view(DeviceInts)


class Case(NamedTuple):
    """A call: x [batch, in_channels, height, width]."""

    batch: int = 2
    height: int = 9
    width: int = 11
    kernel: int = 3
    stride: int = 1
    padding: int | None = None  # None: (kernel - 1) // 2; -1: "same"
    in_channels: int = 8
    hidden_channels: int = 48
    out_channels: int = 8
    expand: bool = True
    residual: bool = False
    tile: Tile | None = Tile(outputs=128, warps=4, chunk=16, block=64, resident=1)  # None: the table's
    splits: int | None = 1
    capability: int = 90

    def pads(self) -> Pads:
        if self.padding != -1:
            pad = self.kernel // 2 if self.padding is None else self.padding
            return Pads(pad, pad, pad, pad)
        total = [max((-(-s // self.stride) - 1) * self.stride + self.kernel - s, 0) for s in (self.height, self.width)]
        return Pads(total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)

    def out(self) -> tuple[int, int]:
        top, bottom, left, right = self.pads()
        height = (self.height + top + bottom - self.kernel) // self.stride + 1
        return height, (self.width + left + right - self.kernel) // self.stride + 1

    def plan(self) -> Plan:
        problem = Problem(
            self.batch, *self.out(), self.in_channels, self.hidden_channels, self.out_channels, self.kernel,
            self.stride, 1, self.expand, 2,
        )  # fmt: skip
        device = Device(self.capability, 100)
        assert gluon_configs.refusal(problem, device, (3, 8)) is None
        plan = gluon_configs.plan(problem, device, self.pads(), self.height * self.width, self.tile, self.splits)
        assert plan is not None
        return plan


class Geometry:
    """The kernel's indices for one plan, by the kernel's own functions."""

    def __init__(self, case: Case):
        self.case, self.plan = case, case.plan()
        self.k = k = self.plan.constants()
        self.step = self.plan.cut.patch_columns * case.stride
        self.grid = gluon_configs.grid(self.plan.cut)
        assert k["PH"] * k["PW"] == k["Q"] // (8 * self.plan.tile.warps)
        self.last_slot = k["STORAGE"] // k["PITCH"] - 1

    def windows(self, program: int) -> np.ndarray:
        """The pixel of x in each slot of e, from image n on; -1: zero."""
        case, k = self.case, self.k
        first = np.int64(program * k["NI"])
        pads = (0, 0) if k["LEAD"] else (case.pads().top, case.pads().left)
        pixel, inside = gluon_index.input_pixel(
            arange(k["TABLE"]), first, first // (k["TY"] * k["TX"]), case.batch, case.height, case.width, *pads,
            *(k[name] for name in ("NI", "TY", "TX", "TH", "TW")), case.stride, k["IH"], k["IW"],
        )  # fmt: skip
        table = np.where(inside, pixel, -1)
        slots = np.full(self.last_slot + 1, UNWRITTEN)
        slots[: k["LEAD"]] = -1
        for block in range(k["NP"]):
            p = block * k["BP"] + gluon_index.slot_of_row(arange(k["BP"]), self.step)
            slot = np.minimum(k["LEAD"] + p, self.last_slot)
            assert sorted(p) == list(range(block * k["BP"], (block + 1) * k["BP"]))
            assert (table[p][k["LEAD"] + p >= self.last_slot] == -1).all(), "a used slot shares the last one"
            slots[slot] = table[p]
        return slots

    def first_taps(self) -> np.ndarray:
        k = self.k
        return gluon_index.row_slot(
            arange(k["Q"]), self.plan.tile.warps, k["NI"], *self.grid, k["PH"], k["PW"], self.case.stride, k["IH"],
            k["IW"],
        )  # fmt: skip

    def outputs(self, program: int) -> tuple[np.ndarray, np.ndarray, int]:
        """(pixel of y from image n on, whether it is one) of each row; n."""
        case, k = self.case, self.k
        first = np.int64(program * k["NI"])
        n = first // (k["TY"] * k["TX"])
        pixel, valid = gluon_index.output_pixel(
            arange(k["Q"]), first, n, case.batch, *case.out(), self.plan.tile.warps, k["NI"], k["TY"], k["TX"],
            k["TH"], k["TW"], *self.grid, k["PH"], k["PW"],
        )  # fmt: skip
        return pixel, valid, int(n)


T64 = Tile(64, 4, 16, 64, 1)
T256 = Tile(256, 4, 32, 64, 1)
T8 = Tile(256, 8, 32, 128, 1)
CASES = {
    "odd sizes": Case(),
    "one pixel": Case(height=1, width=1, batch=3),
    "one row": Case(height=1, width=37),
    "one column": Case(height=37, width=1, tile=T64),
    "larger than a part": Case(height=29, width=31, batch=1, tile=T64),
    "residual": Case(residual=True, height=14, width=14, tile=T256),
    "56": Case(height=56, width=56, batch=1, tile=T256),
    "28, 8 warps": Case(height=28, width=28, batch=2, tile=T8),
    "7 x 7, images share zeros": Case(height=7, width=7, batch=5, tile=T256),
    "7 x 7, 8 warps": Case(height=7, width=7, batch=9, tile=T8),
    "6 x 5, last images missing": Case(height=6, width=5, batch=7, tile=T256),
    "stride 2, even": Case(stride=2, height=14, width=12, tile=T256),
    "stride 2, odd": Case(stride=2, height=15, width=9, batch=3),
    "stride 2, 8 warps": Case(stride=2, height=28, width=28, tile=T8),
    "stride 2, one output": Case(stride=2, height=2, width=1),
    "same, stride 2, even": Case(stride=2, padding=-1, height=12, width=14),
    "same, stride 2, odd": Case(stride=2, padding=-1, height=13, width=11, tile=T64),
    "no padding": Case(padding=0, height=12, width=13),
    "more padding than needed": Case(padding=3, height=7, width=6, tile=T256),
    "kernel 5": Case(kernel=5, height=11, width=13, tile=T256),
    "kernel 5, images share zeros": Case(kernel=5, height=7, width=7, batch=4, tile=T256),
    "kernel 5, stride 2": Case(kernel=5, stride=2, height=13, width=16),
    "last chunk half empty": Case(hidden_channels=144, tile=T256),
    "last chunk with 1 of 4 times 16": Case(hidden_channels=80, tile=Tile(128, 4, 64, 64, 1)),
    "split over hidden channels": Case(hidden_channels=144, splits=3),
    "unequal splits": Case(hidden_channels=80, splits=4, residual=True),
    "output columns in two parts": Case(out_channels=24, hidden_channels=16, tile=T64),
    "no expand": Case(expand=False, in_channels=40, hidden_channels=40, tile=T256),
    "no expand, stride 2": Case(expand=False, in_channels=24, hidden_channels=24, stride=2, height=15, width=14),
    "no expand, images share zeros": Case(
        expand=False, in_channels=40, hidden_channels=40, height=5, width=5, batch=4, tile=T256
    ),
    "a smaller GPU": Case(height=56, width=40, in_channels=64, capability=89, tile=Tile(256, 4, 32, 64, 2)),
}


def check(case: Case) -> None:
    """Every output pixel is written once, by a row that reads its input pixels, and zeros outside the image."""
    g = Geometry(case)
    k, (height, width) = g.k, case.out()
    written = np.zeros(case.batch * height * width, dtype=int)
    top, _, left, _ = case.pads()
    base = g.first_taps()
    assert base.min() >= 0 and base.max() + (case.kernel - 1) * (k["IW"] + 1) <= g.last_slot
    for program in range(g.plan.programs):
        slots, (pixel, valid, n) = g.windows(program), g.outputs(program)
        np.add.at(written, pixel[valid] + n * height * width, 1)
        image, y, x = pixel // (height * width), pixel // width % height, pixel % width
        for ky in range(case.kernel):
            for kx in range(case.kernel):
                in_y, in_x = y * case.stride + ky - top, x * case.stride + kx - left
                inside = (in_y >= 0) & (in_y < case.height) & (in_x >= 0) & (in_x < case.width)
                want = np.where(inside, (image * case.height + in_y) * case.width + in_x, -1)
                got = slots[base + ky * k["IW"] + kx]
                assert (got == want)[valid].all()
    assert (written == 1).all()


@pytest.mark.parametrize("name", CASES)
def test_every_output_reads_its_pixels(name: str) -> None:
    check(CASES[name])


@pytest.mark.parametrize("block", offline.MOBILENET_V2, ids=lambda b: b.name)
@pytest.mark.parametrize("capability", sorted(gluon_configs.SHARED))
def test_every_output_of_the_network(block: offline.Block, capability: int) -> None:
    """The same with the tiles that the tables choose, at a batch that leaves a last program partly empty."""
    check(
        Case(
            3, block.size, block.size, stride=block.stride, in_channels=block.in_channels,
            hidden_channels=block.hidden_channels, out_channels=block.out_channels, expand=block.expand,
            capability=capability, tile=None, splits=None,
        )
    )  # fmt: skip


def test_a_wrong_slot_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above can fail."""
    right = gluon_index.row_slot
    monkeypatch.setattr(gluon_index, "row_slot", lambda m, *rest: right(m, *rest) + (m == 9))
    with pytest.raises(AssertionError):
        check(CASES["odd sizes"])


@pytest.mark.parametrize("chunk", [16, 32, 64])
def test_columns_are_a_permutation_and_four_of_a_thread_lie_together(chunk: int) -> None:
    column = gluon_index.packed_column(arange(chunk))
    assert sorted(column) == list(range(chunk))
    for group in range(0, chunk, 16):
        for j in range(4):  # what a thread holds of 16 columns of the operand (PTX, mma.m16n8k16 and wgmma, A)
            mine = [group + 2 * j, group + 2 * j + 1, group + 2 * j + 8, group + 2 * j + 9]
            assert list(column[mine]) == list(range(group + 4 * j, group + 4 * j + 4))


@pytest.mark.parametrize("warps", [4, 8])
def test_rows_of_a_thread_are_one_patch(warps: int) -> None:
    """Row m belongs to lane group m % 8 of warp m // 16 % warps (PTX, the same operand)."""
    outputs, pixels = 256, 256 // (8 * warps)
    thread = [(m % 8, m // 16 % warps) for m in range(outputs)]
    parts, grid, patch = 1, (4, 8 * warps // 4), (pixels // 2, 2)
    slots = gluon_index.row_slot(arange(outputs), warps, parts, *grid, *patch, 1, 1000, 1000)
    for one in set(thread):
        mine = sorted(slots[m] for m in range(outputs) if thread[m] == one)
        assert mine == [mine[0] + y * 1000 + x for y in range(patch[0]) for x in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_addresses(name: str) -> None:
    g = Geometry(CASES[name])
    k = g.k
    assert k["PITCH"] % 4 == 0  # a thread's 8 bytes of e are aligned
    assert k["STORAGE"] & (k["STORAGE"] - 1) == 0 and g.last_slot * k["PITCH"] + k["PITCH"] <= k["STORAGE"]
    assert k["LEAD"] * k["PITCH"] <= k["STORAGE"]
    # rows m to m + 3 of the expand product: sixteen threads that store 8 bytes each, to every bank once
    slot = gluon_index.slot_of_row(arange(4), g.step)
    stored = {(int(s) * k["PITCH"] * 2 + byte) % 128 for s in slot for byte in range(0, 32, 8)}
    assert len(stored) == 16
