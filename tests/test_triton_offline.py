"""What the compiler makes of the Triton kernels for GPUs that are not here: no spills, tensor cores, wide loads,
shared memory within the device's limit. Compiles for a target, runs nothing; `pytest -s` prints the figures.

The default set takes about a minute on two cores: every distinct block of MobileNetV2, kernel 5, dilation
and MobileNetV1 in fp16 on sm_90; a covering choice (each form of the kernel, smallest and largest channels) on sm_80,
on sm_89, in bf16 and in fp32, one block on sm_100 and on sm_120. MBV2_OFFLINE_ALL=1 compiles all of them on all of
sm_80, sm_89 and sm_90.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import os
import platform
from typing import Any

import pytest

from mbv2_kernels.triton import offline
from mbv2_kernels.triton.configs import Tile

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if platform.machine() != "x86_64":
    pytest.skip("the assembler in Triton's wheel was tried on x86-64 only", allow_module_level=True)

ALL = os.environ.get("MBV2_OFFLINE_ALL") == "1"
DISTINCT = list({block._replace(name=""): block.name for block in reversed(offline.BLOCKS.values())}.values())[::-1]
COVERING = ["b1", "b2", "b3", "b15", "b17", "k5s2", "v1_512_512_s1"]

Key = tuple[str, int, str]  # block, sm, dtype
KEYS: list[Key] = [(name, 90, "float16") for name in DISTINCT]
KEYS += [
    (name, sm, "float16") for sm in (80, 89) for name in (DISTINCT if ALL else COVERING if sm == 80 else COVERING[1:4])
]
KEYS += [("b3", 100, "float16"), ("b3", 120, "float16")]
KEYS += [("b2", 90, "bfloat16"), ("b15", 80, "bfloat16"), ("b3", 90, "float32"), ("b15", 80, "float32")]


def _figures(key: Key, options: dict[str, Any] | None = None) -> offline.Figures:
    name, sm, dtype = key
    return offline.figures(offline.BLOCKS[name], sm, dtype, **options or {})


@pytest.fixture(scope="module")
def compiled(compiler: concurrent.futures.Executor) -> dict[Key, concurrent.futures.Future[offline.Figures]]:
    """All of them, begun at once so that both processes are busy."""
    return {key: compiler.submit(_figures, key) for key in KEYS}


def _id(key: Key) -> str:
    return "-".join(map(str, key))


@pytest.mark.parametrize("key", KEYS, ids=_id)
def test_compiles_well(compiled: dict[Key, concurrent.futures.Future[offline.Figures]], key: Key) -> None:
    f = compiled[key].result()
    print(f.row())
    block, limit = offline.BLOCKS[f.block], offline.DEVICES[f.sm][1]
    assert f.spills == 0
    assert f.tensor_core > 0
    assert 0 < f.shared <= limit
    assert f.resident >= 1
    # pixels, hidden channels of the scratch and weights are read 16 bytes at a time, nothing is read byte by byte
    assert f.loads_128 >= block.kernel
    assert f.loads_narrow == 0


def test_traffic_of_the_network() -> None:
    """What a prediction says of DRAM, against a count by hand: 256 images, 17 blocks, gigabytes."""
    found = [offline.traffic(block, 256) for block in offline.MOBILENET_V2]
    assert sum(t.fused for t in found) == pytest.approx(0.78e9, rel=0.01)
    assert sum(t.unfused for t in found) == pytest.approx(6.67e9, rel=0.01)
    b3 = 256 * 56 * 56 * 2
    assert found[2] == (b3 * (24 + 24), b3 * (24 + 2 * 144 + 2 * 144 + 24 + 24))


def test_hopper_gets_its_own_tensor_core_instruction(compiler: concurrent.futures.Executor) -> None:
    assert "HGMMA" in compiler.submit(_sass, "b3", 90).result()


def _sass(name: str, sm: int) -> str:
    return offline.disassemble(offline.compile_block(offline.BLOCKS[name], sm)[0])[1]


def test_without_tf32_no_tensor_cores(compiler: concurrent.futures.Executor) -> None:
    f = compiler.submit(_figures, ("b3", 80, "float32"), {"tf32": False}).result()
    assert f.tensor_core == 0
    assert f.spills == 0


def test_a_tile_too_large_is_seen_to_spill(compiler: concurrent.futures.Executor) -> None:
    """The checks above can fail: 256 x 160 accumulators do not fit into the registers of 4 warps."""
    tile = Tile(outputs=256, in_block=64, in_step=32, chunk=32, columns=512, warps=4, resident=1)
    f = compiler.submit(_figures, ("b15", 80, "float16"), {"tile": tile}).result()
    assert f.spills > 0


def _odd_channels() -> offline.Figures:
    return offline.figures(offline.Block("odd", 14, 21, 63, 21), 80)


def test_odd_channels_are_seen_to_load_narrowly(compiler: concurrent.futures.Executor) -> None:
    assert compiler.submit(_odd_channels).result().loads_narrow > 0


def _split() -> tuple[int, int, bytes]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mbv2_kernels.triton import kernels

    compiled, plan = offline.compile_block(offline.BLOCKS["b15"], 90, batch=1, splits=None)
    names = kernels.sum_splits.arg_names
    constants = {"COUT": 160, "FINAL": "none", "RESIDUAL": True, "SPLITS": plan.splits, "BLOCK": 1024}
    types = {"partial_ptr": "*fp32", "b3_ptr": "*fp32", "x_ptr": "*fp16", "y_ptr": "*fp16", "total": "i32"}
    source = ASTSource(
        fn=kernels.sum_splits,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    second = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    return plan.programs, plan.splits, compiled.asm["cubin"][:4] + second.asm["cubin"][:4]


def test_a_late_block_at_batch_1_is_split(compiler: concurrent.futures.Executor) -> None:
    programs, splits, magic = compiler.submit(_split).result()
    assert programs * splits >= 24  # of 132 multiprocessors; one program would take the block's whole time
    assert magic == b"\x7fELF\x7fELF"
