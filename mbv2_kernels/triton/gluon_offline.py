"""Compile the Gluon kernel for GPUs that are not here, read what came out, and hold it to a budget.

python -m mbv2_kernels.triton.gluon_offline --sm 90                    every block of MobileNetV2
python -m mbv2_kernels.triton.gluon_offline --sm 90 --half             the same, taps accumulated in fp16
python -m mbv2_kernels.triton.gluon_offline --sm 90 --sweep --blocks b3    candidate tiles, best last
python -m mbv2_kernels.triton.gluon_offline --sm 80 89 90 --write      gluon_budget.json anew
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import functools
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import gluon_configs, offline
from .gluon_configs import Cut, Pads, Plan, Tile
from .offline import BLOCKS, DEVICES, MOBILENET_V2, TRITON_TYPES, Block

# The blocks of MobileNetV2, each shape once (the first of its name).
DISTINCT = list({b._replace(name=""): b.name for b in reversed(MOBILENET_V2)}.values())[::-1]
BUDGET = Path(__file__).with_name("gluon_budget.json")


class Figures(NamedTuple):
    """What the compiler made of one block. Rates are thread instructions an output pixel and hidden channel."""

    block: str
    sm: int
    dtype: str
    half: bool
    tile: Tile
    cut: Cut
    splits: int
    registers: int
    spills: int  # local-memory instructions
    shared: int  # bytes
    resident: int  # programs a multiprocessor holds, by registers, threads and shared memory
    per_output: float  # all instructions
    parts: dict[str, float]  # the same by kind
    shared_cycles: float  # of a multiprocessor's shared memory, for each output pixel and hidden channel
    predicted_us: float

    @property
    def key(self) -> str:
        return f"{self.block}-sm_{self.sm}-{self.dtype}{'-half' if self.half else ''}"

    def limits(self) -> dict[str, float]:
        """What the budget holds: none of these may grow."""
        rates = {kind: round(self.parts[kind], 2) for kind in ("lds", "sts", "fma", "tensor")}
        return {
            "registers": self.registers, "spills": self.spills, "shared": self.shared,
            "idle_warps": 64 - self.resident * self.tile.warps, "per_output": round(self.per_output, 1), **rates,
        }  # fmt: skip

    def row(self) -> str:
        tile, cut = self.tile, self.cut
        kinds = " ".join(f"{kind} {value:.2f}" for kind, value in self.parts.items())
        where = f"{cut.parts}x{cut.rows}x{cut.columns} by {cut.patch_rows}x{cut.patch_columns}"
        return (
            f"{self.key:22} {where:15}{' whole' if cut.whole else ''} Q{tile.outputs:<3} CE{tile.chunk} BP{tile.block}"
            f" {tile.warps}w | {self.registers:3} reg {self.spills} spills {self.shared:6} B {self.resident} resident"
            f" | {self.predicted_us:6.1f} us | {self.per_output:5.1f} instr/output: {kinds}"
            f" | {self.shared_cycles * 128:4.1f} shared"
        )


def signature(
    block: Block, dtype: str, constants: dict[str, Any], names: Iterable[str], partial: bool
) -> dict[str, str]:
    data = "*" + TRITON_TYPES[dtype]
    types = {name: data for name in ("x_ptr", "w1_ptr", "w2_ptr", "y_ptr")}
    types |= {name: "*fp32" for name in ("b1_ptr", "wd_ptr", "b2_ptr", "b3_ptr")}
    if partial:
        types["y_ptr"] = "*fp32"
    return {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}


def compile_block(
    block: Block, sm: int, dtype: str = "float16", batch: int = 256, tile: Tile | None = None, half: bool = False,
    splits: int | None = 1,
) -> tuple[Any, Plan]:  # fmt: skip
    """(Triton's compiled kernel, the plan) as ops.py would launch it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from . import gluon_kernels

    pads = Pads(*[block.kernel // 2] * 4)
    plan = gluon_configs.plan(block.problem(batch), DEVICES[sm][0], pads, block.size**2, tile, splits, half)
    if plan is None:
        raise ValueError(f"{tile} does not fit {block.name} on sm_{sm}")
    constants = plan.constants() | {
        "CIN": block.in_channels, "C": block.hidden_channels, "COUT": block.out_channels, "K": block.kernel,
        "S": block.stride, "ACT": block.activation, "FINAL": block.final_activation, "RESIDUAL": block.residual,
    }  # fmt: skip
    if not block.expand:
        constants |= {"w1_ptr": None, "b1_ptr": None}
    names = list(gluon_kernels.fused_block.arg_names)
    types = signature(block, dtype, constants, names, plan.splits > 1)
    source = GluonASTSource(
        fn=gluon_kernels.fused_block,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in names if types[n].startswith("*")},
    )
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": plan.tile.warps}), plan


def executed(binary: offline.Binary, block: Block, chunk: int) -> collections.Counter[str]:
    """Instructions a thread executes. The kernel's one loop is over chunks; in it, what belongs to 16 channels that the
    last chunk may lack is jumped over."""
    chunks = math.ceil(block.hidden_channels / chunk)
    total = offline.executed(binary, (chunks,) if chunks > 1 else (), lambda body: 1)
    if block.hidden_channels % chunk == 0 or chunks == 1:
        return total
    targets = [instruction.target(binary.labels) for instruction in binary.code]
    loop = next(range(start, end) for end, start in enumerate(targets) if start is not None and start < end)
    jumps = [
        range(start + 1, target)
        for start, target in enumerate(targets)
        if target is not None and binary.code[start].condition and start in loop and start + 60 < target <= loop.stop
    ]
    if len(jumps) != chunk // 16 - 1:  # the compiler arranged them otherwise: an upper bound, then
        return total
    for number, body in enumerate(jumps, 1):
        lacking = chunks - math.ceil(max(0, block.hidden_channels - 16 * number) / chunk)
        # whoever lacks the second 16 channels lacks the third: one jump may go over the next one's instructions as well
        own = [i for i in body if not any(i in inner for inner in jumps[number:])]
        names = collections.Counter(binary.code[i].name for i in own)
        total.subtract({name: lacking * n for name, n in names.items()})
    return total


KINDS = offline.KINDS | {
    "lds": r"LDS|LDSM",
    "sts": r"STS|STSM",
    "copy": r"LDGSTS|LDGDEPBAR",
    "sync": r"BAR|MEMBAR|FENCE\w*",
}
del KINDS["shared"]
# Cycles of shared memory that a warp's instruction takes without bank conflicts; taps (LDS.128) are the same for eight
# lanes. LDSM brings four 8 x 16-byte matrices.
CYCLES = {
    "LDS": 1, "LDS.64": 2, "LDS.128": 1, "STS": 1, "STS.64": 2, "STS.128": 4,
    "LDSM.16.M88.2": 2, "LDSM.16.M88.4": 4, "LDSM.16.MT88.2": 2, "LDSM.16.MT88.4": 4,
}  # fmt: skip


def figures(
    block: Block, sm: int, dtype: str = "float16", batch: int = 256, tile: Tile | None = None, half: bool = False
) -> Figures:
    kernel, plan = compile_block(block, sm, dtype, batch, tile, half)
    binary = offline.read_binary(kernel)
    tile, cut = plan.tile, plan.cut
    count = executed(binary, block, tile.chunk)
    outputs = batch * block.out_size**2 * block.hidden_channels / plan.programs  # of a program, on average
    scale = tile.warps * 32 / outputs
    parts = {
        kind: scale * sum(n for name, n in count.items() if re.match(f"(?:{pattern})\\b", name))
        for kind, pattern in KINDS.items()
    }
    per_output = scale * count.total()
    parts["other"] = per_output - sum(parts.values())
    ways = gluon_configs.conflicts(cut, block.kernel, block.stride, tile.chunk)
    cycles: float = sum(CYCLES.get(name, 0) * (ways if name == "LDS.64" else 1) * n for name, n in count.items())
    if half:  # the taps are fp16, so their loads, the same for eight lanes, are LDS.64 too
        cycles -= (2 * ways - 1) * math.ceil(block.hidden_channels / 16) * (block.kernel**2 + 1)
    if plan.hopper and block.expand:  # wgmma reads both operands of the expand product, 128 bytes a cycle
        rows, k = plan.blocks * tile.block, math.ceil(block.in_channels / plan.x_step) * plan.x_step
        chunks = math.ceil(block.hidden_channels / tile.chunk)
        # of the columns for the bias only w1's are in shared memory
        cycles += chunks * (rows * k + tile.chunk * rows / 64 * (k + 16)) * 2 / 128 / tile.warps
    shared_cycles = scale / 32 * cycles
    f = Figures(
        block.name, sm, dtype, half, tile, cut, plan.splits, binary.registers, binary.spills, binary.shared,
        binary.resident(sm), per_output, parts, shared_cycles, 0.0,
    )  # fmt: skip
    return f._replace(predicted_us=predict(block, f, batch))


def predict(block: Block, f: Figures, batch: int) -> float:
    """Microseconds a call on an H200, by the assumptions of offline.predict: the slowest of issue, shared memory, DRAM.

    Holds for a batch that fills the device. To be confirmed or refuted, not a measurement.
    """
    pixels_in, pixels_out = batch * block.size**2, batch * block.out_size**2
    outputs = pixels_out * block.hidden_channels
    issue = f.per_output * outputs / (offline.LANES * offline.ISSUE_SHARE)
    shared = f.shared_cycles * outputs / (offline.LANES / 128 * offline.ISSUE_SHARE)
    moved = pixels_in * block.in_channels + pixels_out * block.out_channels * (1 + block.residual)
    return 1e6 * max(issue, shared, 2 * moved / offline.COPY_BYTES) + offline.LAUNCH_US


# ---- The budget -----------------------------------------------------------------------------------------------------

SLACK = 1.02  # rates may differ by this much: register allocation moves a few instructions


def over_budget(f: Figures, budget: dict[str, Any]) -> list[str]:
    """What has become worse, in words with both figures; empty if nothing has."""
    allowed = budget["blocks"].get(f.key)
    if allowed is None:
        return [f"{f.key} is not in {BUDGET.name}"]
    slack = {name: 1.0 if name in ("registers", "spills", "shared", "idle_warps") else SLACK for name in allowed}
    return [
        f"{f.key}: {name} {value} > {allowed[name]}"
        for name, value in f.limits().items()
        if value > allowed[name] * slack[name] + (0.01 if slack[name] > 1 else 0)
    ]


def triton_version() -> str:
    import triton

    return ".".join(triton.__version__.split(".")[:2])


# ---- The sweep ------------------------------------------------------------------------------------------------------


def candidates(block: Block, sm: int) -> Iterator[Tile]:
    for warps, outputs in itertools.product((4, 8), (64, 128, 256)):
        # accumulators, the taps' sums and what is around them in 255 registers
        columns = sum(gluon_configs.split_columns(block.out_channels, gluon_configs.MAX_OUT_CHANNELS, True)[:2])
        if not 1 <= outputs // (8 * warps) <= 8 or outputs * columns // (32 * warps) > 160 or outputs < 16 * warps:
            continue
        for chunk, rows, resident in itertools.product((16, 32, 64), (64, 128), (1, 2, 3)):
            if rows < 16 * warps or resident * warps > 12 or (block.hidden_channels <= chunk // 2):
                continue
            yield Tile(outputs, warps, chunk, rows, resident)


def score(f: Figures) -> float:
    """Lower is better: as offline.score, with shared memory's cycles where they are more than the instructions'."""
    warps = f.resident * f.tile.warps
    hiding = next(s for least, s in ((16, 1.0), (12, 1.03), (8, 1.1), (0, 1.6)) if warps >= least)
    return max(f.per_output, 128 * f.shared_cycles) * hiding + (1000 if f.spills else 0)


def _sweep(block: Block, sm: int, dtype: str, half: bool, tile: Tile) -> Figures | str:
    try:
        return figures(block, sm, dtype, tile=tile, half=half)
    except Exception as error:  # a tile the compiler refuses is a result, and printed as one
        return f"{block.name} {tile}: {str(error)[:100]!r}"


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, nargs="+", default=[90], choices=sorted(gluon_configs.SHARED))
    parser.add_argument("--dtype", nargs="+", default=["float16"], choices=["float16", "bfloat16"])
    parser.add_argument("--half", action="store_true", help="accumulate the taps in fp16")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--sweep", action="store_true", help="try every candidate tile instead of the chosen one")
    parser.add_argument("--write", action="store_true", help=f"write {BUDGET.name} instead of comparing with it")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--blocks", nargs="+", choices=list(BLOCKS), default=DISTINCT, help="those of MobileNetV2")
    options = parser.parse_args(None if arguments is None else list(arguments))
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {"blocks": {}}
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        for sm, dtype, name in itertools.product(options.sm, options.dtype, options.blocks):
            if options.sweep:
                sweep = functools.partial(_sweep, BLOCKS[name], sm, dtype, options.half)
                results = list(pool.map(sweep, candidates(BLOCKS[name], sm)))
                kept = {(f.tile[:-1], f.cut): f for f in results if isinstance(f, Figures)}
                for f in sorted(kept.values(), key=score, reverse=True):
                    print(f"{score(f):7.1f} {f.row()} {tuple(f.tile)}", flush=True)
                continue
        if options.sweep:
            return
        work = list(itertools.product(options.sm, options.dtype, options.blocks))
        for f in pool.map(_figures, *zip(*((n, sm, d, options.batch, options.half) for sm, d, n in work), strict=True)):
            print(f.row(), flush=True)
            if options.write:
                budget["blocks"][f.key] = f.limits()
            else:
                print(*over_budget(f, budget), sep="\n", end="\n" if over_budget(f, budget) else "")
    if options.write:
        budget = {"triton": triton_version(), "blocks": dict(sorted(budget["blocks"].items()))}
        lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in budget["blocks"].items())
        text = ",\n".join(lines)
        BUDGET.write_text(f'{{"triton": "{budget["triton"]}", "blocks": {{\n{text}\n}}}}\n')


def _figures(name: str, sm: int, dtype: str, batch: int, half: bool) -> Figures:
    return figures(BLOCKS[name], sm, dtype, batch, half=half)


if __name__ == "__main__":
    main()
