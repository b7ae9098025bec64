"""Device code of the fused inverted residual block in Gluon, for NVIDIA GPUs from Ampere on. Triton 3.8 or later.

The same block as kernels.py, its plain-Triton twin, and the same tensors:

    e[p][c] = act(b1[c] + sum_i w1[c][i] * x[p][i])              expand     1x1     [pixels, CIN] -> [pixels, C]
    d[q][c] = act(b2[c] + sum_t wd[c][t] * e[q * S + t][c])      depthwise  K x K   zero outside the image
    y[q][o] = final(b3[o] + sum_c w2[o][c] * d[q][c]) (+ x[q][o])  project  1x1     [pixels, C] -> [pixels, COUT]

What plain Triton cannot say and Gluon can: e lives in shared memory and is read at an offset, and the depthwise sum is
formed in the very registers from which the tensor cores take the project product's operand. So d never leaves them.

A program owns NI parts, each TH x TW output pixels of some image, and a part's window of IH x IW input pixels. It walks
the hidden channels in chunks of CE:

    barrier 1   x, w1 of this chunk are in shared memory; nobody reads e, wd or w2 of the previous chunk any more
                w2 of this chunk begins to arrive (cp.async)
    expand      [BP, CIN] . [CIN, CE] for each of NP blocks of slots, rounded, clamped, stored to e
    barrier 2   e, wd and w2 of this chunk are in shared memory; nobody reads w1 any more
                w1 of the next chunk begins to arrive
    depthwise   16 channels at a time: K * K loads of e and fused multiply-adds, in the operand's layout
    project     acc [Q, COUT] += d [Q, 16] . w2 [16, COUT]

Between its blocks the compiler adds barriers of its own (it cannot see that they write different slots of e). It adds
one wherever shared memory is written and then read, or read and then written, too; barriers 1 and 2 are written down
because they also end asynchronous copies, which it does not track to their end.

Where everything is. All index arithmetic is in gluon_index.py, which a test runs on the CPU; in short:

    slots     row m of an expand block is slot slot_of_row(m); slots number the parts' windows row by row.
    e         slot p, channel c lies at (LEAD + p) * PITCH + packed_column(c) of a flat array. PITCH is such that slots
              STEP = PW * S apart, which neighbouring threads store and load together, are 32 bytes apart modulo 128:
              the sixteen 8-byte accesses of half a warp touch every bank once.
    rows      a thread's rows of the project product are the PH x PW pixels of one patch: their windows overlap, and the
              compiler loads and converts each of the ((PH-1)*S+K) * ((PW-1)*S+K) slots once instead of K * K a pixel.
    columns   a thread's four of every 16 channels lie side by side in e (packed_column), one 8-byte load.
    whole     when a part is a whole image (LEAD > 0), the pixel right of a row is the one left of the next and the row
              below an image the one above the next: IH x IW has one zero row and column, not two. LEAD zeros precede.

The bias of the expand product and the zeros outside the image both come out of the tensor cores. x has three more
columns, 1 inside the image and 0 outside, which are in registers; w1 has the bias there, as a sum of three 16-bit
numbers (33 bits in fp16, 24 in bf16). Outside, e = act(0) = 0.

Rounding and clamping are inline assembly: two values an instruction, whatever Triton's version makes of maximum() and
minimum(). NaN survives them (.relu and min.NaN hand it on), as in torch.

HALF accumulates the nine taps in packed fp16: half the instructions, about twice the rounding error (GLUON.md).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from . import gluon_index

slot_of_row = gluon.jit(gluon_index.slot_of_row)
input_pixel = gluon.jit(gluon_index.input_pixel)
packed_column = gluon.jit(gluon_index.packed_column)
row_slot = gluon.jit(gluon_index.row_slot)
output_pixel = gluon.jit(gluon_index.output_pixel)


# ---- Layouts and instructions, chosen while compiling ---------------------------------------------------------------


@gluon.constexpr_function
def _accumulator(columns, warps, hopper):
    """Layout of a product's result: a warp has 16 rows of every 16 * warps, all columns."""
    if hopper:
        return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, columns, 16])
    return gl.NVMMADistributedLayout([2, 0], [warps, 1], [16, 8])


@gluon.constexpr_function
def _store_layout(rows, columns, warps):
    """The same, a thread's values in another order: first the four that packed_column puts side by side."""

    def bits(n):
        return range(n.bit_length() - 1)

    registers = [[0, 1], [0, 8], [8, 0]] + [[0, 16 << b] for b in bits(columns // 16)]
    registers += [[16 * warps << b, 0] for b in bits(rows // (16 * warps))]
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16 << b, 0] for b in bits(warps)], [], [rows, columns])


@gluon.constexpr_function
def _vectors(columns, width, warps):
    """Layout of a tile read or written row by row: `width` neighbouring columns a thread, full rows a warp."""
    threads = min(32, max(1, columns // width))
    return gl.BlockedLayout([1, width], [32 // threads, threads], [warps, 1], [1, 0])


@gluon.constexpr_function
def _round_asm(dtype, activation):
    """Two fp32 values -> two 16-bit ones, clamped. cvt's .relu and min.NaN keep NaN a NaN."""
    half = str(dtype) == "fp16"
    kind, six = ("f16x2", "0x46004600") if half else ("bf16x2", "0x40c040c0")
    convert = f"cvt.rn{'' if activation == 'none' else '.relu'}.{kind}.f32"
    if activation == "relu6":
        return f"{{ .reg .b32 r, six; mov.b32 six, {six}; {convert} r, $2, $1; min.NaN.{kind} $0, r, six; }}"
    return f"{convert} $0, $2, $1;"


@gluon.constexpr_function
def _clamp_asm(activation):
    """Two fp16 values, clamped."""
    if activation == "none":
        return "mov.b32 $0, $1;"
    clamp = "{ .reg .b32 zero, six, r; mov.b32 zero, 0; mov.b32 six, 0x46004600; max.NaN.f16x2 r, $1, zero; "
    return clamp + ("min.NaN.f16x2 $0, r, six; }" if activation == "relu6" else "mov.b32 $0, r; }")


@gluon.constexpr_function
def _power_of_two(n):
    return 1 << (n - 1).bit_length()


@gluon.constexpr_function
def _largest(dtype):
    return 65504.0 if str(dtype) == "fp16" else 3.3895313892515355e38


@gluon.jit
def _round(v, DTYPE: gl.constexpr, ACTIVATION: gl.constexpr):
    asm: gl.constexpr = _round_asm(DTYPE, ACTIVATION)
    return gl.inline_asm_elementwise(asm, "=r,r,r", [v], dtype=DTYPE.value, is_pure=True, pack=2)


@gluon.jit
def _clamp(v, ACTIVATION: gl.constexpr):
    return gl.inline_asm_elementwise(_clamp_asm(ACTIVATION), "=r,r", [v], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def _fma_fp16(a, b, c):
    return gl.inline_asm_elementwise(
        "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=gl.float16, is_pure=True, pack=2
    )


# ---- Pieces ---------------------------------------------------------------------------------------------------------


@gluon.jit
def _gather(flat, index, LAYOUT: gl.constexpr):
    """flat[index], in index's own layout: no data moves but the loads'."""
    shape: gl.constexpr = index.shape
    values = flat.gather(gl.reshape(index, [shape[0] * shape[1]]), 0)
    return gl.convert_layout(gl.reshape(values, shape), LAYOUT, assert_trivial=True)


@gluon.jit
def _scatter(flat, values, index):
    size: gl.constexpr = values.shape[0] * values.shape[1]
    flat.scatter(gl.reshape(values, [size]), gl.reshape(index, [size]), 0)


@gluon.jit
def _bias_columns(b1_ptr, c, k, last, DTYPE: gl.constexpr):
    """[CE, 16]: b1 as the sum of columns 0, 1 and 2. Beyond three times the largest number of DTYPE it saturates."""
    LARGEST: gl.constexpr = _largest(DTYPE)
    rest = gl.load(b1_ptr + c, mask=c < last, other=0.0)
    value = gl.zeros([c.shape[0], 16], DTYPE, k.type.layout.parent)
    for column in gl.static_range(3):
        # where, not minimum: a NaN has to stay one
        part = gl.where(rest > LARGEST, LARGEST, gl.where(rest < -LARGEST, -LARGEST, rest)).to(DTYPE)
        rest -= part.to(gl.float32)
        value = gl.where((k == column)[None, :], part[:, None], value)
    return value


@gluon.jit
def _copy_rows(shared, ptr, row, ROWS: gl.constexpr, ROW: gl.constexpr, c0, last, WARPS: gl.constexpr):
    """Begins to copy [rows, channels c0...] of a matrix with rows of ROW elements; 0 from ROWS and `last` on."""
    L: gl.constexpr = _vectors(shared.shape[1], 8, WARPS)
    r = row + gl.arange(0, shared.shape[0], gl.SliceLayout(1, L))
    c = c0 + gl.arange(0, shared.shape[1], gl.SliceLayout(0, L))
    mask = (r < ROWS)[:, None] & (c < last)[None, :]
    async_copy.async_load(shared, ptr + r[:, None] * ROW + c[None, :], mask=mask)


@gluon.jit
def _store_packed(shared, ptr, row, ROWS: gl.constexpr, ROW: gl.constexpr, c0, last, WARPS: gl.constexpr):
    """w2 where e's columns are in their natural order: operand column k is channel packed_column(k)."""
    L: gl.constexpr = _vectors(shared.shape[1], 2, WARPS)
    r = row + gl.arange(0, shared.shape[0], gl.SliceLayout(1, L))
    c = c0 + packed_column(gl.arange(0, shared.shape[1], gl.SliceLayout(0, L)))
    mask = (r < ROWS)[:, None] & (c < last)[None, :]
    shared.store(gl.load(ptr + r[:, None] * ROW + c[None, :], mask=mask, other=0.0))


@gluon.jit
def _expand(xs, ones, w1, bias, CIN: gl.constexpr, BK: gl.constexpr, ACC: gl.constexpr, HOPPER: gl.constexpr):
    """x [BP, CIN] . w1 [CE, CIN]^T + bias inside the image, fp32. BK columns of the tiles at a time: the last ones may
    be padding as a whole."""
    e = gl.zeros([xs.shape[0], w1.shape[0]], gl.float32, ACC)
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, ACC, 2)
    if HOPPER:
        e = warpgroup_mma(ones, bias.permute((1, 0)), e, use_acc=False, is_async=True)
        for step in gl.static_range((CIN + BK - 1) // BK):
            w = w1.slice(step * BK, BK, 1).permute((1, 0))
            e = warpgroup_mma(xs.slice(step * BK, BK, 1), w, e, is_async=True)
        return warpgroup_mma_wait(0, [e])
    else:
        e = mma_v2(ones, bias.permute((1, 0)).load(B), e)
        for step in gl.static_range((CIN + BK - 1) // BK):
            w = w1.slice(step * BK, BK, 1).permute((1, 0))
            e = mma_v2(xs.slice(step * BK, BK, 1).load(A), w.load(B), e)
        return e


@gluon.jit
def _depthwise(
    es, taps, e_index, w_index,
    K: gl.constexpr, IW: gl.constexpr, PITCH: gl.constexpr, CE: gl.constexpr,
    HALF: gl.constexpr, ACT: gl.constexpr, DTYPE: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """d [Q, 16]; e_index and w_index point at the first tap. Row K * K of taps is the bias."""
    d = _gather(taps, w_index + K * K * CE, D)
    for tap in gl.static_range(K * K):
        e = _gather(es, e_index + (tap // K * IW + tap % K) * PITCH, D)
        w = _gather(taps, w_index + tap * CE, D)
        d = _fma_fp16(e, w, d) if HALF else gl.fma(e.to(gl.float32), w, d)
    if HALF:
        return _clamp(d, ACT)
    else:
        return _round(d, DTYPE, ACT)


@gluon.jit
def _project(d, w2, acc, ACC: gl.constexpr, HOPPER: gl.constexpr):
    """acc + d [Q, 16] . w2 [CO, 16]^T. On Hopper only begun: d's registers must not change before the wait."""
    d = gl.convert_layout(d, gl.DotOperandLayout(0, ACC, 2), assert_trivial=True)
    if HOPPER:
        return warpgroup_mma(d, w2.permute((1, 0)), acc, is_async=True)
    else:
        return mma_v2(d, w2.permute((1, 0)).load(gl.DotOperandLayout(1, ACC, 2)), acc)


@gluon.jit
def _start(b3_ptr, o0, COUT: gl.constexpr, Q: gl.constexpr, CO: gl.constexpr, PARTIAL: gl.constexpr, ACC: gl.constexpr):
    """What the project product is added to: its bias, or nothing for a partial sum."""
    acc = gl.zeros([Q, CO], gl.float32, ACC)
    if b3_ptr is not None and not PARTIAL:
        o = o0 + gl.arange(0, CO, gl.SliceLayout(0, ACC))
        acc += gl.load(b3_ptr + o, mask=o < COUT, other=0.0)[None, :]
    return acc


@gluon.jit
def _store(
    acc, o0, x_ptr, y_ptr, first, n, N, HO, WO,
    COUT: gl.constexpr, FINAL: gl.constexpr, RESIDUAL: gl.constexpr, PARTIAL: gl.constexpr,
    NI: gl.constexpr, TY: gl.constexpr, TX: gl.constexpr, TH: gl.constexpr, TW: gl.constexpr,
    PH: gl.constexpr, PW: gl.constexpr, WARPS: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    GH: gl.constexpr = (TH + PH - 1) // PH
    GW: gl.constexpr = (TW + PW - 1) // PW
    m = gl.arange(0, acc.shape[0], gl.SliceLayout(1, ACC))
    o = o0 + gl.arange(0, acc.shape[1], gl.SliceLayout(0, ACC))
    pixel, valid = output_pixel(m, first, n, N, HO, WO, WARPS, NI, TY, TX, TH, TW, GH, GW, PH, PW)
    offset = (pixel * COUT)[:, None] + o[None, :]
    mask = valid[:, None] & (o < COUT)[None, :]
    if PARTIAL:
        gl.store(y_ptr + offset, acc, mask=mask)
    else:
        if RESIDUAL:  # stride 1, CIN == COUT: x has y's shape
            acc += gl.load(x_ptr + offset, mask=mask, other=0.0).to(gl.float32)
        gl.store(y_ptr + offset, _round(acc, x_ptr.dtype.element_ty, FINAL), mask=mask)


# ---- The kernel -----------------------------------------------------------------------------------------------------


@gluon.jit(do_not_specialize=["N", "H", "W", "HO", "WO", "pad_top", "pad_left"])
def fused_block(
    x_ptr,  # [N, H, W, CIN]; CIN, C and COUT are multiples of 8, every pointer of 16 bytes
    w1_ptr,  # [C, CIN] in x's type, None without expand (then CIN == C)
    b1_ptr,  # fp32 [C] or None
    wd_ptr,  # fp32 [K * K, C]
    b2_ptr,  # fp32 [C] or None
    w2_ptr,  # [COUT, C] in x's type
    b3_ptr,  # fp32 [COUT] or None
    y_ptr,  # [N, HO, WO, COUT]; with SPLITS > 1 fp32 partial sums [SPLITS, N, HO, WO, COUT]
    N, H, W, HO, WO,
    pad_top, pad_left,  # 0 when parts are whole images
    CIN: gl.constexpr, C: gl.constexpr, COUT: gl.constexpr, K: gl.constexpr, S: gl.constexpr,
    ACT: gl.constexpr, FINAL: gl.constexpr, RESIDUAL: gl.constexpr,
    HALF: gl.constexpr,  # accumulate the taps in fp16; x is fp16
    NI: gl.constexpr,  # parts a program
    TY: gl.constexpr, TX: gl.constexpr,  # parts an image
    TH: gl.constexpr, TW: gl.constexpr,  # output pixels a part
    PH: gl.constexpr, PW: gl.constexpr,  # output pixels a patch; PH * PW = Q / (8 * warps)
    IH: gl.constexpr, IW: gl.constexpr,  # slots a part
    LEAD: gl.constexpr,  # zero slots in front, when parts are whole images
    Q: gl.constexpr,  # rows of the project product
    NP: gl.constexpr, BP: gl.constexpr,  # blocks of rows of the expand product
    CE: gl.constexpr,  # hidden channels a chunk
    PITCH: gl.constexpr, STORAGE: gl.constexpr,  # elements of a slot and of all of e
    TABLE: gl.constexpr,  # NP * BP, to a power of two
    KA: gl.constexpr, BK: gl.constexpr,  # columns of x's tile (a power of two), columns a step of the expand product
    CO_A: gl.constexpr, CO_B: gl.constexpr,  # output columns: two powers of two, CO_B may be 0
    SPLITS: gl.constexpr,  # programs that share the hidden channels of a tile
    HOPPER: gl.constexpr,  # wgmma; else mma
):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    EXPAND: gl.constexpr = w1_ptr is not None
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    TAP_TYPE: gl.constexpr = gl.float16 if HALF else gl.float32
    TAPS: gl.constexpr = 16 if K == 3 else 32  # K * K taps and the bias, to a power of two
    STEP: gl.constexpr = PW * S
    GH: gl.constexpr = (TH + PH - 1) // PH
    GW: gl.constexpr = (TW + PW - 1) // PW
    CHUNKS: gl.constexpr = (C + CE - 1) // CE
    CHUNKS_A_SPLIT: gl.constexpr = (CHUNKS + SPLITS - 1) // SPLITS
    PARTIAL: gl.constexpr = SPLITS > 1
    LAST_SLOT: gl.constexpr = STORAGE // PITCH - 1

    ACC_E: gl.constexpr = _accumulator(CE, WARPS, HOPPER)
    ACC_A: gl.constexpr = _accumulator(CO_A, WARPS, HOPPER)
    ACC_B: gl.constexpr = _accumulator(CO_B, WARPS, HOPPER)
    A: gl.constexpr = gl.DotOperandLayout(0, ACC_E, 2)
    D: gl.constexpr = gl.DotOperandLayout(0, ACC_A, 2)  # the same registers for ACC_B: the columns are not in it
    STORE_E: gl.constexpr = _store_layout(BP, CE, WARPS)
    LX: gl.constexpr = _vectors(KA, 8, WARPS)
    LC: gl.constexpr = _vectors(CE, 8, WARPS)
    LT: gl.constexpr = _vectors(CE, 4, WARPS)
    LB: gl.constexpr = _vectors(16, 4, WARPS)
    L1: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ROWS: gl.constexpr = gl.NVMMASharedLayout(2 * BK, 16, 2)
    ROWS_16: gl.constexpr = gl.NVMMASharedLayout(32, 16, 2)  # 16 columns are a tile of it: slices of 16 are allowed

    first = gl.program_id(0) * NI
    split = gl.program_id(1)
    first_channel = split * (CHUNKS_A_SPLIT * CE)
    last_channel = gl.minimum(first_channel + CHUNKS_A_SPLIT * CE, C)
    n = first // (TY * TX)
    x_ptr += n.to(gl.int64) * H * W * CIN
    y_ptr += n.to(gl.int64) * HO * WO * COUT
    if PARTIAL:
        y_ptr += split.to(gl.int64) * N * HO * WO * COUT

    es = gl.allocate_shared_memory(DTYPE, [STORAGE], FLAT)
    taps = gl.allocate_shared_memory(TAP_TYPE, [TAPS * CE], FLAT)
    w2_a = gl.allocate_shared_memory(DTYPE, [CO_A, CE], ROWS_16)
    if CO_B > 0:
        w2_b = gl.allocate_shared_memory(DTYPE, [CO_B, CE], ROWS_16)
    # which pixel is in which slot: computed once, looked up by every thread that needs it
    pixels = gl.allocate_shared_memory(gl.int32, [TABLE], FLAT)
    pixel, inside = input_pixel(
        gl.arange(0, TABLE, L1), first, n, N, H, W, pad_top, pad_left, NI, TY, TX, TH, TW, S, IH, IW
    )
    pixels.store(gl.where(inside, pixel, -1))
    if LEAD > 0:
        zeros = gl.arange(0, _power_of_two(LEAD * PITCH), L1)
        es.scatter(gl.zeros_like(zeros).to(DTYPE), zeros, 0)

    if EXPAND:
        # an allocation for each block: the compiler then sees that they do not overlap and adds no barriers
        xs = ()
        for _ in gl.static_range(NP):
            xs = xs + (gl.allocate_shared_memory(DTYPE, [BP, KA], ROWS),)  # noqa: RUF005  (Gluon has no unpacking)
        w1 = gl.allocate_shared_memory(DTYPE, [CE, KA], ROWS)
        bias = gl.allocate_shared_memory(DTYPE, [CE, 16], ROWS_16)
        _copy_rows(w1, w1_ptr + first_channel * CIN, 0, C - first_channel, CIN, 0, CIN, WARPS)
        i = gl.arange(0, KA, gl.SliceLayout(0, LX))
        for block in gl.static_range(NP):
            p = block * BP + slot_of_row(gl.arange(0, BP, gl.SliceLayout(1, LX)), STEP)
            x_pixel = pixels.gather(p, 0)
            mask = (x_pixel >= 0)[:, None] & (i < CIN)[None, :]
            async_copy.async_load(xs[block], x_ptr + (x_pixel * CIN)[:, None] + i[None, :], mask=mask)
        async_copy.commit_group()
        ones = ()
        k = gl.arange(0, 16, gl.SliceLayout(0, A))
        for block in gl.static_range(NP):
            p = block * BP + slot_of_row(gl.arange(0, BP, gl.SliceLayout(1, A)), STEP)
            inside = gl.where(pixels.gather(p, 0) >= 0, 1.0, 0.0).to(DTYPE)
            ones = ones + (gl.where((k < 3)[None, :], inside[:, None], 0.0).to(DTYPE),)  # noqa: RUF005
        if b1_ptr is None:
            bias.store(gl.zeros([CE, 16], DTYPE, LB))
        else:
            bias_c = first_channel + gl.arange(0, CE, gl.SliceLayout(1, LB))
            bias_k = gl.arange(0, 16, gl.SliceLayout(0, LB))
            bias.store(_bias_columns(b1_ptr, bias_c, bias_k, C, DTYPE))
        e_slot = slot_of_row(gl.arange(0, BP, gl.SliceLayout(1, STORE_E)), STEP) + LEAD
        e_column = packed_column(gl.arange(0, CE, gl.SliceLayout(0, STORE_E)))

    tap = gl.arange(0, TAPS, gl.SliceLayout(1, LT))
    tap_c = gl.arange(0, CE, gl.SliceLayout(0, LT))
    tap_column = packed_column(tap_c) if EXPAND else tap_c
    tap_ptr = wd_ptr + tap[:, None] * C + tap_c[None, :]
    if b2_ptr is not None:  # the row after the taps
        tap_ptr = gl.where((tap < K * K)[:, None], tap_ptr, b2_ptr + tap_c[None, :])
    tap_rows: gl.constexpr = K * K if b2_ptr is None else K * K + 1

    m = gl.arange(0, Q, gl.SliceLayout(1, D))
    d_slot = row_slot(m, WARPS, NI, GH, GW, PH, PW, S, IH, IW)
    d_column = packed_column(gl.arange(0, 16, gl.SliceLayout(0, D)))[None, :]
    d_index = (d_slot * PITCH)[:, None] + d_column
    w_index = d_column + gl.zeros([Q, 16], gl.int32, D)

    acc_a = _start(b3_ptr, 0, COUT, Q, CO_A, PARTIAL, ACC_A)
    if CO_B > 0:
        acc_b = _start(b3_ptr, CO_A, COUT, Q, CO_B, PARTIAL, ACC_B)

    for c0 in range(first_channel, last_channel, CE):
        tap_mask = (tap < tap_rows)[:, None] & (c0 + tap_c < C)[None, :]
        tap_values = gl.load(tap_ptr + c0, mask=tap_mask, other=0.0)
        if EXPAND:
            # the wait right before the barrier: anywhere else the compiler adds another barrier behind it
            async_copy.wait_group(0)  # x, w1
            gl.barrier()  # 1
            if HOPPER:
                fence_async_shared()  # wgmma reads through another path than these threads wrote
            _copy_rows(w2_a, w2_ptr + c0, 0, COUT, C, 0, C - c0, WARPS)
            if CO_B > 0:
                _copy_rows(w2_b, w2_ptr + c0, CO_A, COUT, C, 0, C - c0, WARPS)
            async_copy.commit_group()
            for block in gl.static_range(NP):
                e = _expand(xs[block], ones[block], w1, bias, CIN, BK, ACC_E, HOPPER)
                e = gl.convert_layout(_round(e, DTYPE, ACT), STORE_E, assert_trivial=True)
                slot = block * BP + e_slot
                if LEAD + NP * BP - 1 > LAST_SLOT:  # unused slots, all of them 0, share the last one
                    slot = gl.minimum(slot, LAST_SLOT)
                _scatter(es, e, (slot * PITCH)[:, None] + e_column[None, :])
        else:
            _store_packed(w2_a, w2_ptr + c0, 0, COUT, C, 0, C - c0, WARPS)
            if CO_B > 0:
                _store_packed(w2_b, w2_ptr + c0, CO_A, COUT, C, 0, C - c0, WARPS)
            x_p = gl.arange(0, BP, gl.SliceLayout(1, LC))
            x_c = gl.arange(0, CE, gl.SliceLayout(0, LC))
            values = ()
            for block in gl.static_range(NP):  # all loads first: none of them waits for another
                x_pixel = pixels.gather(block * BP + x_p, 0)
                x_mask = (x_pixel >= 0)[:, None] & (c0 + x_c < C)[None, :]
                x_offset = (x_pixel * CIN)[:, None] + (c0 + x_c)[None, :]
                values = values + (gl.load(x_ptr + x_offset, mask=x_mask, other=0.0),)  # noqa: RUF005
            for block in gl.static_range(NP):
                slot = gl.minimum(LEAD + block * BP + x_p, LAST_SLOT)
                _scatter(es, values[block], (slot * PITCH)[:, None] + x_c[None, :])
        _scatter(taps, tap_values.to(TAP_TYPE), (tap * CE)[:, None] + tap_column[None, :])
        if EXPAND:
            async_copy.wait_group(0)  # w2
        gl.barrier()  # 2
        if HOPPER:
            fence_async_shared()
        if EXPAND:
            _copy_rows(w1, w1_ptr + (c0 + CE) * CIN, 0, C - c0 - CE, CIN, 0, CIN, WARPS)
            async_copy.commit_group()
            if b1_ptr is not None:
                next_bias = _bias_columns(b1_ptr, c0 + CE + (bias_c - first_channel), bias_k, C, DTYPE)

        for sub in gl.static_range(CE // 16):
            if sub == 0 or C % CE == 0 or c0 + sub * 16 < last_channel:
                d = _depthwise(es, taps, d_index + sub * 16, w_index + sub * 16, K, IW, PITCH, CE, HALF, ACT, DTYPE, D)
                acc_a = _project(d, w2_a.slice(sub * 16, 16, 1), acc_a, ACC_A, HOPPER)
                if CO_B > 0:
                    acc_b = _project(d, w2_b.slice(sub * 16, 16, 1), acc_b, ACC_B, HOPPER)
                if HOPPER:
                    if CO_B > 0:
                        acc_a, acc_b = warpgroup_mma_wait(0, [acc_a, acc_b])
                    else:
                        acc_a = warpgroup_mma_wait(0, [acc_a])
        if EXPAND and b1_ptr is not None:
            bias.store(next_bias)
    if EXPAND:
        async_copy.wait_group(0)  # w1 of a chunk that does not exist: no copy may outlive its program

    _store(
        acc_a, 0, x_ptr, y_ptr, first, n, N, HO, WO,
        COUT, FINAL, RESIDUAL, PARTIAL, NI, TY, TX, TH, TW, PH, PW, WARPS, ACC_A,
    )  # fmt: skip
    if CO_B > 0:
        _store(
            acc_b, CO_A, x_ptr, y_ptr, first, n, N, HO, WO,
            COUT, FINAL, RESIDUAL, PARTIAL, NI, TY, TX, TH, TW, PH, PW, WARPS, ACC_B,
        )  # fmt: skip
