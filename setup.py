"""Builds the extension mbv2_kernels._C: one shared object out of csrc/, each file with its own flags, by ninja."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
from build_backend import MINIMUM_TORCH, find_torch  # noqa: E402

FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-fvisibility=hidden"]
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*MINIMUM_TORCH)
# The linker of macOS wants to be told that Python's and torch's symbols are there when the object is loaded.
LINK_FLAGS = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]

PROBE_CXX17 = "#include <optional>\nint main() { if constexpr (true) return std::optional<int>(0).value(); }"
# The assembler has to know the tier's instructions too, so make the compiler emit a few.
PROBE_TIER = """
#ifdef __AVX512FP16__
typedef _Float16 V __attribute__((vector_size(64)));
#else
typedef float V __attribute__((vector_size(64)));
#endif
void f(V* a, V* b) { *a = *a * *b + *b; }
#ifdef __AVX512BF16__
#include <immintrin.h>
void g(__m512bh* y, __m512 a, __m512 b) { *y = _mm512_cvtne2ps_pbh(a, b); }
#endif
#ifdef __AMX_BF16__
void h(const char (*config)[64], void* rows, long stride) {
  asm volatile("ldtilecfg %0\\n\\ttilezero %%tmm0" : : "m"(*config));
  asm volatile("tileloadd (%0,%1,1), %%tmm1\\n\\ttileloadd (%0,%1,1), %%tmm2" : : "r"(rows), "r"(stride) : "memory");
  asm volatile("tdpbf16ps %%tmm2, %%tmm1, %%tmm0" : :);
  asm volatile("tilestored %%tmm0, (%0,%1,1)\\n\\ttilerelease" : : "r"(rows), "r"(stride) : "memory");
}
#endif
"""


def tier_features() -> dict[str, list[str]]:
    """Tier name -> the compiler features it is built with, from core/kernels.inc."""
    lines = re.findall(
        r'^MBV2_(?:BF16_|FP16_)?TIER\((\w+), "(.*)"\)$', (ROOT / "csrc/core/kernels.inc").read_text(), re.MULTILINE
    )
    return {tier: features.split() for tier, features in lines}


def compiles(compiler: list[str], flags: list[str], source: str) -> str | None:
    """Compiles `source` to an object. None if that works, else what the compiler says."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "probe.cpp")
        file.write_text(source + "\n")
        command = [*compiler, *flags, "-c", str(file), "-o", str(file.with_suffix(".o"))]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            return str(error)
        return result.stderr.strip() or "it failed without a word" if result.returncode else None


def find_compiler() -> list[str]:
    """The C++ compiler's command: CXX if that is set, else the one Python was built with, else the usual names."""
    if "CXX" in os.environ:
        candidates = [os.environ["CXX"]]
    else:
        candidates = [sysconfig.get_config_var("CXX") or "c++", "c++", "g++", "clang++"]
    failures = []
    for command in map(shlex.split, dict.fromkeys(candidates)):
        failure = compiles(command, ["-std=c++17"], PROBE_CXX17)
        if failure is None:
            return command
        failures.append(f"  {shlex.join(command)}: {failure}")
    raise CompileError(
        "mbv2_kernels needs a C++17 compiler (GCC 8 or Clang 7, or later) and found none. Install one, for example "
        "`apt install g++` or `dnf install gcc-c++`, or name it in the environment variable CXX. Tried:\n"
        + "\n".join(failures)
    )


def find_ninja() -> str:
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise PlatformError("mbv2_kernels is built by ninja and found none: pip install ninja") from None
        return found
    return str(Path(ninja.BIN_DIR, "ninja"))


def include_flags(*folders: str | Path) -> list[str]:
    return [word for folder in folders for word in ("-isystem", str(folder))]


class NinjaBuild(build_ext):
    """Builds with flags of each file's own, which setuptools cannot, and only what has changed."""

    def build_extension(self, ext: Extension) -> None:
        if os.name == "nt":
            raise PlatformError("mbv2_kernels is not built on Windows: its kernels are written for GCC and Clang")
        compiler = find_compiler()
        torch = find_torch()
        if torch is None:
            raise PlatformError(
                "mbv2_kernels is built against torch {}.{} or later and found none: install torch first, "
                "or build without --no-build-isolation".format(*MINIMUM_TORCH)
            )
        python_include = sysconfig.get_path("include")
        if not Path(python_include, "Python.h").exists():
            raise PlatformError(f"Python's headers are missing in {python_include}: install python3-dev or the like")
        try:
            import pybind11
        except ImportError:
            raise PlatformError("mbv2_kernels needs pybind11 to be built: pip install pybind11") from None

        tiers, macros = {}, []
        for tier, features in tier_features().items():
            flags = [f"-m{feature}" for feature in features]
            failure = compiles(compiler, [*flags, "-O3"], PROBE_TIER)
            if failure is None:
                tiers[tier] = flags
                macros.append(f"-DMBV2_HAVE_{tier.upper()}")
            else:
                print(f"mbv2_kernels: built without tier {tier}, the compiler lacks {' '.join(flags)}: {failure}")
        print(f"mbv2_kernels: {shlex.join(compiler)}, torch {torch.version} in {torch.root}, tiers {', '.join(tiers)}")

        # Each layer sees the headers it may use and no others: the core none but its own.
        torch_flags = [TORCH_TARGET, *include_flags(torch.include)]
        layer_flags = {
            "ops.cpp": torch_flags,
            "train_ops.cpp": torch_flags,
            "module.cpp": include_flags(pybind11.get_include(), python_include),
        }
        user_flags = shlex.split(os.environ.get("CPPFLAGS", "")) + shlex.split(os.environ.get("CXXFLAGS", ""))
        flags = {}
        for source in ext.sources:
            # core/x86_avx2.cpp belongs to the tier avx2. A tier that cannot be built leaves its file out.
            tier = Path(source).stem.rpartition("_")[2]
            if tier in tier_features() and tier not in tiers:
                continue
            own = layer_flags.get(Path(source).name, []) + tiers.get(tier, [])
            flags[source] = [*FLAGS, *user_flags, *macros, *own]

        libraries = [] if sys.platform == "darwin" else [f"-L{torch.lib}", "-ltorch", "-ltorch_cpu", "-lc10"]
        link = [*LINK_FLAGS, *shlex.split(os.environ.get("LDFLAGS", "")), *libraries]
        self.run_ninja(compiler, flags, link, Path(self.get_ext_fullpath(ext.name)).resolve())

    def run_ninja(self, compiler: list[str], flags: dict[str, list[str]], link: list[str], output: Path) -> None:
        def text(words: list[str]) -> str:
            return shlex.join(words).replace("$", "$$")

        def path(name: str | Path) -> str:
            return re.sub(r"([$ :])", r"$\1", str(name))

        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        objects = {source: Path(source).with_suffix(".o") for source in flags}
        lines = [
            "rule compile",
            f"  command = {text(compiler)} $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $in",
            "rule link",
            f"  command = {text(compiler)} $in {text(link)} -o $out",
            "  description = $out",
        ]
        for source, words in flags.items():
            lines += [f"build {path(objects[source])}: compile {path(ROOT / source)}", f"  flags = {text(words)}"]
        lines.append(f"build {path(output)}: link {' '.join(path(name) for name in objects.values())}")
        Path(folder, "build.ninja").write_text("\n".join(lines) + "\n")
        jobs = [f"-j{self.parallel}"] if self.parallel else []
        try:
            subprocess.run([find_ninja(), *jobs], cwd=folder, check=True)
        except subprocess.CalledProcessError:
            raise CompileError("the C++ compiler failed; its messages stand above") from None


SOURCES = sorted(str(p.relative_to(ROOT)) for folder in ("csrc", "csrc/core") for p in (ROOT / folder).glob("*.cpp"))

setup(
    ext_modules=[Extension("mbv2_kernels._C", sources=SOURCES, language="c++")],
    cmdclass={"build_ext": NinjaBuild},
)
