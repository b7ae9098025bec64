"""The command line: `mbv2-kernels info`, `verify`, `bench` and `train-demo`.

Exit codes: 0 all is well, 1 a result is out of its error bound, 2 arguments or files cannot be used, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ._bench.cuda import Cuda, FoldedNative, Graphed, MaxAutotune
from ._bench.inputs import (
    InputError,
    load_model,
    load_pictures,
    load_weights,
    random_pictures,
    randomise_batch_norm,
)
from ._bench.machine import describe, machine
from ._bench.peers import Compiled, Eager, Folded, Fused, FusedFp16, Peer
from ._bench.suite import (
    check_json_path,
    columns,
    compare_blocks,
    missing_lines,
    parts,
    peer_table,
    peer_versions,
    record,
    sample_network,
    table,
    write_json,
)
from ._bench.timing import CheckFailed, Comparison, compare
from ._bench.train_demo import train_demo_command
from ._bench.training import (
    TRAINERS,
    TrainingComparison,
    compare_training,
    compare_training_blocks,
    training_table,
)
from ._bench.verify import BlockCheck, NetworkCheck, Verification, verify
from .backends import fp16_accumulation_missing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICE = Cuda()  # what --device cuda times on
RANDOM_NOTE = "weights are random (seed 0); BatchNorm scales, shifts and running statistics are set as if trained"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


class Progress:
    """A bar on stderr, on a terminal only; `clear` before anything else is printed."""

    WIDTH = 24

    def __init__(self) -> None:
        self.shown = sys.stderr.isatty()

    def __call__(self, text: str, done: int, total: int) -> None:
        if self.shown:
            filled = self.WIDTH * done // total
            line = f"[{'#' * filled}{'.' * (self.WIDTH - filled)}] {done}/{total} {text}"
            print(f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e5:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return value


def width(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 4:
        raise argparse.ArgumentTypeError(f"expected a number from 0.1 to 4, got {text!r}")
    return value


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device must be cpu or cuda, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu or cuda, got {name!r}")
    if device.type == "cuda":
        from .status import cuda_missing

        if missing := cuda_missing():
            raise InputError(f"--device {name}: {missing}")
        if (device.index or 0) >= torch.cuda.device_count():
            raise InputError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA device(s)")
    return device


def build(arguments: argparse.Namespace) -> tuple[nn.Module, Tensor, str]:
    """The model and its input as the arguments say, and a line on where weights and input come from."""
    device, dtype = _device(arguments.device), DTYPES[arguments.dtype]
    if getattr(arguments, "fp16_accumulation", False):
        if dtype is not torch.float16 or device.type != "cpu" or getattr(arguments, "train", False):
            raise InputError("--fp16-accumulation is for inference on CPUs with --dtype float16")
        if missing := fp16_accumulation_missing():
            raise InputError(f"--fp16-accumulation cannot run here: {missing}")
    model, size = load_model(arguments.model)
    size = arguments.size or size
    images = getattr(arguments, "image", None)
    x = load_pictures(images, size) if images else random_pictures(arguments.batch, size)
    if arguments.weights:
        load_weights(model, arguments.weights)
    sample_network(model, x[:1], arguments.model)
    if arguments.weights:
        note = f"weights from {arguments.weights}"
    else:
        randomise_batch_norm(model, size)
        note = RANDOM_NOTE
    note += f"; input: {len(images)} picture(s)" if images else "; input: random pictures"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        note += _prepare_cuda(device, dtype)
    model = model.to(device, dtype)
    parts(model)  # an error now, before any work, if there is nothing to fuse
    return model, x.to(device, dtype), note


def _prepare_cuda(device: torch.device, dtype: torch.dtype) -> str:
    """Chooses what runs on a GPU here, and says so: these commands check every result, so they may try a new GPU."""
    from .backends import get_backend, set_backend, unchecked_gpu

    note = ""
    if get_backend() == "auto":
        if reason := unchecked_gpu(device):
            note += f'; backend "triton", which is not this GPU\'s default: {reason}'
        set_backend("triton")
    if dtype is torch.float32:
        torch.backends.cudnn.allow_tf32 = False
        note += "; TF32 off"
    return note


def title(arguments: argparse.Namespace, x: Tensor) -> str:
    return f"{arguments.model}, input {'x'.join(map(str, x.shape))}, {arguments.dtype}, {x.device}"


def origin(arguments: argparse.Namespace, header: dict[str, Any], x: Tensor, note: str) -> dict[str, Any]:
    """What the JSON of every command on a network begins with: the machine, and what was run on it."""
    return {
        "machine": header,
        "model": arguments.model,
        "input_shape": list(x.shape),
        "dtype": arguments.dtype,
        "note": note,
    }


def info(arguments: argparse.Namespace) -> int:
    """What this machine can run, and why not the rest."""
    from . import _C
    from .status import status

    found = status(import_triton=True)
    header = machine(torch.get_num_threads())
    peaks = {t["name"]: round(_C.fma_peak(t["name"], 0.1), 1) for t in _C.all_tiers() if t["runnable"]}
    print(describe(header))
    print(f"CPU features: {' '.join(header['features'])}")
    print("measured FMA peak of one thread: " + ", ".join(f"{name} {peak:.0f} GFLOP/s" for name, peak in peaks.items()))
    print()
    print(found)
    if arguments.json:
        write_json(arguments.json, "info", {"machine": header, "fma_peak_gflops": peaks, "status": asdict(found)})
    return 0


def _verify_table(result: Verification) -> str:
    compared = ["float32 sums"] if result.network.float32_error is not None else []
    rows = [["block", "class", "input", "error", *compared, "unfused", "limit", "ran on", ""]]

    def errors_of(check: BlockCheck | NetworkCheck) -> list[str]:
        values = (check.error, *([check.float32_error] if compared else []), check.unfused_error, check.limit)
        return [f"{value:.1e}" for value in values]

    for b in result.blocks:
        ran = "/".join(part for part in (b.backend, b.tier) if part) or "-"
        shape = "x".join(map(str, b.input_shape))
        rows.append([b.path, b.class_name, shape, *errors_of(b), ran, "ok" if b.ok else "TOO LARGE"])
    n = result.network
    rows.append(["network", "", "", *errors_of(n), "", "ok" if n.ok else "TOO LARGE"])
    return columns(rows)


def verify_command(arguments: argparse.Namespace) -> int:
    """Compare the fused network with the unfused one and with fp64."""
    model, x, note = build(arguments)
    progress = Progress()
    try:
        result = verify(model, x, progress, fp16_accumulation=arguments.fp16_accumulation)
    finally:
        progress.clear()
    print(f"{title(arguments, x)}\n{note}\n")
    print("relative errors against fp64, fused and unfused on the same inputs:")
    print(_verify_table(result))
    print(
        f"\nfused and unfused agree in the first class of {result.network.top1:.0%} "
        f"and in {result.network.top5:.1%} of the first five, over {result.network.images} image(s)"
    )
    for row in result.not_fused:
        print(f"not fused: {row.path} ({row.class_name}): {row.reason}")
    bad = sum(not block.ok for block in result.blocks) + (not result.network.ok)
    print(f"{len(result.blocks)} fused: " + (f"{bad} error(s) OUT OF BOUNDS" if bad else "all errors within bounds"))
    if arguments.json:
        content: dict[str, Any] = {
            **origin(arguments, machine(torch.get_num_threads(), x.device), x, note),
            "ok": result.ok,
            "network": {**asdict(result.network), "ok": result.network.ok},
            "blocks": [{**asdict(block), "ok": block.ok} for block in result.blocks],
            "not_fused": [asdict(row) for row in result.not_fused],
        }
        write_json(arguments.json, "verify", content)
    return 0 if result.ok else 1


def bench(arguments: argparse.Namespace) -> int:
    """Time the fused blocks and network against the best unfused ones."""
    if arguments.train:
        return bench_training(arguments)
    if arguments.graph and not arguments.device.startswith("cuda"):
        raise InputError("--graph is for CUDA graphs: it needs --device cuda")
    model, x, note = build(arguments)
    threads = arguments.threads or torch.get_num_threads()
    block_peers, network_peers = _peers(arguments, x.device)
    header = machine(threads, x.device)
    if x.device.type == "cuda":
        note += ", every contestant as a CUDA graph" if arguments.graph else ", without CUDA graphs"
        header["matmul_tflop_s"], header["copy_gb_s"] = DEVICE.matmul_rate(x.dtype), DEVICE.copy_rate()
        peak = 1e3 * header["matmul_tflop_s"]
    else:
        peak = header["fma_peak_gflops_per_thread"] * threads
    memory = DEVICE.peak_bytes if x.device.type == "cuda" else None
    print(f"{describe(header)}\n{title(arguments, x)}\n{note}", flush=True)
    progress = Progress()
    block_results: list[Comparison] = []
    network_results: list[Comparison] = []
    try:
        if arguments.only != "network":
            block_results = compare_blocks(
                model, x, block_peers, threads=threads, seconds=arguments.seconds, progress=progress, memory=memory
            )
            progress.clear()
            print(f"\nblocks, milliseconds (medians):\n{table(block_results, block_peers, peak)}", flush=True)
        if arguments.only != "blocks":
            progress("network" if arguments.no_compile else "network (torch.compile takes a minute)", 0, 1)
            budget = 4 * arguments.seconds
            network_results = [
                compare(
                    "network", model, x, network_peers, threads=threads, seconds=budget, network=True, memory=memory
                )
            ]
            progress.clear()
            print(f"\nnetwork:\n{peer_table(network_results[0], network_peers, peak)}")
    finally:
        progress.clear()
    for line in missing_lines(block_results + network_results):
        print(line)
    if arguments.json:
        content = {
            **origin(arguments, header, x, note),
            "peers": peer_versions(network_peers),
            "threads": threads,
            "blocks": [record(c, block_peers, peak) for c in block_results],
            "network": record(network_results[0], network_peers, peak) if network_results else None,
        }
        write_json(arguments.json, "bench", content)
    return 0


def _peers(arguments: argparse.Namespace, device: torch.device) -> tuple[list[Peer], list[Peer]]:
    """The contestants for single blocks and for the network."""
    on_gpu = device.type == "cuda"
    ours: list[Peer] = [Fused(), *([FusedFp16()] if arguments.fp16_accumulation else [])]
    blocks: list[Peer] = [*ours, Folded(), *([FoldedNative()] if on_gpu else []), Eager()]
    compiled: list[Peer] = [] if arguments.no_compile else [MaxAutotune() if on_gpu else Compiled()]
    network = blocks + compiled
    if arguments.graph:
        return [Graphed(peer, DEVICE) for peer in blocks], [Graphed(peer, DEVICE) for peer in network]
    return blocks, network


def bench_training(arguments: argparse.Namespace) -> int:
    """Time and weigh training steps of the fused and the unfused blocks and network."""
    model, x, note = build(arguments)
    threads = arguments.threads or torch.get_num_threads()
    trainers = [t for t in TRAINERS if not (arguments.no_compile and t.compiled)]
    header = machine(threads, x.device)
    print(
        f"{describe(header)}\n{title(arguments, x)}\n{note}\n"
        "training steps: forward, loss, backward; worst gradient error: of any gradient in any block, against fp64",
        flush=True,
    )
    progress = Progress()
    blocks: list[TrainingComparison] = []
    network: list[TrainingComparison] = []
    try:
        if arguments.only != "network":
            blocks = compare_training_blocks(
                model, x, trainers, threads=threads, seconds=arguments.seconds, progress=progress
            )
            progress.clear()
            print(f"\nblocks:\n{training_table(blocks)}", flush=True)
        if arguments.only != "blocks":
            progress("network" if arguments.no_compile else "network (torch.compile takes minutes)", 0, 1)
            budget = 4 * arguments.seconds
            network = [compare_training("network", model, x, trainers, threads=threads, seconds=budget)]
            progress.clear()
            print(f"\nnetwork:\n{training_table(network)}")
    finally:
        progress.clear()
    for comparison in blocks + network:
        for name, reason in comparison.unavailable.items():
            print(f"{comparison.label}: {name}: {reason}")
    if arguments.json:
        content = {
            **origin(arguments, header, x, note),
            "threads": threads,
            "blocks": [asdict(c) for c in blocks],
            "network": asdict(network[0]) if network else None,
        }
        write_json(arguments.json, "bench --train", content)
    return 0


def train_demo(arguments: argparse.Namespace) -> int:
    """Train on digits, fused and unfused, compare accuracies and loss curves, and draw them."""
    return train_demo_command(arguments, Progress())


def output_options() -> Parser:
    """A parent parser with --json."""
    parent = Parser(add_help=False)
    parent.add_argument("--json", metavar="FILE", help="write everything to FILE as JSON too")
    return parent


def network_options() -> Parser:
    """A parent parser with the options that `build` reads."""
    parent = Parser(add_help=False)
    parent.add_argument(
        "--model",
        metavar="M",
        default="builtin:mobilenet_v2",
        help="builtin:mobilenet_v2 (default), builtin:mobilenet_v1, torchvision:NAME or timm:NAME",
    )
    parent.add_argument("--weights", metavar="FILE", help="a state_dict for the model (default: random weights)")
    parent.add_argument("--size", type=positive, metavar="N", help="image size (default: the model's, 224)")
    parent.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and activations")
    parent.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    return parent


def fp16_options() -> Parser:
    """A parent parser with --fp16-accumulation."""
    parent = Parser(add_help=False)
    parent.add_argument(
        "--fp16-accumulation",
        action="store_true",
        help="with --dtype float16, on CPUs with AVX512-FP16: with set_fp16_accumulation(True): faster, less exact",
    )
    return parent


def timing_options() -> Parser:
    """A parent parser with what every timing needs to know."""
    parent = Parser(add_help=False)
    parent.add_argument("--batch", type=positive, default=1, metavar="N", help="images a call (default 1)")
    parent.add_argument("--threads", type=positive, metavar="N", help="threads (default: torch's number)")
    parent.add_argument("--only", choices=("blocks", "network"), help="time only these")
    parent.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    parent.add_argument(
        "--seconds",
        type=seconds,
        default=1.0,
        metavar="S",
        help="to spend on a block, the network gets 4 S (default 1)",
    )
    return parent


def _parser() -> Parser:
    from . import __version__

    parser = Parser(prog="mbv2-kernels", description="MobileNetV2-like blocks as one fused kernel.")
    parser.add_argument("--version", action="version", version=f"mbv2_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,verify,bench,train-demo}")

    output, network, fp16 = output_options(), network_options(), fp16_options()
    command = commands.add_parser("info", parents=[output], help="what this machine can run, and why not the rest")
    command.set_defaults(run=info)

    command = commands.add_parser(
        "verify", parents=[network, fp16, output], help="errors of the fused network, block by block and as a whole"
    )
    given = command.add_mutually_exclusive_group()
    given.add_argument("--image", nargs="+", metavar="FILE", help="pictures to run on (needs Pillow)")
    given.add_argument("--batch", type=positive, default=4, metavar="N", help="number of random pictures (default 4)")
    command.set_defaults(run=verify_command)

    command = commands.add_parser(
        "bench",
        parents=[network, fp16, timing_options(), output],
        help="fused against the best unfused path, per block and whole network",
    )
    command.add_argument("--graph", action="store_true", help="with --device cuda: everything as CUDA graphs")
    command.add_argument("--train", action="store_true", help="time and weigh training steps instead of inference")
    command.set_defaults(run=bench)

    command = commands.add_parser(
        "train-demo",
        parents=[output],
        help="train a small MobileNetV2 on handwritten digits, fused and unfused; also under torchrun",
    )
    command.add_argument("--epochs", type=positive, default=8, metavar="N", help="passes over the data (default 8)")
    command.add_argument("--batch", type=positive, default=64, metavar="N", help="images a step (default 64)")
    command.add_argument("--width", type=width, default=0.35, metavar="W", help="width multiplier (default 0.35)")
    command.add_argument("--images", type=positive, metavar="N", help="learn from the first N images only")
    command.add_argument("--picture", default="train-demo.png", metavar="FILE", help="where the losses are drawn")
    command.set_defaults(run=train_demo)
    return parser


def run(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse `argv`, call the command (`arguments.run`), turn what can go wrong into one line and an exit code."""
    name = parser.prog
    try:
        arguments = parser.parse_args(argv)
        name = f"{parser.prog} {arguments.command}" if "command" in arguments else parser.prog
        if arguments.json:
            check_json_path(arguments.json)
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except InputError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except CheckFailed as error:
        print(f"{name}: error: {error}; no speed is reported", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output (head, less) has gone. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def main(argv: Sequence[str] | None = None) -> int:
    """The console script `mbv2-kernels`; returns the exit code."""
    return run(_parser(), argv)
