"""No instruction outside its tier, read from the machine code of the built extension.

The danger: an inline function or template that is compiled in a file for AVX-512 and in another for any CPU is one weak
symbol. The linker keeps one copy, and if that is the AVX-512 one, the portable path dies of an illegal instruction, on
other people's machines only. So: decode the built object, and look at the tier files' objects where they are at hand.
"""

from __future__ import annotations

import bisect
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from mbv2_kernels import _C

ROOT = Path(__file__).resolve().parent.parent
ALL_TIERS = _C.all_tiers()
TIERS = {tier["name"]: tier["features"] for tier in ALL_TIERS}
COMPILER = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or "c++"]

pytestmark = [
    pytest.mark.skipif(
        platform.system() != "Linux" or platform.machine() != "x86_64",
        reason=f"decodes x86-64 ELF objects, this is {platform.system()} on {platform.machine()}",
    ),
    pytest.mark.skipif(
        not all(map(shutil.which, ("objdump", "readelf", "nm"))),
        reason="objdump, readelf and nm (binutils) are not installed",
    ),
]
needs_compiler = pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason=f"no C++ compiler ({COMPILER[0]})")

# Legacy and REX prefixes. VEX and EVEX instructions take none but segment and address size.
SEGMENT_OR_ADDRESS = {0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x67}
PREFIXES = SEGMENT_OR_ADDRESS | {0x66, 0xF0, 0xF2, 0xF3} | set(range(0x40, 0x50))
TILES = re.compile(r"%tmm[0-7]|^(ldtilecfg|sttilecfg|tilerelease)\b")
BMI = re.compile(r"(andn|bextr|bls[irm]\w*|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx)[lq]?$")


def instruction_set(code: bytes, text: str) -> str | None:
    """What an instruction needs beyond x86-64's baseline: "amx", "avx512", "bmi", "avx", "sse4" (SSSE3 and up), or
    nothing.

    By its encoding (Intel SDM volume 2, chapter 2), so that no list of mnemonics can be incomplete. AMX has AVX's, and
    registers of its own.
    """
    at = next((i for i, byte in enumerate(code) if byte not in SEGMENT_OR_ADDRESS), len(code))
    if code[at : at + 1] == b"\x62":
        return "avx512"
    if code[at : at + 1] in (b"\xc4", b"\xc5"):
        if re.search(r"%k[0-7]", text):
            return "avx512"
        if TILES.search(text):
            return "amx"
        return "bmi" if BMI.match(text.split()[0]) else "avx"
    at = next((i for i, byte in enumerate(code) if byte not in PREFIXES), len(code))
    if code[at : at + 2] in (b"\x0f\x38", b"\x0f\x3a") or (0xF3 in code[:at] and code[at : at + 2] == b"\x0f\xb8"):
        return "sse4"
    return None


def allowed(tier: str | None) -> set[str | None]:
    features = TIERS.get(tier, []) if tier else []
    sets: set[str | None] = {None}
    if "sse4.2" in features:
        sets.add("sse4")
    if "avx2" in features:
        sets.add("avx")
    if "avx512f" in features:
        sets.add("avx512")
    if "amx-tile" in features:
        sets.add("amx")
    return sets


def tier_of(file: str) -> str | None:
    """As setup.py decides it: x86_avx2.cpp belongs to the tier avx2."""
    tier = Path(file).stem.rpartition("_")[2]
    return tier if TIERS.get(tier) else None


class Function(NamedTuple):
    begin: int
    end: int
    name: str
    tier: str | None


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def functions(shared_object: Path) -> list[Function]:
    """In order of address. A file's local symbols follow its FILE symbol; global ones belong to no file."""
    table = output_of("readelf", "--symbols", "--wide", "--demangle", shared_object).partition("'.symtab'")[2]
    found, file = [], ""
    for line in table.splitlines():
        match = re.match(r"\s*\d+: ([0-9a-f]+)\s+(\w+) (\w+)\s+(\w+)\s+\w+\s+\S+ ?(.*)", line)
        if not match:
            continue
        address, size, kind, binding, name = match.groups()
        if kind == "FILE":
            file = name
        elif kind == "FUNC" and int(size, 0):
            begin = int(address, 16)
            found.append(Function(begin, begin + int(size, 0), name, tier_of(file) if binding == "LOCAL" else None))
    return sorted(found)


class Findings(NamedTuple):
    leaks: list[str]
    seen: set[tuple[str | None, str]]  # (tier, instruction set) of every instruction beyond the baseline


def examine(shared_object: Path) -> Findings:
    code = functions(shared_object)
    assert code, f"{shared_object} is stripped: nothing tells which function came from which file"
    leaks, seen = {}, set()
    for f in code:
        if f.tier and "_GLOBAL__sub_I" in f.name:
            leaks[f.name] = f"{f.name} of tier {f.tier} runs when the object is loaded, on any CPU"
    starts = [f.begin for f in code]
    for line in output_of("objdump", "--disassemble", "--wide", shared_object).splitlines():
        parts = line.split("\t")
        if len(parts) < 3 or not parts[0].endswith(":"):
            continue
        needed = instruction_set(bytes.fromhex(parts[1]), parts[2])
        if needed is None:
            continue
        address = int(parts[0][:-1], 16)
        f = code[max(bisect.bisect_right(starts, address) - 1, 0)]
        if not f.begin <= address < f.end:
            f = Function(address, address, "code without a symbol", None)
        seen.add((f.tier, needed))
        if needed not in allowed(f.tier):
            leaks.setdefault(f.name, f"{f.name} (tier {f.tier or 'none'}) has {needed}: {parts[2].strip()}")
    return Findings(list(leaks.values()), seen)


def shared_symbols(tier_object: Path) -> list[str]:
    """What a tier's object file gives to the linker besides its table of kernels."""
    symbols = output_of("nm", "--demangle", "--defined-only", tier_object).splitlines()
    rows = (line.split(maxsplit=2) for line in symbols)
    return [name for _, kind, name in rows if kind in "TDBRWVu" and not name.startswith("mbv2::kernels_")]


def test_no_instruction_outside_its_tier() -> None:
    findings = examine(Path(_C.__file__))
    assert not findings.leaks, "\n".join(findings.leaks)
    # ... and the decoder did see the tiers
    for tier in ALL_TIERS:
        if tier["compiled"] and tier["features"]:
            for needed in allowed(tier["name"]) & {"avx", "avx512", "amx"}:
                assert (tier["name"], needed) in findings.seen


def test_tier_objects_share_no_symbols() -> None:
    """Also where the linker happened to keep the harmless copy."""
    objects = [path for path in ROOT.glob("build/temp*/csrc/core/*.o") if tier_of(path.name)]
    if not objects:
        pytest.skip("no object files of the tiers here: the package was not built in this checkout")
    shared = {path.name: symbols for path in objects if (symbols := shared_symbols(path))}
    assert not shared


# ---- The proof that the above can fail -------------------------------------------------------------------------------

NOINLINE = "__attribute__((noinline))"
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512vl", "-mprefer-vector-width=512"]
LOOP = "{ T s = 0; for (int i = 0; i < 64; ++i) s += x[i] * x[i]; return s; }"


def inline(name: str) -> str:
    """A function `name` that calls a template with external linkage: one weak symbol in every file that has it."""
    template = f"template <class T> {NOINLINE} T total(const T* x) {LOOP}"
    return f"{template}\nfloat {name}(const float* x) {{ return total(x); }}"


def internal(tier: str) -> str:
    """The same as the tiers are written: nothing but a constant table is seen from outside."""
    table = f"float (*const kernels_{tier})(const float*)"
    return (
        f"namespace mbv2 {{ namespace {{ template <class T> {NOINLINE} T total(const T* x) {LOOP} }}\n"
        f"static float run(const float* x) {{ return total(x); }}\nextern {table}; {table} = run; }}"
    )


def build(folder: Path, files: Sequence[tuple[str, str, Sequence[str]]]) -> tuple[Path, list[Path]]:
    """One shared object out of (name, source, flags), linked in that order."""
    objects = []
    for name, source, flags in files:
        path = folder / name
        path.write_text(source + "\n")
        objects.append(path.with_suffix(".o"))
        output_of(*COMPILER, "-std=c++17", "-O3", "-ffast-math", "-fPIC", *flags, "-c", path, "-o", objects[-1])
    output_of(*COMPILER, "-shared", *objects, "-o", folder / "probe.so")
    return folder / "probe.so", objects


@needs_compiler
@pytest.mark.parametrize(("tier", "flags", "needed"), [("avx2", AVX2, "avx"), ("avx512", AVX512, "avx512")])
def test_weak_symbol_is_found(tmp_path: Path, tier: str, flags: list[str], needed: str) -> None:
    shared_object, objects = build(
        tmp_path,
        [(f"x86_{tier}.cpp", inline("fast"), flags), ("plain.cpp", inline("slow"), [])],
    )
    leaks = examine(shared_object).leaks
    assert any("total" in leak and f"has {needed}" in leak for leak in leaks), leaks
    assert any("total" in symbol for symbol in shared_symbols(objects[0]))


@needs_compiler
def test_weak_symbol_is_found_where_the_linker_kept_the_plain_copy(tmp_path: Path) -> None:
    shared_object, objects = build(
        tmp_path,
        [("plain.cpp", inline("slow"), []), ("x86_avx512.cpp", inline("fast"), AVX512)],
    )
    assert not any("total" in leak for leak in examine(shared_object).leaks)
    assert any("total" in symbol for symbol in shared_symbols(objects[1]))


@needs_compiler
@pytest.mark.parametrize(
    ("file", "flags", "needed"),
    [
        ("plain.cpp", ["-mssse3", "-msse4.1"], "sse4"),
        ("plain.cpp", AVX2, "avx"),
        ("plain.cpp", AVX512, "avx512"),
        ("x86_avx2.cpp", AVX512, "avx512"),
    ],
)
def test_file_with_too_many_flags_is_found(tmp_path: Path, file: str, flags: list[str], needed: str) -> None:
    function = f"static {NOINLINE} int dot(const int* x) {LOOP.replace('T s', 'int s')}"
    source = f"{function}\nint entry(const int* x) {{ return dot(x); }}"
    shared_object, _ = build(tmp_path, [(file, source, flags)])
    leaks = examine(shared_object).leaks
    assert any("dot" in leak and f"has {needed}" in leak for leak in leaks), leaks


@needs_compiler
@pytest.mark.skipif(not _C.bf16_tier()["compiled"], reason="the compiler knows no AMX")
@pytest.mark.parametrize("tier", ["avx512", "avx512bf16x3", "avx512amx"])
@pytest.mark.parametrize(
    "code", ["tdpbf16ps %tmm2, %tmm1, %tmm0", "tileloadd (%rax,%rcx,1), %tmm3", "ldtilecfg (%rax)", "tilerelease"]
)
def test_tiles_outside_their_tier_are_found(tmp_path: Path, code: str, tier: str) -> None:
    source = f'static {NOINLINE} void tiles() {{ asm volatile("{code}"); }}\nvoid entry() {{ tiles(); }}'
    shared_object, _ = build(tmp_path, [(f"x86_{tier}.cpp", source, AVX512)])
    findings = examine(shared_object)
    assert any("tiles" in leak and "has amx" in leak for leak in findings.leaks) == (tier == "avx512")
    assert (tier, "amx") in findings.seen


@needs_compiler
def test_constructor_in_a_tier_is_found(tmp_path: Path) -> None:
    source = "#include <cstdlib>\nstatic const int seed = std::rand();\nint entry() { return seed; }"
    shared_object, _ = build(tmp_path, [("x86_avx2.cpp", source, AVX2)])
    assert any("runs when the object is loaded" in leak for leak in examine(shared_object).leaks)


@needs_compiler
def test_clean_object_passes(tmp_path: Path) -> None:
    files = [(f"x86_{tier}.cpp", internal(tier), flags) for tier, flags in (("avx2", AVX2), ("avx512", AVX512))]
    shared_object, objects = build(tmp_path, [*files, ("plain.cpp", inline("slow"), [])])
    findings = examine(shared_object)
    assert not findings.leaks
    assert {("avx2", "avx"), ("avx512", "avx512")} <= findings.seen
    assert [shared_symbols(path) for path in objects[:2]] == [[], []]
