"""`pytest --benchmark` as typed, beside pytest-benchmark's own options; each in a pytest of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import mbv2_kernels as mbv2

ROOT = Path(__file__).resolve().parents[1]
# One block on one peer: the smallest selection that times something.
TINY = ["-k", "bench_block and features.5-fused", "--benchmark-max-time=0.02", "--benchmark-min-rounds=2"]

needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("pytest_benchmark") is None, reason="pytest-benchmark is not installed"
)


def run_pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest in the repository's root, with the mbv2_kernels that this process has."""
    found = str(Path(mbv2.__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([found, os.environ.get("PYTHONPATH", "")])}
    environment.pop("PYTEST_ADDOPTS", None)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@needs_plugin
def test_it_selects_the_benchmarks_and_only_them() -> None:
    child = run_pytest("--benchmark", "--collect-only", "-q")
    assert child.returncode == 0, child.stdout + child.stderr
    collected = [line for line in child.stdout.splitlines() if "::" in line]
    assert collected and all(line.startswith("benchmarks/bench_") for line in collected)
    for block in range(1, 18):
        for peer in ("fused", "folded channels_last", "eager", "ONNX Runtime", "OpenVINO"):
            assert f"benchmarks/bench_blocks.py::bench_block[features.{block}-{peer}]" in collected
    for peer in ("fused", "fused + torch.compile", "torch.compile", "ONNX Runtime", "OpenVINO"):
        assert f"benchmarks/bench_network.py::bench_network[1-{peer}]" in collected


@needs_plugin
def test_without_it_no_benchmark_is_collected() -> None:
    child = run_pytest("--collect-only", "-q", "tests/test_benchmark_option.py", "benchmarks")
    collected = [line for line in child.stdout.splitlines() if "::" in line]
    assert collected and all(line.startswith("tests/") for line in collected), child.stdout


@needs_plugin
def test_it_times_and_the_plugins_own_options_keep_working(tmp_path: Path) -> None:
    file, storage = tmp_path / "out.json", f"--benchmark-storage=file://{tmp_path / 'storage'}"
    child = run_pytest(
        *("--benchmark", *TINY, "--benchmark-only", f"--benchmark-json={file}"),
        *(storage, "--benchmark-save=first", "--benchmark-columns=median"),
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert "1 passed" in child.stdout and "FMA peak" in child.stdout
    content = json.loads(file.read_text())
    (entry,) = content["benchmarks"]
    assert entry["group"] == "features.5 1x32x28x28"
    assert entry["stats"]["median"] > 0
    extra = entry["extra_info"]
    assert extra["flop"] == 2 * 28 * 28 * (32 * 192 + 9 * 192 + 192 * 32)
    assert extra["gflops"] == pytest.approx(1e-9 * extra["flop"] / entry["stats"]["median"])
    assert 0 < extra["fraction_of_fma_peak"] < 2 and extra["bytes"] > 4 * 2 * (32 * 192 + 32 * 28 * 28)
    assert 0 < extra["relative_error"] < 2e-6
    assert extra["fma_peak_gflops"] == pytest.approx(extra["gflops"] / extra["fraction_of_fma_peak"])
    assert content["machine_info"]["mbv2_kernels"]["isa"] == mbv2._C.active_tier()

    again = run_pytest("--benchmark", *TINY, storage, "--benchmark-compare", "--benchmark-sort=name")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Comparing against benchmarks from" in again.stdout + again.stderr
    assert "0001_first" in again.stdout
    assert "machine_info is different" not in again.stdout + again.stderr


def test_without_the_plugin_it_says_what_to_install() -> None:
    child = run_pytest("--benchmark", "-p", "no:benchmark")
    assert child.returncode == 4
    assert "--benchmark needs pytest-benchmark, which is not installed: pip install '.[bench]'" in child.stderr
    assert "Traceback" not in child.stderr


def test_sources_without_an_extension_do_not_hide_the_installed_package(tmp_path: Path) -> None:
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    for folder, name in ((checkout, "sources"), (site, "installed")):
        (folder / "mbv2_kernels").mkdir(parents=True)
        (folder / "mbv2_kernels" / "__init__.py").write_text(f"name = {name!r}\n")
    (checkout / "mbv2_kernels" / "_C.pyi").touch()
    (checkout / "tests").mkdir()
    test = "import mbv2_kernels\n\ndef test_name():\n    assert mbv2_kernels.name == {!r}\n"
    shutil.copy(ROOT / "conftest.py", checkout)

    def outcome(expected: str) -> int:
        (checkout / "tests" / "test_name.py").write_text(test.format(expected))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, check=False).returncode

    assert outcome("installed") == 0
    (checkout / "mbv2_kernels" / f"_C{EXTENSION_SUFFIXES[0]}").touch()  # built in place: the sources are what is meant
    assert outcome("sources") == 0
