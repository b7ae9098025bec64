"""Every GPU test and benchmark in one call, for a machine that is at hand for minutes only.

    python benchmarks/gpu.py --budget 540 --out gpu.json

In this order, stopping cleanly when the budget is spent (the JSON has what was done and lists what was not): build the
extension if it is missing, the GPU tests, the machine's measured ceilings; then for each batch the network, the blocks.

Contestants, all checked against fp64 before they are timed, each with and without CUDA graphs:

    fused                    mbv2_kernels.fuse (blocks: the op)
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
import contextlib
import copy
import functools
import importlib.machinery
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
BOUNDS = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-6}
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
        self.path, self.data = path, {"skipped": []}

    def set(self, key: str, value: Any) -> None:
        self.data[key] = value
        self.write()

    def add(self, key: str, row: dict[str, Any]) -> None:
        self.data.setdefault(key, []).append(row)
        self.write()

    def skip(self, what: str, why: str) -> None:
        print(f"skipped: {what}: {why}", flush=True)
        self.data["skipped"].append({"what": what, "why": why})
        self.write()

    def write(self) -> None:
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1))
        os.replace(part, self.path)


# ---- Timing ---------------------------------------------------------------------------------------------------------


def milliseconds(call: Callable[[], object], samples: int = 9, least: float = 4.0) -> float:
    """Median milliseconds of `call`, over `samples` event pairs that each last `least` milliseconds or more."""

    def timed(calls: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / calls

    for _ in range(3):
        call()
    calls = max(1, round(least / max(1e-4, timed(2))))
    return statistics.median(timed(calls) for _ in range(samples))


def captured(run: Run, inputs: list[Tensor]) -> Callable[[], None]:
    """A CUDA graph of one call for each input."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for x in inputs[:2]:
            run(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run(x) for x in inputs]
    replay = graph.replay
    return lambda kept=kept: replay()  # type: ignore[misc]


def copies(x: Tensor, moved: int) -> list[Tensor]:
    """x often enough that one round moves four times the L2 cache, at most 16 times."""
    cache = torch.cuda.get_device_properties(x.device).L2_cache_size
    number = min(16, max(2, -(-4 * cache // moved)))
    return [x.clone() for _ in range(number)]


def measure(run: Run, x: Tensor, moved: int, samples: int) -> dict[str, float]:
    """us a call in eager and as graph, and the peak of extra memory a call holds."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(x)
    torch.cuda.synchronize()
    result = {"peak_mb": (torch.cuda.max_memory_allocated() - before) / 2**20}
    inputs = copies(x, moved)

    def around() -> None:
        for value in inputs:
            run(value)

    result["eager_us"] = 1e3 * milliseconds(around, samples) / len(inputs)
    try:
        result["graph_us"] = 1e3 * milliseconds(captured(run, inputs), samples) / len(inputs)
    except Exception as error:  # a contestant that cannot be captured is a result
        result["graph_error"] = f"{type(error).__name__}: {error}"[:300]  # type: ignore[assignment]
        torch.cuda.synchronize()
    return result


def ceilings() -> dict[str, float]:
    """What this card reaches: device copy (bytes read and written) and a large matrix product on random data."""

    def copy_rate() -> float:
        a = torch.randn(1 << 29, device="cuda", dtype=torch.float16)
        b = torch.empty_like(a)
        return 2 * a.nbytes / milliseconds(lambda: b.copy_(a)) / 1e6

    def matmul_rate(dtype: torch.dtype) -> float:
        m = torch.randn(8192, 8192, device="cuda", dtype=dtype)
        return 2 * 8192**3 / milliseconds(lambda: m @ m) / 1e9

    rates = {f"matmul_{name}_tflop_s": matmul_rate(DTYPES[name]) for name in ("float16", "bfloat16")}
    return {"copy_gb_s": copy_rate(), **rates}


# ---- Contestants ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def depthwise(kernel: str) -> Iterator[None]:
    """torch's switch between cuDNN's and its own depthwise kernel; "auto" where this torch has no such switch."""
    if hasattr(torch._C, "_set_cudnn_depthwise_kernel"):
        before = torch._C._get_cudnn_depthwise_kernel()
        torch._C._set_cudnn_depthwise_kernel(kernel)
        try:
            yield
        finally:
            torch._C._set_cudnn_depthwise_kernel(before)
    else:
        yield


class NativeDepthwise(nn.Module):
    """A depthwise convolution with cuDNN off: how torch's own kernel is reached where the switch is missing."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            return self.conv(x)


def with_native_depthwise(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d) and child.groups > 1 and not isinstance(parent, NativeDepthwise):
                setattr(parent, name, NativeDepthwise(child))
    return model


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

    def eager(kernel: str, model: nn.Module) -> Run:
        def run(x: Tensor) -> Tensor:
            with depthwise(kernel):
                return model(x)

        return run

    def compiled() -> Run:
        torch._dynamo.reset()
        return torch.compile(unfused, mode="max-autotune-no-cudagraphs", dynamic=False)

    native = unfused if hasattr(torch._C, "_set_cudnn_depthwise_kernel") else with_native_depthwise(unfused)
    found: dict[str, Callable[[], Run]] = {
        "eager cudnn": lambda: eager("cudnn", unfused),
        "eager native": lambda: eager("native", native),
    }
    if compile_too:
        found["compile max-autotune"] = compiled
    return found


def error(y: Tensor, want: Tensor) -> float:
    return ((y.double() - want).norm() / want.norm()).item()


def compare(
    report: Report, key: str, row: dict[str, Any], ready: dict[str, Callable[[], Run]], x: Tensor,
    want: tuple[Tensor, Tensor], limit: float, moved: int, work: int, budget: Budget, need: float, samples: int,
) -> None:  # fmt: skip
    """Check and time every contestant; `want` is the fp64 result of the first and last few images of x."""
    first, last = want
    for name, make in ready.items():
        seconds = 60.0 if "compile" in name else need
        if budget.left() < seconds:
            report.skip(f"{key} {row} {name}", f"{budget.left():.0f} s left")
            continue
        try:
            run = make()
            y = run(x)
            off = max(error(y[: len(first)], first), error(y[-len(last) :], last))
            # ours within the bound; a peer that is far off computes something else, and its time means nothing
            allowed = limit if name.startswith("fused") else 10 * limit
            result: dict[str, Any] = {**row, "contestant": name, "error": off, "allowed": allowed}
            if off <= allowed:
                result |= measure(run, x, moved, samples)
                best = min(result.get("graph_us", 1e12), result["eager_us"])
                result |= {"gb_s": moved / best / 1e3, "tflop_s": work / best / 1e6}
            else:
                result["failed"] = f"off by {off:.2e}, allowed {allowed:.2e}: not timed"
        except Exception as problem:
            result = {**row, "contestant": name, "failed": f"{type(problem).__name__}: {problem}"[:500]}
            with contextlib.suppress(Exception):
                torch.cuda.synchronize()
        report.add(key, result)
        print(line(result), flush=True)
        torch.cuda.empty_cache()


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


def bench_block(report: Report, block: Any, batch: int, dtype: torch.dtype, options: Any, budget: Budget) -> None:
    from mbv2_kernels.triton import ops

    c, i, o, k = block.hidden_channels, block.in_channels, block.out_channels, block.kernel
    torch.manual_seed(0)

    def rand(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, device="cuda") * scale).to(dtype)

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
    config = (block.stride, padding, block.dilation, block.activation, block.final_activation, block.residual)
    prepared = ops.prepare_weights(dtype, *weights)
    unfused = UnfusedBlock(block, weights)
    exact = UnfusedBlock(block, [None if w is None else w.double() for w in weights])
    ready: dict[str, Callable[[], Run]] = {"fused": lambda: lambda v: ops.inverted_residual(v, *prepared, *config)}
    ready |= contestants(unfused, options.compile_blocks)
    out = block.out_size
    moved = x.element_size() * (batch * (block.size**2 * i + out**2 * o) + c * (i * block.expand + o + k * k))
    work = 2 * batch * c * (block.size**2 * i * block.expand + out**2 * (k * k + o))
    row = {"block": block.name, "dtype": str(dtype)[6:], "batch": batch}
    compare(report, "blocks", row, ready, x, ends(x, exact), BOUNDS[dtype], moved, work, budget, 4.0, options.samples)


def bench_network(report: Report, batch: int, dtype: torch.dtype, options: Any, budget: Budget) -> None:
    import mbv2_kernels as mbv2
    from mbv2_kernels._bench.peers import fold_batch_norm

    torch.manual_seed(0)
    model = mbv2.models.mobilenet_v2()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
            nn.init.normal_(module.running_mean, 0.0, 0.2)
            nn.init.uniform_(module.running_var, 0.7, 1.3)
    model = model.eval().cuda()
    x = torch.randn(batch, 3, 224, 224, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)
    exact = copy.deepcopy(model).double()
    unfused = fold_batch_norm(model, x[:1].float()).to(dtype).to(memory_format=torch.channels_last)
    want = ends(x, exact)
    limit = 2 * max(error(unfused(x[:4]), want[0]), error(unfused(x[-4:]), want[1]))

    def fused() -> nn.Module:
        return mbv2.fuse(copy.deepcopy(model).to(dtype).to(memory_format=torch.channels_last))

    def fused_compiled() -> Run:
        torch._dynamo.reset()
        return torch.compile(fused(), mode="max-autotune-no-cudagraphs", dynamic=False)

    ready: dict[str, Callable[[], Run]] = {"fused": fused, **contestants(unfused, False)}
    ready["fused + compile"] = fused_compiled
    ready["compile max-autotune"] = contestants(unfused, True)["compile max-autotune"]
    parameters = sum(p.numel() for p in unfused.parameters())
    moved = x.element_size() * (x.numel() + 1000 * batch + parameters)
    row = {"dtype": str(dtype)[6:], "batch": batch}
    work = 2 * batch * 300_800_000  # multiply-adds of the network at 224 x 224 (Table 4 of the paper)
    compare(report, "network", row, ready, x, want, limit, moved, work, budget, 8.0, options.samples)


def run_tests(report: Report, seconds: float) -> None:
    """The GPU tests in a process of their own: a fault there must not take the benchmark with it."""
    test = str(ROOT / "tests" / "test_gpu.py")
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=20", "-m", "gpu", "-p", "no:cacheprovider", test]
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        try:
            code = subprocess.run(command, stdout=output, stderr=output, timeout=seconds, cwd=ROOT).returncode
        except subprocess.TimeoutExpired:
            code = 124
        output.seek(0)
        text = output.read()
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", text)}
    report.set("tests", {"exit": code, "seconds": time.monotonic() - begin, **counts, "output": text[-20000:]})
    print(f"GPU tests: exit {code} {counts}\n" + "\n".join(re.findall(r"^(?:FAILED|ERROR).*", text, re.M)), flush=True)


def header() -> dict[str, Any]:
    import triton

    p = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
    return {
        "gpu": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_gib": round(p.total_memory / 2**30),
        "l2_mib": p.L2_cache_size / 2**20,
        "driver, clock": subprocess.run(query, capture_output=True, text=True).stdout.strip(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "depthwise switch": hasattr(torch._C, "_set_cudnn_depthwise_kernel"),
        "triton": triton.__version__,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything (540)")
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1, 32])
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16"], choices=list(DTYPES))
    parser.add_argument("--blocks", nargs="*", help="of mbv2_kernels.triton.offline.BLOCKS; distinct ones without")
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--compile-blocks", action="store_true", help="single blocks too, about 20 s each")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--no-network", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA device; torch sees none")
    budget, report = Budget(options.budget), Report(options.out)
    build()
    report.set("machine", header())
    print(json.dumps(report.data["machine"]), flush=True)
    torch.backends.cudnn.benchmark = True
    from mbv2_kernels.triton import offline

    with torch.no_grad():
        if not options.no_tests:
            run_tests(report, min(200.0, 0.4 * budget.left()))
        report.set("ceilings", ceilings())
        print({k: round(v) for k, v in report.data["ceilings"].items()}, flush=True)
        torch.cuda.empty_cache()
        names = options.blocks
        if names is None:
            names = list({b._replace(name=""): b.name for b in reversed(offline.MOBILENET_V2)}.values())[::-1]
        work: list[tuple[str, Callable[[], None]]] = []
        for batch, dtype in itertools.product(options.batches, (DTYPES[name] for name in options.dtypes)):
            common = batch, dtype, options, budget
            if not options.no_network:
                work.append((f"network {batch} {dtype}", functools.partial(bench_network, report, *common)))
            for block in names:
                do_block = functools.partial(bench_block, report, offline.BLOCKS[block], *common)
                work.append((f"{block} {batch} {dtype}", do_block))
        for what, do in work:
            if budget.left() < 10:
                report.skip(what, "budget spent")
                continue
            try:
                do()
            except Exception as problem:
                report.skip(what, f"{type(problem).__name__}: {problem}"[:500])
    report.set("table", table(report.data).splitlines())
    print(f"\nfused / best unfused, in {options.budget - budget.left():.0f} s\n{table(report.data)}")


if __name__ == "__main__":
    main()
