"""Device code of a training step of the inverted residual block in plain Triton: pointers and sizes, no torch.

The step is a chain of phases with per-channel arithmetic in between (training_ops.py), because a batch statistic must
be complete before the next phase may use it. Everything is channels_last; sums are over all pixels of the batch.

    e = act(w1 x + b1), 0 outside the image     D = depthwise(e)     B = act(D * scale2 + shift2)     Z = w2 B
    y = final(Z * scale3 + shift3) (+ x)

    gram                 x               -> sum x, sum x xT
    depthwise            x               -> D, sums of D and D * D
    project              D or x          -> Z, sums of Z and Z * Z
    finish               Z               -> y
    finish_sums          gy, Z           -> sums of g and g * Z, g = gy where final lets the gradient through
    finish_gradient      gy, Z           -> gz = a3 * g + b3 * Z + c3
    project_gradient     gz, D or x      -> gw2 = sum gz BT, sums of g2 and g2 * D; g2 = w2T gz where B is not clamped
    depthwise_gradient   gz, x, maybe D  -> gD = a2 * g2 + b2 * D + c2, and from it gwd = sum over pixels of gD * e,
                                            g1 = depthwiseT(gD) where e is not clamped, G = w1T g1, T = sum g1 xT,
                                            sum g1
    input_gradient       G, x            -> gx = G - M x - c0 (+ gy)

How a program works. It owns tiles of NI images x TH x TW pixels (Q rows) and takes the hidden channels in chunks of CE,
as kernels.py does. What a stencil reads around a tile, the window, is first put into a scratch in global memory that is
the program's own and stays in the L2: e around a tile of output pixels, gD around a tile of input pixels. A window is
cut off at the image's edges, so that of a 7 x 7 image is 7 x 7; a tap that falls outside reads the row after it, which
is zero. So dilation needs nothing special, and no hidden tensor but D is ever written as a whole.

Two orders of the loops. Where all results are sums over pixels (depthwise, project_gradient) a program keeps one chunk
and walks tiles, with its sums in registers. Where a result has pixels and is a sum over channels (project,
depthwise_gradient) it keeps a tile and walks chunks; what it sums over pixels it then keeps in a workspace of its own.

Every sum over pixels ends as one fp32 partial sum a program, added up in fp64 in a fixed order. Which program adds what
depends on the shapes alone: the same bits every time. Where a variance is to come of it, a program sums deviations from
the mean of its first tile, so that nothing cancels in fp32, and combine_moments takes the shift out again in fp64.

Names: q counts pixels of the tile, p pixels of a window, c hidden channels, i input channels, o output channels.
Compiled and interpreted with Triton 3.8. Launch with num_stages=1: kernels.py says why.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import _activate

# Sizes that differ from call to call: one compilation serves them all.
_FLAT = ["pixels", "steps"]
_TILED = ["N", "H", "W", "HO", "WO", "pad_top", "pad_left", "tiles", "tiles_y", "tiles_x"]


# ---- Pieces ---------------------------------------------------------------------------------------------------------


@triton.jit
def _let_through(g, v, KIND: tl.constexpr):
    # The gradient of act(v) as torch has it: 0 at both edges of a clamp; a NaN in v lets it through.
    if KIND == "relu6":
        g = tl.where((v <= 0.0) | (v >= 6.0), 0.0, g)
    elif KIND == "relu":
        g = tl.where(v <= 0.0, 0.0, g)
    return g


@triton.jit
def _tile_origin(tile, tiles_y, tiles_x, NI: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr):
    return tile // (tiles_y * tiles_x) * NI, (tile // tiles_x) % tiles_y * TH, tile % tiles_x * TW


@triton.jit
def _place(
    r, n, y0, x0, N, HEIGHT, WIDTH, NI: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr
):
    """Of place r in NI x ROWS x COLUMNS pixels that begin at image n, y0, x0: (image from n on, y, x, the pixel
    counted from the first one, whether there is such a pixel)."""
    image = r // (ROWS * COLUMNS) if NI > 1 else 0
    row = (r // COLUMNS) % ROWS if NI > 1 else r // COLUMNS
    column = r % COLUMNS
    y, x = y0 + row, x0 + column
    there = (r < NI * ROWS * COLUMNS) & (y < HEIGHT) & (x < WIDTH)
    if NI > 1:  # a last group of images that is not full
        there = there & (n + image < N)
    if WIDE:
        row = row.to(tl.int64)
    return image, y, x, (image * HEIGHT + row) * WIDTH + column, there


@triton.jit
def _first_pixel(n, y0, x0, HEIGHT, WIDTH):
    return (n.to(tl.int64) * HEIGHT + y0) * WIDTH + x0


@triton.jit
def _window(first, SIZE, LENGTH: tl.constexpr):
    # LENGTH positions from `first` on, moved so that they lie within SIZE: none that is inside gets lost
    return tl.minimum(tl.maximum(first, 0), SIZE - LENGTH)


@triton.jit
def _transposed_window(first, pad, SIZE, K: tl.constexpr, S: tl.constexpr, DIL: tl.constexpr, LENGTH: tl.constexpr):
    # the outputs o that meet inputs i from `first` on: o * S - pad + t * DIL = i for a tap t
    least = tl.maximum(first + pad - (K - 1) * DIL, 0)
    return tl.minimum((least + S - 1) // S, SIZE - LENGTH)


@triton.jit
def _vector(ptr, c, c_mask):
    return tl.load(ptr + c, mask=c_mask, other=0.0)[None, :]


@triton.jit
def _product(
    a_ptr, pixel, there, w_ptr, c, c_mask, stride_c, stride_k,
    LENGTH: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_k a[pixel][k] * w[c][k]: a 1x1 convolution of pixels with LENGTH channels."""
    acc = tl.zeros([pixel.shape[0], c.shape[0]], tl.float32)
    for k0 in range(0, LENGTH, STEP):
        k = k0 + tl.arange(0, STEP)
        k_mask = (k < LENGTH) | (LENGTH % STEP == 0)
        a = tl.load(a_ptr + (pixel * LENGTH)[:, None] + k[None, :], mask=there[:, None] & k_mask[None, :], other=0.0)
        w = tl.load(
            w_ptr + k[:, None] * stride_k + c[None, :] * stride_c, mask=k_mask[:, None] & c_mask[None, :], other=0.0
        )
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _expand_window(
    x_ptr, w1_ptr, b1_ptr, scratch_ptr, n, y0, x0, N, H, W, c, c_mask,
    NI: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, NP: tl.constexpr, BP: tl.constexpr,
    CIN: tl.constexpr, BK: tl.constexpr, CE: tl.constexpr, ACT: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """e of NI x WH x WW pixels of x from y0, x0 on -> scratch [NP * BP, CE]. The caller puts the barriers."""
    x_ptr += _first_pixel(n, y0, x0, H, W) * CIN
    for block in range(NP):
        p = block * BP + tl.arange(0, BP)
        _, _, _, pixel, there = _place(p, n, y0, x0, N, H, W, NI, WH, WW, WIDE)
        e = _product(x_ptr, pixel, there, w1_ptr, c, c_mask, CIN, 1, CIN, BK, PRECISION)
        e = _activate(e + _vector(b1_ptr, c, c_mask), ACT).to(scratch_ptr.dtype.element_ty)
        tl.store(scratch_ptr + p[:, None] * CE + tl.arange(0, CE)[None, :], e)


@triton.jit
def _stencil(
    e_ptr, taps_ptr, image, y, x, there, y0, x0, H, W, pad_top, pad_left, c, c_mask,
    C: tl.constexpr, K: tl.constexpr, S: tl.constexpr, DIL: tl.constexpr,
    WH: tl.constexpr, WW: tl.constexpr, ZERO: tl.constexpr, CE: tl.constexpr, EXPAND: tl.constexpr,
):  # fmt: skip
    """D at the output pixels (image, y, x), from e in the scratch, whose window begins at y0, x0.

    Without expand e is x: e_ptr is then x at the window's first pixel.
    """
    d = tl.zeros([there.shape[0], CE], tl.float32)
    for ky in range(K):  # a real loop: kernels.py says why
        in_y = y * S - pad_top + ky * DIL
        row_inside = there & (in_y >= 0) & (in_y < H)
        row = image * (WH if EXPAND else H) + in_y - y0
        for kx in tl.static_range(K):
            in_x = x * S - pad_left + kx * DIL
            inside = row_inside & (in_x >= 0) & (in_x < W)
            if EXPAND:
                pixel = tl.where(inside, row * WW + (in_x - x0), ZERO)
                e = tl.load(e_ptr + pixel[:, None] * CE + tl.arange(0, CE)[None, :])
            else:
                pixel = row * W + (in_x - x0)
                e = tl.load(
                    e_ptr + (pixel * C)[:, None] + c[None, :], mask=inside[:, None] & c_mask[None, :], other=0.0
                )
            d += e.to(tl.float32) * _vector(taps_ptr + (ky * K + kx) * C, c, c_mask)
    return d


@triton.jit
def _depthwise(
    x_ptr, w1_ptr, b1_ptr, taps_ptr, scratch_ptr, n, y0, x0, image, y, x, there, N, H, W, pad_top, pad_left, c, c_mask,
    CIN: tl.constexpr, C: tl.constexpr, K: tl.constexpr, S: tl.constexpr, DIL: tl.constexpr, ACT: tl.constexpr,
    PRECISION: tl.constexpr, NI: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr,
    NP: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr, CE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """D of one tile of output pixels that begins at n, y0, x0, computed from x."""
    EXPAND: tl.constexpr = w1_ptr is not None
    window_y = _window(y0 * S - pad_top, H, WH)
    window_x = _window(x0 * S - pad_left, W, WW)
    if EXPAND:
        tl.debug_barrier()  # the scratch may still be read from for the tile or chunk before
        _expand_window(
            x_ptr, w1_ptr, b1_ptr, scratch_ptr, n, window_y, window_x, N, H, W, c, c_mask,
            NI, WH, WW, NP, BP, CIN, BK, CE, ACT, PRECISION, WIDE,
        )  # fmt: skip
        tl.debug_barrier()
        e_ptr = scratch_ptr
    else:
        e_ptr = x_ptr + _first_pixel(n, window_y, window_x, H, W) * CIN
    if WIDE:
        y, x = y.to(tl.int64), x.to(tl.int64)
    return _stencil(
        e_ptr, taps_ptr, image, y, x, there, window_y, window_x, H, W, pad_top, pad_left, c, c_mask,
        C, K, S, DIL, WH, WW, NP * BP, CE, EXPAND,
    )  # fmt: skip


@triton.jit
def _fold(v):
    """Sums over rows that one thread holds, [rows, channels] -> [32, channels]: a loop's sums meet at its end."""
    return tl.sum(tl.reshape(v, [v.shape[0] // 32, 32, v.shape[1]]), 0)


@triton.jit
def _own_scratch(scratch_ptr, program, ROWS: tl.constexpr, CE: tl.constexpr):
    """The program's part of the scratch: ROWS rows of CE channels and one of zeros. A barrier must follow."""
    scratch_ptr += program.to(tl.int64) * ((ROWS + 1) * CE)
    tl.store(scratch_ptr + ROWS * CE + tl.arange(0, CE), tl.zeros([CE], scratch_ptr.dtype.element_ty))
    return scratch_ptr


@triton.jit
def _store_moments(moment_ptr, program, first, second, shift, c, c_mask, C: tl.constexpr):
    moment_ptr += program.to(tl.int64) * 3 * C + c
    tl.store(moment_ptr, first, mask=c_mask)
    tl.store(moment_ptr + C, second, mask=c_mask)
    tl.store(moment_ptr + 2 * C, shift, mask=c_mask)


# ---- Forward --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_FLAT)
def gram(
    x_ptr,  # [pixels, CIN]
    shift_ptr,  # fp32 [CIN], subtracted from x, or None
    sum_ptr,  # fp32 [programs 2, CIN]
    gram_ptr,  # fp32 [programs 2, CIN, CIN]
    pixels, steps,
    CIN: tl.constexpr, BP: tl.constexpr, CI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i, j, group): columns i and j of x, `steps` times BP pixels."""
    group = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * CI + tl.arange(0, CI)
    j = tl.program_id(1) * CI + tl.arange(0, CI)
    i_mask, j_mask = i < CIN, j < CIN
    total = tl.zeros([CI], tl.float32)
    acc = tl.zeros([CI, CI], tl.float32)
    for step in range(steps):
        p = (group * steps + step) * BP + tl.arange(0, BP)
        p_mask = (p < pixels)[:, None]
        x_i = tl.load(x_ptr + (p * CIN)[:, None] + i[None, :], mask=p_mask & i_mask[None, :], other=0.0)
        x_j = tl.load(x_ptr + (p * CIN)[:, None] + j[None, :], mask=p_mask & j_mask[None, :], other=0.0)
        if shift_ptr is not None:
            x_i = tl.where(p_mask, x_i - _vector(shift_ptr, i, i_mask), 0.0)
            x_j = tl.where(p_mask, x_j - _vector(shift_ptr, j, j_mask), 0.0)
        total += tl.sum(x_i.to(tl.float32), 0)
        acc = tl.dot(x_i.trans(), x_j, acc, input_precision=PRECISION)
    if tl.program_id(1) == 0:
        tl.store(sum_ptr + group * CIN + i, total, mask=i_mask)
    gram_ptr += group * CIN * CIN
    tl.store(gram_ptr + i[:, None] * CIN + j[None, :], acc, mask=i_mask[:, None] & j_mask[None, :])


@triton.jit(do_not_specialize=_TILED)
def depthwise(
    x_ptr,  # [N, H, W, CIN]
    w1_ptr,  # [C, CIN] in x's dtype, None without expand (then CIN == C)
    b1_ptr,  # fp32 [C], None without expand
    taps_ptr,  # fp32 [K * K, C]
    d_ptr,  # [N, HO, WO, C] in x's dtype, or None
    moment_ptr,  # fp32 [programs 1, 3, C]: sum of D - shift, of its square, shift
    count_ptr,  # int32 [programs 1]: pixels in these sums
    scratch_ptr,  # [programs, NP * BP + 1, CE] in x's dtype, None without expand
    N, H, W, HO, WO, pad_top, pad_left, tiles, tiles_y, tiles_x,
    CIN: tl.constexpr, C: tl.constexpr, K: tl.constexpr, S: tl.constexpr, DIL: tl.constexpr, ACT: tl.constexpr,
    PRECISION: tl.constexpr, NI: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr,
    Q: tl.constexpr, NP: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr, CE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (chunk, group): CE hidden channels; tiles of output pixels in turns with the other groups."""
    group, groups = tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(0) * CE + tl.arange(0, CE)
    c_mask = (c < C) | (C % CE == 0)
    if w1_ptr is not None:
        scratch_ptr = _own_scratch(scratch_ptr, group * tl.num_programs(0) + tl.program_id(0), NP * BP, CE)
    count = 0
    shift = tl.zeros([CE], tl.float32)
    first = tl.zeros([32, CE], tl.float32)
    second = tl.zeros([32, CE], tl.float32)
    for tile in range(group, tiles, groups):
        n, y0, x0 = _tile_origin(tile, tiles_y, tiles_x, NI, TH, TW)
        image, y, x, pixel, there = _place(tl.arange(0, Q), n, y0, x0, N, HO, WO, NI, TH, TW, WIDE)
        d = _depthwise(
            x_ptr, w1_ptr, b1_ptr, taps_ptr, scratch_ptr, n, y0, x0, image, y, x, there,
            N, H, W, pad_top, pad_left, c, c_mask,
            CIN, C, K, S, DIL, ACT, PRECISION, NI, WH, WW, NP, BP, BK, CE, WIDE,
        )  # fmt: skip
        if d_ptr is not None:
            d_tile = d_ptr + _first_pixel(n, y0, x0, HO, WO) * C
            offset = (pixel * C)[:, None] + c[None, :]
            tl.store(d_tile + offset, d.to(d_ptr.dtype.element_ty), mask=there[:, None] & c_mask[None, :])
        number = tl.sum(there.to(tl.int32), 0)
        if count == 0:
            shift = tl.sum(d, 0) / number
        d = tl.where(there[:, None], d - shift[None, :], 0.0)
        first += _fold(d)
        second += _fold(d * d)
        count += number
    _store_moments(moment_ptr, group, tl.sum(first, 0), tl.sum(second, 0), shift, c, c_mask, C)
    if tl.program_id(0) == 0:
        tl.store(count_ptr + group, count)


@triton.jit(do_not_specialize=_TILED)
def project(
    x_ptr,  # as in `depthwise`; x, w1, b1, taps and scratch are None when D is given
    w1_ptr, b1_ptr, taps_ptr,
    d_ptr,  # [N, HO, WO, C], None: computed from x
    scale2_ptr, shift2_ptr,  # fp32 [C]
    w2_ptr,  # [COUT, C] in x's dtype
    z_ptr,  # [N, HO, WO, COUT] in x's dtype
    moment_ptr,  # fp32 [programs 0, 3, COUT], as in `depthwise`
    count_ptr,  # int32 [programs 0]
    scratch_ptr,
    N, H, W, HO, WO, pad_top, pad_left, tiles, tiles_y, tiles_x,
    CIN: tl.constexpr, C: tl.constexpr, COUT: tl.constexpr, K: tl.constexpr, S: tl.constexpr, DIL: tl.constexpr,
    ACT: tl.constexpr, PRECISION: tl.constexpr,
    NI: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr,
    Q: tl.constexpr, NP: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr, CE: tl.constexpr,
    CO: tl.constexpr,  # output channels a program
    WIDE: tl.constexpr,
):  # fmt: skip
    """Program (group, columns): tiles of output pixels in turns with the other groups; CO output channels."""
    group, groups = tl.program_id(0), tl.num_programs(0)
    o = tl.program_id(1) * CO + tl.arange(0, CO)
    o_mask = (o < COUT) | (COUT % CO == 0)
    if w1_ptr is not None:
        scratch_ptr = _own_scratch(scratch_ptr, tl.program_id(1) * groups + group, NP * BP, CE)
    count = 0
    shift = tl.zeros([CO], tl.float32)
    first = tl.zeros([CO], tl.float32)
    second = tl.zeros([CO], tl.float32)
    for tile in range(group, tiles, groups):
        n, y0, x0 = _tile_origin(tile, tiles_y, tiles_x, NI, TH, TW)
        image, y, x, pixel, there = _place(tl.arange(0, Q), n, y0, x0, N, HO, WO, NI, TH, TW, WIDE)
        origin = _first_pixel(n, y0, x0, HO, WO)
        z = tl.zeros([Q, CO], tl.float32)
        for c0 in range(0, C, CE):
            c = c0 + tl.arange(0, CE)
            c_mask = (c < C) | (C % CE == 0)
            if d_ptr is not None:
                offset = (pixel * C)[:, None] + c[None, :]
                d = tl.load(d_ptr + origin * C + offset, mask=there[:, None] & c_mask[None, :], other=0.0).to(
                    tl.float32
                )
            else:
                d = _depthwise(
                    x_ptr, w1_ptr, b1_ptr, taps_ptr, scratch_ptr, n, y0, x0, image, y, x, there,
                    N, H, W, pad_top, pad_left, c, c_mask,
                    CIN, C, K, S, DIL, ACT, PRECISION, NI, WH, WW, NP, BP, BK, CE, WIDE,
                )  # fmt: skip
            b = _activate(d * _vector(scale2_ptr, c, c_mask) + _vector(shift2_ptr, c, c_mask), ACT)
            if d_ptr is None and C % CE != 0:  # an infinite x times the zeros past the last channel is NaN
                b = tl.where(c_mask[None, :], b, 0.0)
            w2 = tl.load(w2_ptr + o[None, :] * C + c[:, None], mask=c_mask[:, None] & o_mask[None, :], other=0.0)
            z = tl.dot(b.to(w2.dtype), w2, z, input_precision=PRECISION)
        offset = (pixel * COUT)[:, None] + o[None, :]
        tl.store(z_ptr + origin * COUT + offset, z.to(z_ptr.dtype.element_ty), mask=there[:, None] & o_mask[None, :])
        number = tl.sum(there.to(tl.int32), 0)
        z = tl.where(there[:, None], z, 0.0)
        if count == 0:
            shift = tl.sum(z, 0) / number
        z = tl.where(there[:, None], z - shift[None, :], 0.0)
        first += tl.sum(z, 0)
        second += tl.sum(z * z, 0)
        count += number
    _store_moments(moment_ptr, group, first, second, shift, o, o_mask, COUT)
    if tl.program_id(1) == 0:
        tl.store(count_ptr + group, count)


@triton.jit(do_not_specialize=["groups"])
def combine_moments(
    moment_ptr,  # fp32 [groups, 3, C]: sum of v - shift, of its square, shift
    count_ptr,  # int32 [groups]
    sum_ptr,  # fp64 [C]: sum of v
    square_ptr,  # fp64 [C]: sum of v * v
    groups,
    C: tl.constexpr, BG: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Program (block of BC channels): what depthwise and project summed, without the shift, in fp64."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    c_mask = c < C
    total = tl.zeros([BC], tl.float64)
    square = tl.zeros([BC], tl.float64)
    for g0 in range(0, groups, BG):
        g = g0 + tl.arange(0, BG)
        mask = (g < groups)[:, None] & c_mask[None, :]
        offset = g.to(tl.int64)[:, None] * (3 * C) + c[None, :]
        count = tl.load(count_ptr + g, mask=g < groups, other=0).to(tl.float64)[:, None]
        first = tl.load(moment_ptr + offset, mask=mask, other=0.0).to(tl.float64)
        second = tl.load(moment_ptr + offset + C, mask=mask, other=0.0).to(tl.float64)
        shift = tl.load(moment_ptr + offset + 2 * C, mask=mask, other=0.0).to(tl.float64)
        total += tl.sum(first + count * shift, 0)
        square += tl.sum(second + shift * (2.0 * first + count * shift), 0)
    tl.store(sum_ptr + c, total, mask=c_mask)
    tl.store(square_ptr + c, square, mask=c_mask)


@triton.jit
def _elements(pixels, COUT: tl.constexpr, BP: tl.constexpr, CO: tl.constexpr):
    """Program (pixels, columns): its columns of [pixels, COUT], which exist; its BP x CO elements, which exist."""
    p = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    o = tl.program_id(1) * CO + tl.arange(0, CO)
    o_mask = (o < COUT) | (COUT % CO == 0)
    return o, o_mask, (p * COUT)[:, None] + o[None, :], (p < pixels)[:, None] & o_mask[None, :]


@triton.jit(do_not_specialize=["pixels"])
def finish(
    z_ptr,  # [pixels, COUT]
    x_ptr,  # [pixels, COUT], added, or None
    scale3_ptr, shift3_ptr,  # fp32 [COUT]
    y_ptr,  # [pixels, COUT]
    pixels,
    COUT: tl.constexpr, FINAL: tl.constexpr, BP: tl.constexpr, CO: tl.constexpr,
):  # fmt: skip
    """Program (pixels, columns): BP x CO elements."""
    o, o_mask, offset, mask = _elements(pixels, COUT, BP, CO)
    y = tl.load(z_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    y = _activate(y * _vector(scale3_ptr, o, o_mask) + _vector(shift3_ptr, o, o_mask), FINAL)
    if x_ptr is not None:
        y += tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


# ---- Backward -------------------------------------------------------------------------------------------------------


@triton.jit
def _finish_backward(gy_ptr, z_ptr, scale3_ptr, shift3_ptr, offset, mask, o, o_mask, FINAL: tl.constexpr):
    g = tl.load(gy_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    return _let_through(g, z * _vector(scale3_ptr, o, o_mask) + _vector(shift3_ptr, o, o_mask), FINAL), z


@triton.jit(do_not_specialize=_FLAT)
def finish_sums(
    gy_ptr, z_ptr,  # [pixels, COUT]
    scale3_ptr, shift3_ptr,  # fp32 [COUT]
    sum_ptr,  # fp32 [programs 0, 2, COUT]: of g, of g * Z
    pixels, steps,
    COUT: tl.constexpr, FINAL: tl.constexpr, BP: tl.constexpr, CO: tl.constexpr,
):  # fmt: skip
    """Program (group, columns): `steps` times BP pixels, CO channels."""
    group = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * CO + tl.arange(0, CO)
    o_mask = (o < COUT) | (COUT % CO == 0)
    sum_g = tl.zeros([BP, CO], tl.float32)
    sum_gz = tl.zeros([BP, CO], tl.float32)
    for step in range(steps):
        p = (group * steps + step) * BP + tl.arange(0, BP)
        mask = (p < pixels)[:, None] & o_mask[None, :]
        offset = (p * COUT)[:, None] + o[None, :]
        g, z = _finish_backward(gy_ptr, z_ptr, scale3_ptr, shift3_ptr, offset, mask, o, o_mask, FINAL)
        sum_g += g
        sum_gz += g * z
    sum_ptr += group * 2 * COUT + o
    tl.store(sum_ptr, tl.sum(sum_g, 0), mask=o_mask)
    tl.store(sum_ptr + COUT, tl.sum(sum_gz, 0), mask=o_mask)


@triton.jit(do_not_specialize=["pixels"])
def finish_gradient(
    gy_ptr, z_ptr,  # [pixels, COUT]
    scale3_ptr, shift3_ptr, a3_ptr, b3_ptr, c3_ptr,  # fp32 [COUT]
    gz_ptr,  # [pixels, COUT]
    pixels,
    COUT: tl.constexpr, FINAL: tl.constexpr, BP: tl.constexpr, CO: tl.constexpr,
):  # fmt: skip
    """Program (pixels, columns): BP x CO elements."""
    o, o_mask, offset, mask = _elements(pixels, COUT, BP, CO)
    g, z = _finish_backward(gy_ptr, z_ptr, scale3_ptr, shift3_ptr, offset, mask, o, o_mask, FINAL)
    gz = _vector(a3_ptr, o, o_mask) * g + _vector(b3_ptr, o, o_mask) * z + _vector(c3_ptr, o, o_mask)
    tl.store(gz_ptr + offset, gz.to(gz_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_TILED)
def project_gradient(
    gz_ptr,  # [N, HO, WO, COUT]
    x_ptr, w1_ptr, b1_ptr, taps_ptr, d_ptr, scale2_ptr, shift2_ptr, w2_ptr,  # as in `project`
    gw2_ptr,  # fp32 [programs 1, COUT, C], or None
    sum_ptr,  # fp32 [programs 1, 2, C]: of g2, of g2 * D; or None
    scratch_ptr,
    N, H, W, HO, WO, pad_top, pad_left, tiles, tiles_y, tiles_x,
    CIN: tl.constexpr, C: tl.constexpr, COUT: tl.constexpr, K: tl.constexpr, S: tl.constexpr, DIL: tl.constexpr,
    ACT: tl.constexpr, PRECISION: tl.constexpr,
    NI: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr,
    Q: tl.constexpr, NP: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
    BO: tl.constexpr,  # output channels a step of the product with w2
    CE: tl.constexpr,
    CO: tl.constexpr,  # output channels of gw2 a program
    WIDE: tl.constexpr,
):  # fmt: skip
    """Program (chunk, group, rows of gw2): CE hidden channels; tiles of output pixels in turns with the groups."""
    group, groups = tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(0) * CE + tl.arange(0, CE)
    c_mask = (c < C) | (C % CE == 0)
    o = tl.program_id(2) * CO + tl.arange(0, CO)
    o_mask = (o < COUT) | (COUT % CO == 0)
    if w1_ptr is not None:
        program = (tl.program_id(2) * groups + group) * tl.num_programs(0) + tl.program_id(0)
        scratch_ptr = _own_scratch(scratch_ptr, program, NP * BP, CE)
    scale2, shift2 = _vector(scale2_ptr, c, c_mask), _vector(shift2_ptr, c, c_mask)
    sum_g = tl.zeros([32, CE], tl.float32)
    sum_gd = tl.zeros([32, CE], tl.float32)
    gw2 = tl.zeros([CO, CE], tl.float32)
    for tile in range(group, tiles, groups):
        n, y0, x0 = _tile_origin(tile, tiles_y, tiles_x, NI, TH, TW)
        image, y, x, pixel, there = _place(tl.arange(0, Q), n, y0, x0, N, HO, WO, NI, TH, TW, WIDE)
        origin = _first_pixel(n, y0, x0, HO, WO)
        if d_ptr is not None:
            offset = (pixel * C)[:, None] + c[None, :]
            d = tl.load(d_ptr + origin * C + offset, mask=there[:, None] & c_mask[None, :], other=0.0).to(tl.float32)
        else:
            d = _depthwise(
                x_ptr, w1_ptr, b1_ptr, taps_ptr, scratch_ptr, n, y0, x0, image, y, x, there,
                N, H, W, pad_top, pad_left, c, c_mask,
                CIN, C, K, S, DIL, ACT, PRECISION, NI, WH, WW, NP, BP, BK, CE, WIDE,
            )  # fmt: skip
        v = d * scale2 + shift2
        gz_tile = gz_ptr + origin * COUT
        if sum_ptr is not None:
            g2 = _product(gz_tile, pixel, there, w2_ptr, c, c_mask, 1, C, COUT, BO, PRECISION)
            g2 = _let_through(g2, v, ACT)
            sum_g += _fold(g2)
            sum_gd += _fold(g2 * d)
        if gw2_ptr is not None:
            gz = tl.load(
                gz_tile + (pixel * COUT)[None, :] + o[:, None], mask=there[None, :] & o_mask[:, None], other=0.0
            )
            gw2 = tl.dot(gz, _activate(v, ACT).to(gz.dtype), gw2, input_precision=PRECISION)
    if gw2_ptr is not None:
        gw2_ptr += group.to(tl.int64) * (COUT * C)
        tl.store(gw2_ptr + o[:, None] * C + c[None, :], gw2, mask=o_mask[:, None] & c_mask[None, :])
    if sum_ptr is not None:
        sum_ptr += group.to(tl.int64) * 2 * C + c
        mask = c_mask & (tl.program_id(2) == 0)
        tl.store(sum_ptr, tl.sum(sum_g, 0), mask=mask)
        tl.store(sum_ptr + C, tl.sum(sum_gd, 0), mask=mask)


@triton.jit(do_not_specialize=[*_TILED, "taps"])
def depthwise_gradient(
    gz_ptr,  # [N, HO, WO, COUT]
    x_ptr, w1_ptr, b1_ptr, taps_ptr,  # as in `depthwise`
    d_ptr, scale2_ptr, shift2_ptr,  # as in `project`
    a2_ptr, b2_ptr, c2_ptr,  # fp32 [C]
    w2_ptr,  # [COUT, C]
    g_ptr,  # fp32 [SPLITS, N, H, W, CIN]: G, or the splits' parts of it ([N, H, W, CIN] without expand); or None
    t_ptr,  # fp32 [programs 0, C, CIN], None without expand or without G
    sum_ptr,  # fp32 [programs 0, C], as t_ptr
    gwd_ptr,  # fp32 [programs 0, K * K, C], or None
    e_scratch_ptr,  # [programs, NV * BP + 1, CE], None when D is given or without expand
    g_scratch_ptr,  # [programs, NP * BP + 1, CE]
    N, H, W, HO, WO, pad_top, pad_left,
    tiles, tiles_y, tiles_x,  # of x
    taps,  # K * K, but not known to the compiler, which would unroll the loop over them and run out of registers
    CIN: tl.constexpr, C: tl.constexpr, COUT: tl.constexpr, K: tl.constexpr, S: tl.constexpr, DIL: tl.constexpr,
    ACT: tl.constexpr, PRECISION: tl.constexpr,
    NI: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,  # the tile, in pixels of x
    WH: tl.constexpr, WW: tl.constexpr, NP: tl.constexpr,  # the outputs around it, in NP blocks of BP
    VH: tl.constexpr, VW: tl.constexpr, NV: tl.constexpr,  # the pixels of x around those, if D is to be computed
    Q: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr, CE: tl.constexpr,
    CI: tl.constexpr,  # columns of G a program
    SPLITS: tl.constexpr,  # programs that share the hidden channels of a tile
    WIDE: tl.constexpr,
):  # fmt: skip
    """Program (group, split, columns): tiles of pixels of x in turns with the groups, a share of the hidden channels,
    CI columns of G and T."""
    EXPAND: tl.constexpr = w1_ptr is not None
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    SIXTEEN_BITS: tl.constexpr = DTYPE.primitive_bitwidth == 16
    CHUNKS_A_SPLIT: tl.constexpr = ((C + CE - 1) // CE + SPLITS - 1) // SPLITS
    group, groups, split = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    first_share = tl.program_id(2) == 0  # of the columns: what all have computed is kept once
    program = (tl.program_id(2) * SPLITS + split) * groups + group
    first_channel = split * (CHUNKS_A_SPLIT * CE)
    last_channel = tl.minimum(first_channel + CHUNKS_A_SPLIT * CE, C)
    g_scratch_ptr = _own_scratch(g_scratch_ptr, program, NP * BP, CE)
    if e_scratch_ptr is not None:
        e_scratch_ptr = _own_scratch(e_scratch_ptr, program, NV * BP, CE)
    if EXPAND and g_ptr is not None:
        g_ptr += split.to(tl.int64) * N * H * W * CIN
    if gwd_ptr is not None:
        gwd_ptr += group.to(tl.int64) * (K * K * C)
    if t_ptr is not None:
        t_ptr += group.to(tl.int64) * (C * CIN)
        sum_ptr += group.to(tl.int64) * C
    first_column = tl.program_id(2) * CI
    i = first_column + tl.arange(0, CI)
    i_mask = (i < CIN) | (CIN % CI == 0)

    for tile in range(group, tiles, groups):
        again = tile != group  # the workspace holds sums of tiles before
        n, y0, x0 = _tile_origin(tile, tiles_y, tiles_x, NI, TH, TW)
        image, y, x, pixel, there = _place(tl.arange(0, Q), n, y0, x0, N, H, W, NI, TH, TW, WIDE)
        origin = _first_pixel(n, y0, x0, H, W)
        window_y = _transposed_window(y0, pad_top, HO, K, S, DIL, WH)
        window_x = _transposed_window(x0, pad_left, WO, K, S, DIL, WW)
        out_origin = _first_pixel(n, window_y, window_x, HO, WO)
        acc = tl.zeros([Q, CI], tl.float32)

        for c0 in range(first_channel, last_channel, CE):
            c = c0 + tl.arange(0, CE)
            c_mask = (c < C) | (C % CE == 0)

            # gD of the window -> scratch
            e_y = _window(window_y * S - pad_top, H, VH)
            e_x = _window(window_x * S - pad_left, W, VW)
            e_ptr = x_ptr + _first_pixel(n, e_y, e_x, H, W) * CIN
            if e_scratch_ptr is not None:
                _expand_window(
                    x_ptr, w1_ptr, b1_ptr, e_scratch_ptr, n, e_y, e_x, N, H, W, c, c_mask,
                    NI, VH, VW, NV, BP, CIN, BK, CE, ACT, PRECISION, WIDE,
                )  # fmt: skip
                tl.debug_barrier()
                e_ptr = e_scratch_ptr
            for block in range(NP):
                p = block * BP + tl.arange(0, BP)
                p_image, p_y, p_x, p_pixel, p_there = _place(p, n, window_y, window_x, N, HO, WO, NI, WH, WW, WIDE)
                if d_ptr is not None:
                    offset = (p_pixel * C)[:, None] + c[None, :]
                    mask = p_there[:, None] & c_mask[None, :]
                    d = tl.load(d_ptr + out_origin * C + offset, mask=mask, other=0.0).to(tl.float32)
                else:
                    if WIDE:
                        p_y, p_x = p_y.to(tl.int64), p_x.to(tl.int64)
                    d = _stencil(
                        e_ptr, taps_ptr, p_image, p_y, p_x, p_there, e_y, e_x, H, W, pad_top, pad_left, c, c_mask,
                        C, K, S, DIL, VH, VW, NV * BP, CE, EXPAND,
                    )  # fmt: skip
                g2 = _product(
                    gz_ptr + out_origin * COUT, p_pixel, p_there, w2_ptr, c, c_mask, 1, C, COUT, BO, PRECISION
                )
                g2 = _let_through(g2, d * _vector(scale2_ptr, c, c_mask) + _vector(shift2_ptr, c, c_mask), ACT)
                g_d = _vector(a2_ptr, c, c_mask) * g2 + _vector(b2_ptr, c, c_mask) * d + _vector(c2_ptr, c, c_mask)
                tl.store(g_scratch_ptr + p[:, None] * CE + tl.arange(0, CE)[None, :], g_d.to(DTYPE))
            tl.debug_barrier()

            # e of the tile, and what it was before its activation
            x_tile = x_ptr + origin * CIN
            if EXPAND:
                v = _product(x_tile, pixel, there, w1_ptr, c, c_mask, CIN, 1, CIN, BK, PRECISION)
                v += _vector(b1_ptr, c, c_mask)
                e = _activate(v, ACT).to(DTYPE)
            else:
                mask = there[:, None] & c_mask[None, :]
                e = tl.load(x_tile + (pixel * CIN)[:, None] + c[None, :], mask=mask, other=0.0)

            # depthwise, transposed: of the input pixel y, x tap t meets the output pixel o with o * S - pad + t * DIL
            g1 = tl.zeros([Q, CE], tl.float32)
            for tap in range(taps):
                row = y + pad_top - tap // K * DIL
                column = x + pad_left - tap % K * DIL
                out_y, out_x = row // S, column // S
                meets = there & (row >= 0) & (row % S == 0) & (out_y < HO)
                meets = meets & (column >= 0) & (column % S == 0) & (out_x < WO)
                place = (image * WH + out_y - window_y) * WW + (out_x - window_x)
                place = tl.where(meets, place, NP * BP)
                g_d = tl.load(g_scratch_ptr + place[:, None] * CE + tl.arange(0, CE)[None, :])
                g1 += g_d.to(tl.float32) * _vector(taps_ptr + tap * C, c, c_mask)
                if gwd_ptr is not None:
                    if SIXTEEN_BITS:
                        # The diagonal of a product on tensor cores, whose other elements cost nothing: a sum over rows
                        # that many threads share would be more instructions than the tap itself.
                        diagonal = (c[:, None] == c[None, :]) & c_mask[None, :]
                        here = gwd_ptr + tap * C + (c[:, None] * 0 + c[None, :])
                        gwd = tl.load(here, mask=diagonal & again, other=0.0)
                        gwd = tl.dot(e.trans(), g_d, gwd)
                        tl.store(here, gwd, mask=diagonal & first_share)
                    else:
                        here = gwd_ptr + tap * C + c
                        gwd = tl.load(here, mask=c_mask & again, other=0.0)
                        tl.store(here, gwd + tl.sum(g_d * e, 0), mask=c_mask & first_share)
            tl.debug_barrier()

            if g_ptr is not None:
                if EXPAND:
                    g1 = _let_through(g1, v, ACT)
                    if C % CE != 0:  # see project
                        g1 = tl.where(c_mask[None, :], g1, 0.0)
                    total = tl.load(sum_ptr + c, mask=c_mask & again, other=0.0)
                    tl.store(sum_ptr + c, total + tl.sum(g1, 0), mask=c_mask & first_share)
                    g1 = g1.to(DTYPE)
                    for i0 in range(first_column, first_column + CI, BK):
                        k = i0 + tl.arange(0, BK)
                        k_mask = (k < CIN) | (CIN % CI == 0)
                        x_tile_k = x_tile + (pixel * CIN)[:, None] + k[None, :]
                        x_k = tl.load(x_tile_k, mask=there[:, None] & k_mask[None, :], other=0.0)
                        t_k = t_ptr + c[:, None] * CIN + k[None, :]
                        t_mask = c_mask[:, None] & k_mask[None, :]
                        t = tl.load(t_k, mask=t_mask & again, other=0.0)
                        tl.store(t_k, tl.dot(g1.trans(), x_k, t, input_precision=PRECISION), mask=t_mask)
                    w1 = tl.load(
                        w1_ptr + c[:, None] * CIN + i[None, :], mask=c_mask[:, None] & i_mask[None, :], other=0.0
                    )
                    acc = tl.dot(g1, w1, acc, input_precision=PRECISION)
                else:  # G is g1
                    offset = (pixel * CIN)[:, None] + c[None, :]
                    tl.store(g_ptr + origin * CIN + offset, g1, mask=there[:, None] & c_mask[None, :])
        if EXPAND and g_ptr is not None:
            offset = (pixel * CIN)[:, None] + i[None, :]
            tl.store(g_ptr + origin * CIN + offset, acc, mask=there[:, None] & i_mask[None, :])


@triton.jit(do_not_specialize=["pixels"])
def input_gradient(
    g_ptr,  # fp32 [pixels, CIN]
    x_ptr,  # [pixels, CIN], None without M
    m_ptr,  # fp32 [CIN, CIN], or None
    c0_ptr,  # fp32 [CIN], or None
    gy_ptr,  # [pixels, CIN], added, or None
    gx_ptr,  # [pixels, CIN]
    pixels,
    CIN: tl.constexpr, PRECISION: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr, CI: tl.constexpr,
):  # fmt: skip
    """Program (pixels, columns): BP x CI elements."""
    p = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    p_mask = p < pixels
    i = tl.program_id(1) * CI + tl.arange(0, CI)
    i_mask = (i < CIN) | (CIN % CI == 0)
    mask = p_mask[:, None] & i_mask[None, :]
    offset = (p * CIN)[:, None] + i[None, :]
    gx = tl.load(g_ptr + offset, mask=mask, other=0.0)
    if m_ptr is not None:
        product = tl.zeros([BP, CI], tl.float32)
        for k0 in range(0, CIN, BK):
            k = k0 + tl.arange(0, BK)
            k_mask = (k < CIN) | (CIN % BK == 0)
            # in fp32, at worst rounded to TF32: M is far too small for fp16's exponents
            x = tl.load(x_ptr + (p * CIN)[:, None] + k[None, :], mask=p_mask[:, None] & k_mask[None, :], other=0.0)
            m = tl.load(m_ptr + i[None, :] * CIN + k[:, None], mask=k_mask[:, None] & i_mask[None, :], other=0.0)
            product = tl.dot(x.to(tl.float32), m, product, input_precision=PRECISION)
        gx -= product
    if c0_ptr is not None:
        gx -= _vector(c0_ptr, i, i_mask)
    if gy_ptr is not None:
        gx += tl.load(gy_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(gx_ptr + offset, gx.to(gx_ptr.dtype.element_ty), mask=mask)
