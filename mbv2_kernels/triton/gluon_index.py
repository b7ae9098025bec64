"""Which pixel, slot and column is where in the Gluon kernel: its index arithmetic, and nothing else.

Plain functions of integers. gluon_kernels.py compiles them; tests/test_gluon_index.py runs the same functions over
arrays and checks, for every plan, that each output reads exactly the pixels it should. Only + - * // % of numbers that
are never negative: // and % of negative numbers differ between Python and the device.

    m     row of a matrix product's operand: which thread holds it is fixed by the tensor cores
    p     slot: a pixel of a tile's input window, image by image, row by row
    c     column: a hidden channel of a chunk
"""

from __future__ import annotations


def slot_of_row(m, STEP):
    """Expand product: the slot of row m, within a block.

    Rows m, m + 1, m + 2, m + 3 belong to threads that store in the same cycle. They get slots STEP apart, which are
    in different shared-memory banks (see `pitch` in gluon_configs.py).
    """
    return m % 4 * STEP + m // 4 % STEP + m // (4 * STEP) * (4 * STEP)


def place_of_slot(p, IH, IW):
    """(part, row, column) of slot p; a part's window has IH x IW pixels."""
    return p // (IH * IW), p // IW % IH, p % IW


def place_of_part(g, TY, TX):
    """(image, row, column) of part g among all parts of all images; an image is cut into TY x TX of them."""
    return g // (TY * TX), g // TX % TY, g % TX


def packed_column(c):
    """Where in a row of the expanded tile the channel of operand column c lies.

    A thread holds columns 2j, 2j + 1, 2j + 8, 2j + 9 of every 16 of the project product's operand. This puts them side
    by side, so that one 8-byte load brings all four.
    """
    return c // 16 * 16 + c % 8 // 2 * 4 + c // 8 % 2 * 2 + c % 2


def patch_of_row(m, WARPS):
    """Project product: the patch of output pixels that row m belongs to. A thread's rows are all of one patch."""
    return m % 8 + m // 16 % WARPS * 8


def pixel_of_row(m, WARPS):
    """The number of row m's pixel in its patch."""
    return m // 8 % 2 + m // (16 * WARPS) * 2


def place_of_patch(patch, GH, GW, PH, PW):
    """(part, row, column) of a patch's first pixel; a part has GH x GW patches of PH x PW pixels."""
    return patch // (GH * GW), patch // GW % GH * PH, patch % GW * PW


def tap_slot(part, row, column, S, IH, IW):
    """The slot of the first tap of an output pixel; tap (ky, kx) is ky * IW + kx further on."""
    return (part * IH + row * S) * IW + column * S
