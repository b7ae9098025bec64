"""When the Gluon kernel runs, and how it cuts a problem: data, and the arithmetic that makes a launch of it.

No torch, no Triton. `choose` says which of the two kernels runs and why; `plan` lays a problem out. A wrong tile costs
time, never correctness: every Tile computes every problem that `refusal` lets through.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from . import gluon_index
from .configs import NEAR, Device, Problem, choose_splits, distance, power_of_two, split_columns

OLDEST_TRITON = (3, 8)  # 3.7 has what is needed, but its compiler stops at this kernel; 3.6 has no gather

# Compute capability -> card, versions and date of a run in which tests/test_gpu.py passed with this kernel as it is:
# right against fp64 and against the twin, the same bits every time. Only there it is chosen without being asked for. A
# change of what gluon_kernels.py computes empties the table. Empty: all that is known of it comes from compilers.
CHECKED: dict[int, str] = {}

#: Compute capabilities it is compiled for in the tests; bytes of shared memory a program may have there.
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
SHARED_RESERVED = 1024  # bytes a program, by the driver


class Tile(NamedTuple):
    """What one program computes and with how much; all powers of two."""

    outputs: int  # Q: rows of the project product, 16 * warps at least
    warps: int  # 4 or 8
    chunk: int  # CE: hidden channels at a time
    block: int  # BP: rows of an expand product, 16 * warps at least
    resident: int  # programs a multiprocessor is to hold: bounds the shared memory of each


class Cut(NamedTuple):
    """Which output pixels a program has."""

    parts: int  # NI
    rows: int  # TH
    columns: int  # TW
    patch_rows: int  # PH
    patch_columns: int  # PW
    whole: bool  # a part is an image with zeros around it that the next one shares


class Plan(NamedTuple):
    """A Tile applied to a Problem."""

    tile: Tile
    cut: Cut
    parts_y: int  # TY
    parts_x: int  # TX
    window_height: int  # IH
    window_width: int  # IW
    lead: int  # LEAD
    blocks: int  # NP
    pitch: int  # PITCH
    storage: int  # STORAGE
    x_columns: int  # KA
    x_step: int  # BK
    columns_a: int  # CO_A
    columns_b: int  # CO_B
    programs: int
    splits: int
    hopper: bool
    half: bool

    def constants(self) -> dict[str, Any]:
        """The kernel's arguments of the same meaning."""
        cut = self.cut
        return {
            "NI": cut.parts, "TY": self.parts_y, "TX": self.parts_x, "TH": cut.rows, "TW": cut.columns,
            "PH": cut.patch_rows, "PW": cut.patch_columns, "IH": self.window_height, "IW": self.window_width,
            "LEAD": self.lead, "Q": self.tile.outputs, "NP": self.blocks, "BP": self.tile.block, "CE": self.tile.chunk,
            "PITCH": self.pitch, "STORAGE": self.storage, "TABLE": power_of_two(self.blocks * self.tile.block),
            "KA": self.x_columns, "BK": self.x_step, "CO_A": self.columns_a, "CO_B": self.columns_b,
            "SPLITS": self.splits, "HOPPER": self.hopper, "HALF": self.half,
        }  # fmt: skip


# ---- Which kernel ---------------------------------------------------------------------------------------------------

MAX_OUT_CHANNELS = 320  # its accumulators fill the registers of 8 warps
MAX_IN_CHANNELS = 256  # a whole window of x lies in shared memory


class Pads(NamedTuple):
    top: int
    bottom: int
    left: int
    right: int


def refusal(p: Problem, device: Device, triton: tuple[int, int]) -> str | None:
    """Why the Gluon kernel cannot compute a problem, or None if it can (`plan` may still find that nothing fits)."""
    if triton < OLDEST_TRITON:
        return f"Triton {triton[0]}.{triton[1]} is older than {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]}"
    if device.capability not in SHARED:
        return f"it is not compiled for compute capability {device.capability / 10}"
    if p.element_size != 2:
        return "it computes float16 and bfloat16"
    if p.kernel not in (3, 5) or p.stride not in (1, 2) or p.dilation != 1:
        return (
            f"it has depthwise kernels 3 and 5, stride 1 and 2, not {p.kernel}, {p.stride} with dilation {p.dilation}"
        )
    if p.in_channels % 8 or p.hidden_channels % 8 or p.out_channels % 8:
        return f"{p.in_channels}, {p.hidden_channels}, {p.out_channels} channels are not all multiples of 8"
    if p.expand and p.hidden_channels % 16:
        # channels that do not exist would share 16 with some that do, and an infinite pixel of x times their zero
        # weights is NaN: in a product with other zeros it would reach y
        return f"{p.hidden_channels} hidden channels are no multiple of 16"
    if p.out_channels > MAX_OUT_CHANNELS or (p.expand and p.in_channels > MAX_IN_CHANNELS):
        return (
            f"{p.in_channels} in, {p.out_channels} out channels: it has at most {MAX_IN_CHANNELS}, {MAX_OUT_CHANNELS}"
        )
    return None


KERNELS = ("gluon", "triton")


def choose(
    problem: Problem,
    device: Device,
    triton: tuple[int, int],
    pads: Pads,
    in_pixels: int,
    requested: str | None = None,
    **options: Any,
) -> tuple[Plan | None, str]:
    """(the Gluon kernel's plan, or None for the plain-Triton kernel; why). `requested`: one of KERNELS or None.

    `options`: tile, splits and half of `plan`.
    """
    if requested == "triton":
        return None, "asked for"
    reason = refusal(problem, device, triton)
    if reason is None and requested is None and device.capability not in CHECKED:
        return None, f"the Gluon kernel has not been checked on compute capability {device.capability / 10}"
    found = None if reason else plan(problem, device, pads, in_pixels, **options)
    if found is None:
        return None, f"the Gluon kernel cannot: {reason or 'no tile fits into shared memory'}"
    return found, "asked for" if requested == "gluon" else f"checked on {CHECKED[device.capability]}"


# ---- The cut --------------------------------------------------------------------------------------------------------


def pitch(chunk: int, patch_columns: int, stride: int) -> int:
    """Elements from one slot of e to the next, so that slots STEP apart are 32 bytes apart modulo 128, up or down."""
    step = patch_columns * stride
    return next(p for p in itertools.count(chunk, 4) if 2 * p * step % 128 in (32, 96))


def window(cut: Cut, kernel: int, stride: int) -> tuple[int, int, int]:
    """(IH, IW, LEAD) of a part's window."""
    if cut.whole:
        pad = kernel // 2
        return cut.rows + pad, cut.columns + pad, pad * (cut.columns + pad + 1)
    return (cut.rows - 1) * stride + kernel, (cut.columns - 1) * stride + kernel, 0


def grid(cut: Cut) -> tuple[int, int]:
    """(GH, GW): patches a part."""
    return math.ceil(cut.rows / cut.patch_rows), math.ceil(cut.columns / cut.patch_columns)


def first_slots(cut: Cut, kernel: int, stride: int, rows: Iterable[int], warps: int) -> list[int]:
    """row_slot of these rows of the project product."""
    height, width, _ = window(cut, kernel, stride)
    shape = cut.parts, *grid(cut), cut.patch_rows, cut.patch_columns, stride, height, width
    return [gluon_index.row_slot(m, warps, *shape) for m in rows]


def conflicts(cut: Cut, kernel: int, stride: int, chunk: int) -> int:
    """Cycles that one 8-byte load of e by half a warp takes; 1 without bank conflicts."""
    worst = 1
    for lanes in (range(0, 4), range(4, 8)):  # rows of lanes 0 to 15 and 16 to 31: 32 bytes, of four lanes, each
        banks: dict[int, set[int]] = {}
        for slot in first_slots(cut, kernel, stride, lanes, warps=1):
            start = slot * pitch(chunk, cut.patch_columns, stride) * 2
            for byte in range(start, start + 32, 8):
                banks.setdefault(byte % 128, set()).add(byte)
        worst = max(worst, *map(len, banks.values()))
    return worst


def storage(cut: Cut, kernel: int, stride: int, chunk: int) -> int:
    """Elements of e, to a power of two; one slot more than are used, for the unused ones to share."""
    height, width, lead = window(cut, kernel, stride)
    # the last tap of the last pixel of the last patch, which may stick out of its part and its window
    (GH, GW), last = grid(cut), (kernel - 1) * (width + 1)
    last += ((cut.parts - 1) * height + (GH * cut.patch_rows - 1) * stride) * width
    last += (GW * cut.patch_columns - 1) * stride
    slots = max(last + 1, lead + cut.parts * height * width + 1)
    return max(
        power_of_two(slots * pitch(chunk, cut.patch_columns, stride)),
        power_of_two(lead * pitch(chunk, cut.patch_columns, stride)),
    )


def shared_bytes(problem: Problem, tile: Tile, cut: Cut) -> int:
    """Shared memory of a program, as the kernel allocates it."""
    p = problem
    height, width, _ = window(cut, p.kernel, p.stride)
    rows = math.ceil(cut.parts * height * width / tile.block) * tile.block
    taps = 16 if p.kernel == 3 else 32
    columns_a, columns_b, _ = split_columns(p.out_channels, MAX_OUT_CHANNELS, True)
    total = 2 * storage(cut, p.kernel, p.stride, tile.chunk) + 4 * taps * tile.chunk + 4 * power_of_two(rows)
    total += 2 * tile.chunk * (columns_a + columns_b)
    if p.expand:
        total += 2 * ((rows + tile.chunk) * x_columns(p.in_channels) + 16 * tile.chunk)
    return total


def x_columns(in_channels: int) -> int:
    return max(16, power_of_two(in_channels))


@functools.lru_cache(maxsize=4096)
def best_cut(problem: Problem, tile: Tile, whole_possible: bool, limit: int) -> Cut | None:
    """The cut with the least work whose program has at most `limit` bytes of shared memory."""
    # The batch matters only where it is too small to fill a program with parts
    p, pixels, patches = problem, tile.outputs // (8 * tile.warps), 8 * tile.warps
    best = None
    for patch_columns in (1, 2, 4):
        if pixels % patch_columns or patch_columns * p.stride > 4:
            continue
        patch_rows = pixels // patch_columns
        for grid_rows, grid_columns in itertools.product(range(1, patches + 1), repeat=2):
            if grid_rows * grid_columns > patches:
                continue
            rows, columns = min(grid_rows * patch_rows, p.out_height), min(grid_columns * patch_columns, p.out_width)
            if (grid_rows - 1) * patch_rows >= rows or (grid_columns - 1) * patch_columns >= columns:
                continue
            whole = whole_possible and rows == p.out_height and columns == p.out_width
            per_image = math.ceil(p.out_height / rows) * math.ceil(p.out_width / columns)
            for parts in range(min(patches // (grid_rows * grid_columns), p.batch * per_image), 0, -1):
                cut = Cut(parts, rows, columns, patch_rows, patch_columns, whole)
                if shared_bytes(p, tile, cut) <= limit:
                    programs = math.ceil(p.batch * per_image / parts)
                    cost = programs * program_cost(p, tile, cut), -columns
                    if best is None or cost < best[0]:
                        best = cost, cut
                    break
    return best and best[1]


def program_cost(problem: Problem, tile: Tile, cut: Cut) -> float:
    """Instructions a hidden channel of a program, about: from the compiled kernels, for comparing cuts only."""
    p = problem
    height, width, _ = window(cut, p.kernel, p.stride)
    rows = math.ceil(cut.parts * height * width / tile.block) * tile.block
    pixels = cut.patch_rows * cut.patch_columns
    reads = ((cut.patch_rows - 1) * p.stride + p.kernel) * ((cut.patch_columns - 1) * p.stride + p.kernel) / pixels
    # an output: its multiply-adds; converting and loading what a patch reads, longer with bank conflicts; the taps'
    # own loads, which a patch shares; rounding and clamping
    a_read = 1.25 + 0.5 * (conflicts(cut, p.kernel, p.stride, tile.chunk) - 1)
    output = p.kernel**2 * (1 + 0.3 / pixels) + a_read * reads + 1.5
    # an input: rounding, clamping, storing; then what happens once a program
    slot = 1.7 + (140 / p.hidden_channels if p.expand else 1)
    if p.expand:  # the expand product reads x and w1 from shared memory: half an instruction a byte, roughly
        slot += 1.5 * (p.in_channels + 16) / tile.chunk
    return tile.outputs * output + rows * slot + 60 * 32 * tile.warps * (4 / p.hidden_channels)


# ---- The plan -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)  # a network asks for the same few in every step
def plan(
    problem: Problem,
    device: Device,
    pads: Pads,
    in_pixels: int,
    tile: Tile | None = None,
    splits: int | None = None,
    half: bool = False,
) -> Plan | None:
    """Lay a problem out on a device; None if no cut fits. in_pixels = H * W of x."""
    p = problem
    tiles = (tile,) if tile else choose_tiles(p, device)
    # a part that is a whole image needs the same zeros on all sides
    same = p.stride == 1 and set(pads) == {p.kernel // 2}
    cut = None
    for tile in tiles:
        limit = SHARED[device.capability] // tile.resident - SHARED_RESERVED
        # a larger batch has the same cut: this keeps best_cut's memory short
        cut = best_cut(p._replace(batch=min(p.batch, 256)), tile, same, limit)
        if cut:
            break
    if cut is None or tile is None:
        return None
    parts_y, parts_x = math.ceil(p.out_height / cut.rows), math.ceil(p.out_width / cut.columns)
    programs = math.ceil(p.batch * parts_y * parts_x / cut.parts)
    images = math.ceil(cut.parts / (parts_y * parts_x)) + 1
    if images * max(in_pixels * p.in_channels, p.out_height * p.out_width * p.out_channels) >= 1 << 31:
        return None  # offsets inside a program are 32 bits
    height, width, lead = window(cut, p.kernel, p.stride)
    columns_a, columns_b, _ = split_columns(p.out_channels, MAX_OUT_CHANNELS, True)
    return Plan(
        tile, cut, parts_y, parts_x, height, width, lead,
        blocks=math.ceil(cut.parts * height * width / tile.block),
        pitch=pitch(tile.chunk, cut.patch_columns, p.stride),
        storage=storage(cut, p.kernel, p.stride, tile.chunk),
        x_columns=x_columns(p.in_channels),
        # columns a step of the expand product: as many as divide the channels, so that no step is padding only
        x_step=next(step for step in (64, 32, 16) if step <= x_columns(p.in_channels) and
                    (p.in_channels % step == 0 or step == 16 or x_columns(p.in_channels) <= 32)),
        columns_a=columns_a, columns_b=columns_b, programs=programs,
        splits=splits or choose_splits(programs, device.multiprocessors * tile.resident,
                                       math.ceil(p.hidden_channels / tile.chunk)),
        hopper=device.capability == 90, half=half,
    )  # fmt: skip


# ---- The tiles ------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A tile chosen for one layer shape, with the reason; fields as in configs.Row."""

    in_channels: int
    hidden_channels: int
    out_channels: int
    out_size: int
    kernel: int
    stride: int
    expand: bool
    tile: Tile
    why: str


# Chosen in fp16 among a few by gluon_offline.score: instructions executed an output, or cycles of shared memory where
# those are more, weighed by how many warps a multiprocessor then holds. "instr" is thread instructions an output pixel
# and hidden channel. None of it has been timed. More of them: python -m mbv2_kernels.triton.gluon_offline --sweep
# fmt: off
HOPPER = (
    Row(32, 32, 16, 112, 3, 1, False, Tile(512, 4, 32, 128, 2), "22 instr, 8 warps; 256 rows: 25, 16 warps"),
    Row(16, 96, 24, 56, 3, 2, True, Tile(128, 4, 32, 128, 2), "39 instr; chunks of 16: 43, 12 warps"),
    Row(24, 144, 24, 56, 3, 1, True, Tile(256, 4, 32, 64, 2), "24 instr; chunks of 64 as many; of 16: 26"),
    Row(24, 144, 32, 28, 3, 2, True, Tile(128, 4, 32, 128, 2), "47 instr; chunks of 16: 52"),
    Row(32, 192, 32, 28, 3, 1, True, Tile(256, 4, 64, 128, 2), "25 instr; chunks of 32: as many, more barriers"),
    Row(64, 384, 64, 14, 3, 1, True, Tile(256, 4, 32, 128, 2), "26 instr, an image; chunks of 64 spill"),
    Row(32, 192, 64, 14, 3, 2, True, Tile(256, 8, 32, 128, 1), "an image; 4 warps spill"),
    Row(64, 384, 96, 14, 3, 1, True, Tile(256, 8, 64, 128, 1), "an image; 4 warps cannot hold its accumulators"),
    Row(96, 576, 96, 14, 3, 1, True, Tile(256, 8, 64, 128, 1), "30 instr, an image; chunks of 32: 32"),
    Row(160, 960, 160, 7, 3, 1, True, Tile(64, 4, 64, 64, 2), "39 instr, an image; chunks of 32: 43; two images spill"),
    Row(96, 576, 160, 7, 3, 2, True, Tile(64, 4, 32, 64, 2), "an image"),
    Row(160, 960, 320, 7, 3, 1, True, Tile(128, 8, 32, 128, 1), "two images"),
)
AMPERE = (  # 163 KiB of shared memory
    Row(32, 32, 16, 112, 3, 1, False, Tile(256, 4, 32, 128, 2), "as on Hopper"),
    Row(16, 96, 24, 56, 3, 2, True, Tile(64, 4, 32, 64, 2), "48 instr; 128 rows: 40, 4 warps"),
    Row(24, 144, 24, 56, 3, 1, True, Tile(256, 4, 32, 64, 2), "26 instr; 128 rows: 30"),
    Row(24, 144, 32, 28, 3, 2, True, Tile(64, 4, 32, 64, 2), "54 instr, 8 warps; 128 rows: 46, 4 warps"),
    Row(32, 192, 32, 28, 3, 1, True, Tile(256, 4, 32, 128, 2), "27 instr; 128 rows: 29"),
    Row(64, 384, 64, 14, 3, 1, True, Tile(256, 4, 32, 64, 2), "29 instr, an image; blocks of 128 spill; 8 warps: 32"),
    Row(32, 192, 64, 14, 3, 2, True, Tile(256, 8, 32, 128, 1), "47 instr, an image; 64 rows: 55"),
    Row(64, 384, 96, 14, 3, 1, True, Tile(256, 8, 64, 128, 1), "32 instr, an image; chunks of 32: 34"),
    Row(96, 576, 96, 14, 3, 1, True, Tile(256, 8, 32, 128, 1), "35 instr, an image; 128 rows: 38, 4 warps"),
    Row(160, 960, 160, 7, 3, 1, True, Tile(64, 4, 32, 64, 2), "48 instr, an image"),
    Row(96, 576, 160, 7, 3, 2, True, Tile(64, 4, 32, 64, 1), "an image"),
    Row(160, 960, 320, 7, 3, 1, True, Tile(128, 8, 32, 128, 1), "two images"),
)
ADA = (  # 99 KiB: one program of 8 warps
    Row(32, 32, 16, 112, 3, 1, False, Tile(256, 4, 32, 128, 2), "as on Hopper"),
    Row(16, 96, 24, 56, 3, 2, True, Tile(128, 8, 32, 128, 1), "51 instr; 256 rows: 58"),
    Row(24, 144, 24, 56, 3, 1, True, Tile(256, 8, 32, 128, 1), "30 instr; 128 rows: 32 to 39"),
    Row(24, 144, 32, 28, 3, 2, True, Tile(128, 8, 32, 128, 1), "60 instr; 256 rows: 95"),
    Row(32, 192, 32, 28, 3, 1, True, Tile(256, 8, 32, 128, 1), "30 instr; 128 rows: 43"),
    Row(32, 192, 64, 14, 3, 2, True, Tile(128, 4, 32, 64, 1), "256 rows spill"),
    Row(64, 384, 64, 14, 3, 1, True, Tile(256, 8, 32, 128, 1), "32 instr, an image; 29 by 4 warps"),
    Row(64, 384, 96, 14, 3, 1, True, Tile(256, 8, 32, 128, 1), "34 instr, an image; 128 rows: 37"),
    Row(96, 576, 96, 14, 3, 1, True, Tile(128, 4, 32, 64, 1), "half an image; no image fits"),
    Row(160, 960, 160, 7, 3, 1, True, Tile(64, 4, 32, 64, 1), "an image"),
)
# fmt: on
TUNED = {80: AMPERE, 86: ADA, 89: ADA, 90: HOPPER}


def conservative_tiles(problem: Problem) -> tuple[Tile, ...]:
    """Tiles that compile without spills for whatever `refusal` lets through, the largest first; one may fit."""
    shapes: tuple[tuple[int, int], ...]
    if problem.out_channels <= 64:
        # at stride 2 a patch of 8 outputs reads 45 slots: beside accumulators of 64 columns that spills
        shapes = ((256, 4), (128, 4), (64, 4))[problem.stride == 2 :]
    elif problem.out_channels <= 128:
        shapes = (128, 4), (64, 4)
    else:
        shapes = (128, 8), (64, 4)
    chunks = (32, 16)
    return tuple(Tile(q, warps, chunk, 16 * warps, 1) for chunk in chunks for q, warps in shapes)


def accumulator_columns(out_channels: int) -> int:
    return sum(split_columns(out_channels, MAX_OUT_CHANNELS, True)[:2])


def choose_tiles(problem: Problem, device: Device) -> tuple[Tile, ...]:
    """What to try, in this order: the nearest row's tile, then the conservative ones. The first that fits is taken."""
    row = min(TUNED[device.capability], key=lambda row: distance(row, problem))  # type: ignore[arg-type]
    near = distance(row, problem) <= NEAR  # type: ignore[arg-type]
    fits = accumulator_columns(problem.out_channels) <= accumulator_columns(row.out_channels)
    tuned = (row.tile,) if near and fits else ()
    return tuned + conservative_tiles(problem)
