"""The CPU targets of this package, each as a ratio measured now on this machine, in one table.

    python benchmarks/targets.py --json out.json          # all of them: about ten minutes on two cores
    python benchmarks/targets.py --quick                   # the same table from fewer shapes and shorter timings
    python benchmarks/targets.py --only networks memory    # parts of it: networks, blocks, first-call, memory, sweep

Ours against ONNX Runtime and OpenVINO on the same weights, every output checked against float64 first, all timed in
turns in one process. A peer that is not installed is named; what needs it then counts as not measured. Where one says
"missed", the line says by how much. `MBV2_MAX_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2` holds ours and the oneDNN users (torch,
OpenVINO) to AVX2, which has targets of its own; ONNX Runtime picks its instructions itself.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import compare as compare_script
from mbv2_kernels import fuse, models, summary
from mbv2_kernels._bench.inputs import InputError, copy_of_block, load_model, random_pictures, randomise_batch_norm
from mbv2_kernels._bench.inputs import block_inputs as inputs_of
from mbv2_kernels._bench.machine import describe, machine
from mbv2_kernels._bench.peers import Eager, Folded, Fused, Peer
from mbv2_kernels._bench.suite import columns, missing_lines, peer_versions, record, write_json
from mbv2_kernels._bench.timing import Comparison, compare
from mbv2_kernels.cli import Parser, Progress, network_options, output_options, run, seconds, timing_options
from mbv2_kernels.recognise import LAYER_KINDS
from peers import OnnxRuntime, OpenVino

WIDTHS, SIZES, BATCHES = (0.35, 0.5, 1.0, 1.4), (96, 160, 224, 320), (1, 8, 64)
QUICK_WIDTHS, QUICK_SIZES, QUICK_BATCHES = (0.35, 1.4), (96, 224), (1, 8)
FIRST_CALLS = 5


@dataclass(frozen=True)
class Target:
    """One line of the table. `at_most`: the figure is to stay below `wanted`, not above. value None: not measured."""

    name: str
    wanted: float
    value: float | None
    at_most: bool = False
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        held = self.value <= self.wanted if self.at_most else self.value >= self.wanted
        return "held" if held else "missed"


class Measurement:
    """Runs the comparisons and collects targets and records."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.quick = arguments.quick
        self.seconds = arguments.seconds * (0.25 if self.quick else 1.0)
        self.runtimes: list[Peer] = [OnnxRuntime(), OpenVino()]
        self.targets: list[Target] = []
        self.comparisons: list[Comparison] = []
        self.progress = Progress()

    def add(self, *args: Any, **kw: Any) -> None:
        target = Target(*args, **kw)
        self.targets.append(target)
        self.progress.clear()
        print(line_of(target), flush=True)

    def compare(
        self,
        label: str,
        model: nn.Module,
        x: Tensor,
        peers: Sequence[Peer],
        threads: int,
        seconds: float,
        *,
        network: bool = True,
    ) -> Comparison:
        self.progress(label, len(self.comparisons), len(self.comparisons) + 1)
        result = compare(label, model, x, [Fused(), *peers], threads=threads, seconds=seconds, network=network)
        self.comparisons.append(result)
        return result

    def against_runtimes(
        self, label: str, model: nn.Module, x: Tensor, threads: int, seconds: float | None = None
    ) -> tuple[float | None, str, Comparison]:
        """How many times as fast as the faster runtime; which that is."""
        result = self.compare(label, model, x, self.runtimes, threads, seconds or 4 * self.seconds)
        best = result.fastest([peer.name for peer in self.runtimes])
        return (None if best is None else result.ratio(best)), f"against {best or 'no runtime'}", result


def network_of(spec: str, size: int | None = None, batch: int = 1, width: float = 1.0) -> tuple[nn.Module, Tensor]:
    """A network with BatchNorms as if trained, and pictures for it."""
    if spec == "builtin:mobilenet_v2":
        torch.manual_seed(0)
        model, default = models.mobilenet_v2(width).eval(), 224
    else:
        model, default = load_model(spec)
    size = size or default
    randomise_batch_norm(model, size)
    return model, random_pictures(batch, size)


def networks(m: Measurement, threads: Sequence[int], avx2: bool, peak: float) -> None:
    """The whole network against the runtimes and against the arithmetic peak."""
    for count in threads:
        model, x = network_of("builtin:mobilenet_v2")
        ratio, note, result = m.against_runtimes(f"batch 1, {count} thread(s)", model, x, count)
        m.add(f"batch 1, {count} thread(s): times as fast", 1.2 if avx2 else 1.5, ratio, note=note)
        if count == 1:
            m.add("batch 1, 1 thread: part of the FMA peak", 0.8, result.gflops("fused") / peak)
    model, x = network_of("builtin:mobilenet_v2", batch=16)
    ratio, note, _ = m.against_runtimes(f"batch 16, {threads[-1]} thread(s)", model, x, threads[-1], 8 * m.seconds)
    m.add(f"batch 16, {threads[-1]} thread(s): times as fast", 1.2 if avx2 else 1.4, ratio, note=note)
    for spec in ("builtin:mobilenet_v1", "timm:efficientnet_lite0"):
        try:
            model, x = network_of(spec)
        except InputError as error:
            m.add(f"{spec}: times as fast", 1.0, None, note=str(error))
            continue
        ratio, note, _ = m.against_runtimes(spec, model, x, 1)
        m.add(f"{spec}: times as fast", 1.0, ratio, note=note)


def blocks(m: Measurement, peak: float) -> None:
    """Every block, one thread, batch 1, against the BN-folded channels_last path of torch."""
    model, x = network_of("builtin:mobilenet_v2")
    paths = [row.path for row in summary(fuse(copy.deepcopy(model))) if row.fused and row.kind not in LAYER_KINDS]
    results = []
    for path, block_input in inputs_of(model, paths, x).items():
        results.append(
            m.compare(path, copy_of_block(model, path), block_input, [Folded()], 1, m.seconds, network=False)
        )
    name = Folded.name
    slowest = min(results, key=lambda c: c.ratio(name))
    idlest = min(results, key=lambda c: c.gflops("fused"))
    m.add(f"worst of {len(results)} blocks: times as fast as {name}", 2.0, slowest.ratio(name), note=slowest.label)
    m.add("worst block: part of the FMA peak", 0.7, idlest.gflops("fused") / peak, note=idlest.label)


def sweep(m: Measurement) -> None:
    """The worst ratio over widths, resolutions and batches, one thread."""
    widths, sizes, batches = (QUICK_WIDTHS, QUICK_SIZES, QUICK_BATCHES) if m.quick else (WIDTHS, SIZES, BATCHES)
    worst: tuple[float, str] | None = None
    for width, size, batch in itertools.product(widths, sizes, batches):
        model, x = network_of("builtin:mobilenet_v2", size, batch, width)
        label = f"width {width}, {size}x{size}, batch {batch}"
        ratio, note, _ = m.against_runtimes(label, model, x, 1, m.seconds)
        if ratio is not None and (worst is None or ratio < worst[0]):
            worst = ratio, f"{label}, {note}"
    name = f"worst of {len(widths) * len(sizes) * len(batches)} widths, sizes, batches: times as fast"
    m.add(name, 1.0, worst[0] if worst else None, note=worst[1] if worst else "no runtime")


def first_call(m: Measurement) -> None:
    """Milliseconds of the first call of a freshly fused model: folding and packing included, one thread."""
    model, x = network_of("builtin:mobilenet_v2")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        taken: dict[str, list[float]] = {"fuse": [], "first call": []}
        with torch.no_grad():
            model(x)
            for _ in range(FIRST_CALLS):
                fresh = copy.deepcopy(model)
                for name, step in (("fuse", lambda f=fresh: fuse(f)), ("first call", lambda f=fresh: f(x))):
                    start = time.perf_counter()
                    step()
                    taken[name].append(1e3 * (time.perf_counter() - start))
    finally:
        torch.set_num_threads(before)
    note = f"fuse() itself: {median(taken['fuse']):.0f} ms"
    m.add("first call, milliseconds", 100.0, median(taken["first call"]), at_most=True, note=note)


def memory(m: Measurement) -> dict[str, Any]:
    """Resident memory and activation peak, ours against eager, each in a process of its own."""
    argv = ["--memory", "--threads", "1"]
    parser = Parser(parents=[network_options(), timing_options(), output_options()])
    found = compare_script.memory(parser.parse_args(argv[1:]), argv, [Fused(), Eager()])
    for key, name, wanted in (
        ("resident", "resident memory, ours / eager", 1.3),
        ("activations", "activation peak, ours / eager", 1.0),
    ):
        ours, theirs = found["fused"][key], found["eager"][key]
        note = f"{ours / 2**20:.1f} / {theirs / 2**20:.1f} MiB"
        if key == "resident":
            note += ", torch itself in both"
        m.add(name, wanted, ours / theirs, at_most=True, note=note)
    return found


def line_of(target: Target) -> str:
    """A line for while the measurement runs."""
    value = "-" if target.value is None else f"{target.value:.2f}"
    bound = "<=" if target.at_most else ">="
    return f"{target.name}: {value} (wanted {bound} {target.wanted:g}) {target.verdict}  {target.note}".rstrip()


def table_of(targets: Sequence[Target]) -> str:
    """All targets, one a line."""
    rows = [["", "wanted", "measured", "verdict", "note"]]
    for t in targets:
        wanted = f"{'<=' if t.at_most else '>='} {t.wanted:g}"
        rows.append([t.name, wanted, "-" if t.value is None else f"{t.value:.2f}", t.verdict, t.note])
    return columns(rows)


def targets_command(arguments: argparse.Namespace) -> int:
    """Measure all targets, print the table, write the JSON."""
    cores = torch.get_num_threads()
    threads = [1, 2] if cores > 1 else [1]
    header = machine(threads[-1])
    peak = header["fma_peak_gflops_per_thread"]
    m = Measurement(arguments)
    print(describe(header))
    print("peers: " + ", ".join(f"{name} {version}" for name, version in peer_versions(m.runtimes).items()), flush=True)
    found: dict[str, Any] = {}
    steps: dict[str, Callable[[], object]] = {
        "networks": lambda: networks(m, threads, header["isa"] == "avx2", peak),
        "blocks": lambda: blocks(m, peak),
        "first-call": lambda: first_call(m),
        "memory": lambda: found.update(memory(m)),
        "sweep": lambda: sweep(m),
    }
    for name in arguments.only:
        if name not in steps:
            raise InputError(f"--only: expected some of {', '.join(steps)}, got {name!r}")
    try:
        for name, step in steps.items():
            if not arguments.only or name in arguments.only:
                step()
    finally:
        m.progress.clear()
    print(f"\n{table_of(m.targets)}")
    for line in missing_lines(m.comparisons):
        print(line)
    if arguments.json:
        contestants = [Fused(), Folded(), *m.runtimes]
        content = {
            "machine": header,
            "peers": peer_versions(contestants),
            "quick": m.quick,
            "targets": [{**asdict(t), "verdict": t.verdict} for t in m.targets],
            "comparisons": [record(c, contestants, peak * c.threads) for c in m.comparisons],
            "memory": found,
        }
        write_json(arguments.json, "targets", content)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, whether the targets are held or missed; 1 if an output is wrong."""
    parser = Parser(prog="targets.py", description=(__doc__ or "").split("\n\n")[0], parents=[output_options()])
    parser.add_argument("--quick", action="store_true", help="fewer shapes, shorter timings")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="networks blocks first-call memory sweep")
    parser.add_argument("--seconds", type=seconds, default=1.0, metavar="S", help="to spend on a block (default 1)")
    parser.set_defaults(run=targets_command)
    return run(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
