"""The torch side of the Triton kernels of a training step: the phases of mbv2_kernels.training_reference, by name.

Every function takes and returns what its namesake there does, on CUDA tensors (or CPU tensors under TRITON_INTERPRET=1;
not bfloat16, which the interpreter multiplies wrongly). What they are made of is in training_kernels.py.

Nothing in here depends on the card: tiles and the number of programs follow from the shapes, so that sums over pixels
have the same parts, added in the same order, every time.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .configs import power_of_two
from .ops import (
    ACTIVATIONS,
    DTYPES,
    LAUNCH_OPTIONS,
    _device,
    _same_padding,
    _tf32,
    interpreted,
)

PROGRAMS = 1024  # that share the pixels and channels of a phase: several for each multiprocessor of any card
WORKSPACE = 64 << 20  # bytes of partial sums that a phase may have, as long as that leaves it with programs
MAX_SPLITS = 8  # of the hidden channels in the last backward phase: each costs a G in fp32


class Tile(NamedTuple):
    """What one program computes at a time; all powers of two."""

    rows: int  # Q: pixels of the tile, at least 32
    block: int  # BP: pixels of the window a product
    step: int  # BK, BO: channels a step of a product that sums over channels of x or gz
    chunk: int  # CE: hidden channels
    columns: int  # CO, CI: columns at most, and at least `step`, that a program accumulates; above, programs share them
    warps: int


class Geometry(NamedTuple):
    """A depthwise convolution from [height, width] to [out_height, out_width]."""

    batch: int
    height: int
    width: int
    out_height: int
    out_width: int
    kernel: int
    stride: int
    dilation: int
    top: int  # pixels of padding
    left: int

    def window(self, rows: int, columns: int) -> tuple[int, int]:
        """Pixels of x that rows x columns outputs reach, as far as there are any."""
        reach = (self.kernel - 1) * self.dilation + 1
        return (
            min((rows - 1) * self.stride + reach, self.height),
            min((columns - 1) * self.stride + reach, self.width),
        )

    def transposed_window(self, rows: int, columns: int) -> tuple[int, int]:
        """Outputs that reach rows x columns pixels of x, as far as there are any."""
        reach = (self.kernel - 1) * self.dilation
        return (
            min((rows - 1 + reach) // self.stride + 1, self.out_height),
            min((columns - 1 + reach) // self.stride + 1, self.out_width),
        )


class Cut(NamedTuple):
    """Pixels cut into tiles: what the kernels want to be told of it."""

    images: int  # NI
    rows: int  # TH
    columns: int  # TW
    window: tuple[int, int]  # WH, WW
    blocks: int  # NP
    outer_window: tuple[int, int]  # VH, VW: of the last backward phase without D
    outer_blocks: int  # NV
    tiles_y: int
    tiles_x: int
    tiles: int


@functools.lru_cache(maxsize=1024)
def cut(geometry: Geometry, tile: Tile, transposed: bool, outer: bool) -> Cut:
    """The cheapest cut: of the outputs, or `transposed` of x; `outer` if the window has a window in turn."""
    height, width, out_height, out_width = geometry[1:5]
    owned = (height, width) if transposed else (out_height, out_width)
    taps = geometry.kernel**2
    best = None
    for rows in range(1, min(owned[0], tile.rows) + 1):
        for columns in range(1, min(owned[1], tile.rows // rows) + 1):
            whole = (rows, columns) == owned
            images = min(tile.rows // (rows * columns), geometry.batch) if whole else 1
            window = (geometry.transposed_window if transposed else geometry.window)(rows, columns)
            outer_window = geometry.window(*window) if outer else (0, 0)
            blocks, outer_blocks = (math.ceil(images * h * w / tile.block) for h, w in (window, outer_window))
            tiles_y, tiles_x = math.ceil(owned[0] / rows), math.ceil(owned[1] / columns)
            tiles = math.ceil(geometry.batch / images) * tiles_y * tiles_x
            # Instructions a row and hidden channel, roughly: a tap 2 (4 with its weight's gradient), the rest 8.
            own = tile.rows * (8 + (4 if transposed else 2) * taps)
            around = tile.block * (blocks * (8 + 2 * taps * outer) + outer_blocks * 8)
            key = (tiles * (own + around), -columns)  # long rows load in longer runs
            if best is None or key < best[0]:
                best = (
                    key,
                    Cut(images, rows, columns, window, blocks, outer_window, outer_blocks, tiles_y, tiles_x, tiles),
                )
    assert best is not None
    return best[1]


def flat_cut(pixels: int, rows: int) -> Cut:
    """Of pixels whose neighbours do not matter: one image of one line."""
    tiles = math.ceil(pixels / rows)
    return Cut(1, 1, rows, (0, 0), 0, (0, 0), 0, 1, tiles, tiles)


# ---- Arguments ------------------------------------------------------------------------------------------------------


def _require(condition: bool, message: str, error: type[Exception] = ValueError) -> None:
    if not condition:
        raise error(f"train phase in Triton: {message}")


class _Block(NamedTuple):
    """The arguments that several phases share, checked and as the kernels read them."""

    geometry: Geometry
    in_channels: int
    hidden_channels: int
    x: Tensor  # dense channels_last
    w1: Tensor | None  # [C, Cin] in x's dtype
    b1: Tensor | None
    taps: Tensor  # [k * k, C]
    activation: str
    precision: str

    @property
    def out_pixels(self) -> int:
        return self.geometry.batch * self.geometry.out_height * self.geometry.out_width

    def out_shape(self, channels: int) -> tuple[int, ...]:
        return self.geometry.batch, channels, self.geometry.out_height, self.geometry.out_width

    def outputs(self, channels: int) -> Tensor:
        return torch.empty(
            self.out_shape(channels), dtype=self.x.dtype, device=self.x.device, memory_format=torch.channels_last
        )

    def check_outputs(self, name: str, t: Tensor, channels: int) -> Tensor:
        shape = self.out_shape(channels)
        _require(tuple(t.shape) == shape, f"{name} must be {list(shape)}, got {list(t.shape)}")
        return _images(name, t, self.x)

    def check_d(self, d: Tensor | None) -> Tensor | None:
        return None if d is None else self.check_outputs("d", d, self.hidden_channels)

    def vector(self, name: str, t: Tensor) -> Tensor:
        return _float(name, t, (self.hidden_channels,), self.x)

    def matrix(self, w2: Tensor) -> Tensor:
        """w2 [Cout, C] in x's dtype."""
        _require(w2.dim() == 2, f"w2 must be [Cout, C], got {w2.dim()} dimensions")
        return _float("w2", w2, (w2.shape[0], self.hidden_channels), self.x).to(self.x.dtype)


def _images(name: str, t: Tensor, like: Tensor | None = None) -> Tensor:
    _require(t.dtype in DTYPES, f"{name} must be float16, bfloat16 or float32, got {t.dtype}", TypeError)
    _require(t.dim() == 4, f"{name} must be [N, C, H, W], got {t.dim()} dimensions")
    if like is not None:
        _require(t.dtype == like.dtype, f"{name} must be {like.dtype}, got {t.dtype}", TypeError)
        _require(t.device == like.device, f"{name} is on {t.device}, x on {like.device}")
    return t.contiguous(memory_format=torch.channels_last)


def _float(name: str, t: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
    _require(tuple(t.shape) == shape, f"{name} must be {list(shape)}, got {list(t.shape)}")
    _require(t.dtype == torch.float32, f"{name} must be float32, got {t.dtype}", TypeError)
    _require(t.device == like.device, f"{name} is on {t.device}, the activations on {like.device}")
    return t.contiguous()


def _block(
    x: Tensor, w1: Tensor | None, b1: Tensor | None, wd: Tensor,
    stride: int, padding: int, dilation: int, activation: str,
) -> _Block:  # fmt: skip
    x = _images("x", x)
    batch, in_channels, height, width = x.shape
    _require(wd.dim() == 4 and wd.shape[2] == wd.shape[3], f"wd must be [C, 1, k, k], got {list(wd.shape)}")
    hidden, kernel = wd.shape[0], wd.shape[2]
    wd = _float("wd", wd, (hidden, 1, kernel, kernel), x)
    _require((w1 is None) == (b1 is None), "w1 and b1 are given together or not at all")
    if w1 is not None and b1 is not None:
        w1 = _float("w1", w1, (hidden, in_channels), x).to(x.dtype)
        b1 = _float("b1", b1, (hidden,), x)
    else:
        _require(in_channels == hidden, f"without w1 x must have wd's {hidden} channels, got {in_channels}")
    _require(activation in ACTIVATIONS, f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    _require(stride >= 1 and dilation >= 1 and padding >= -1, f"stride {stride}, dilation {dilation}, pad {padding}")
    reach = (kernel - 1) * dilation + 1
    (top, pad_y), (left, pad_x) = ((padding, 2 * padding),) * 2
    if padding == -1:
        (top, pad_y), (left, pad_x) = (_same_padding(size, kernel, stride, dilation) for size in (height, width))
    _require(
        height + pad_y >= reach and width + pad_x >= reach,
        f"x of {height} x {width} pixels, padded, is smaller than the depthwise kernel's {reach} x {reach}",
    )
    geometry = Geometry(
        batch, height, width, (height + pad_y - reach) // stride + 1, (width + pad_x - reach) // stride + 1,
        kernel, stride, dilation, top, left,
    )  # fmt: skip
    taps = wd.reshape(hidden, kernel * kernel).t().contiguous()
    return _Block(geometry, in_channels, hidden, x, w1, b1, taps, activation, _precision(x))


def _precision(x: Tensor) -> str:
    return "tf32" if x.dtype != torch.float32 or _tf32() else "ieee"


def choose_tile(phase: str, block: _Block, computes_d: bool, columns: int = 16) -> Tile:
    """The tile of "depthwise", "project", "project_backward" or "depthwise_backward"; `columns`: see Tile.

    As many rows and channels as compile without spills (training_offline.py): the work a tile has besides its elements
    (windows, addresses, barriers) is then shared by most. None of it has been timed on a GPU.
    """
    wide = columns > 64
    if block.x.element_size() == 4:  # twice the registers
        return Tile(32 if wide else 64, 32, 16, 16, 128, 8)
    if phase == "depthwise":
        return Tile(128 if block.geometry.stride == 1 else 64, 64, 32, 32, 16, 4)
    warps = 8 if columns > 128 or phase == "depthwise_backward" else 4
    if computes_d:  # never on the way of a training step that the package takes
        return Tile(64, 64, 32, 16 if wide else 32, 256, warps)
    return Tile(128 if phase == "depthwise_backward" and not wide else 64, 64, 32, 32, 256, warps)


# ---- Launching ------------------------------------------------------------------------------------------------------


def _run(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any], warps: int) -> None:
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    if device.type == "cuda":
        _device(device.index)  # raises where the kernels cannot run
    else:
        _require(device.type == "cpu" and interpreted(), f"Triton runs on CUDA tensors, not on {device}")
        sixteen = any(isinstance(a, Tensor) and a.dtype == torch.bfloat16 for a in arguments)
        _require(not sixteen, "bfloat16, whose tl.dot Triton's interpreter computes wrongly")
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, **constants, num_warps=warps, **LAUNCH_OPTIONS)


def _kernels() -> Any:
    from . import training_kernels

    return training_kernels


def _channels_a_program(channels: int, most: int) -> int:
    """A power of two from 16 up: all channels if that is within `most`, else an even share of them."""
    return max(16, power_of_two(math.ceil(channels / math.ceil(channels / most))))


def _spread(pixels: int, columns: int, block: int) -> tuple[int, int]:
    """(programs, blocks of pixels each of them sums) for a sum over pixels that `columns` programs share."""
    blocks = math.ceil(pixels / block)
    steps = math.ceil(blocks / max(1, min(blocks, PROGRAMS // columns)))
    return math.ceil(blocks / steps), steps


def _step(tile: Tile, channels: int) -> int:
    return min(tile.step, max(16, power_of_two(channels)))


def _wide(geometry: Geometry, cut: Cut, channels: int) -> bool:
    """Whether offsets within a tile or a window, counted from its first pixel, need 64 bits."""
    rows = max(cut.rows, cut.window[0], cut.outer_window[0])
    if cut.images > 1:
        rows = cut.images * max(geometry.height, geometry.out_height)
    return (rows + 1) * max(geometry.width, geometry.out_width) * channels >= 1 << 31


def _sizes(geometry: Geometry, cut: Cut) -> tuple[int, ...]:
    g = geometry
    return (
        g.batch, g.height, g.width, g.out_height, g.out_width, g.top, g.left, cut.tiles, cut.tiles_y, cut.tiles_x
    )  # fmt: skip


class _Sweep(NamedTuple):
    """How a phase goes over the outputs. With D given it needs no stencil: then all outputs are one line of pixels, and
    neither x nor the weights before D are read."""

    tile: Tile
    cut: Cut
    inputs: tuple[Tensor | None, ...]  # x, w1, b1, taps
    sizes: tuple[int, ...]
    constants: dict[str, Any]

    def groups(self, programs: int) -> int:
        """How many programs take the tiles in turns when each tile occupies `programs` of them."""
        return max(1, min(self.cut.tiles, PROGRAMS // programs))


def _sweep(block: _Block, d: Tensor | None, tile: Tile, out_channels: int = 0) -> _Sweep:
    geometry = block.geometry
    inputs: tuple[Tensor | None, ...] = (block.x, block.w1, block.b1, block.taps)
    if d is None:
        pieces = cut(geometry, tile, transposed=False, outer=False)
    else:
        pieces = flat_cut(block.out_pixels, tile.rows)
        geometry = Geometry(1, 1, block.out_pixels, 1, block.out_pixels, 1, 1, 1, 0, 0)
        inputs = (None,) * 4
    channels = max(block.in_channels, block.hidden_channels, out_channels)
    constants = _constants(block, tile, pieces) | {
        "K": geometry.kernel, "S": geometry.stride, "DIL": geometry.dilation, "WIDE": _wide(geometry, pieces, channels)
    }  # fmt: skip
    return _Sweep(tile, pieces, inputs, _sizes(geometry, pieces), constants)


def _constants(block: _Block, tile: Tile, pieces: Cut) -> dict[str, Any]:
    return {
        "CIN": block.in_channels, "C": block.hidden_channels, "ACT": block.activation, "PRECISION": block.precision,
        "NI": pieces.images, "TH": pieces.rows, "TW": pieces.columns, "WH": pieces.window[0], "WW": pieces.window[1],
        "Q": tile.rows, "NP": pieces.blocks, "BP": tile.block, "BK": _step(tile, block.in_channels), "CE": tile.chunk,
    }  # fmt: skip


def _scratch(like: Tensor, programs: int, blocks: int, tile: Tile) -> Tensor:
    return like.new_empty(programs * (blocks * tile.block + 1) * tile.chunk)


def _combine(moments: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over pixels of v and v * v, float64 [channels], from the programs' moments [programs, 3, channels]."""
    groups, _, channels = moments.shape
    total, square = (moments.new_empty(channels, dtype=torch.float64) for _ in range(2))
    width = 16
    _run(
        _kernels().combine_moments, (math.ceil(channels / width),), (moments, counts, total, square, groups),
        {"C": channels, "BG": 64, "BC": width}, 4,
    )  # fmt: skip
    return total, square


def _add_up(partial: Tensor) -> Tensor:
    """Partial sums of the programs [programs, ...] in fp64, in an order that the shape alone decides."""
    return partial.sum(0, dtype=torch.float64)


def _given(x: Tensor, *results: Tensor | None) -> tuple[Any, ...]:
    """The results, with an empty tensor for each that was not asked for."""
    return tuple(x.new_empty(0) if r is None else r for r in results)


def _zeros(x: Tensor, *sizes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return x.new_zeros(sizes, dtype=dtype)


# ---- Forward --------------------------------------------------------------------------------------------------------


def train_gram(x: Tensor) -> tuple[Tensor, Tensor]:
    x = _images("x", x)
    channels, pixels = x.shape[1], x.numel() // x.shape[1]
    if pixels == 0:
        return _zeros(x, channels), _zeros(x, channels, channels)
    # In 16 bits the products are exact; in fp32 a shift by about the mean keeps what cancels in a variance.
    shift = None
    if x.dtype == torch.float32:
        shift = x.permute(0, 2, 3, 1).reshape(pixels, channels)[:1024].mean(0)
    columns, rows = _channels_a_program(channels, 128 if shift is None else 64), 64
    shares = math.ceil(channels / columns)
    programs, steps = _spread(pixels, shares**2, rows)
    sums = x.new_empty(programs, channels, dtype=torch.float32)
    grams = x.new_empty(programs, channels, channels, dtype=torch.float32)
    _run(
        _kernels().gram, (shares, shares, programs), (x, shift, sums, grams, pixels, steps),
        {"CIN": channels, "BP": rows, "CI": columns, "PRECISION": "ieee"}, 4,
    )  # fmt: skip
    total, products = _add_up(sums), _add_up(grams)
    if shift is not None:
        shift = shift.double()
        cross = torch.outer(total + 0.5 * pixels * shift, shift)
        total, products = total + pixels * shift, products + cross + cross.T
    return total, products


def train_depthwise(
    x: Tensor, w1: Tensor | None, b1: Tensor | None, wd: Tensor,
    stride: int, padding: int, dilation: int, activation: str, keep: bool, *, tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    block = _block(x, w1, b1, wd, stride, padding, dilation, activation)
    x, channels = block.x, block.hidden_channels
    d = block.outputs(channels) if keep else x.new_empty(0)
    if block.out_pixels == 0:
        return d, _zeros(x, channels), _zeros(x, channels)
    sweep = _sweep(block, None, tile or choose_tile("depthwise", block, False))
    chunks = math.ceil(channels / sweep.tile.chunk)
    groups = sweep.groups(chunks)
    moments = x.new_empty(groups, 3, channels, dtype=torch.float32)
    counts = x.new_empty(groups, dtype=torch.int32)
    scratch = None if w1 is None else _scratch(x, chunks * groups, sweep.cut.blocks, sweep.tile)
    _run(
        _kernels().depthwise, (chunks, groups),
        (*sweep.inputs, d if keep else None, moments, counts, scratch, *sweep.sizes), sweep.constants, sweep.tile.warps,
    )  # fmt: skip
    return d, *_combine(moments, counts)


def train_project(
    x: Tensor, d: Tensor | None, w1: Tensor | None, b1: Tensor | None, wd: Tensor,
    scale2: Tensor, shift2: Tensor, w2: Tensor,
    stride: int, padding: int, dilation: int, activation: str, *, tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    block = _block(x, w1, b1, wd, stride, padding, dilation, activation)
    x, d = block.x, block.check_d(d)
    scale2, shift2, w2 = block.vector("scale2", scale2), block.vector("shift2", shift2), block.matrix(w2)
    out_channels = w2.shape[0]
    z = block.outputs(out_channels)
    if block.out_pixels == 0:
        return z, _zeros(x, out_channels), _zeros(x, out_channels)
    sweep = _sweep(block, d, tile or choose_tile("project", block, d is None, out_channels), out_channels)
    columns = _channels_a_program(out_channels, sweep.tile.columns)
    shares = math.ceil(out_channels / columns)
    groups = sweep.groups(shares)
    moments = x.new_empty(groups, 3, out_channels, dtype=torch.float32)
    counts = x.new_empty(groups, dtype=torch.int32)
    scratch = None
    if d is None and w1 is not None:
        scratch = _scratch(x, shares * groups, sweep.cut.blocks, sweep.tile)
    _run(
        _kernels().project, (groups, shares),
        (*sweep.inputs, d, scale2, shift2, w2, z, moments, counts, scratch, *sweep.sizes),
        sweep.constants | {"COUT": out_channels, "CO": columns}, sweep.tile.warps,
    )  # fmt: skip
    return z, *_combine(moments, counts)


class _Pixelwise(NamedTuple):
    """z and what goes with it, element by element: tiles of rows x columns."""

    z: Tensor
    pixels: int
    constants: dict[str, Any]
    shares: int  # programs that share the channels

    @property
    def grid(self) -> tuple[int, int]:
        return math.ceil(self.pixels / self.constants["BP"]), self.shares


def _pixelwise(z: Tensor, final_activation: str) -> _Pixelwise:
    z = _images("z", z)
    _require(
        final_activation in ACTIVATIONS, f"final_activation must be one of {ACTIVATIONS}, got {final_activation!r}"
    )
    channels = z.shape[1]
    columns = _channels_a_program(channels, 64)
    constants = {"COUT": channels, "FINAL": final_activation, "BP": 2048 // columns, "CO": columns}
    return _Pixelwise(z, z.numel() // channels, constants, math.ceil(channels / columns))


def train_finish(z: Tensor, x: Tensor | None, scale3: Tensor, shift3: Tensor, final_activation: str) -> Tensor:
    p = _pixelwise(z, final_activation)
    scale3, shift3 = (_float(name, t, (z.shape[1],), z) for name, t in (("scale3", scale3), ("shift3", shift3)))
    y = torch.empty_like(p.z, memory_format=torch.channels_last)
    if x is not None:
        _require(x.shape == z.shape, f"x must be like z, {list(z.shape)}, got {list(x.shape)}")
        x = _images("x", x, p.z)
    if p.pixels:
        _run(_kernels().finish, p.grid, (p.z, x, scale3, shift3, y, p.pixels), p.constants, 4)
    return y


# ---- Backward -------------------------------------------------------------------------------------------------------


def train_finish_backward(
    gy: Tensor, z: Tensor, scale3: Tensor, shift3: Tensor, final_activation: str
) -> tuple[Tensor, Tensor]:
    p = _pixelwise(z, final_activation)
    scale3, shift3 = (_float(name, t, (z.shape[1],), z) for name, t in (("scale3", scale3), ("shift3", shift3)))
    _require(gy.shape == z.shape, f"gy must be like z, {list(z.shape)}, got {list(gy.shape)}")
    gy = _images("gy", gy, p.z)
    if p.pixels == 0:
        return _zeros(z, z.shape[1]), _zeros(z, z.shape[1])
    programs, steps = _spread(p.pixels, p.shares, p.constants["BP"])
    sums = z.new_empty(programs, 2, z.shape[1], dtype=torch.float32)
    arguments = (gy, p.z, scale3, shift3, sums, p.pixels, steps)
    _run(_kernels().finish_sums, (programs, p.shares), arguments, p.constants, 4)
    return _add_up(sums[:, 0]), _add_up(sums[:, 1])


def _z_gradient(
    gy: Tensor, z: Tensor, scale3: Tensor, shift3: Tensor, a3: Tensor, b3: Tensor, c3: Tensor, final_activation: str
) -> Tensor:
    """gz, the gradient of z, in z's dtype. It is as small as z, and the products want it in that dtype anyway."""
    p = _pixelwise(z, final_activation)
    named = {"scale3": scale3, "shift3": shift3, "a3": a3, "b3": b3, "c3": c3}
    vectors = (_float(name, t, (z.shape[1],), z) for name, t in named.items())
    _require(gy.shape == z.shape, f"gy must be like z, {list(z.shape)}, got {list(gy.shape)}")
    gz = torch.empty_like(p.z, memory_format=torch.channels_last)
    if p.pixels:
        arguments = (_images("gy", gy, p.z), p.z, *vectors, gz, p.pixels)
        _run(_kernels().finish_gradient, p.grid, arguments, p.constants, 4)
    return gz


def train_project_backward(
    gy: Tensor, z: Tensor, scale3: Tensor, shift3: Tensor, a3: Tensor, b3: Tensor, c3: Tensor, final_activation: str,
    x: Tensor, d: Tensor | None, w1: Tensor | None, b1: Tensor | None, wd: Tensor,
    scale2: Tensor, shift2: Tensor, w2: Tensor,
    stride: int, padding: int, dilation: int, activation: str, needs: tuple[bool, bool], *, tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    block = _block(x, w1, b1, wd, stride, padding, dilation, activation)
    x, d, channels = block.x, block.check_d(d), block.hidden_channels
    scale2, shift2, w2 = block.vector("scale2", scale2), block.vector("shift2", shift2), block.matrix(w2)
    out_channels = w2.shape[0]
    block.check_outputs("z", z, out_channels)
    need_w2, need_sums = needs
    if block.out_pixels == 0 or not any(needs):
        g = _zeros(x, out_channels, channels, dtype=torch.float32) if need_w2 else None
        return _given(x, g, *((_zeros(x, channels), _zeros(x, channels)) if need_sums else (None, None)))
    gz = _z_gradient(gy, z, scale3, shift3, a3, b3, c3, final_activation)
    sweep = _sweep(block, d, tile or choose_tile("project_backward", block, d is None, out_channels), out_channels)
    columns = _channels_a_program(out_channels, sweep.tile.columns)
    shares = math.ceil(out_channels / columns) if need_w2 else 1
    chunks = math.ceil(channels / sweep.tile.chunk)
    groups = sweep.groups(chunks * shares)
    gw2 = x.new_empty(groups, out_channels, channels, dtype=torch.float32) if need_w2 else None
    sums = x.new_empty(groups, 2, channels, dtype=torch.float32) if need_sums else None
    scratch = None
    if d is None and w1 is not None:
        scratch = _scratch(x, chunks * groups * shares, sweep.cut.blocks, sweep.tile)
    _run(
        _kernels().project_gradient, (chunks, groups, shares),
        (gz, *sweep.inputs, d, scale2, shift2, w2, gw2, sums, scratch, *sweep.sizes),
        sweep.constants | {"COUT": out_channels, "CO": columns, "BO": _step(sweep.tile, out_channels)},
        sweep.tile.warps,
    )  # fmt: skip
    sum_g, sum_gd = (None, None) if sums is None else (_add_up(sums[:, 0]), _add_up(sums[:, 1]))
    return _given(x, None if gw2 is None else _add_up(gw2).float(), sum_g, sum_gd)


def train_depthwise_backward(
    gy: Tensor, z: Tensor, scale3: Tensor, shift3: Tensor, a3: Tensor, b3: Tensor, c3: Tensor, final_activation: str,
    x: Tensor, d: Tensor | None, w1: Tensor | None, b1: Tensor | None, wd: Tensor,
    scale2: Tensor, shift2: Tensor, a2: Tensor, b2: Tensor, c2: Tensor, w2: Tensor,
    stride: int, padding: int, dilation: int, activation: str, needs: tuple[bool, bool], *, tile: Tile | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    block = _block(x, w1, b1, wd, stride, padding, dilation, activation)
    x, d, channels, in_channels = block.x, block.check_d(d), block.hidden_channels, block.in_channels
    named = {"scale2": scale2, "shift2": shift2, "a2": a2, "b2": b2, "c2": c2}
    vectors = tuple(block.vector(name, t) for name, t in named.items())
    w2 = block.matrix(w2)
    out_channels = w2.shape[0]
    block.check_outputs("z", z, out_channels)
    expand, kernel = block.w1 is not None, block.geometry.kernel
    need_x, need_wd = needs
    need_t = need_x and expand
    g = torch.empty_like(x, dtype=torch.float32, memory_format=torch.channels_last) if need_x else None
    if block.out_pixels == 0 or not any(needs):
        return _given(
            x,
            None if g is None else g.zero_(),
            torch.zeros_like(wd, memory_format=torch.contiguous_format) if need_wd else None,
            _zeros(x, channels, in_channels, dtype=torch.float32) if need_t else None,
            _zeros(x, channels) if need_t else None,
        )

    gz = _z_gradient(gy, z, scale3, shift3, a3, b3, c3, final_activation)
    tile = tile or choose_tile("depthwise_backward", block, d is None, in_channels if need_t else 16)
    pieces = cut(block.geometry, tile, transposed=True, outer=d is None)
    columns = _channels_a_program(in_channels, tile.columns) if need_t else 16
    shares = math.ceil(in_channels / columns) if need_t else 1
    # Each group keeps sums over its pixels in fp32.
    kept = 4 * channels * (kernel**2 * need_wd + (in_channels + 1) * need_t)
    groups = max(1, min(pieces.tiles, PROGRAMS // shares, WORKSPACE // max(1, kept)))
    chunks = math.ceil(channels / tile.chunk)
    splits = splits or min(chunks, MAX_SPLITS, max(1, PROGRAMS // (groups * shares)))
    splits = math.ceil(chunks / math.ceil(chunks / splits))  # the longest program as long, and none empty
    programs = groups * splits * shares

    parts = g
    if g is not None and expand and splits > 1:
        parts = x.new_empty(splits, g.numel(), dtype=torch.float32)
    t = x.new_empty(groups, channels, in_channels, dtype=torch.float32) if need_t else None
    sums = x.new_empty(groups, channels, dtype=torch.float32) if need_t else None
    gwd = x.new_empty(groups, kernel * kernel, channels, dtype=torch.float32) if need_wd else None
    geometry = block.geometry
    _run(
        _kernels().depthwise_gradient, (groups, splits, shares),
        (
            gz, x, block.w1, block.b1, block.taps, d, *vectors, w2, parts, t, sums, gwd,
            _scratch(x, programs, pieces.outer_blocks, tile) if d is None and expand else None,
            _scratch(x, programs, pieces.blocks, tile),
            *_sizes(geometry, pieces), kernel * kernel,
        ),
        _constants(block, tile, pieces) | {
            "COUT": out_channels, "K": kernel, "S": stride, "DIL": dilation,
            "VH": pieces.outer_window[0], "VW": pieces.outer_window[1], "NV": pieces.outer_blocks,
            "BO": _step(tile, out_channels), "CI": columns, "SPLITS": splits,
            "WIDE": _wide(geometry, pieces, max(in_channels, channels, out_channels)),
        },
        tile.warps,
    )  # fmt: skip
    if g is not None and parts is not None and parts is not g:
        torch.sum(parts, 0, out=g.permute(0, 2, 3, 1).view(-1))
    return _given(
        x,
        g,
        None if gwd is None else _add_up(gwd).float().t().reshape(wd.shape).contiguous(),
        None if t is None else _add_up(t).float(),
        None if sums is None else _add_up(sums),
    )


def train_input_backward(g: Tensor, x: Tensor, m: Tensor | None, c0: Tensor | None, gy: Tensor | None) -> Tensor:
    x = _images("x", x)
    for name, t in (("g", g), ("gy", gy)):
        if t is not None:
            _require(t.shape == x.shape, f"{name} must be like x, {list(x.shape)}, got {list(t.shape)}")
    channels, pixels = x.shape[1], x.numel() // x.shape[1]
    _require(g.dtype == torch.float32, f"g must be float32, got {g.dtype}", TypeError)
    g = g.contiguous(memory_format=torch.channels_last)
    m = None if m is None else _float("m", m, (channels, channels), x)
    c0 = None if c0 is None else _float("c0", c0, (channels,), x)
    gy = None if gy is None else _images("gy", gy, x)
    gx = torch.empty_like(x, memory_format=torch.channels_last)
    if pixels:
        columns, rows = _channels_a_program(channels, 64), 64
        _run(
            _kernels().input_gradient, (math.ceil(pixels / rows), math.ceil(channels / columns)),
            (g, x, m, c0, gy, gx, pixels),
            {"CIN": channels, "PRECISION": _precision(x), "BP": rows, "BK": min(32, columns), "CI": columns}, 4,
        )  # fmt: skip
    return gx
