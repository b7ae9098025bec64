"""The other ways of doing the depthwise stencil in plain Triton, compiled beside the kernel that was chosen.

    python benchmarks/triton_candidates.py [--sm 90]

nine     the expand product is computed again for each of the nine taps
patches  rows of a product are the same pixel of many small patches, so that shifting by a pixel is taking another
         tensor: everything stays in registers, the halo of each TH x TW patch is computed again
scratch  mbv2_kernels/triton/kernels.py

Compiles, runs nothing, needs no GPU. mbv2_kernels/triton/README.md has the result and the reasoning. Both candidates
are reduced to what is compared: stride 1 or 2, 3 x 3, ReLU6, channels that the chunk divides.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.append(str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

from mbv2_kernels.triton import offline
from mbv2_kernels.triton.kernels import _activate


@triton.jit
def nine(
    x_ptr, w1_ptr, b1_ptr, wd_ptr, b2_ptr, w2_ptr, b3_ptr, y_ptr, H, W, HO, WO, total,
    CIN: tl.constexpr, C: tl.constexpr, COUT: tl.constexpr, S: tl.constexpr,
    Q: tl.constexpr, BK: tl.constexpr, CE: tl.constexpr, CO: tl.constexpr,
):  # fmt: skip
    q = tl.program_id(0).to(tl.int64) * Q + tl.arange(0, Q)
    out_x, out_y, n = q % WO, (q // WO) % HO, q // (WO * HO)
    i, chunk, o = tl.arange(0, BK), tl.arange(0, CE), tl.arange(0, CO)
    acc = tl.zeros([Q, CO], tl.float32)
    for c0 in range(0, C, CE):
        c = c0 + chunk
        w1 = tl.load(w1_ptr + c[:, None] * CIN + i[None, :], mask=(i < CIN)[None, :], other=0.0).trans()
        b1 = tl.load(b1_ptr + c)[None, :]
        d = tl.zeros([Q, CE], tl.float32)
        for t in range(9):
            in_y, in_x = out_y * S + t // 3 - 1, out_x * S + t % 3 - 1
            inside = ((q < total) & (in_y >= 0) & (in_y < H) & (in_x >= 0) & (in_x < W))[:, None]
            pixel = ((n * H + in_y) * W + in_x) * CIN
            x = tl.load(x_ptr + pixel[:, None] + i[None, :], mask=inside & (i < CIN)[None, :], other=0.0)
            e = _activate(tl.dot(x, w1) + tl.where(inside, b1, 0.0), "relu6")
            d += e * tl.load(wd_ptr + t * C + c)[None, :]
        d = _activate(d + tl.load(b2_ptr + c)[None, :], "relu6").to(x_ptr.dtype.element_ty)
        w2 = tl.load(w2_ptr + o[:, None] * C + c[None, :], mask=(o < COUT)[:, None], other=0.0)
        acc = tl.dot(d, w2.trans(), acc)
    y = acc + tl.load(b3_ptr + o, mask=o < COUT, other=0.0)[None, :]
    mask = (q < total)[:, None] & (o < COUT)[None, :]
    tl.store(y_ptr + (q * COUT)[:, None] + o[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def patches(rows: int, columns: int, stride: int) -> Any:
    """The kernel for patches of rows x columns outputs. Unrolled as text: Triton has no arrays of tensors."""
    lines = [
        "import triton",
        "import triton.language as tl",
        "from mbv2_kernels.triton.kernels import _activate",
        "@triton.jit",
        "def patches(x_ptr, w1_ptr, b1_ptr, wd_ptr, b2_ptr, w2_ptr, b3_ptr, y_ptr, N, H, W, HO, WO,",
        "            patches_y, patches_x, CIN: tl.constexpr, C: tl.constexpr, COUT: tl.constexpr,",
        "            M: tl.constexpr, BK: tl.constexpr, CE: tl.constexpr, CO: tl.constexpr):",
        "    m = tl.program_id(0) * M + tl.arange(0, M)",
        "    n = m // (patches_x * patches_y)",
        f"    y0, x0 = (m // patches_x) % patches_y * {rows}, m % patches_x * {columns}",
        f"    iy0, ix0 = y0 * {stride} - 1, x0 * {stride} - 1",
        "    i, chunk, o = tl.arange(0, BK), tl.arange(0, CE), tl.arange(0, CO)",
        "    xp = x_ptr + (((n.to(tl.int64) * H + iy0) * W + ix0) * CIN)[:, None] + i[None, :]",
        "    im = (i < CIN)[None, :]",
        *(f"    o{r}_{c} = tl.zeros([M, CO], tl.float32)" for r in range(rows) for c in range(columns)),
        "    for c0 in range(0, C, CE):",
        "        c = c0 + chunk",
        "        w1 = tl.load(w1_ptr + c[:, None] * CIN + i[None, :], mask=im, other=0.0).trans()",
        "        w2 = tl.load(w2_ptr + o[:, None] * C + c[None, :], mask=(o < COUT)[:, None], other=0.0).trans()",
        "        b1, b2 = tl.load(b1_ptr + c)[None, :], tl.load(b2_ptr + c)[None, :]",
        *(f"        t{t} = tl.load(wd_ptr + c + {t} * C)[None, :]" for t in range(9)),
    ]
    for iy in range((rows - 1) * stride + 3):
        for ix in range((columns - 1) * stride + 3):
            lines += [
                f"        iy, ix = iy0 + {iy}, ix0 + {ix}",
                "        inside = (n < N) & (iy >= 0) & (iy < H) & (ix >= 0) & (ix < W)",
                f"        x = tl.load(xp + ({iy} * W + {ix}) * CIN, mask=inside[:, None] & im, other=0.0)",
                "        e = _activate(tl.dot(x, w1) + tl.where(inside[:, None], b1, 0.0), 'relu6')",
            ]
            for tap in range(9):
                (r, rest_y), (c, rest_x) = divmod(iy - tap // 3, stride), divmod(ix - tap % 3, stride)
                if rest_y or rest_x or not (0 <= r < rows and 0 <= c < columns):
                    continue
                lines.append(f"        d{r}_{c} {'=' if tap == 0 else '+='} e * t{tap}")
                if tap == 8:
                    d = f"_activate(d{r}_{c} + b2, 'relu6').to(x_ptr.dtype.element_ty)"
                    lines.append(f"        o{r}_{c} = tl.dot({d}, w2, o{r}_{c})")
    lines += [
        "    b3 = tl.load(b3_ptr + o, mask=o < COUT, other=0.0)[None, :]",
        "    yp = y_ptr + (((n.to(tl.int64) * HO + y0) * WO + x0) * COUT)[:, None] + o[None, :]",
    ]
    for r in range(rows):
        for c in range(columns):
            mask = f"((n < N) & (y0 + {r} < HO) & (x0 + {c} < WO))[:, None] & (o < COUT)[None, :]"
            lines.append(
                f"    tl.store(yp + ({r} * WO + {c}) * COUT, (o{r}_{c} + b3).to(y_ptr.dtype.element_ty), mask={mask})"
            )
    file = Path(tempfile.mkdtemp()) / "generated_patches.py"  # triton.jit reads its function's source from a file
    file.write_text("\n".join(lines) + "\n")
    spec = importlib.util.spec_from_file_location("generated_patches", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.patches


def row(name: str, function: Any, block: offline.Block, sm: int, warps: int, outputs: int, **constants: int) -> str:
    """Registers, spills and instructions an output of a candidate; `outputs` is output pixels a program."""
    data = {"x_ptr", "w1_ptr", "w2_ptr", "y_ptr"}
    names = function.arg_names
    constants |= {"CIN": block.in_channels, "C": block.hidden_channels, "COUT": block.out_channels}
    kinds = {n: "*fp16" if n in data else "*fp32" if n.endswith("_ptr") else "i32" for n in names}
    source = ASTSource(
        fn=function,
        signature={n: "constexpr" if n in constants else kinds[n] for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in names if n.endswith("_ptr")},
    )
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    kernel = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    binary = offline.read_binary(kernel)
    chunks = block.hidden_channels // constants["CE"]
    # no loop over tiles here: the outermost one is the loop over chunks, inside it at most the nine taps
    total = offline.executed(binary, (chunks,), lambda _: 9)
    spills = sum(count for op, count in total.items() if op.startswith(("LDL", "STL")))
    scale = warps * 32 / (outputs * block.hidden_channels)
    return (
        f"{block.name} sm_{sm} {name:12} {binary.registers} registers, {binary.shared} B shared,"
        f" {spills * scale:.1f} of {total.total() * scale:.1f} instructions an output are spills"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, default=90)
    sm = parser.parse_args().sm
    for name, step in (("b3", 32), ("b2", 16)):
        block = offline.BLOCKS[name]
        print(row("nine", nine, block, sm, 4, 128, S=block.stride, Q=128, BK=step, CE=16, CO=32), flush=True)
        for rows, columns in ((2, 2), (4, 2)):
            function = patches(rows, columns, block.stride)
            print(
                row(
                    f"patches {rows}x{columns}",
                    function,
                    block,
                    sm,
                    4,
                    64 * rows * columns,
                    M=64,
                    BK=step,
                    CE=16,
                    CO=32,
                ),
                flush=True,
            )
        print(offline.figures(block, sm).row(), flush=True)


if __name__ == "__main__":
    main()
