"""What the compiler makes of the Gluon kernel for GPUs that are not here, held to the budget in the repository:
registers, no spills, shared memory, warps, instructions and shared-memory accesses an output. Compiles, runs nothing.

The default set, about half a minute on two cores, has each form of the kernel once. MBV2_OFFLINE_ALL=1 compiles every
block of MobileNetV2 for sm_80, sm_89 and sm_90, as `python -m mbv2_kernels.triton.gluon_offline` does. After a change
that lowers the figures, that command with --write makes the budget anew.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import os
import platform
import re

import pytest

from mbv2_kernels.triton import gluon_configs, gluon_offline, offline

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if platform.machine() != "x86_64":
    pytest.skip("the assembler in Triton's wheel was tried on x86-64 only", allow_module_level=True)
if tuple(map(int, gluon_offline.triton_version().split("."))) < gluon_configs.OLDEST_TRITON:
    pytest.skip(f"Triton {gluon_offline.triton_version()} is too old for Gluon", allow_module_level=True)

Key = tuple[str, int, str, bool]  # block, sm, dtype, taps accumulated in fp16
KEYS: list[Key] = [
    ("b1", 90, "float16", False),
    ("b3", 90, "float16", False),
    ("b3", 90, "float16", True),
    ("b5", 90, "bfloat16", False),
    ("b2", 80, "float16", False),
    ("b15", 89, "float16", False),
]
if os.environ.get("MBV2_OFFLINE_ALL") == "1":
    KEYS = [(name, sm, "float16", False) for sm in (80, 89, 90) for name in gluon_offline.DISTINCT]
    KEYS += [(name, 90, "float16", True) for name in gluon_offline.DISTINCT]
    KEYS += [(name, 90, "bfloat16", False) for name in gluon_offline.DISTINCT]


def _figures(key: Key) -> gluon_offline.Figures:
    name, sm, dtype, half = key
    return gluon_offline.figures(offline.BLOCKS[name], sm, dtype, half=half)


@pytest.fixture(scope="module")
def compiled(
    compiler: concurrent.futures.Executor,
) -> dict[Key, concurrent.futures.Future[gluon_offline.Figures]]:
    return {key: compiler.submit(_figures, key) for key in KEYS}


@pytest.mark.parametrize("key", KEYS, ids=lambda key: "-".join(map(str, key)))
def test_within_budget(compiled: dict[Key, concurrent.futures.Future[gluon_offline.Figures]], key: Key) -> None:
    f = compiled[key].result()
    print(f.row())
    block = offline.BLOCKS[f.block]
    plan = gluon_configs.plan(
        block.problem(256), offline.DEVICES[f.sm][0], gluon_configs.Pads(*[block.kernel // 2] * 4), block.size**2,
        splits=1, half=f.half,
    )  # fmt: skip
    assert plan is not None and plan.tile == f.tile and plan.cut == f.cut
    assert f.spills == 0
    assert f.resident >= 1
    # the cut was chosen by this estimate
    estimate = gluon_configs.shared_bytes(block.problem(256), f.tile, f.cut)
    assert abs(f.shared - estimate) <= 2048 and f.shared <= gluon_configs.SHARED[f.sm]
    budget = json.loads(gluon_offline.BUDGET.read_text())
    if budget["triton"] != gluon_offline.triton_version():
        pytest.skip(f"the budget is for Triton {budget['triton']}; what needs no budget has passed")
    assert gluon_offline.over_budget(f, budget) == []


def test_the_budget_allows_no_spills() -> None:
    budget = json.loads(gluon_offline.BUDGET.read_text())
    blocks = {f"{name}-sm_{sm}-float16" for name in gluon_offline.DISTINCT for sm in (80, 89, 90)}
    assert blocks <= set(budget["blocks"])
    assert {key for key, limits in budget["blocks"].items() if limits["spills"]} == set()


def test_a_worse_figure_fails_with_both_numbers(
    compiled: dict[Key, concurrent.futures.Future[gluon_offline.Figures]],
) -> None:
    f = compiled[KEYS[0]].result()
    budget = {"blocks": {f.key: f.limits()}}
    assert gluon_offline.over_budget(f, budget) == []
    more = f._replace(registers=f.registers + 8, parts=f.parts | {"lds": f.parts["lds"] + 0.5})
    found = gluon_offline.over_budget(more, budget)
    assert len(found) == 2
    assert f"registers {f.registers + 8} > {f.registers}" in found[0] and "lds" in found[1]
    assert "is not in" in gluon_offline.over_budget(f, {"blocks": {}})[0]


def _assembly(name: str, sm: int, half: bool) -> tuple[str, str]:
    kernel, _ = gluon_offline.compile_block(offline.BLOCKS[name], sm, half=half)
    return kernel.asm["ptx"], offline.disassemble(kernel)[1]


def test_instructions_of_a_hopper_kernel(compiler: concurrent.futures.Executor) -> None:
    """What the kernel's arithmetic relies on: wgmma, one wide load for four channels, NaN kept, zeros copied in."""
    ptx, sass = compiler.submit(_assembly, "b3", 90, False).result()
    assert "HGMMA" in sass and "HMMA" not in sass
    # a patch of 4 x 2 outputs reads 6 x 4 slots, each once, for 16 of a chunk's 32 channels at a time
    assert len(re.findall(r"\bLDS\.64\b", sass)) == 2 * 6 * 4
    assert not re.search(r"\bLDS\.(U8|U16|S16)", sass)
    # nine fused multiply-adds for each of a thread's 8 pixels x 4 channels, twice
    assert len(re.findall(r"\bFFMA\b", sass)) == 2 * 9 * 32
    assert "cvt.rn.relu.f16x2.f32" in ptx and "min.NaN.f16x2" in ptx
    # every copy has a source size, which is 0 where the mask is: the rest of the 16 bytes is filled with zeros
    copies = re.findall(r"cp\.async\.\w+\.shared\.global \[[^]]*\], \[[^]]*\], 0x10(, %r\d+)?;", ptx)
    assert copies and all(copies)
    assert ptx.count("fence.proxy.async") >= 2


def test_packed_fp16_sums(compiler: concurrent.futures.Executor) -> None:
    _, sass = compiler.submit(_assembly, "b3", 90, True).result()
    assert len(re.findall(r"\bHFMA2\b(?!\.BF16)(?!\.MMA -RZ)", sass)) >= 2 * 9 * 16
    assert len(re.findall(r"\bFFMA\b", sass)) == 0


def test_ampere_uses_its_own_tensor_cores(compiler: concurrent.futures.Executor) -> None:
    _, sass = compiler.submit(_assembly, "b15", 89, False).result()
    assert "HMMA.16816" in sass and "HGMMA" not in sass


def _others() -> list[tuple[str, int]]:
    """Forms that no block of MobileNetV2 has: kernel 5, MobileNetV1's, a split."""
    blocks = [offline.BLOCKS[name] for name in ("k5s1", "k5s2", "v1_128_128_s1")]
    kernels = [gluon_offline.compile_block(block, 90)[0] for block in blocks]
    split, plan = gluon_offline.compile_block(offline.BLOCKS["b15"], 90, batch=1, splits=None)
    assert plan.splits * plan.programs >= 15
    found = []
    for kernel in (*kernels, split):
        sass = offline.disassemble(kernel)[1]
        found.append((kernel.asm["cubin"][:4].decode("latin1"), len(re.findall(r"\b(?:LDL|STL)\b", sass))))
    return found


def test_other_forms_compile(compiler: concurrent.futures.Executor) -> None:
    assert compiler.submit(_others).result() == [("\x7fELF", 0)] * 4
