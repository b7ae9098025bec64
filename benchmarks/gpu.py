"""Every GPU test and benchmark in one call, for a machine that is at hand for minutes only.

    python benchmarks/gpu.py --budget 540 --out gpu.json

In this order, stopping cleanly when the budget is spent: build the extension if it is missing, the GPU tests (of
inference, then of training), the card's measured ceilings; then the network, the blocks, and what torch.compile makes
of the network, the first of --batches and --dtypes first. What fails is recorded with its reason and the rest goes on:
in the same process, or in a new one where the failure took the process or its CUDA context with it. The JSON is
rewritten after every result and lists what was left out.

Contestants, all checked against fp64 before they are timed, each with and without CUDA graphs:

    fused                    mbv2_kernels.fuse (blocks: the op)
    fused gluon              the same by the Gluon kernel, which is the default nowhere until a GPU has checked it
    fused gluon fp16 sums    the same, the nine taps added up in fp16 (blocks in float16 only)
    fused + compile          the same under torch.compile, which then runs stem, head and pooling (network only)
    eager cudnn              BatchNorm folded, channels_last, depthwise convolutions by cuDNN
    eager native             the same with torch's own depthwise kernel
    compile max-autotune     torch.compile(mode="max-autotune-no-cudagraphs") of the folded channels_last model

Times are medians of event pairs around back-to-back calls. Calls rotate among enough copies of the input that x and y
come from DRAM, as they do inside a network at large batch; a graph holds one call for each copy. "Without graphs" is
therefore what a Python loop gets, launches included. Needs torch >= 2.11 and Triton >= 3.6; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import copy
import functools
import importlib.machinery
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from mbv2_kernels._bench.cuda import Cuda

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # a checkout that is not installed

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
BOUNDS = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-6}
SIZE = 224  # side of the network's images
DISTINCT = "distinct"  # --blocks: every layer shape of MobileNetV2 once
LIMIT = 500  # characters of an error that are kept
CALL_LIMIT, COMPILE_LIMIT = 60.0, 150.0  # seconds that one contestant may take
Run = Callable[[Tensor], Tensor]


class Budget:
    """Seconds this process may take; asked before each piece of work."""

    def __init__(self, seconds: float):
        self.start, self.seconds = time.monotonic(), seconds

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)


class Report:
    """The JSON, rewritten after every result so that nothing is lost when the machine goes away."""

    def __init__(self, path: Path):
        self.path, self.data = path, {"begun": [], "skipped": []}

    def reload(self) -> None:
        """Take over what a process before this one has written."""
        if self.path.exists():
            self.data = json.loads(self.path.read_text())

    def set(self, key: str, value: Any) -> None:
        self.data[key] = value
        self.write()

    def add(self, key: str, row: dict[str, Any]) -> None:
        self.data.setdefault(key, []).append(row)
        self.write()

    def skip(self, what: str, why: str, trace: str = "") -> None:
        print(f"skipped: {what}: {why}", flush=True)
        self.data["skipped"].append({"what": what, "why": why, **({"traceback": trace} if trace else {})})
        self.write()

    def attempt(self, what: str, do: Callable[[], object]) -> None:
        """`do`, unless it was begun before. Its failure is a result: recorded, and the rest goes on."""
        if what in self.data["begun"]:
            return
        self.data["begun"].append(what)
        self.write()
        try:
            do()
        except Exception as problem:
            self.skip(what, reason(problem), traceback.format_exc()[-2000:])

    def write(self) -> None:
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1))
        os.replace(part, self.path)


def reason(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {problem}"[:LIMIT]


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError in the body after `seconds`: a compiler that searches for minutes must not take the budget."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(0.1, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- Timing ---------------------------------------------------------------------------------------------------------


def copies(x: Tensor, moved: int, device: Cuda) -> list[Tensor]:
    """x often enough that one round moves four times the L2 cache, at most 16 times."""
    number = min(16, max(2, -(-4 * device.l2_bytes() // moved)))
    return [x.clone() for _ in range(number)]


def measure(run: Run, x: Tensor, moved: int, samples: int, device: Cuda) -> dict[str, Any]:
    """us a call in eager and as graph, and the peak of extra memory a call holds."""
    result: dict[str, Any] = {"peak_mb": device.peak_bytes(lambda: run(x)) / 2**20}
    inputs = copies(x, moved, device)

    def around() -> list[Tensor]:
        return [run(value) for value in inputs]

    result["eager_us"] = 1e3 * device.milliseconds(around, samples) / len(inputs)
    try:
        replay, _results = device.capture(around)
        result["graph_us"] = 1e3 * device.milliseconds(replay, samples) / len(inputs)
    except Exception as problem:  # a contestant that cannot be captured is a result
        result["graph_error"] = reason(problem)
        device.synchronize()
    return result


def ceilings(device: Cuda) -> dict[str, float]:
    """What this card reaches: device copy (bytes read and written) and a large matrix product on random data."""
    rates = {f"matmul_{name}_tflop_s": device.matmul_rate(DTYPES[name]) for name in ("float16", "bfloat16")}
    return {"copy_gb_s": device.copy_rate(), **rates}


# ---- Contestants ----------------------------------------------------------------------------------------------------


class UnfusedBlock(nn.Module):
    """The block as three convolutions with the given folded weights."""

    def __init__(self, block: Any, weights: list[Tensor | None]):
        super().__init__()
        self.block = block
        w1, b1, wd, b2, w2, b3 = weights

        def conv(weight: Tensor, bias: Tensor, **options: Any) -> nn.Conv2d:
            layer = nn.Conv2d(weight.shape[1] * options.get("groups", 1), weight.shape[0], weight.shape[2], **options)
            layer.weight, layer.bias = nn.Parameter(weight.clone(), False), nn.Parameter(bias.to(weight.dtype), False)
            return layer

        padding = block.dilation * (block.kernel - 1) // 2
        self.expand = conv(w1, b1) if w1 is not None else None
        self.depthwise = conv(
            wd, b2, stride=block.stride, padding=padding, dilation=block.dilation, groups=block.hidden_channels
        )
        self.project = conv(w2, b3)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        act = F.relu6 if self.block.activation == "relu6" else F.relu
        hidden = x if self.expand is None else act(self.expand(x))
        y = self.project(act(self.depthwise(hidden)))
        if self.block.final_activation != "none":
            y = act(y)
        return x + y if self.block.residual else y


def contestants(unfused: nn.Module, compile_too: bool) -> dict[str, Callable[[], Run]]:
    """name -> a function that makes the contestant ready."""
    from mbv2_kernels._bench.cuda import depthwise, max_autotune, with_native_depthwise

    def cudnn(x: Tensor) -> Tensor:
        with depthwise("cudnn"):
            return unfused(x)

    found: dict[str, Callable[[], Run]] = {
        "eager cudnn": lambda: cudnn,
        "eager native": lambda: with_native_depthwise(unfused),
    }
    if compile_too:
        found["compile max-autotune"] = lambda: max_autotune(unfused)
    return found


def error(y: Tensor, want: Tensor) -> float:
    return ((y.double() - want).norm() / want.norm()).item()


def compare(
    report: Report, key: str, row: dict[str, Any], ready: dict[str, Callable[[], Run]], x: Tensor,
    want: tuple[Tensor, Tensor], limit: float, moved: int, work: int, need: float, options: Any, budget: Budget,
) -> None:  # fmt: skip
    """Check and time every contestant; `want` is the fp64 result of the first and last few images of x."""
    first, last = want
    device: Cuda = options.device
    for name, make in ready.items():
        compiling = "compile" in name
        if budget.left() < (60.0 if compiling else need):
            report.skip(f"{key} {row} {name}", f"{budget.left():.0f} s left")
            continue
        run = y = None
        try:
            with time_limit(min(budget.left() - 2, COMPILE_LIMIT if compiling else CALL_LIMIT)):
                run = make()
                y = run(x)
                off = max(error(y[: len(first)], first), error(y[-len(last) :], last))
                # ours within the bound; a peer that is far off computes something else, and its time means nothing
                allowed = limit if name.startswith("fused") else 10 * limit
                result: dict[str, Any] = {**row, "contestant": name, "error": off, "allowed": allowed}
                if off <= allowed:
                    result |= measure(run, x, moved, options.samples, device)
                    best = min(result.get("graph_us", 1e12), result["eager_us"])
                    result |= {"gb_s": moved / best / 1e3, "tflop_s": work / best / 1e6}
                    result |= fractions(result, report.data.get("ceilings", {}))
                else:
                    result["failed"] = f"off by {off:.2e}, allowed {allowed:.2e}: not timed"
        except Exception as problem:
            result = {**row, "contestant": name, "failed": reason(problem), "traceback": traceback.format_exc()[-2000:]}
        report.add(key, result)
        print(line(result), flush=True)
        device.synchronize()  # raises if the CUDA context is lost: only a new process helps then
        device.release()


def fractions(result: dict[str, Any], measured: dict[str, float]) -> dict[str, float]:
    """The rates against the card's own: of the copy and of the matrix product in this dtype."""
    of = {"of_copy": ("gb_s", "copy_gb_s"), "of_matmul": ("tflop_s", f"matmul_{result['dtype']}_tflop_s")}
    return {name: result[rate] / measured[top] for name, (rate, top) in of.items() if measured.get(top)}


def line(r: dict[str, Any]) -> str:
    head = f"{r.get('block', 'network'):16} {r['dtype']:8} batch {r['batch']:<4} {r['contestant']:22}"
    if "failed" in r:
        return f"{head} FAILED {r['failed']}"
    graph = f"{r['graph_us']:9.1f}" if "graph_us" in r else "     none"
    rate = f"{r['gb_s']:6.0f} GB/s {r['tflop_s']:6.1f} TFLOP/s  peak {r['peak_mb']:7.0f} MB  error {r['error']:.1e}"
    return f"{head} eager {r['eager_us']:9.1f} us  graph {graph} us  {rate}"


# ---- Work -----------------------------------------------------------------------------------------------------------


def ends(x: Tensor, exact: Callable[[Tensor], Tensor], images: int = 4) -> tuple[Tensor, Tensor]:
    return exact(x[:images].double()), exact(x[-images:].double())


def draw(
    block: Any, batch: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, list[Tensor | None], tuple[Any, ...]]:
    """x, the six weights, the op's other arguments; activations reach both edges of a ReLU6."""
    c, i, o, k = block.hidden_channels, block.in_channels, block.out_channels, block.kernel
    torch.manual_seed(0)

    def rand(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    x = rand(batch, i, block.size, block.size, scale=1.0).contiguous(memory_format=torch.channels_last)
    weights = [
        rand(c, i, 1, 1, scale=2 * i**-0.5) if block.expand else None,
        rand(c, scale=1.0) if block.expand else None,
        rand(c, 1, k, k, scale=2 / k),
        rand(c, scale=1.0),
        rand(o, c, 1, 1, scale=c**-0.5),
        rand(o, scale=1.0),
    ]
    padding = block.dilation * (k - 1) // 2
    return x, weights, (block.stride, padding, block.dilation, block.activation, block.final_activation, block.residual)


def gluon_kernels(x: Tensor, weights: tuple[Any, ...], config: tuple[Any, ...]) -> dict[str, Run]:
    """The op by the Gluon kernel, for prepared weights; empty where that kernel cannot take x."""
    from mbv2_kernels.triton import gluon_configs, ops

    if not x.is_cuda or x.dtype == torch.float32 or ops.triton_version() < gluon_configs.OLDEST_TRITON:
        return {}
    if ops._device(x.device.index).capability not in gluon_configs.SHARED:
        return {}
    run = functools.partial(ops.inverted_residual, kernel="gluon")
    found: dict[str, Run] = {"fused gluon": lambda v: run(v, *weights, *config)}
    if x.dtype == torch.float16:
        found["fused gluon fp16 sums"] = lambda v: run(v, *weights, *config, gluon={"half": True})
    return found


def compile_kernel(name: str, batch: int, dtype: str, device: str) -> None:
    """In a process of its own: fills Triton's cache on disk, from which the timed process loads."""
    from mbv2_kernels.triton import offline, ops

    x, weights, config = draw(offline.BLOCKS[name], batch, DTYPES[dtype], device)
    prepared = ops.prepare_weights(x.dtype, *weights)
    ops.inverted_residual(x, *prepared, *config)
    for run in gluon_kernels(x, prepared, config).values():
        run(x)


def compile_kernels(report: Report, jobs: int, keys: list[tuple[str, int, str, str]], seconds: float) -> None:
    """All kernels side by side: one after the other they would take minutes of the budget."""
    begin = time.monotonic()
    pool = concurrent.futures.ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    futures = [pool.submit(compile_kernel, *key) for key in keys]
    done, late = concurrent.futures.wait(futures, timeout=seconds)
    pool.shutdown(wait=False, cancel_futures=True)
    if late:  # a compiler that hangs must not be waited for at the end either
        for process in multiprocessing.active_children():
            process.kill()
    failures = [reason(problem) for future in done if (problem := future.exception())]
    report.set(
        "compiled",
        {
            "seconds": time.monotonic() - begin,
            "kernels": len(done) - len(failures),
            "late": len(late),
            "failures": failures[:5],
        },
    )


def bench_block(report: Report, block: Any, batch: int, dtype: torch.dtype, options: Any, budget: Budget) -> None:
    from mbv2_kernels.triton import ops

    c, i, o, k = block.hidden_channels, block.in_channels, block.out_channels, block.kernel
    x, weights, config = draw(block, batch, dtype, options.device.name)
    prepared = ops.prepare_weights(dtype, *weights)
    unfused = UnfusedBlock(block, weights)
    exact = UnfusedBlock(block, [None if w is None else w.double() for w in weights])
    ready: dict[str, Callable[[], Run]] = {"fused": lambda: lambda v: ops.inverted_residual(v, *prepared, *config)}
    for name, run in gluon_kernels(x, prepared, config).items():
        ready[name] = lambda run=run: run  # type: ignore[misc]
    ready |= contestants(unfused, options.compile_blocks)
    out = block.out_size
    moved = x.element_size() * (batch * (block.size**2 * i + out**2 * o) + c * (i * block.expand + o + k * k))
    work = 2 * batch * c * (block.size**2 * i * block.expand + out**2 * (k * k + o))
    row = {"block": block.name, "dtype": str(dtype)[6:], "batch": batch}
    compare(report, "blocks", row, ready, x, ends(x, exact), BOUNDS[dtype], moved, work, 4.0, options, budget)


def bench_network(
    report: Report, batch: int, dtype: torch.dtype, options: Any, budget: Budget, compiling: bool
) -> None:
    import mbv2_kernels as mbv2
    from mbv2_kernels._bench.cuda import max_autotune
    from mbv2_kernels._bench.peers import fold_batch_norm
    from mbv2_kernels.models import count

    torch.manual_seed(0)
    model = mbv2.models.mobilenet_v2()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
            nn.init.normal_(module.running_mean, 0.0, 0.2)
            nn.init.uniform_(module.running_var, 0.7, 1.3)
    device = options.device.name
    model = model.eval().to(device)
    x = torch.randn(batch, 3, SIZE, SIZE, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    exact = copy.deepcopy(model).double()
    unfused = fold_batch_norm(model, x[:1].float()).to(dtype).to(memory_format=torch.channels_last)
    want = ends(x, exact)
    limit = 2 * max(error(unfused(x[:4]), want[0]), error(unfused(x[-4:]), want[1]))

    def fused() -> nn.Module:
        return mbv2.fuse(copy.deepcopy(model).to(dtype).to(memory_format=torch.channels_last))

    def fused_gluon() -> Run:
        from mbv2_kernels.triton.ops import KERNEL_VARIABLE

        model = fused()

        def run(v: Tensor) -> Tensor:
            os.environ[KERNEL_VARIABLE] = "gluon"
            try:
                return model(v)
            finally:
                del os.environ[KERNEL_VARIABLE]

        return run

    ready: dict[str, Callable[[], Run]] = {"fused": fused, **contestants(unfused, True)}
    if x.is_cuda and dtype != torch.float32:
        ready["fused gluon"] = fused_gluon
    ready["fused + compile"] = lambda: max_autotune(fused())
    ready = {name: make for name, make in ready.items() if ("compile" in name) == compiling}
    parameters = sum(p.numel() for p in unfused.parameters())
    moved = x.element_size() * (x.numel() + 1000 * batch + parameters)
    row = {"dtype": str(dtype)[6:], "batch": batch}
    work = 2 * count(model, tuple(x.shape)).multiply_adds
    compare(report, "network", row, ready, x, want, limit, moved, work, 8.0, options, budget)


TESTS = {"tests": "test_gpu.py", "training tests": "test_gpu_training.py"}  # by what the report calls them


def run_tests(report: Report, key: str, seconds: float) -> None:
    """The GPU tests in a process of their own: a fault there must not take the benchmark with it."""
    test = str(ROOT / "tests" / TESTS[key])
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=20", "-m", "gpu", "-p", "no:cacheprovider", test]
    if importlib.util.find_spec("xdist"):  # hundreds of kernels to compile: one process would take all of the budget
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        try:
            code = subprocess.run(command, stdout=output, stderr=output, timeout=seconds, cwd=ROOT).returncode
        except subprocess.TimeoutExpired:
            code = 124
        output.seek(0)
        text = output.read()
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", text)}
    report.set(key, {"exit": code, "seconds": time.monotonic() - begin, **counts, "output": text[-20000:]})
    print(f"GPU {key}: exit {code} {counts}\n" + "\n".join(re.findall(r"^(?:FAILED|ERROR).*", text, re.M)), flush=True)
    if key == "tests" and code == 0 and counts.get("passed"):
        machine = collections.defaultdict(lambda: "?", report.data.get("machine", {}))
        words = f"{machine['gpu']}, torch {machine['torch']}, Triton {machine['triton']}, {machine['date']}"
        row = f'    {machine["capability"].replace(".", "")}: "{words}",'
        print(f"to make Triton the default there, add to CHECKED in mbv2_kernels/triton/configs.py:\n{row}", flush=True)
        print(
            "and the Gluon kernel: the same to gluon_configs.py, if none of the tests named gluon was skipped",
            flush=True,
        )


def header(device: Cuda) -> dict[str, Any]:
    from mbv2_kernels._bench.cuda import HAS_DEPTHWISE_SWITCH

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
        except Exception as problem:
            return reason(problem)

    def version(name: str) -> str:
        try:
            return importlib.import_module(name).__version__
        except Exception as problem:
            return reason(problem)

    return {
        **device.describe(),
        "driver, clock": output("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": version("triton"),
        "mbv2_kernels": version("mbv2_kernels"),
        "commit": output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
        "depthwise switch": HAS_DEPTHWISE_SWITCH,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def build() -> None:
    """The package does not import without its C++ extension; a fresh machine has none."""
    if not any((ROOT / "mbv2_kernels" / f"_C{suffix}").exists() for suffix in importlib.machinery.EXTENSION_SUFFIXES):
        print("building the extension", flush=True)
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def table(data: dict[str, Any]) -> str:
    """Fused against the best unfused contestant, one line a shape; the last thing printed."""
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for r in data.get("network", []) + data.get("blocks", []):
        groups.setdefault((r.get("block", "network"), r["dtype"], r["batch"]), {})[r["contestant"]] = r

    def best(rows: dict[str, dict[str, Any]], ours: bool, kind: str) -> tuple[float, str]:
        mine = (r for r in rows.values() if r["contestant"].startswith("fused") == ours and kind in r)
        return min(((r[kind], r["contestant"]) for r in mine), default=(0.0, "-"))

    lines = []
    for (what, dtype, batch), rows in groups.items():
        cells = []
        for kind in ("eager_us", "graph_us"):
            (a, _), (b, name) = best(rows, True, kind), best(rows, False, kind)
            cells.append(f"{a:9.1f} / {b:9.1f} us {b / a if a else 0:5.2f}x ({name})")
        lines.append(f"{what:16} {dtype:8} {batch:4}  eager {cells[0]}  graph {cells[1]}")
    return "\n".join(lines)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything (540)")
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1, 32])
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16"], choices=list(DTYPES))
    parser.add_argument(
        "--blocks", nargs="*", default=[DISTINCT], help="names of mbv2_kernels.triton.offline.BLOCKS; none: no blocks"
    )
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile kernels beforehand; 0: none")
    parser.add_argument("--compile-blocks", action="store_true", help="single blocks too, about 20 s each")
    parser.add_argument("--no-compile", dest="compile_network", action="store_false", help="no torch.compile at all")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--no-network", action="store_true")
    parser.add_argument("--part", action="store_true", help=argparse.SUPPRESS)  # the process that does the work
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """The process at the top: it builds, and starts a new process for the rest until one comes to the end."""
    argv = sys.argv[1:] if argv is None else argv
    options = arguments(argv)
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA device; torch sees none")
    budget, report = Budget(options.budget), Report(options.out)
    report.attempt("build", build)
    supervise(report, budget, [sys.executable, __file__, *argv])
    report.set("seconds", options.budget - budget.left())
    report.set("table", table(report.data).splitlines())
    print(f"\nfused / best unfused, in {report.data['seconds']:.0f} s\n{table(report.data)}")


def supervise(report: Report, budget: Budget, command: list[str]) -> None:
    """Run `command --part`, which goes on where the JSON ends, until it is done or the budget is spent."""
    report.write()
    for _ in range(10):
        if budget.left() < 10:
            break
        try:
            part = [*command, "--part", "--budget", str(budget.left() - 5)]
            code = subprocess.run(part, timeout=budget.left()).returncode
        except subprocess.TimeoutExpired:
            code = 124
        begun = len(report.data["begun"])
        report.reload()
        if code == 0:
            return
        report.skip(report.data["begun"][-1], f"the process ended there with code {code}")
        if len(report.data["begun"]) == begun:  # it came to nothing new: the next would not either
            return


def run_part(options: argparse.Namespace, device: Cuda | None = None) -> None:
    """All of the work that is not begun yet; `device` is for the test of this script, which has a stand-in."""
    from mbv2_kernels import set_backend
    from mbv2_kernels._bench.cuda import Cuda
    from mbv2_kernels.triton import offline

    budget, report = Budget(options.budget), Report(options.out)
    report.reload()
    options.device = device or Cuda()
    set_backend("triton")  # also on a GPU that is not in configs.CHECKED: every result is checked before it is timed
    torch.backends.cudnn.benchmark = True
    report.attempt("machine", lambda: report.set("machine", header(options.device)))
    print(json.dumps(report.data.get("machine")), flush=True)
    if not options.no_tests:
        for key in TESTS:
            seconds = min(200.0, 0.4 * budget.left())
            report.attempt(key, functools.partial(run_tests, report, key, seconds))
    report.attempt("ceilings", lambda: report.set("ceilings", ceilings(options.device)))
    print({k: round(v, 1) for k, v in report.data.get("ceilings", {}).items()}, flush=True)
    names = options.blocks
    if names == [DISTINCT]:
        names = list({b._replace(name=""): b.name for b in reversed(offline.MOBILENET_V2)}.values())[::-1]
    if options.jobs:
        keys = [(block, *key) for key in itertools.product(options.batches, options.dtypes) for block in names]
        keys = [(*key, options.device.name) for key in keys]
        seconds = 0.2 * budget.left()
        report.attempt("kernels", lambda: compile_kernels(report, options.jobs, keys, seconds))
    work: list[tuple[str, Callable[[], None]]] = []
    for batch, name in itertools.product(options.batches, options.dtypes):
        common = batch, DTYPES[name], options, budget
        stages = [(f"{block} {batch} {name}", bench_block, offline.BLOCKS[block]) for block in names]
        if not options.no_network:
            work.append((f"network {batch} {name}", functools.partial(bench_network, report, *common, False)))
        work += [(what, functools.partial(do, report, block, *common)) for what, do, block in stages]
        if options.compile_network and not options.no_network:
            do = functools.partial(bench_network, report, *common, True)
            work.append((f"compiled network {batch} {name}", do))
    with torch.no_grad():
        for what, do in work:
            if budget.left() < 10:
                report.skip(what, "budget spent")
                continue
            report.attempt(what, do)
            options.device.synchronize()  # a lost CUDA context ends this process here; the next one goes on


if __name__ == "__main__":
    if "--part" in sys.argv:
        run_part(arguments(None))
    else:
        main()
