"""Device code of the fused inverted residual block in plain Triton: pointers and sizes, no torch.

The block, BatchNorm folded, everything channels_last (a pixel's channels are contiguous):

    e[p][c] = act(b1[c] + sum_i w1[c][i] * x[p][i])              expand     1x1     [pixels, CIN] -> [pixels, C]
    d[q][c] = act(b2[c] + sum_t wd[c][t] * e[q * S + t][c])      depthwise  K x K   zero outside the image
    y[q][o] = final(b3[o] + sum_c w2[o][c] * d[q][c]) (+ x[q][o])  project  1x1     [pixels, C] -> [pixels, COUT]

How a program works. It owns a tile: NI sub-images x TH x TW output pixels (rows of the Q-row tensors), which need
NI x IH x IW input pixels, halo included (rows of NP blocks of BP). It walks the hidden channels in chunks of CE:

    expand   x [BP, CIN] . w1 [CIN, CE] on the tensor cores, act, 0 outside the image -> scratch [NP * BP, CE]
    barrier
    depthwise  K * K loads [Q, CE] from scratch, each shifted by a constant, summed in fp32, act
    barrier
    project  acc [Q, COUT] += d [Q, CE] . w2 [CE, COUT] on the tensor cores

The scratch is global memory that one program reuses for every chunk and every tile it ever works on, so its few KiB
stay in the L1 and L2: the hidden tensor never exists as a whole. Triton has no shared-memory tile that can be read at
an offset; README.md beside this file compares the other ways of doing a stencil in it.

Dilation costs nothing: an output pixel (a + D*u, b + D*v) only ever meets input pixels of one residue class, so an
image is D * D interleaved sub-images on which the convolution is not dilated. "Sub-image" below means that; with D = 1
it is the image.

TF32 (fp32 with torch's switch on) is what the tensor cores make of fp32: they drop the low bits. Rounding instead
(cvt.rna.tf32) would cut the error to a third and nearly double the instructions.

Names: p numbers input pixels of the tile, q output pixels, c hidden channels, i input channels, o output channels.
Written against Triton 3.6 to 3.9. Launch with num_stages=1: the software pipeliner does not know that the scratch loads
depend on the scratch stores and may start them before the barrier.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Rounding to 16 bits before the clamp gives the same bits as after it, 0 and 6 being exact, and from Triton 3.9 on it
# clamps two values an instruction (48 instead of 51 instructions an output in block 3, sm_90). Before 3.9 the compiler
# clamps one 16-bit value at a time and packs it again: 118 instead of 84 in block 15, sm_80.
ROUND_FIRST = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9))


@triton.jit
def _activate(v, KIND: tl.constexpr):
    # propagate_nan: torch's ReLU and ReLU6 hand a NaN through, the hardware's plain min and max drop it
    if KIND != "none":
        v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if KIND == "relu6":
        v = tl.minimum(v, 6.0, propagate_nan=tl.PropagateNan.ALL)
    return v


@triton.jit
def _activate_as(v, KIND: tl.constexpr, DTYPE: tl.constexpr):
    if ROUND_FIRST:
        v = v.to(DTYPE)
    return _activate(v, KIND).to(DTYPE)


@triton.jit
def _activate_inside_as(v, inside, KIND: tl.constexpr, DTYPE: tl.constexpr):
    # act(v) inside the image, 0 outside. ReLU6 clamps anyway: clamping to 0 instead of 6 saves the select.
    if ROUND_FIRST:
        v = v.to(DTYPE)
    if KIND == "relu6":
        v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
        v = tl.minimum(v, tl.where(inside, 6.0, 0.0).to(v.dtype), propagate_nan=tl.PropagateNan.ALL)
    else:
        v = tl.where(inside, _activate(v, KIND), 0.0)
    return v.to(DTYPE)


@triton.jit
def _bias(ptr, offset, mask):
    if ptr is None:
        return tl.zeros(offset.shape, tl.float32)
    return tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _project(d, w2_ptr, acc, o, c, c_mask, C: tl.constexpr, COUT: tl.constexpr, PRECISION: tl.constexpr):
    o_mask = o < COUT
    w2 = tl.load(w2_ptr + o[:, None] * C + c[None, :], mask=o_mask[:, None] & c_mask[None, :], other=0.0)
    return tl.dot(d, w2.to(d.dtype).trans(), acc, input_precision=PRECISION)


@triton.jit
def _store(
    acc, y_ptr, y_offset, valid, b3_ptr, x_ptr, x_offset, o,
    COUT: tl.constexpr, FINAL: tl.constexpr, RESIDUAL: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    o_mask = o < COUT
    mask = valid[:, None] & o_mask[None, :]
    if not PARTIAL:
        acc = _activate(acc + _bias(b3_ptr, o, o_mask)[None, :], FINAL)
        if RESIDUAL:  # stride 1, CIN == COUT: x has y's shape
            acc += tl.load(x_ptr + x_offset[:, None] + o[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + y_offset[:, None] + o[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "H", "W", "HO", "WO", "pad_top", "pad_left", "tiles", "tiles_y", "tiles_x"])
def fused_block(
    x_ptr,  # [N, H, W, CIN]
    w1_ptr,  # [C, CIN], None without expand (then CIN == C)
    b1_ptr,  # [C] or None
    wd_ptr,  # [C, K * K] with strides wd_stride_c, wd_stride_t
    b2_ptr,  # [C] or None
    w2_ptr,  # [COUT, C]
    b3_ptr,  # [COUT] or None
    y_ptr,  # [N, HO, WO, COUT]; with SPLITS > 1 fp32 partial sums [SPLITS, N, HO, WO, COUT]
    scratch_ptr,  # [programs, NP * BP, CE], None without expand
    N, H, W, HO, WO,
    pad_top, pad_left,
    tiles, tiles_y, tiles_x,  # tiles = groups of sub-images x tiles_y x tiles_x x column groups
    wd_stride_c, wd_stride_t,
    CIN: tl.constexpr, C: tl.constexpr, COUT: tl.constexpr,
    K: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    ACT: tl.constexpr, FINAL: tl.constexpr, RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,  # of tl.dot in fp32: "ieee" or "tf32"
    NI: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,  # the tile, see above
    Q: tl.constexpr, NP: tl.constexpr, BP: tl.constexpr,
    BK: tl.constexpr,  # input channels a step of the expand product
    CE: tl.constexpr,  # hidden channels a chunk
    CO_A: tl.constexpr, CO_B: tl.constexpr,  # output columns a program: two powers of two, CO_B may be 0
    CO_GROUPS: tl.constexpr,  # programs that share the output columns of a tile
    SPLITS: tl.constexpr,  # programs that share the hidden channels of a tile
    WIDE: tl.constexpr,  # offsets within NI images need 64 bits
):  # fmt: skip
    IH: tl.constexpr = (TH - 1) * S + K
    IW: tl.constexpr = (TW - 1) * S + K
    EXPAND: tl.constexpr = w1_ptr is not None
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    CHUNKS: tl.constexpr = (C + CE - 1) // CE
    CHUNKS_A_SPLIT: tl.constexpr = (CHUNKS + SPLITS - 1) // SPLITS
    index_type: tl.constexpr = tl.int64 if WIDE else tl.int32

    split = tl.program_id(1)
    first_channel = split * (CHUNKS_A_SPLIT * CE)
    last_channel = tl.minimum(first_channel + CHUNKS_A_SPLIT * CE, C)
    if SPLITS > 1:
        y_ptr += split.to(tl.int64) * N * HO * WO * COUT
    if EXPAND:
        scratch_ptr += (tl.program_id(0) * SPLITS + split).to(tl.int64) * (NP * BP * CE)

    chunk = tl.arange(0, CE)
    q = tl.arange(0, Q)
    # with one sub-image a tile, nothing that depends on the number of the sub-image is a vector
    q_image = q // (TH * TW) if NI > 1 else 0
    q_row = (q // TW) % TH if NI > 1 else q // TW
    q_col = q % TW
    q_used = q < NI * TH * TW

    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        group = tile % CO_GROUPS
        tile_x = (tile // CO_GROUPS) % tiles_x
        tile_y = (tile // (CO_GROUPS * tiles_x)) % tiles_y
        image = tile // (CO_GROUPS * tiles_x * tiles_y) * NI  # first sub-image; n * D * D + residue class
        n = image // (D * D)
        x_tile = x_ptr + n.to(tl.int64) * H * W * CIN
        y_tile = y_ptr + n.to(tl.int64) * HO * WO * COUT

        # output pixels
        image_q = image + q_image
        out_y = (image_q // D) % D + (tile_y * TH + q_row) * D
        out_x = image_q % D + (tile_x * TW + q_col) * D
        n_q = image_q // (D * D)
        valid = q_used & (out_y < HO) & (out_x < WO)
        if NI > 1:  # a last group of images that is not full
            valid = valid & (n_q < N)
        out_pixel = ((n_q - n).to(index_type) * HO + out_y) * WO + out_x

        o_a = group * (CO_A + CO_B) + tl.arange(0, CO_A)
        acc_a = tl.zeros([Q, CO_A], tl.float32)
        if CO_B > 0:
            o_b = group * (CO_A + CO_B) + CO_A + tl.arange(0, CO_B)
            acc_b = tl.zeros([Q, CO_B], tl.float32)

        for c0 in range(first_channel, last_channel, CE):
            c = c0 + chunk
            c_mask = (c < C) | (C % CE == 0)

            if EXPAND:
                b1 = _bias(b1_ptr, c, c_mask)
                for block in tl.static_range(NP):
                    p = block * BP + tl.arange(0, BP)
                    image_p = image + (p // (IH * IW) if NI > 1 else 0)
                    row = (p // IW) % IH if NI > 1 else p // IW
                    in_y = (image_p // D) % D * S - pad_top + (tile_y * (TH * S) + row) * D
                    in_x = image_p % D * S - pad_left + (tile_x * (TW * S) + p % IW) * D
                    n_p = image_p // (D * D)
                    inside = (p < NI * IH * IW) & (in_y >= 0) & (in_y < H) & (in_x >= 0) & (in_x < W)
                    if NI > 1:
                        inside = inside & (n_p < N)
                    in_pixel = ((n_p - n).to(index_type) * H + in_y) * W + in_x
                    e = tl.zeros([BP, CE], tl.float32)
                    for i0 in range(0, CIN, BK):
                        i = i0 + tl.arange(0, BK)
                        i_mask = (i < CIN) | (CIN % BK == 0)
                        x = tl.load(
                            x_tile + (in_pixel * CIN)[:, None] + i[None, :],
                            mask=inside[:, None] & i_mask[None, :],
                            other=0.0,
                        )
                        w1 = tl.load(
                            w1_ptr + c[:, None] * CIN + i[None, :], mask=c_mask[:, None] & i_mask[None, :], other=0.0
                        )
                        e = tl.dot(x, w1.to(DTYPE).trans(), e, input_precision=PRECISION)
                    e = _activate_inside_as(e + b1[None, :], inside[:, None], ACT, DTYPE)
                    tl.store(scratch_ptr + p[:, None] * CE + chunk[None, :], e)
                tl.debug_barrier()

            d = tl.zeros([Q, CE], tl.float32)
            wd = wd_ptr + c * wd_stride_c
            # The outer loop over tap rows is a real loop on purpose: unrolled, the compiler pulls the conversion to the
            # project product's operand layout up to the loads, and every tap goes through shared memory.
            if EXPAND:
                pixel = (q_image * IH + q_row * S) * IW + q_col * S
                taps = scratch_ptr + tl.where(q_used, pixel, 0)[:, None] * CE + chunk[None, :]
                for _ky in range(K):
                    for kx in tl.static_range(K):
                        w = tl.load(wd + kx * wd_stride_t, mask=c_mask, other=0.0).to(tl.float32)
                        d += tl.load(taps + kx * CE).to(tl.float32) * w[None, :]
                    taps += IW * CE
                    wd += K * wd_stride_t
                tl.debug_barrier()
            else:
                in_y = (image_q // D) % D * S - pad_top + (tile_y * TH + q_row) * (S * D)
                in_x = image_q % D * S - pad_left + (tile_x * TW + q_col) * (S * D)
                in_pixel = ((n_q - n).to(index_type) * H + in_y) * W + in_x
                taps = x_tile + (in_pixel * CIN)[:, None] + c[None, :]
                row_step = W.to(index_type) * (D * CIN)
                for _ky in range(K):
                    row_inside = valid & (in_y >= 0) & (in_y < H)
                    for kx in tl.static_range(K):
                        w = tl.load(wd + kx * wd_stride_t, mask=c_mask, other=0.0).to(tl.float32)
                        inside = row_inside & (in_x + kx * D >= 0) & (in_x + kx * D < W)
                        e = tl.load(taps + kx * (D * CIN), mask=inside[:, None] & c_mask[None, :], other=0.0)
                        d += e.to(tl.float32) * w[None, :]
                    taps += row_step
                    wd += K * wd_stride_t
                    in_y += D

            d = _activate_as(d + _bias(b2_ptr, c, c_mask)[None, :], ACT, DTYPE)
            if EXPAND and C % CE != 0:  # an infinite x times the zeros past the last channel is NaN
                d = tl.where(c_mask[None, :], d, 0.0).to(DTYPE)
            acc_a = _project(d, w2_ptr, acc_a, o_a, c, c_mask, C, COUT, PRECISION)
            if CO_B > 0:
                acc_b = _project(d, w2_ptr, acc_b, o_b, c, c_mask, C, COUT, PRECISION)

        y_offset = out_pixel * COUT
        PARTIAL: tl.constexpr = SPLITS > 1
        _store(acc_a, y_tile, y_offset, valid, b3_ptr, x_tile, y_offset, o_a, COUT, FINAL, RESIDUAL, PARTIAL)
        if CO_B > 0:
            _store(acc_b, y_tile, y_offset, valid, b3_ptr, x_tile, y_offset, o_b, COUT, FINAL, RESIDUAL, PARTIAL)


@triton.jit(do_not_specialize=["total"])
def sum_splits(
    partial_ptr,  # fp32 [SPLITS, total]
    b3_ptr,  # [COUT] or None
    x_ptr,  # [total], read when RESIDUAL
    y_ptr,  # [total] = [N, HO, WO, COUT]
    total,
    COUT: tl.constexpr, FINAL: tl.constexpr, RESIDUAL: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Second stage of a split over hidden channels: always added in the same order, so the result is reproducible."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < total
    acc = tl.zeros([BLOCK], tl.float32)
    for split in range(SPLITS):
        acc += tl.load(partial_ptr + split * tl.cast(total, tl.int64) + offset, mask=mask, other=0.0)
    acc = _activate(acc + _bias(b3_ptr, offset % COUT, mask), FINAL)
    if RESIDUAL:
        acc += tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offset, acc.to(y_ptr.dtype.element_ty), mask=mask)
