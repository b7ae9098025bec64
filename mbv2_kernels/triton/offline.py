"""Compile the kernels for a GPU that is not here and read what the compiler made of them: registers, spills, shared
memory, tensor-core instructions, width of the loads, instructions executed an output. Needs Triton (its wheel ships
ptxas, cuobjdump and nvdisasm), no GPU and no torch.

    python -m mbv2_kernels.triton.offline --sm 90                          every block of MobileNetV2, k5, MobileNetV1
    python -m mbv2_kernels.triton.offline --sm 80 89 90 --markdown         the tables of README.md
    python -m mbv2_kernels.triton.offline --sm 80 --sweep --blocks b3 b15   every candidate tile for them, best last
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import functools
import itertools
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from . import configs
from .configs import Device, Problem, Tile
from .gluon_configs import SHARED_RESERVED

# multiprocessors and shared memory a block may have, of a common card of each capability
DEVICES = {
    80: (Device(80, 108), 163 * 1024),  # A100
    86: (Device(86, 82), 99 * 1024),  # RTX 3090
    89: (Device(89, 128), 99 * 1024),  # RTX 4090
    90: (Device(90, 132), 227 * 1024),  # H100, H200
    100: (Device(100, 148), 227 * 1024),  # B200
    120: (Device(120, 170), 99 * 1024),  # RTX 5090
}
TRITON_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
REGISTERS = 65536  # of a multiprocessor, 4 bytes each


class Block(NamedTuple):
    """A layer shape to compile for; size is the side of x in pixels."""

    name: str
    size: int
    in_channels: int
    hidden_channels: int
    out_channels: int
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    expand: bool = True
    activation: str = "relu6"
    final_activation: str = "none"

    @property
    def out_size(self) -> int:
        return -(-self.size // self.stride)

    @property
    def residual(self) -> bool:
        return self.stride == 1 and self.in_channels == self.out_channels and self.final_activation == "none"

    def problem(self, batch: int, element_size: int = 2, tensor_cores: bool = True) -> Problem:
        return Problem(
            batch, self.out_size, self.out_size, self.in_channels, self.hidden_channels, self.out_channels,
            self.kernel, self.stride, self.dilation, self.expand, element_size, tensor_cores,
        )  # fmt: skip


def _mobilenet_v2() -> Iterator[Block]:
    number, size, channels = 1, 112, 32
    for ratio, out, repeats, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for index in range(repeats):
            step = stride if index == 0 else 1
            yield Block(f"b{number}", size, channels, channels * ratio, out, stride=step, expand=ratio != 1)
            number, size, channels = number + 1, size // step, out


MOBILENET_V2 = tuple(_mobilenet_v2())
OTHERS = (
    Block("k5s1", 28, 40, 240, 40, kernel=5),
    Block("k5s2", 56, 24, 144, 40, kernel=5, stride=2),
    Block("k5late", 7, 192, 1152, 192, kernel=5, activation="relu"),
    Block("dilated", 28, 64, 384, 64, dilation=2),
    *(
        Block(f"v1_{channels}_{out}_s{stride}", size, channels, channels, out, stride=stride, expand=False,
              activation="relu", final_activation="relu")
        for channels, out, stride, size in (
            (32, 64, 1, 112), (64, 128, 2, 112), (128, 128, 1, 56), (256, 512, 2, 28), (512, 512, 1, 14),
            (1024, 1024, 1, 7),
        )
    ),
)  # fmt: skip
BLOCKS = {block.name: block for block in (*MOBILENET_V2, *OTHERS)}


class Figures(NamedTuple):
    """What the compiler made of one block."""

    block: str
    sm: int
    dtype: str
    tile: Tile
    cut: tuple[int, int, int, int]  # in_blocks, images, rows, columns a tile
    registers: int
    spills: int  # local-memory instructions
    shared: int  # bytes
    resident: int  # programs a multiprocessor holds, by registers and shared memory
    tensor_core: int  # instructions in the binary
    loads_128: int
    loads_narrow: int  # global loads of less than 4 bytes
    barriers: float  # executed a tile
    per_output: float  # thread instructions an output pixel and hidden channel, everything included, batch -> infinity
    parts: dict[str, float]  # the same by kind
    prediction: Prediction  # of an H200: says something of sm_90 alone

    def row(self) -> str:
        tile, (in_blocks, images, rows, columns) = self.tile, self.cut
        predicted = f"{self.prediction.us:6.1f} us | " if self.sm == 90 else ""
        kinds = " ".join(f"{kind} {value:.1f}" for kind, value in self.parts.items())
        return (
            f"{self.block:14} sm_{self.sm} {self.dtype:8} {images}x{rows}x{columns:<3} Q{tile.outputs:<3}"
            f" P{in_blocks}x{tile.in_block:<3} BK{tile.in_step:<2} CE{tile.chunk:<2} {tile.warps}w"
            f" | {self.registers:3} reg {self.spills:3} spills {self.shared:6} B shared {self.resident} resident"
            f" | {self.tensor_core:3} mma {self.loads_128:3} ld128 {self.loads_narrow:2} narrow"
            f" {self.barriers:4.0f} bar | {predicted}{self.per_output:5.1f} instr/output: {kinds}"
        )


def compile_block(
    block: Block,
    sm: int,
    dtype: str = "float16",
    batch: int = 256,
    tile: Tile | None = None,
    tf32: bool = True,
    splits: int | None = 1,
) -> tuple[Any, configs.Plan]:
    """(Triton's compiled kernel, the plan) as ops.py would launch it, with prepared weights."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from . import kernels

    size = 4 if dtype == "float32" else 2
    plan = configs.plan(block.problem(batch, size, size == 2 or tf32), DEVICES[sm][0], block.size**2, tile, splits)
    data = "*" + TRITON_TYPES[dtype]
    tile = plan.tile
    constants: dict[str, Any] = {
        "CIN": block.in_channels, "C": block.hidden_channels, "COUT": block.out_channels,
        "K": block.kernel, "S": block.stride, "D": block.dilation,
        "ACT": block.activation, "FINAL": block.final_activation, "RESIDUAL": block.residual,
        "PRECISION": "tf32" if size == 2 or tf32 else "ieee",
        "NI": plan.sub_images, "TH": plan.tile_height, "TW": plan.tile_width,
        "Q": tile.outputs, "NP": plan.in_blocks, "BP": tile.in_block, "BK": tile.in_step, "CE": tile.chunk,
        "CO_A": plan.columns_a, "CO_B": plan.columns_b, "CO_GROUPS": plan.column_groups,
        "SPLITS": plan.splits, "WIDE": plan.wide, "wd_stride_c": 1,
    }  # fmt: skip
    if not block.expand:
        constants |= {"w1_ptr": None, "b1_ptr": None, "scratch_ptr": None}
    types = {
        "x_ptr": data, "w1_ptr": data, "b1_ptr": "*fp32", "wd_ptr": "*fp32", "b2_ptr": "*fp32", "w2_ptr": data,
        "b3_ptr": "*fp32", "y_ptr": data if plan.splits == 1 else "*fp32", "scratch_ptr": data,
    }  # fmt: skip
    names = list(kernels.fused_block.arg_names)
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [name for name in names if signature[name].startswith("*")]
    if block.hidden_channels % 16 == 0:
        aligned.append("wd_stride_t")
    source = ASTSource(
        fn=kernels.fused_block,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": tile.warps, "num_stages": 1, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options), plan


class Instruction(NamedTuple):
    condition: str  # the predicate it is executed under, if any
    name: str  # with its modifiers
    operands: str

    def target(self, labels: dict[str, int]) -> int | None:
        """Where a branch goes."""
        label = re.search(r"\.L_x_\d+", self.operands) if self.name.startswith("BRA") else None
        return labels[label[0]] if label else None


class Binary(NamedTuple):
    """A compiled kernel as a GPU would run it. `labels` index `code`."""

    registers: int
    shared: int  # bytes
    warps: int
    code: list[Instruction]
    labels: dict[str, int]

    def count(self, pattern: str) -> int:
        """Instructions whose names begin with `pattern`."""
        return sum(re.match(pattern, instruction.name) is not None for instruction in self.code)

    @property
    def spills(self) -> int:
        """Local-memory instructions."""
        return self.count("LDL|STL")

    @property
    def tensor_core(self) -> int:
        return self.count("HMMA|HGMMA|UTCHMMA|UTCQMMA")

    @property
    def loads_128(self) -> int:
        return self.count(r"LDG\b.*\.128\b")

    @property
    def loads_narrow(self) -> int:
        """Global loads of less than 4 bytes."""
        return self.count(r"LDG\b.*\.[US](8|16)\b")

    def resident(self, sm: int) -> int:
        """Programs that a multiprocessor holds, by registers, shared memory and threads."""
        threads = 32 * self.warps
        return min(
            REGISTERS // (math.ceil(self.registers / 8) * 8 * threads),
            DEVICES[sm][1] // (self.shared + SHARED_RESERVED),
            2048 // threads,
        )


def disassemble(kernel: Any) -> tuple[str, str]:
    """(resource usage, SASS) of a compiled kernel, by the tools in Triton's wheel."""
    import triton

    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def run(*command: str) -> str:
            return subprocess.run(
                [os.path.join(tools, command[0]), *command[1:], file.name], check=True, capture_output=True, text=True
            ).stdout

        return run("cuobjdump", "-res-usage"), run("nvdisasm", "-c")


def read_binary(kernel: Any) -> Binary:
    """What `disassemble` has of a compiled kernel, without what only fills gaps."""
    usage, sass = disassemble(kernel)
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        found = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line)
        if found and found[2] != "NOP":
            code.append(Instruction(found[1] or "", found[2], found[3]))
    registers = int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]
    return Binary(registers, kernel.metadata.shared, kernel.metadata.num_warps, code, labels)


def executed(
    binary: Binary, outer: Sequence[int], inner: Callable[[list[Instruction]], int]
) -> collections.Counter[str]:
    """Instructions a thread executes: every instruction weighted by the trip counts of the loops it is in.

    `outer` has the trips of the outermost loops, from the outside in; `inner` tells those of the others from what is
    in them. Loops are found by their backward branches; one of a single trip is gone by then.
    """
    targets = ((instruction.target(binary.labels), end) for end, instruction in enumerate(binary.code))
    loops = sorted({(start, end) for start, end in targets if start is not None and start < end})

    def trips(loop: tuple[int, int]) -> int:
        depth = sum(other[0] <= loop[0] and loop[1] <= other[1] for other in loops) - 1
        return outer[depth] if depth < len(outer) else inner(binary.code[loop[0] : loop[1]])

    weighted = [(loop, trips(loop)) for loop in loops]
    total: collections.Counter[str] = collections.Counter()
    for index, instruction in enumerate(binary.code):
        total[instruction.name] += math.prod(count for (start, end), count in weighted if start <= index <= end)
    return total


KINDS = {
    "fma": r"FFMA2?|HFMA2|FMUL2?|FADD2?|HMUL2",
    "convert": r"HADD2|F2FP|PRMT",
    "clamp": r"FMNMX|HMNMX2|VHMNMX|FSEL",
    "tensor": r"HMMA|HGMMA|WARPGROUP|UTC\w*",
    "global": r"LDG|STG",
    "shared": r"LDS|STS|STSM|LDGSTS|BAR|MEMBAR|FENCE",
}


# What a prediction rests on, for an H200: the copy rate measured there, and 132 multiprocessors of 128 lanes at 1.755
# GHz. The last three are assumptions, for a timed run to correct: how much of the issue slots a kernel with barriers
# fills, the rate at which the L2 takes the scratch's stores, the cost of a launch.
COPY_BYTES, LANES = 4.3e12, 132 * 128 * 1.755e9
ISSUE_SHARE, L2_BYTES, LAUNCH_US = 0.65, 5.5e12, 3.0


class Traffic(NamedTuple):
    """Bytes that a block moves to and from DRAM at the least; the weights are left out."""

    fused: int  # x read, y written; for a residual the tile's x is in the caches
    unfused: int  # as well the hidden tensor, before and after the depthwise convolution, written and read; residual


def traffic(block: Block, batch: int, element_size: int = 2) -> Traffic:
    before, after = batch * block.size**2, batch * block.out_size**2  # pixels
    fused = before * block.in_channels + after * block.out_channels
    hidden = 2 * block.hidden_channels * (before * block.expand + after)
    return Traffic(fused * element_size, (fused + hidden + block.residual * before * block.in_channels) * element_size)


class Prediction(NamedTuple):
    """Microseconds a call takes on an H200, for a batch that fills it. To be confirmed or refuted, not measured."""

    issue_us: float  # issuing the instructions
    dram_us: float  # x and y, at the rate of a copy
    scratch_us: float  # the scratch's stores into the L2
    floor_us: float  # of any unfused implementation: Traffic.unfused at the rate of a copy

    @property
    def us(self) -> float:
        """The slowest of the three and a launch."""
        return max(self[:3]) + LAUNCH_US


def predict(block: Block, plan: configs.Plan, per_output: float, batch: int, element_size: int) -> Prediction:
    outputs = batch * block.out_size**2 * block.hidden_channels
    scratch = element_size * plan.tiles * plan.in_blocks * plan.tile.in_block * block.hidden_channels
    fused, unfused = traffic(block, batch, element_size)
    return Prediction(
        issue_us=1e6 * per_output * outputs / (LANES * ISSUE_SHARE),
        dram_us=1e6 * fused / COPY_BYTES,
        scratch_us=1e6 * scratch / L2_BYTES,
        floor_us=1e6 * unfused / COPY_BYTES,
    )


def figures(
    block: Block, sm: int, dtype: str = "float16", batch: int = 256, tile: Tile | None = None, tf32: bool = True
) -> Figures:
    kernel, plan = compile_block(block, sm, dtype, batch, tile, tf32)
    binary = read_binary(kernel)
    tile = plan.tile
    chunks = math.ceil(block.hidden_channels / tile.chunk)
    steps = math.ceil(block.in_channels / tile.in_step)

    def inner(body: list[Instruction]) -> int:
        # the loop over input channels multiplies matrices, the one over tap rows does not
        return steps if any("MMA" in instruction.name for instruction in body) else block.kernel

    count = executed(binary, (1, chunks) if chunks > 1 else (1,), inner)  # of one tile
    size = 4 if dtype == "float32" else 2
    outputs = batch * block.out_size**2 * block.hidden_channels / plan.tiles  # a tile, on average
    scale = tile.warps * 32 / outputs
    parts = {
        kind: scale * sum(n for name, n in count.items() if re.match(f"(?:{pattern})\\b", name))
        for kind, pattern in KINDS.items()
    }
    per_output = scale * count.total()
    parts["other"] = per_output - sum(parts.values())
    return Figures(
        block.name, sm, dtype, tile, (plan.in_blocks, plan.sub_images, plan.tile_height, plan.tile_width),
        binary.registers, binary.spills, binary.shared, binary.resident(sm), binary.tensor_core, binary.loads_128,
        binary.loads_narrow, barriers=sum(n for name, n in count.items() if name.startswith("BAR")),
        per_output=per_output, parts=parts, prediction=predict(block, plan, per_output, batch, size),
    )  # fmt: skip


def candidates(block: Block) -> Iterator[Tile]:
    """Tiles worth compiling for a block in 16-bit: what the rows of configs.TUNED were chosen from."""
    in_step = next((step for step in (64, 32) if block.in_channels % step == 0), 32 if block.in_channels > 16 else 16)
    padded = configs.split_columns(block.out_channels, 512, False)
    parts = (True, False) if configs.split_columns(block.out_channels, 512, True) != padded else (True,)
    limits = (512,) if block.out_channels <= 128 else (512, 128)
    for outputs, warps in ((64, 4), (128, 4), (128, 8), (256, 8)):
        if outputs >= 4 * max(32, block.out_size**2):
            continue
        in_blocks = (64,) if not block.expand else (128,) if warps == 8 else (64, 128)
        for chunk, in_block, columns, two_parts in itertools.product((16, 32, 64), in_blocks, limits, parts):
            yield Tile(outputs, in_block, in_step, chunk, columns, warps, 1, two_parts)


def score(f: Figures) -> float:
    """Lower is better. Instructions an output, stretched when too few warps are there to hide latency behind."""
    warps = f.resident * f.tile.warps
    hiding = next(
        stretch for least, stretch in ((16, 1.0), (12, 1.06), (9, 1.12), (8, 1.2), (0, 1.8)) if warps >= least
    )
    return f.per_output * hiding + (1000 if f.spills else 0)


def markdown(found: Sequence[Figures]) -> str:
    """One architecture's figures as README.md has them; with a prediction for sm_90."""
    head = ["block", "tile", "registers", "spills", "shared, B", "resident", "mma", "instr/output", "fused, MB"]
    hopper = found[0].sm == 90
    head += ["issue, us", "DRAM, us", "scratch, us", "**predicted, us**", "unfused floor, us"] if hopper else []
    rows = [head, ["---"] * len(head)]
    for f in found:
        block, (in_blocks, images, height, width) = BLOCKS[f.block], f.cut
        tile = f"{images}x{height}x{width} Q{f.tile.outputs} P{in_blocks}x{f.tile.in_block} CE{f.tile.chunk}"
        row = [f.block, f"{tile} {f.tile.warps}w", f.registers, f.spills, f.shared, f.resident, f.tensor_core]
        row += [f"{f.per_output:.1f}", f"{traffic(block, 256).fused / 1e6:.0f}"]
        p = f.prediction
        row += [f"{v:.0f}" for v in (*p[:3], p.us, p.floor_us)] if hopper else []
        rows.append(list(map(str, row)))
    network = [f.prediction for f in found if f.block in {b.name for b in MOBILENET_V2}]
    if hopper and len(network) == len(MOBILENET_V2):
        sums = [sum(values) for values in zip(*((*p[:3], p.us, p.floor_us) for p in network), strict=True)]
        rows.append(["17 blocks", *[""] * 8, *(f"{v:.0f}" for v in sums)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _sweep(block: Block, sm: int, dtype: str, tile: Tile) -> Figures | str:
    try:
        return figures(block, sm, dtype, tile=tile)
    except Exception as error:  # a tile the compiler refuses is a result, and printed as one
        return f"{block.name} {tile}: {str(error)[:100]!r}"


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, nargs="+", default=[90], choices=sorted(DEVICES))
    parser.add_argument("--dtype", default="float16", choices=list(TRITON_TYPES))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--sweep", action="store_true", help="try every candidate tile instead of the chosen one")
    parser.add_argument("--markdown", action="store_true", help="print tables instead of lines")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--blocks", nargs="+", choices=list(BLOCKS), help="all without")
    options = parser.parse_args(None if arguments is None else list(arguments))
    blocks = [BLOCKS[name] for name in options.blocks or BLOCKS]
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        for sm in options.sm:
            if not options.sweep:
                compiled = pool.map(functools.partial(_named, sm, options.dtype, options.batch), blocks)
                if options.markdown:
                    print(
                        f"sm_{sm}, {options.dtype}, batch {options.batch}:\n\n{markdown(list(compiled))}\n", flush=True
                    )
                else:
                    for f in compiled:
                        print(f.row(), flush=True)
                continue
            for block in blocks:
                results = list(pool.map(functools.partial(_sweep, block, sm, options.dtype), candidates(block)))
                print(*(r for r in results if isinstance(r, str)), sep="\n")
                for f in sorted((f for f in results if isinstance(f, Figures)), key=score, reverse=True):
                    print(f"{score(f):7.1f} {f.row()} columns {f.tile.columns} {f.tile.two_parts}", flush=True)


def _named(sm: int, dtype: str, batch: int, block: Block) -> Figures:
    return figures(block, sm, dtype, batch)


if __name__ == "__main__":
    main()
