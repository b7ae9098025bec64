"""Compile the kernels of a training step for a GPU that is not here, as training_ops.py would launch them, and read
what the compiler made of them. The phases run on tensors without data, and every launch is compiled instead.

    python -m mbv2_kernels.triton.training_offline --sm 90                       every block of MobileNetV2, k5, V1
    python -m mbv2_kernels.triton.training_offline --sm 80 --blocks b3 --memory lean --dtype bfloat16
"""

from __future__ import annotations

import argparse
import concurrent.futures
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from . import training_ops
from .offline import BLOCKS, DEVICES, Block, read_binary

TRITON_TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.int32: "i32"
}  # fmt: skip
#: Those that multiply matrices; the others are held up by memory alone.
PRODUCTS = ("gram", "depthwise", "project", "project_gradient", "depthwise_gradient", "input_gradient")


class Launch(NamedTuple):
    """One kernel of one phase, as it would be launched."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int


class Figures(NamedTuple):
    """What the compiler made of one launch."""

    block: str
    kernel: str
    sm: int
    dtype: str
    memory: str
    programs: tuple[int, ...]
    tile: str
    warps: int
    registers: int
    spills: int  # local-memory instructions
    shared: int  # bytes
    resident: int  # programs a multiprocessor holds, by registers and shared memory
    tensor_core: int  # instructions in the binary
    loads_128: int
    loads_narrow: int  # global loads of less than 4 bytes
    instructions: int  # in the binary

    def row(self) -> str:
        return (
            f"{self.block:14} {self.kernel:19} sm_{self.sm} {self.dtype:8} {self.memory} {self.tile} {self.warps}w"
            f" grid {'x'.join(map(str, self.programs))} | {self.registers:3} reg {self.spills:3} spills"
            f" {self.shared:6} B shared {self.resident} resident | {self.tensor_core:3} mma {self.loads_128:3} ld128"
            f" {self.loads_narrow:2} narrow {self.instructions:5} instr"
        )


def launches(
    block: Block, sm: int, dtype: str = "float16", batch: int = 256, memory: str = "fast", **tile: Any
) -> Iterator[Launch]:
    """Every launch of a training step of `block`; `tile` replaces fields of the chosen tiles."""
    i, c, o, k = block.in_channels, block.hidden_channels, block.out_channels, block.kernel

    def images(channels: int, size: int, dtype: str = dtype) -> Tensor:
        shape = batch, channels, size, size
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta", memory_format=torch.channels_last)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    x, z, d = images(i, block.size), images(o, block.out_size), images(c, block.out_size)
    gy = torch.empty_like(z)
    w1, b1 = (floats(c, i), floats(c)) if block.expand else (None, None)
    wd, w2 = floats(c, 1, k, k), floats(o, c)
    config = block.stride, block.dilation * (k - 1) // 2, block.dilation, block.activation
    given = x, d if memory == "fast" else None, w1, b1, wd
    final = floats(o), floats(o), block.final_activation
    gradient = gy, z, floats(o), floats(o), floats(o), floats(o), floats(o), block.final_activation
    channels = [floats(c) for _ in range(5)]
    m, c0 = (floats(i, i), floats(i)) if block.expand else (None, None)
    added = gy if block.residual else None
    phases: dict[str, tuple[Any, ...]] = {
        "train_gram": (x,),
        "train_depthwise": (x, w1, b1, wd, *config, memory == "fast"),
        "train_project": (*given, *channels[:2], w2, *config),
        "train_finish": (z, x if block.residual else None, *final),
        "train_finish_backward": (gy, z, *final),
        "train_project_backward": (*gradient, *given, *channels[:2], w2, *config, (True, True)),
        "train_depthwise_backward": (*gradient, *given, *channels, w2, *config, (True, True)),
        "train_input_backward": (images(i, block.size, "float32"), x, m, c0, added),
    }
    recorded: list[Launch] = []
    choose = training_ops.choose_tile
    with (
        mock.patch.object(training_ops, "_run", lambda *launch: recorded.append(Launch(*launch))),
        mock.patch.object(training_ops, "choose_tile", lambda *args: choose(*args)._replace(**tile)),
    ):
        for phase, arguments in phases.items():
            getattr(training_ops, phase)(*arguments)
    yield from {launch.kernel.__name__: launch for launch in recorded}.values()  # some occur in two phases


def compile_launch(launch: Launch, sm: int) -> Any:
    """Triton's compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    positional = dict(zip(names, launch.arguments, strict=False))
    constants = launch.constants | {name: None for name, value in positional.items() if value is None}
    types = {
        name: f"*{TRITON_TYPES[value.dtype]}" if isinstance(value, Tensor) else "i32"
        for name, value in positional.items()
        if value is not None
    }
    source = ASTSource(
        fn=launch.kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind.startswith("*")},
    )
    options = {"num_warps": launch.warps, **training_ops.LAUNCH_OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def figures(
    name: str, sm: int, dtype: str = "float16", memory: str = "fast", kernels: Iterable[str] | None = None, **tile: Any
) -> list[Figures]:
    """Of every kernel of a training step of BLOCKS[name], or of `kernels`."""
    found = []
    for launch in launches(BLOCKS[name], sm, dtype, memory=memory, **tile):
        kernel = launch.kernel.__name__
        if kernels is not None and kernel not in kernels:
            continue
        binary, constants = read_binary(compile_launch(launch, sm)), launch.constants
        keys = ("Q", "NI", "TH", "TW", "NP", "NV", "BP", "BK", "BO", "CE", "CO", "CI")
        found.append(
            Figures(
                name, kernel, sm, dtype, memory, launch.grid,
                " ".join(f"{key}{constants[key]}" for key in keys if key in constants), launch.warps, binary.registers,
                binary.spills, binary.shared, binary.resident(sm), binary.tensor_core, binary.loads_128,
                binary.loads_narrow, instructions=len(binary.code),
            )
        )  # fmt: skip
    return found


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, nargs="+", default=[90], choices=sorted(DEVICES))
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--memory", default="fast", choices=["fast", "lean"])
    parser.add_argument("--kernels", nargs="+", help="all without")
    parser.add_argument("--blocks", nargs="+", choices=list(BLOCKS), help="all without")
    parser.add_argument("--tile", nargs="*", default=[], metavar="FIELD=NUMBER", help="fields of training_ops.Tile")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(None if arguments is None else list(arguments))
    tile = {field: int(number) for field, number in (item.split("=") for item in options.tile)}
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        for sm in options.sm:
            work = [
                pool.submit(figures, name, sm, options.dtype, options.memory, options.kernels, **tile)
                for name in options.blocks or BLOCKS
            ]
            for future in work:
                print(*(f.row() for f in future.result()), sep="\n", flush=True)


if __name__ == "__main__":
    main()
