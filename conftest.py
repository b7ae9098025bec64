"""`pytest --benchmark`: the benchmarks instead of the tests.

pytest knows no such option and refuses unknown ones; pytest-benchmark has only `--benchmark-...`. It is registered
here, at the root, because pytest reads only the conftest files above its arguments before it parses the command line.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent
# After a plain `pip install .` the package in use lies in site-packages, and the sources here, which have no compiled
# extension, must not hide it. pytest puts this folder in front of sys.path; Python does so with the current folder.
INSTALLED = not any((ROOT / "mbv2_kernels" / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES)
if INSTALLED:
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]


def pytest_sessionstart(session: pytest.Session) -> None:
    if INSTALLED and not session.config.getoption("run_benchmarks"):
        os.chdir(ROOT / "tests")  # where the processes start that tests start


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mbv2_kernels")
    group.addoption(
        "--benchmark",
        action="store_true",
        dest="run_benchmarks",
        help="run benchmarks/ (timed by pytest-benchmark, whose own --benchmark-... options apply) instead of tests/",
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("run_benchmarks"):
        return
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("--benchmark needs pytest-benchmark, which is not installed: pip install '.[bench]'")
    try:
        import mbv2_kernels  # noqa: F401
    except ImportError as error:
        raise pytest.UsageError(f"--benchmark: {error}") from error
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = [str(config.rootpath / "benchmarks")]
    if "s" not in config.option.reportchars.lower():
        config.option.reportchars += "s"  # a peer that is skipped is named with its reason


def pytest_report_header(config: pytest.Config) -> list[str]:
    if not config.getoption("run_benchmarks"):
        return []
    from mbv2_kernels._bench.machine import describe, machine

    return describe(machine(threads=1)).splitlines()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """The machine goes into the JSON of every timed run; what is measured anew each time does not, or no two runs of
    one machine would compare without a warning (the peak is in each benchmark's extra_info)."""
    import torch

    from mbv2_kernels._bench.machine import machine

    found = machine(torch.get_num_threads())
    del found["fma_peak_gflops_per_thread"]
    machine_info["mbv2_kernels"] = found
