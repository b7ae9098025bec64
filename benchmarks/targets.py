"""The CPU targets of this package, each as a ratio measured now on this machine, in one table.

    python benchmarks/targets.py --json out.json                    # all of them: about six minutes on two cores
    python benchmarks/targets.py --quick                            # the same table from fewer shapes, shorter timings
    python benchmarks/targets.py --only networks memory             # parts of it
    python benchmarks/targets.py --only sweep --json out.json --resume      # go on where an earlier run was stopped

The parts: networks, blocks, storage (16 bits against float32), call (what one costs beside its kernels), first-call,
memory, sweep (widths, sizes, batches).
--resume takes over what FILE holds already, which every part (and every shape of the sweep) adds as soon as it is
measured: each ratio is of one run, so that a table may be of several.

Ours against ONNX Runtime and OpenVINO on the same weights, every output checked against float64 first, all timed in
turns in one process. A peer that is not installed is named; what needs it then counts as not measured. Where one says
"missed", the line says by how much. `MBV2_MAX_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2` holds ours and the oneDNN users (torch,
OpenVINO) to AVX2, which has targets of its own; ONNX Runtime picks its instructions itself.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import compare as compare_script
from mbv2_kernels import _C, fuse, models, summary
from mbv2_kernels._bench.inputs import InputError, load_model, random_pictures, randomise_batch_norm
from mbv2_kernels._bench.machine import describe, machine
from mbv2_kernels._bench.peers import Eager, Folded, Fused, Peer, Run
from mbv2_kernels._bench.suite import blocks as suite_blocks
from mbv2_kernels._bench.suite import columns, missing_lines, peer_versions, record, write_json
from mbv2_kernels._bench.timing import Comparison, check, compare, interleave
from mbv2_kernels._bench.verify import error_limit, relative_error, summands
from mbv2_kernels.cli import DTYPES, Parser, Progress, network_options, output_options, run, seconds, timing_options
from mbv2_kernels.recognise import LAYER_KINDS
from peers import OnnxRuntime, OpenVino

# (width, size, batch): the corners that take no minutes, and every size and batch with several widths. The full product
# would take an hour, most of it for large images in large batches, where all widths do alike.
SWEEP = (
    *((width, size, 1) for width in (0.35, 1.0, 1.4) for size in (96, 160, 224, 320)),
    *((width, size, 8) for width, size in ((0.35, 96), (0.35, 224), (0.5, 160), (1.0, 96), (1.0, 224), (1.4, 160))),
    *((width, size, 64) for width, size in ((0.35, 96), (0.35, 160), (1.0, 96))),
)
QUICK_SWEEP = ((0.35, 96, 1), (0.35, 224, 8), (1.4, 96, 1), (1.4, 224, 1))
FIRST_CALLS = 5
PARTS = ("networks", "blocks", "storage", "call", "first-call", "memory", "sweep")


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
    """Runs the comparisons and collects what is found, in the form in which it is written to JSON."""

    def __init__(self, arguments: argparse.Namespace, header: dict[str, Any]) -> None:
        self.quick = arguments.quick
        self.seconds = arguments.seconds * (0.25 if self.quick else 1.0)
        self.runtimes: list[Peer] = [OnnxRuntime(), OpenVino()]
        self.targets: list[Target] = []
        self.sweep: dict[str, tuple[float | None, str]] = {}
        self.peaks: dict[str, float] = {}  # GFLOP/s of one thread, beside each comparison: a shared machine's changes
        self.progress = Progress()
        self.file = arguments.json
        self.content: dict[str, Any] = {
            "machine": header,
            "peers": peer_versions([Fused(), Folded(), *self.runtimes]),
            "quick": self.quick,
            "parts": [],
            "comparisons": [],
            "unavailable": [],
            "storage": {},
            "memory": {},
        }

    def resume(self) -> None:
        """Takes over what the file holds; `InputError` if it was measured in another way."""
        try:
            with open(self.file, encoding="utf-8") as file:
                found = json.load(file)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise InputError(f"--resume: cannot read {self.file}: {error}") from error
        for key in ("cpu", "isa", "torch"):
            if found.get("schema") != "mbv2_kernels.targets" or found["machine"][key] != self.content["machine"][key]:
                raise InputError(f"--resume: {self.file} is no record of targets.py with this {key}")
        if found["quick"] != self.quick:
            raise InputError(f"--resume: {self.file} was measured {'with' if found['quick'] else 'without'} --quick")
        self.content.update({key: found[key] for key in self.content if key not in ("machine", "peers", "quick")})
        self.targets = [Target(**{k: v for k, v in t.items() if k != "verdict"}) for t in found["targets"]]
        self.sweep = {label: (ratio, note) for label, ratio, note in found["sweep"]}

    def save(self) -> None:
        """Writes all that is known so far."""
        if self.file:
            targets = [{**asdict(t), "verdict": t.verdict} for t in self.targets]
            sweep = [[label, *found] for label, found in self.sweep.items()]
            write_json(self.file, "targets", {**self.content, "targets": targets, "sweep": sweep})

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
        done = self.content["comparisons"]
        self.progress(label, len(done), len(done) + 1)
        contestants = [Fused(), *peers]
        before = fma_peak()
        result = compare(label, model, x, contestants, threads=threads, seconds=seconds, network=network)
        self.peaks[label] = (before + fma_peak()) / 2
        done.append(record(result, contestants, self.peaks[label] * threads))
        known = self.content["unavailable"]
        known += [line for line in missing_lines([result]) if line not in known]
        return result

    def of_peak(self, result: Comparison) -> float:
        """What part of the FMA peak of that moment ours reached, on one thread."""
        return result.gflops("fused") / self.peaks[result.label]

    def against_runtimes(
        self, label: str, model: nn.Module, x: Tensor, threads: int, seconds: float | None = None
    ) -> tuple[float | None, str, Comparison]:
        """How many times as fast as the faster runtime; which that is."""
        result = self.compare(label, model, x, self.runtimes, threads, seconds or 4 * self.seconds)
        best = result.fastest([peer.name for peer in self.runtimes])
        return (None if best is None else result.ratio(best)), f"against {best or 'no runtime'}", result


def fma_peak() -> float:
    """GFLOP/s of one thread that does nothing but multiply-adds, now."""
    return _C.fma_peak(_C.active_tier(), 0.05)


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


def networks(m: Measurement, threads: Sequence[int], avx2: bool) -> None:
    """The whole network against the runtimes and against the arithmetic peak."""
    for count in threads:
        model, x = network_of("builtin:mobilenet_v2")
        ratio, note, result = m.against_runtimes(f"batch 1, {count} thread(s)", model, x, count)
        m.add(f"batch 1, {count} thread(s): times as fast", 1.2 if avx2 else 1.5, ratio, note=note)
        if count == 1:
            m.add("batch 1, 1 thread: part of the FMA peak", 0.8, m.of_peak(result))
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


def single_blocks() -> list[tuple[str, nn.Module, Tensor]]:
    """(path, network of that one block, its input) of the 17 blocks."""
    model, x = network_of("builtin:mobilenet_v2")
    layers = [row.path for row in summary(model) if row.kind in LAYER_KINDS]
    return [block for block in suite_blocks(model, x) if block[0] not in layers]


def blocks(m: Measurement) -> None:
    """Every block, one thread, batch 1, against the BN-folded channels_last path of torch."""
    results = [m.compare(path, block, x, [Folded()], 1, m.seconds, network=False) for path, block, x in single_blocks()]
    name = Folded.name
    slowest = min(results, key=lambda c: c.ratio(name))
    idlest = min(results, key=m.of_peak)
    m.add(f"worst of {len(results)} blocks: times as fast as {name}", 2.0, slowest.ratio(name), note=slowest.label)
    m.add("worst block: part of the FMA peak", 0.7, m.of_peak(idlest), note=idlest.label)


@torch.no_grad()
def storage(m: Measurement) -> None:
    """The network and its blocks in 16-bit storage against float32, fused all of them, one thread, batch 1."""
    ratios: dict[str, dict[str, float]] = {}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        todo = [("network", *network_of("builtin:mobilenet_v2")), *single_blocks()]
        for done, (path, part, x) in enumerate(todo):
            m.progress(path, done, len(todo))
            runs: dict[str, Run] = {}
            for name, dtype in DTYPES.items():
                own, x_own = copy.deepcopy(part).to(dtype), x.to(dtype)
                reference = copy.deepcopy(own).double()(x_own.double())
                unfused = relative_error(own(x_own), reference)
                limit = error_limit(dtype, unfused, summands(own), network=path == "network")
                runs[name] = Fused().prepare(own, x_own, 1)
                check(path, Fused(), runs[name](), reference, limit)
            timings = interleave(runs, seconds=m.seconds)
            ratios[path] = {name: timings["float32"].median / timings[name].median for name in timings}
    finally:
        torch.set_num_threads(before)
    m.content["storage"] = dict(ratios)
    network = ratios.pop("network")
    for name in list(DTYPES)[1:]:
        path = min(ratios, key=lambda p: ratios[p][name])
        note = f"{path}; median of {len(ratios)} blocks {median(r[name] for r in ratios.values()):.2f}"
        m.add(f"network in {name}: speed / float32", 1.0, network[name])
        m.add(f"worst block in {name}: speed / float32", 1.0, ratios[path][name], note=note)


def sweep(m: Measurement) -> None:
    """The worst ratio over widths, resolutions and batches, one thread."""
    for width, size, batch in QUICK_SWEEP if m.quick else SWEEP:
        label = f"width {width}, {size}x{size}, batch {batch}"
        if label in m.sweep:
            continue
        model, x = network_of("builtin:mobilenet_v2", size, batch, width)
        ratio, note, _ = m.against_runtimes(label, model, x, 1, m.seconds)
        m.sweep[label] = ratio, note
        m.progress.clear()
        print(f"  {label}: {'-' if ratio is None else f'{ratio:.2f}'} {note}", flush=True)
        m.save()
    measured = {label: ratio for label, (ratio, _) in m.sweep.items() if ratio is not None}
    name = f"worst of {len(m.sweep)} widths, sizes, batches: times as fast"
    if not measured:
        m.add(name, 1.0, None, note="no runtime")
        return
    worst = min(measured, key=measured.__getitem__)
    ahead = sum(ratio >= 1 for ratio in measured.values())
    note = f"{worst}, {m.sweep[worst][1]}; not slower in {ahead}, median {median(measured.values()):.2f}"
    m.add(name, 1.0, measured[worst], note=note)


@torch.no_grad()
def call(m: Measurement) -> None:
    """Microseconds that a call of all layers costs beside its kernels: checks, Python, one thread, 32x32 pixels."""
    model, x = network_of("builtin:mobilenet_v2", 32)
    features: Any = fuse(model).features
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        features(x)  # packs
        steps = [child.forward.step(x.dtype) for child in features]
        packed, numbers = [weights for weights, _ in steps], [n for _, own in steps for n in own]
        chain = torch.ops.mbv2.pack_chain(packed, numbers)
        runs = {"call": lambda: features(x), "op": lambda: torch.ops.mbv2.chain_packed(x, chain)}
        timings = interleave(runs, seconds=2 * m.seconds)
    finally:
        torch.set_num_threads(before)
    whole, op = (1e6 * timings[name].median for name in ("call", "op"))
    m.add("call beside its kernels, microseconds", 60.0, whole - op, at_most=True, note=f"{whole:.0f} - {op:.0f}")


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


def memory(m: Measurement) -> None:
    """Resident memory and activation peak, ours against eager, each in a process of its own."""
    argv = ["--memory", "--threads", "1"]
    parser = Parser(parents=[network_options(), timing_options(), output_options()])
    found = compare_script.memory(parser.parse_args(argv[1:]), argv, [Fused(), Eager()])
    bound = max(x.nbytes + y.nbytes for x, y in inputs_and_outputs())
    m.content["memory"] = {**found, "largest_input_and_output": bound}
    for key, name, wanted, also in (
        ("resident", "resident memory, ours / eager", 1.3, "torch itself in both"),
        # Section 5.1 of the paper: with a block as one operation, the largest input and output are all that is needed.
        ("activations", "activation peak, ours / eager", 1.0, f"input + output of a block: {bound / 2**20:.1f}"),
    ):
        ours, theirs = found["fused"][key], found["eager"][key]
        note = f"{ours / 2**20:.1f} / {theirs / 2**20:.1f} MiB, {also}"
        m.add(name, wanted, ours / theirs, at_most=True, note=note)


def inputs_and_outputs() -> list[tuple[Tensor, Tensor]]:
    """What goes into each block and layer of the network, and what comes out."""
    with torch.no_grad():
        return [(x, block(x)) for _, block, x in suite_blocks(*network_of("builtin:mobilenet_v2"))]


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
    for name in arguments.only:
        if name not in PARTS:
            raise InputError(f"--only: expected some of {', '.join(PARTS)}, got {name!r}")
    if arguments.resume and not arguments.json:
        raise InputError("--resume: goes on with a file, which --json names")
    threads = [1, 2] if torch.get_num_threads() > 1 else [1]
    header = machine(threads[-1])
    m = Measurement(arguments, header)
    if arguments.resume:
        m.resume()
    print(describe(header))
    print("peers: " + ", ".join(f"{name} {version}" for name, version in m.content["peers"].items()), flush=True)
    steps: tuple[Callable[[], None], ...] = (
        lambda: networks(m, threads, header["isa"] == "avx2"),
        lambda: blocks(m),
        lambda: storage(m),
        lambda: call(m),
        lambda: first_call(m),
        lambda: memory(m),
        lambda: sweep(m),
    )
    try:
        for name, step in zip(PARTS, steps, strict=True):
            if (not arguments.only or name in arguments.only) and name not in m.content["parts"]:
                step()
                m.content["parts"].append(name)
                m.save()
    finally:
        m.progress.clear()
    print(f"\n{table_of(m.targets)}")
    for line in m.content["unavailable"]:
        print(line)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, whether the targets are held or missed; 1 if an output is wrong."""
    parser = Parser(prog="targets.py", description=(__doc__ or "").split("\n\n")[0], parents=[output_options()])
    parser.add_argument("--quick", action="store_true", help="fewer shapes, shorter timings")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help=" ".join(PARTS))
    parser.add_argument("--resume", action="store_true", help="keep what the JSON file holds, measure what it lacks")
    parser.add_argument("--seconds", type=seconds, default=1.0, metavar="S", help="to spend on a block (default 1)")
    parser.set_defaults(run=targets_command)
    return run(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
