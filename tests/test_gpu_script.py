"""benchmarks/gpu.py driven from end to end where there is no GPU: the script gets a few minutes on a card, and a slip
in Python must not be what they are spent on.

The device is a stand-in on the CPU, the fused kernel runs in Triton's interpreter (in a process of its own), shapes are
tiny, and torch.compile is replaced: what is left is all the script's own code.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mbv2_kernels as mbv2
from mbv2_kernels._bench import cuda, peers
from mbv2_kernels.models import mobilenet_v2  # the tests replace it in mbv2.models

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from test_triton_interpreter import skip_without_interpreter

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.py"


class StandIn(cuda.Cuda):
    """A CPU in the place of the GPU: a graph replays by calling, and some of the calls fail as they may on a card."""

    name = "cpu"
    copy_elements = 1 << 12
    matmul_size = 16

    def __init__(self) -> None:
        self.lost = False

    def synchronize(self) -> None:
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def elapsed(self, call: Callable[[], object], calls: int) -> float:
        begin = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - begin)

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        return lambda: None, run()

    def peak_bytes(self, run: Callable[[], object]) -> int:
        run()
        return 1 << 20

    def l2_bytes(self) -> int:
        return 1

    def release(self) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {"gpu": "stand-in", "capability": "0.0"}


class TinyNetwork(nn.Module):
    """Stem, one inverted residual block, head: what the script makes contestants of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.block = mobilenet_v2(0.35).features[3]
        self.squeeze = nn.Conv2d(8, self.block.conv[0][0].in_channels, 1)
        self.head = nn.Linear(self.block.conv[-1].num_features, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.squeeze(self.stem(x))).mean((2, 3)))


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(script: ModuleType, out: Path, *more: str) -> argparse.Namespace:
    return script.arguments(["--out", str(out), "--samples", "2", "--batches", "2", "--no-tests", "--jobs", "0", *more])


def drive(out: str) -> None:
    """In a process with TRITON_INTERPRET=1: a part of the script with everything that may come its way."""
    from mbv2_kernels.triton import offline

    script = load()
    script.SIZE = 8
    cuda.max_autotune = lambda model: model  # type: ignore[assignment]
    mbv2.models.mobilenet_v2 = TinyNetwork  # type: ignore[assignment]
    torch.set_num_threads(1)
    for name, expand in (("tiny", True), ("plain", False)):
        offline.BLOCKS[name] = offline.Block(name, 6, 8, 16 if expand else 8, 8, expand=expand)
    script.compile_kernel("tiny", 2, "float16", "cpu")
    # bfloat16, which the interpreter refuses, stands for a contestant that fails
    script.run_part(
        options(script, Path(out), "--dtypes", "float16", "bfloat16", "--blocks", "tiny", "plain"), StandIn()
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    skip_without_interpreter()
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    code = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent)]}; sys.path.append({str(SCRIPT.parent.parent)!r}); "
    )
    code += f"import test_gpu_script; test_gpu_script.drive({str(out)!r})"
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    return json.loads(out.read_text()), child.stdout


def test_every_contestant_is_checked_and_timed(result: tuple[dict[str, Any], str]) -> None:
    data, printed = result
    assert data["skipped"] == [] and data["begun"][:2] == ["machine", "ceilings"]
    assert data["machine"]["gpu"] == "stand-in" and data["machine"]["torch"] == torch.__version__
    assert all(data["ceilings"][name] > 0 for name in ("copy_gb_s", "matmul_float16_tflop_s"))
    networks = [r for r in data["network"] if r["dtype"] == "float16"]
    assert {r["contestant"] for r in networks} == {
        "fused", "eager cudnn", "eager native", "compile max-autotune", "fused + compile",
    }  # fmt: skip
    blocks = [r for r in data["blocks"] if r["dtype"] == "float16"]
    assert {(r["block"], r["contestant"]) for r in blocks} == {
        (block, contestant) for block in ("tiny", "plain") for contestant in ("fused", "eager cudnn", "eager native")
    }
    for r in networks + blocks:
        assert "failed" not in r, r
        assert r["batch"] == 2 and 0 < r["error"] <= r["allowed"]
        assert all(r[name] > 0 for name in ("eager_us", "graph_us", "peak_mb", "gb_s", "tflop_s", "of_copy"))
        assert f"{r['eager_us']:9.1f}" in printed


def test_a_contestant_that_fails_is_recorded_and_the_rest_goes_on(result: tuple[dict[str, Any], str]) -> None:
    data, printed = result
    rows = [r for r in data["network"] + data["blocks"] if r["dtype"] == "bfloat16"]
    assert {r["contestant"] for r in rows if "failed" in r} == {"fused", "fused + compile"}
    assert all("bfloat16" in r["failed"] and "ValueError" in r["traceback"] for r in rows if "failed" in r)
    assert any("eager_us" in r for r in rows) and "FAILED" in printed


def test_table_compares_with_the_best_unfused(result: tuple[dict[str, Any], str]) -> None:
    data, _ = result
    lines = load().table(data).splitlines()
    assert [tuple(line.split()[:2]) for line in lines if "float16" in line.split()] == [
        ("network", "float16"), ("tiny", "float16"), ("plain", "float16"),
    ]  # fmt: skip
    made_up = {"block": "b", "dtype": "float16", "batch": 1, "error": 0.0}
    rows = [
        {**made_up, "contestant": "fused", "eager_us": 10.0, "graph_us": 5.0},
        {**made_up, "contestant": "eager cudnn", "eager_us": 30.0, "graph_us": 20.0},
        {**made_up, "contestant": "eager native", "eager_us": 40.0, "graph_us": 15.0},
    ]
    (line,) = load().table({"blocks": rows}).splitlines()
    assert "3.00x (eager cudnn)" in line and "3.00x (eager native)" in line


def test_a_lost_context_ends_the_process_and_the_next_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was begun is not tried again, what was not is; and the supervisor says where a process ended."""
    script, out, done = load(), tmp_path / "gpu.json", []
    device = StandIn()

    def bench(report: Any, block: Any, batch: int, dtype: torch.dtype, options: Any, budget: Any) -> None:
        done.append(block.name)
        if block.name == "b2":
            device.lost = True
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(script, "bench_block", bench)
    chosen = options(script, out, "--no-network", "--blocks", "b1", "b2", "b3", "--dtypes", "float16")

    def part(command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
        assert command[:2] == ["again", "--part"] and 0 < float(command[-1]) < timeout
        device.lost = False
        try:
            script.run_part(chosen, device)
        except RuntimeError:
            return subprocess.CompletedProcess(command, 1)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(script.subprocess, "run", part)
    monkeypatch.setattr(script, "header", lambda device: {})
    report = script.Report(out)
    try:
        script.supervise(report, script.Budget(60), ["again"])
    finally:
        mbv2.set_backend("auto")
    assert done == ["b1", "b2", "b3"]
    assert [s["why"] for s in report.data["skipped"]] == [
        "RuntimeError: CUDA error: an illegal memory access was encountered",
        "the process ended there with code 1",
    ]
    assert all(s["what"] == "b2 2 float16" for s in report.data["skipped"])


def test_a_process_that_comes_to_nothing_is_not_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, starts = load(), []
    monkeypatch.setattr(
        script.subprocess, "run", lambda command, **_: starts.append(command) or subprocess.CompletedProcess(command, 1)
    )
    report = script.Report(tmp_path / "gpu.json")
    report.attempt("build", lambda: None)
    script.supervise(report, script.Budget(60), ["again"])
    assert len(starts) == 1
    assert report.data["skipped"] == [{"what": "build", "why": "the process ended there with code 1"}]


def test_the_gpu_tests_themselves_run() -> None:
    """Those of tests/test_gpu.py that a CPU can stand in for; a slip common to all of them has happened."""
    skip_without_interpreter()
    chosen = "functional_form or never_worse or gradients or (nan_and and b8) or (network_shapes and b15-1)"
    chosen += " or (every_branch and (plain or columns) and not wide and not bfloat16 and not float32)"
    chosen = f"({chosen}) and not gluon"  # which has no interpreter
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_stand_in", "-p", "no:cacheprovider", "-k", chosen]
    folder = Path(__file__).parent
    child = subprocess.run(
        [*command, str(folder / "test_gpu.py")], cwd=folder, capture_output=True, text=True, timeout=400,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(folder)},
    )  # fmt: skip
    passed = re.search(r"(\d+) passed", child.stdout)
    assert child.returncode == 0 and passed and int(passed[1]) >= 15, child.stdout[-3000:]


@pytest.mark.parametrize(("output", "code"), [("12 passed, 1 skipped in 3.21s", 0), ("FAILED a::b - c\n1 failed", 1)])
def test_only_green_gpu_tests_give_a_line_for_the_table(
    output: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load()

    def run(command: list[str], stdout: Any, **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[-1].endswith("test_gpu.py")
        stdout.write(output)
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(script.subprocess, "run", run)
    report = script.Report(tmp_path / "gpu.json")
    report.set("machine", {"gpu": "a card", "capability": "9.0", "torch": "2", "triton": "3", "date": "today"})
    script.run_tests(report, "tests", 10)
    printed = capsys.readouterr().out
    assert report.data["tests"]["exit"] == code and report.data["tests"]["output"] == output
    assert ('90: "a card, torch 2, Triton 3, today",' in printed) == (code == 0)
    assert ("FAILED a::b" in printed) == (code == 1)


def test_a_spent_budget_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, out = load(), tmp_path / "gpu.json"
    monkeypatch.setattr(script, "header", lambda device: {})
    try:
        script.run_part(options(script, out, "--blocks", "b1", "--budget", "5"), StandIn())
    finally:
        mbv2.set_backend("auto")
    data = json.loads(out.read_text())
    assert {s["why"] for s in data["skipped"]} == {"budget spent"} and "blocks" not in data


def test_a_call_that_hangs_is_ended() -> None:
    with pytest.raises(TimeoutError, match="not done after 0 s"), load().time_limit(0.1):
        time.sleep(5)
    time.sleep(0.15)  # the alarm is off again


def test_a_contestant_as_a_graph() -> None:
    """`bench --graph`: the graph's static result is what is checked and timed; what cannot be captured is named."""
    model, x = nn.Conv2d(3, 3, 1).eval(), torch.randn(1, 3, 4, 4)
    run = cuda.Graphed(peers.Eager(), StandIn()).prepare(model, x, 1)
    assert torch.equal(run(), model(x))

    class Broken(StandIn):
        def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    with pytest.raises(peers.PeerUnavailable, match=r"^no CUDA graph: RuntimeError: operation not .* capturing$"):
        cuda.Graphed(peers.Eager(), Broken()).prepare(model, x, 1)
    with pytest.raises(RuntimeError, match="operation not permitted"):  # ours must not just be missing
        cuda.Graphed(peers.Fused(), Broken()).prepare(mobilenet_v2(0.35).eval(), torch.randn(1, 3, 32, 32), 1)


def test_native_depthwise_computes_the_same() -> None:
    model = mobilenet_v2(0.35, num_classes=10).eval()
    native = cuda.with_native_depthwise(model)
    count = sum(isinstance(m, cuda.NativeDepthwise) for m in native.modules())
    assert count == sum(isinstance(m, nn.Conv2d) and m.groups > 1 for m in model.modules()) == 17
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(native(x), model(x))
