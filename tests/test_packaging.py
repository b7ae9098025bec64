"""What is shipped, and how it is built: against which torch, with which flags, and what is said when it cannot be."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mbv2_kernels import __version__

ROOT = Path(__file__).resolve().parent.parent
BUILD = (
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "conftest.py",
)

needs_build_tools = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("setuptools", "pybind11", "ninja")),
    reason="setuptools, pybind11 and ninja are needed to build: pip install '.[test]'",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout without build products: building writes into the source folder."""
    copy = tmp_path_factory.mktemp("source")
    for name in BUILD:
        shutil.copy2(ROOT / name, copy)
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for folder in ("csrc", "mbv2_kernels", "tests", "benchmarks"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    return copy


def setup(source: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("CXX", "CXXFLAGS", "CPPFLAGS", "LDFLAGS")}
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(
        command, cwd=source, env={**clean, **environment}, capture_output=True, text=True, check=False
    )


# ---- What is shipped -------------------------------------------------------------------------------------------------


def test_version_is_in_one_place() -> None:
    quoted = re.compile(rf"""["'=]{re.escape(__version__)}["']""")
    sources = [
        ROOT / "setup.py",
        ROOT / "pyproject.toml",
        *ROOT.glob("csrc/**/*.*"),
        *ROOT.glob("mbv2_kernels/**/*.py"),
    ]
    files = [path for path in sources if path.suffix != ".pyc"]  # of the build's own Python, where it was imported
    assert [path.name for path in files if quoted.search(path.read_text())] == ["_version.py"]


def test_changelog_begins_with_the_version() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == __version__


def test_installed_metadata() -> None:
    try:
        installed = metadata.metadata("mbv2-kernels")
    except metadata.PackageNotFoundError:
        pytest.skip("mbv2-kernels runs from a checkout here, it is not installed")
    assert installed["Version"] == __version__
    assert installed["License-Expression"] == "Apache-2.0"
    assert "torch>=2.11" in (installed.get_all("Requires-Dist") or [])
    scripts = metadata.distribution("mbv2-kernels").entry_points.select(group="console_scripts")
    assert [(script.name, script.value) for script in scripts] == [("mbv2-kernels", "mbv2_kernels.cli:main")]


@needs_build_tools
def test_wheel_holds_the_package_and_its_data(source: Path, tmp_path: Path) -> None:
    result = setup(source, "build_py", "--build-lib", tmp_path)
    assert result.returncode == 0, result.stderr
    built = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    package = source / "mbv2_kernels"
    wanted = {
        str(path.relative_to(source))
        for path in package.rglob("*")
        if path.suffix in (".py", ".pyi", ".json", ".typed")
    }
    assert "mbv2_kernels/py.typed" in built
    assert built == wanted


@needs_build_tools
def test_sdist_holds_what_a_build_and_a_test_run_need(source: Path, tmp_path: Path) -> None:
    result = setup(source, "sdist", "--dist-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.iterdir()
    assert archive.name == f"mbv2_kernels-{__version__}.tar.gz"
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    wanted = set(BUILD)
    for folder in ("csrc", "mbv2_kernels", "tests", "benchmarks"):
        files = (path.relative_to(source) for path in (source / folder).rglob("*") if path.is_file())
        wanted |= {str(path) for path in files if "__pycache__" not in path.parts}
    assert wanted <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


# ---- Which torch is built against ------------------------------------------------------------------------------------


@pytest.fixture
def backend() -> ModuleType:
    pytest.importorskip("setuptools", reason="the build backend is setuptools'")
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "csrc/build_backend.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_torch(folder: Path, version: str, header: bool = True) -> str:
    root = folder / f"site-{version}"
    (root / "torch/include/torch/csrc/stable").mkdir(parents=True)
    (root / "torch/__init__.py").touch()
    (root / "torch/version.py").write_text(f"from typing import Optional\n__version__ = '{version}'\n")
    if header:
        (root / "torch/include/torch/csrc/stable/library.h").touch()
    return str(root)


def only(backend: ModuleType, monkeypatch: pytest.MonkeyPatch, *folders: str) -> None:
    """As in an isolated build: no torch can be imported, and `folders` are what lies behind."""
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(backend.site, "getsitepackages", lambda prefixes: list(folders))
    monkeypatch.setattr(backend.site, "getusersitepackages", lambda: "/nowhere")


def test_installed_torch_is_found(backend: ModuleType) -> None:
    found = backend.find_torch()
    assert found == (Path(torch.__file__).parent, torch.__version__)
    assert backend.get_requires_for_build_wheel() == []


def test_hidden_torch_is_found(backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    only(backend, monkeypatch, str(tmp_path / "empty"), fake_torch(tmp_path, "2.11.0+cpu"))
    assert backend.find_torch() == (tmp_path / "site-2.11.0+cpu/torch", "2.11.0+cpu")
    assert backend.get_requires_for_build_wheel() == []
    assert backend.get_requires_for_build_editable() == []


def test_unsuitable_torch_is_passed_over(backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unsuitable = fake_torch(tmp_path, "2.10.1"), fake_torch(tmp_path, "2.12.0", header=False)
    only(backend, monkeypatch, *unsuitable)
    assert backend.find_torch() is None
    assert backend.get_requires_for_build_wheel() == ["torch>=2.11"]
    only(backend, monkeypatch, *unsuitable, fake_torch(tmp_path, "3.0.0a0+git1234"))
    assert backend.find_torch().version == "3.0.0a0+git1234"


# ---- How it is built -------------------------------------------------------------------------------------------------

# Writes down what it is asked to do, and does none of it; like an old compiler it may not know a flag.
FAKE_COMPILER = """#!{python}
import json, pathlib, sys
arguments = sys.argv[1:]
if {unknown!r} in arguments:
    sys.exit("unrecognized command-line option")
pathlib.Path(arguments[arguments.index("-o") + 1]).touch()
if "-MF" in arguments:
    pathlib.Path(arguments[arguments.index("-MF") + 1]).touch()
with open({log!r}, "a") as log:
    log.write(json.dumps(arguments) + "\\n")
"""


def commands(source: Path, folder: Path, unknown: str) -> tuple[Mapping[str, list[str]], str]:
    """The compiler's arguments by file name ("link" for the linker's), and what the build printed."""
    compiler, log = folder / "c++", folder / "log"
    compiler.write_text(FAKE_COMPILER.format(python=sys.executable, unknown=unknown, log=str(log)))
    compiler.chmod(0o755)
    result = setup(
        source, "build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "temp", CXX=str(compiler)
    )
    assert result.returncode == 0, result.stdout + result.stderr
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    compiled = {Path(call[call.index("-c") + 1]).name: call for call in calls if "-MF" in call}
    (link,) = (call for call in calls if "-c" not in call)
    return {**compiled, "link": link}, result.stdout


@needs_build_tools
def test_each_file_gets_its_own_flags(source: Path, tmp_path: Path) -> None:
    calls, printed = commands(source, tmp_path, unknown="")
    sources = {path.name for path in (ROOT / "csrc").rglob("*.cpp")}
    assert set(calls) == sources | {"link"}
    assert f"torch {torch.__version__}" in printed
    for name in sources:
        machine_flags = {flag for flag in calls[name] if flag.startswith("-m")}
        if name == "x86_avx2.cpp":
            assert {"-mavx2", "-mfma", "-mf16c"} < machine_flags
            assert not any("avx512" in flag for flag in machine_flags)
        elif name.startswith("x86_avx512"):
            assert {"-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"} < machine_flags
            assert ("-mavx512fp16" in machine_flags) == ("fp16" in name)
            for flag in ("-mamx-tile", "-mamx-bf16"):
                assert (flag in machine_flags) == (name in ("x86_avx512amx.cpp", "x86_avx512bf16x3.cpp"))
            assert ("-mavx512bf16" in machine_flags) == ("amx" in name)
        else:
            assert not machine_flags, name
        assert {"-std=c++17", "-fvisibility=hidden", "-DMBV2_HAVE_AVX2", "-DMBV2_HAVE_AVX512"} < set(calls[name])
    # The layers: torch's headers for the ops alone, pybind11's for the module alone, none for the core.
    assert "-DTORCH_TARGET_VERSION=0x020b000000000000" in calls["ops.cpp"]
    assert any("torch" in word for word in calls["ops.cpp"][calls["ops.cpp"].index("-isystem") :])
    assert {name for name in sources if "-isystem" in calls[name]} == {"ops.cpp", "train_ops.cpp", "module.cpp"}
    assert str(Path(torch.__file__).parent / "include") not in calls["module.cpp"]


@needs_build_tools
@pytest.mark.parametrize(
    ("unknown", "lost"),
    [
        ("-mavx512f", ["avx512bf16x3", "avx512", "avx512amx", "avx512fp16"]),
        ("-mavx512fp16", ["avx512fp16"]),
        ("-mamx-bf16", ["avx512bf16x3", "avx512amx"]),
        ("-mavx512bf16", ["avx512amx"]),
    ],
)
def test_compiler_without_a_feature_loses_its_tiers_only(
    source: Path, tmp_path: Path, unknown: str, lost: list[str]
) -> None:
    calls, printed = commands(source, tmp_path, unknown=unknown)
    for tier in ("avx512bf16x3", "avx512", "avx2", "avx512amx", "avx512fp16"):
        said = re.search(rf"built without tier {tier}, the compiler lacks .*{unknown}\b", printed)
        assert bool(said) == (tier in lost)
        assert (f"x86_{tier}.cpp" in calls) == (tier not in lost)
        assert any(word.endswith(f"x86_{tier}.o") for word in calls["link"]) == (tier not in lost)
        for name, call in calls.items():
            assert (f"-DMBV2_HAVE_{tier.upper()}" in call) == (name != "link" and tier not in lost)


@needs_build_tools
def test_missing_compiler_is_said_clearly(source: Path, tmp_path: Path) -> None:
    result = setup(source, "build_ext", "--build-temp", tmp_path, "--build-lib", tmp_path, CXX="no-such-compiler")
    assert result.returncode != 0
    assert "needs a C++17 compiler" in result.stderr
    assert "no-such-compiler" in result.stderr
    assert "Traceback" not in result.stderr


@needs_build_tools
def test_old_compiler_is_said_clearly(source: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "old-c++"
    compiler.write_text('#!/bin/sh\necho "error: unrecognized option -std=c++17" >&2\nexit 1\n')
    compiler.chmod(0o755)
    result = setup(source, "build_ext", "--build-temp", tmp_path, "--build-lib", tmp_path, CXX=str(compiler))
    assert result.returncode != 0
    assert "needs a C++17 compiler" in result.stderr
    assert "error: unrecognized option -std=c++17" in result.stderr
