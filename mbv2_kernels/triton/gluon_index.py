"""Which pixel, slot and column is where in the Gluon kernel: its index arithmetic, and nothing else.

Functions of integers, without types because they have two lives: gluon_kernels.py compiles them, and
tests/test_gluon_index.py runs the same functions over arrays and checks, for every kind of plan, that each output reads
the pixels it should and zeros where there are none. Numbers that are divided are never negative: // and % of negative
numbers differ between Python and the device.

    p     slot: a pixel of a program's input windows, part by part, row by row; a part's window has IH x IW of them
    m     row of a matrix product's operand: which thread holds it is fixed by the tensor cores
    c     hidden channel of a chunk

The names in capitals are those of the kernel's arguments.
"""


def slot_of_row(m, STEP):
    """Expand product: the slot of row m, both counted within a block.

    Rows m to m + 3 (m a multiple of 4) belong to threads that store in the same cycle. They get slots STEP apart, which
    lie in different shared-memory banks (gluon_configs.pitch).
    """
    return m % 4 * STEP + m // 4 % STEP + m // (4 * STEP) * (4 * STEP)


def input_pixel(p, first, n, N, H, W, pad_top, pad_left, NI, TY, TX, TH, TW, S, IH, IW):
    """(pixel of x in slot p, counted from image n; whether there is one).

    The program's parts are `first` to `first + NI - 1`, numbered over all images, each of which has TY x TX.
    """
    part = first + p // (IH * IW) % NI
    in_y = part // TX % TY * (TH * S) + p // IW % IH - pad_top
    in_x = part % TX * (TW * S) + p % IW - pad_left
    image = part // (TY * TX)
    inside = (p < NI * IH * IW) & (image < N) & (in_y >= 0) & (in_y < H) & (in_x >= 0) & (in_x < W)
    return ((image - n) * H + in_y) * W + in_x, inside


def packed_column(c):
    """Where in a slot of e the channel of operand column c lies.

    A thread holds columns 2j, 2j + 1, 2j + 8 and 2j + 9 of every 16 of the project product's operand. This puts them
    side by side, so that one 8-byte access takes all four.
    """
    return c // 16 * 16 + c % 8 // 2 * 4 + c // 8 % 2 * 2 + c % 2


def row_slot(m, WARPS, NI, GH, GW, PH, PW, S, IH, IW):
    """Project product: the slot of the first tap of row m's output pixel; tap (ky, kx) is ky * IW + kx further on.

    Rows are patches of PH x PW output pixels, GH x GW a part: a thread's rows are the pixels of one patch. A patch that
    does not exist ("% (NI * GH * GW)") reads where another does.
    """
    patch = (m % 8 + m // 16 % WARPS * 8) % (NI * GH * GW)
    pixel = m // 8 % 2 + m // (16 * WARPS) * 2
    row = patch // GW % GH * PH + pixel // PW
    column = patch % GW * PW + pixel % PW
    return (patch // (GH * GW) * IH + row * S) * IW + column * S


def output_pixel(m, first, n, N, HO, WO, WARPS, NI, TY, TX, TH, TW, GH, GW, PH, PW):
    """(pixel of y that row m is, counted from image n; whether it is one).

    It is none in a patch or part that does not exist, and where a patch sticks out of its part or of the image.
    """
    patch = m % 8 + m // 16 % WARPS * 8
    pixel = m // 8 % 2 + m // (16 * WARPS) * 2
    row = patch // GW % GH * PH + pixel // PW
    column = patch % GW * PW + pixel % PW
    part = first + patch // (GH * GW) % NI
    out_y = part // TX % TY * TH + row
    out_x = part % TX * TW + column
    image = part // (TY * TX)
    valid = (patch < NI * GH * GW) & (image < N) & (row < TH) & (column < TW) & (out_y < HO) & (out_x < WO)
    return ((image - n) * HO + out_y) * WO + out_x, valid
