"""Which tile for which block on which device: data, and the arithmetic that makes a launch of it. No torch, no Triton.

`plan(problem, device)` takes the nearest row of TUNED (the same kernel size, stride, element size and form; nearest in
channels and pixels) and a conservative tile when none is near. A wrong choice costs
time, never correctness: every Tile computes every block.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple


class Problem(NamedTuple):
    """One call, as far as the choice of a tile goes. Sizes in pixels and channels."""

    batch: int
    out_height: int
    out_width: int
    in_channels: int
    hidden_channels: int
    out_channels: int
    kernel: int
    stride: int
    dilation: int
    expand: bool
    element_size: int  # bytes of x
    tensor_cores: bool = True  # False: fp32 with TF32 switched off


class Device(NamedTuple):
    """A GPU: compute capability as major * 10 + minor, number of multiprocessors."""

    capability: int
    multiprocessors: int


class Tile(NamedTuple):
    """What one program computes and with how much; all powers of two except columns and resident."""

    outputs: int  # Q: rows of output pixels
    in_block: int  # BP: rows of input pixels an expand product
    in_step: int  # BK: input channels a step of the expand product
    chunk: int  # CE: hidden channels at a time
    columns: int  # output channels a program at most; above, programs share them and recompute the hidden tensor
    warps: int
    resident: int  # programs a multiprocessor can hold at a time (from the registers of the compiled kernel)
    two_parts: bool = True  # output columns as two powers of two (96 = 64 + 32) instead of one padded one (128)


class Plan(NamedTuple):
    """A Tile applied to a Problem: everything kernels.fused_block wants to be told."""

    tile: Tile
    in_blocks: int  # NP: expand products that make up a tile's input window
    sub_images: int  # NI
    tile_height: int  # TH
    tile_width: int  # TW
    tiles_y: int
    tiles_x: int
    tiles: int  # in all, column groups included
    columns_a: int  # CO_A
    columns_b: int  # CO_B
    column_groups: int
    splits: int  # programs sharing a tile's hidden channels
    programs: int  # of grid axis 0; they take the tiles in turns
    wide: bool  # offsets inside a tile need 64 bits

    @property
    def scratch_elements(self) -> int:
        return self.programs * self.splits * self.in_blocks * self.tile.in_block * self.tile.chunk


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, (n - 1).bit_length())


@functools.lru_cache(maxsize=4096)
def geometry(
    height: int, width: int, count: int, kernel: int, stride: int, outputs: int, inputs: int
) -> tuple[int, int, int, int] | None:
    """The cut of `count` images of height x width outputs with the fewest tiles: (tiles, images, rows, columns).

    A tile holds at most `outputs` output pixels and `inputs` input pixels, halo included. Several images share a tile
    only when each of them is in it as a whole. None when not even one output's window fits.
    """
    best = None
    for rows in range(1, min(height, outputs) + 1):
        in_rows = (rows - 1) * stride + kernel
        for columns in range(1, min(width, outputs // rows) + 1):
            in_pixels = in_rows * ((columns - 1) * stride + kernel)
            if in_pixels > inputs:
                break
            images = 1
            if rows == height and columns == width:
                images = min(outputs // (rows * columns), inputs // in_pixels, count)
            tiles = math.ceil(height / rows) * math.ceil(width / columns) * math.ceil(count / images)
            # fewest tiles; then the least halo; then long rows, which load in longer runs
            key = (tiles, in_pixels * images, -columns)
            if best is None or key < best[0]:
                best = key, (tiles, images, rows, columns)
    return best and best[1]


MAX_IN_BLOCKS = 8  # they are unrolled: more would only grow the code


@functools.lru_cache(maxsize=4096)
def cut(height: int, width: int, count: int, kernel: int, stride: int, tile: Tile) -> tuple[int, int, int, int, int]:
    """(in_blocks, tiles, images, rows, columns): the input window that makes the whole image cheapest."""
    # instructions a row and hidden channel, from the compiled kernels: a tap costs a conversion, an FMA and its share
    # of a load; the activations and the conversion between layouts the rest
    output_cost, input_cost = 2.3 * kernel**2 + 6, 6
    best = None
    for in_blocks in range(1, max(MAX_IN_BLOCKS, math.ceil(kernel**2 / tile.in_block)) + 1):
        found = geometry(height, width, count, kernel, stride, tile.outputs, in_blocks * tile.in_block)
        if found:
            cost = found[0] * (tile.outputs * output_cost + in_blocks * tile.in_block * input_cost)
            if best is None or cost < best[0]:
                best = cost, (in_blocks, *found)
    assert best is not None
    return best[1]


def split_columns(out_channels: int, columns: int, two_parts: bool) -> tuple[int, int, int]:
    """(columns_a, columns_b, groups): powers of two from 16 up, groups * (columns_a + columns_b) >= out_channels."""
    groups = math.ceil(out_channels / columns)
    need = math.ceil(out_channels / groups)
    padded = max(16, power_of_two(need))
    large = padded // 2
    small = max(16, power_of_two(need - large)) if need > large else 0
    if two_parts and large >= 16 and large + small < padded:
        return large, small, groups
    return padded, 0, groups


def plan(problem: Problem, device: Device, in_pixels: int, tile: Tile | None = None, splits: int | None = None) -> Plan:
    """Choose a tile (unless one is given) and lay the problem out on the device; in_pixels = H * W of x."""
    tile = tile or choose_tile(problem, device)
    dilation = problem.dilation
    # a dilated convolution is dilation**2 independent undilated ones on interleaved sub-images (kernels.py)
    height, width = math.ceil(problem.out_height / dilation), math.ceil(problem.out_width / dilation)
    count = problem.batch * dilation**2
    if problem.expand:
        in_blocks, _, images, rows, columns = cut(height, width, count, problem.kernel, problem.stride, tile)
    else:  # the taps are read from x itself
        in_blocks = 0
        found = geometry(height, width, count, problem.kernel, problem.stride, tile.outputs, 1 << 30)
        assert found is not None
        _, images, rows, columns = found
    columns_a, columns_b, groups = split_columns(problem.out_channels, tile.columns, tile.two_parts)
    tiles_y, tiles_x = math.ceil(height / rows), math.ceil(width / columns)
    tiles = math.ceil(count / images) * tiles_y * tiles_x * groups
    slots = device.multiprocessors * tile.resident
    splits = splits or choose_splits(tiles, slots, math.ceil(problem.hidden_channels / tile.chunk))
    # offsets inside a tile are counted from its first image; "+ 2": sub-images may straddle images
    out_pixels = problem.out_height * problem.out_width
    span = (images // dilation**2 + 2) * max(in_pixels * problem.in_channels, out_pixels * problem.out_channels)
    return Plan(
        tile, in_blocks, images, rows, columns, tiles_y, tiles_x, tiles, columns_a, columns_b, groups, splits,
        programs=min(tiles, max(1, slots // splits)),
        wide=span >= 1 << 31,
    )  # fmt: skip


def choose_splits(tiles: int, slots: int, chunks: int) -> int:
    """How many programs share the hidden channels of a tile when there are too few tiles to fill the device.

    Each split adds one fp32 partial sum of y to write and read again and the second stage's launch, so nothing is split
    while at least half of the slots have a tile.
    """
    if 2 * tiles > slots:
        return 1
    splits = min(chunks, slots // tiles, MAX_SPLITS)
    return math.ceil(chunks / math.ceil(chunks / splits))  # same longest program, no empty ones


MAX_SPLITS = 64  # the second stage reads this many partial sums an output one after the other


# ---- The GPUs that are known to compute right ------------------------------------------------------------------------

# Compute capability (as in Device) -> card, versions and date of a run in which tests/test_gpu.py passed on the kernels
# as they are now. set_backend("auto") uses Triton on these alone; set_backend("triton") on any. benchmarks/gpu.py
# prints the line to add after such a run; a change of what kernels.py computes empties the table.
CHECKED: dict[int, str] = {}


# ---- The tiles ------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A tile chosen for one layer shape, with the reason."""

    in_channels: int
    hidden_channels: int
    out_channels: int
    out_size: int  # side of y in pixels
    kernel: int
    stride: int
    expand: bool
    tile: Tile
    why: str


# Chosen for 16-bit data among offline.candidates by offline.score: fewest instructions executed an output, without
# spills, weighed by how many warps a multiprocessor then holds. "instr" is instructions a thread, an output pixel and
# hidden channel. None of it has been timed on a GPU yet. Regenerate: python -m mbv2_kernels.triton.offline --sweep
# fmt: off
HOPPER = (  # wgmma: accumulators of 64 rows a warp group
    Row(32, 32, 16, 112, 3, 1, False, Tile(128, 64, 16, 32, 32, 4, 3), "41 instr; 256 rows save none"),
    Row(16, 96, 24, 56, 3, 2, True, Tile(64, 64, 16, 32, 32, 4, 3), "64 instr; 128 rows need 242 registers for 62"),
    Row(24, 144, 24, 56, 3, 1, True, Tile(128, 64, 32, 16, 32, 4, 3), "48 instr; chunks of 32: 235 registers"),
    Row(24, 144, 32, 28, 3, 2, True, Tile(64, 64, 32, 16, 32, 4, 3), "83 instr; as good as chunks of 32"),
    Row(32, 192, 32, 28, 3, 1, True, Tile(64, 64, 32, 64, 32, 4, 3), "49 instr; 128 rows: 43 in 255 registers"),
    Row(32, 192, 64, 14, 3, 2, True, Tile(64, 64, 32, 64, 64, 4, 2), "67 instr; chunks of 32: 76"),
    Row(64, 384, 64, 14, 3, 1, True, Tile(256, 128, 64, 32, 64, 8, 1), "44 instr; a whole 14 x 14 image without halo"),
    Row(64, 384, 96, 14, 3, 1, True, Tile(64, 64, 64, 64, 96, 4, 2), "56 instr; 128 and 256 rows: 50, spills"),
    Row(96, 576, 96, 14, 3, 1, True, Tile(256, 128, 32, 32, 96, 8, 1), "51 instr; a whole image; 128 rows: 53"),
    Row(96, 576, 160, 7, 3, 2, True, Tile(64, 64, 32, 32, 160, 4, 2), "83 instr; 8 warps, padded columns: 86"),
    Row(160, 960, 160, 7, 3, 1, True, Tile(64, 64, 32, 32, 160, 4, 2), "67 instr; two images a tile: 72"),
    Row(160, 960, 320, 7, 3, 1, True, Tile(64, 64, 32, 64, 320, 8, 1), "73 instr; 4 warps spill with 320 columns"),
    Row(40, 240, 40, 28, 5, 1, True, Tile(128, 64, 32, 16, 64, 4, 2), "101 instr; 64 rows: 138, more halo"),
    Row(24, 144, 40, 28, 5, 2, True, Tile(64, 64, 32, 16, 64, 4, 2), "149 instr"),
    Row(192, 1152, 192, 7, 5, 1, True, Tile(64, 64, 64, 32, 192, 4, 2), "124 instr; 8 warps: 149"),
    Row(32, 32, 64, 112, 3, 1, False, Tile(128, 64, 16, 32, 64, 4, 3), "as for 32 -> 16"),
    Row(128, 128, 128, 56, 3, 1, False, Tile(64, 64, 16, 64, 128, 4, 2), "39 instr; chunks of 32: 41"),
    Row(512, 512, 512, 14, 3, 1, False, Tile(64, 64, 16, 64, 512, 8, 1), "59 instr; sharing the columns: 104"),
    Row(1024, 1024, 1024, 7, 3, 1, False, Tile(64, 64, 16, 32, 512, 8, 1), "112 instr; 32 rows: as many, spills"),
)
BLACKWELL = (  # tcgen05: accumulators in tensor memory; the rows of HOPPER that spill there are others
    Row(24, 144, 24, 56, 3, 1, True, Tile(128, 64, 32, 32, 32, 4, 2), "55 instr; chunks of 16 spill"),
    Row(32, 192, 32, 28, 3, 1, True, Tile(64, 64, 32, 32, 32, 4, 3), "51 instr; chunks of 64 spill"),
    Row(64, 384, 64, 14, 3, 1, True, Tile(128, 64, 64, 32, 64, 4, 2), "47 instr; 256 rows spill"),
    Row(96, 576, 96, 14, 3, 1, True, Tile(64, 64, 32, 64, 96, 4, 2), "60 instr, 12 warps; 256 rows: 50, 8, spills"),
    Row(160, 960, 160, 7, 3, 1, True, Tile(64, 64, 32, 64, 160, 4, 2), "76 instr and 4 spills; 32 rows: 123 without"),
    Row(512, 512, 512, 14, 3, 1, False, Tile(32, 64, 16, 64, 512, 8, 1), "59 instr; 64 rows spill"),
    *HOPPER,  # of two rows for one shape the first counts
)
AMPERE = (  # mma: 16 rows a warp; both operands of the weights' tile are in registers
    Row(32, 32, 16, 112, 3, 1, False, Tile(128, 64, 16, 16, 32, 4, 4), "43 instr; chunks of 32 spill"),
    Row(16, 96, 24, 56, 3, 2, True, Tile(64, 64, 16, 32, 32, 4, 3), "62 instr; chunks of 16: 76"),
    Row(24, 144, 24, 56, 3, 1, True, Tile(128, 64, 32, 32, 32, 4, 2), "48 instr; chunks of 16: 50"),
    Row(24, 144, 32, 28, 3, 2, True, Tile(64, 64, 32, 32, 32, 4, 2), "81 instr; chunks of 16: 94"),
    Row(32, 192, 32, 28, 3, 1, True, Tile(64, 64, 32, 32, 32, 4, 4), "48 instr in 128 registers; 128 rows: 42 in 255"),
    Row(32, 192, 64, 14, 3, 2, True, Tile(64, 64, 32, 32, 64, 4, 2), "71 instr; chunks of 64: 67 in 255 registers"),
    Row(64, 384, 64, 14, 3, 1, True, Tile(128, 64, 64, 32, 64, 4, 2), "50 instr; 64 rows: 59"),
    Row(64, 384, 96, 14, 3, 1, True, Tile(64, 64, 64, 32, 96, 4, 2), "60 instr; 128 rows spill"),
    Row(96, 576, 96, 14, 3, 1, True, Tile(64, 64, 32, 32, 96, 4, 2), "66 instr; 128 rows spill"),
    Row(96, 576, 160, 7, 3, 2, True, Tile(64, 64, 32, 64, 256, 8, 1, False), "102 instr; 4 warps spill"),
    Row(160, 960, 160, 7, 3, 1, True, Tile(32, 64, 32, 32, 256, 4, 2, False), "88 instr; chunks of 64 spill on sm_89"),
    Row(160, 960, 320, 7, 3, 1, True, Tile(32, 64, 32, 64, 512, 8, 1, False), "106 instr; 64 rows spill"),
    Row(40, 240, 40, 28, 5, 1, True, Tile(128, 64, 32, 16, 64, 4, 2), "109 instr; 64 rows: 134, more halo"),
    Row(24, 144, 40, 28, 5, 2, True, Tile(64, 64, 32, 16, 64, 4, 2), "152 instr"),
    Row(192, 1152, 192, 7, 5, 1, True, Tile(64, 64, 64, 32, 256, 8, 1, False), "156 instr; 4 warps spill"),
    Row(32, 32, 64, 112, 3, 1, False, Tile(128, 64, 16, 32, 64, 4, 3), "47 instr; 64 rows: 57"),
    Row(64, 64, 128, 56, 3, 2, False, Tile(64, 64, 16, 64, 128, 8, 1), "58 instr; 4 warps: 48 and 2 spills"),
    Row(128, 128, 128, 56, 3, 1, False, Tile(64, 64, 16, 64, 128, 4, 2), "42 instr; chunks of 32 spill"),
    Row(512, 512, 512, 14, 3, 1, False, Tile(32, 64, 16, 64, 512, 8, 1), "66 instr; 64 rows: 69"),
    Row(1024, 1024, 1024, 7, 3, 1, False, Tile(32, 64, 16, 32, 512, 8, 1), "164 instr; 1024 columns at once spill"),
)
# fmt: on
TUNED = {80: AMPERE, 90: HOPPER, 100: BLACKWELL, 120: AMPERE}  # by the least capability; 12.x has no wgmma

# Sum of the base-2 logarithms by which channels and pixels differ, up to which a row still says something.
NEAR = 8.0


def conservative_tile(problem: Problem) -> Tile:
    """A tile that compiles without spills for every block on every supported GPU; used where nothing tuned is near."""
    in_step = min(32, max(16, power_of_two(problem.in_channels)))
    if problem.element_size == 4:
        # fp32 doubles the registers of every operand, and without TF32 tl.dot is a loop of FMAs over registers
        if problem.out_channels <= 64:
            return Tile(outputs=64, in_block=64, in_step=16, chunk=16, columns=64, warps=4, resident=2)
        if problem.tensor_cores:
            return Tile(32, 64, in_step, chunk=32, columns=256, warps=8, resident=1, two_parts=False)
        return Tile(64, 64, in_step=16, chunk=16, columns=256, warps=8, resident=1, two_parts=False)
    return Tile(outputs=64, in_block=64, in_step=in_step, chunk=16, columns=128, warps=4, resident=2)


def distance(row: Row, problem: Problem) -> float:
    """How far a row is from a problem: octaves in channels and pixels, one for another stride; infinite if unlike."""
    if (row.kernel, row.expand) != (problem.kernel, problem.expand) or problem.element_size != 2:
        return math.inf
    octaves = (
        math.log2(problem.in_channels / row.in_channels),
        math.log2(problem.hidden_channels / row.hidden_channels),
        math.log2(problem.out_channels / row.out_channels),
        math.log2(problem.out_height * problem.out_width / (problem.dilation * row.out_size) ** 2),
    )
    return sum(map(abs, octaves)) + (row.stride != problem.stride)


def choose_tile(problem: Problem, device: Device) -> Tile:
    """The nearest row's tile, with fewer rows where it would leave the device half empty; else the conservative one."""
    family = max((least for least in TUNED if least <= device.capability), default=80)
    row = min(TUNED[family], key=lambda row: distance(row, problem))
    if distance(row, problem) > NEAR:
        return conservative_tile(problem)
    tile = row.tile
    pixels = problem.batch * problem.out_height * problem.out_width
    while tile.outputs > 64 and pixels < tile.outputs * device.multiprocessors:
        # same rows a warp, so no more registers than the tuned tile
        tile = tile._replace(outputs=tile.outputs // 2, warps=max(4, tile.warps // 2), resident=2)
    return tile
