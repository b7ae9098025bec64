"""The instruction-set tiers: what is detected, what is chosen, and that a forced lower tier is what really runs."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import (
    BOUNDS,
    DTYPES,
    PAIRED,
    PAIRED_HIDDEN,
    PAIRED_OUT,
    PATCHES,
    double,
    make_config,
    make_weights,
    relative_error,
)
from torch import Tensor

from mbv2_kernels import _C, reference

ROOT = Path(__file__).resolve().parent.parent
TIERS = {tier["name"]: tier for tier in _C.tiers()}
FP16 = _C.fp16_tier()
ALL_TIERS = {**TIERS, FP16["name"]: FP16}
X86 = platform.machine().lower() in ("x86_64", "amd64", "i686")

# The kernel's names for what the compiler calls otherwise.
PROC_CPUINFO = {
    "sse4.2": "sse4_2",
    "avxvnni": "avx_vnni",
    "avx512vnni": "avx512_vnni",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    "amx-tile": "amx_tile",
    "amx-bf16": "amx_bf16",
    "amx-int8": "amx_int8",
}


@pytest.fixture(autouse=True)
def restored_cap() -> Iterator[None]:
    cap = _C.max_isa()
    yield
    _C.set_max_isa(cap)


def registry(macro: str = "MBV2_TIER") -> dict[str, list[str]]:
    text = (ROOT / "csrc/core/kernels.inc").read_text()
    return {name: features.split() for name, features in re.findall(rf'^{macro}\((\w+), "(.*)"\)$', text, re.M)}


def needs(tier: str) -> None:
    if not TIERS[tier]["runnable"]:
        pytest.skip(f"tier {tier} cannot run here: {TIERS[tier]['reason']}")


def block(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x and six weights; 9 -> 27 -> 11 channels fill no vector of any tier."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 9, 7, 5), (27, 9, 1, 1), (27,), (27, 1, 3, 3), (27,), (11, 27, 1, 1), (11,))
    x, *weights = (torch.randn(shape, generator=generator) for shape in shapes)
    return x.to(dtype), *weights


CONFIG = (1, 1, 1, "relu6", "none", False)


def test_list_is_the_registry() -> None:
    assert [tier["name"] for tier in _C.tiers()] == list(registry())
    assert {tier["name"]: tier["features"] for tier in _C.tiers()} == registry()
    assert registry("MBV2_FP16_TIER") == {FP16["name"]: FP16["features"]}
    assert list(_C.counters()) == [*registry(), FP16["name"]]


def test_portable_is_everywhere() -> None:
    assert list(TIERS)[-1] == "portable"
    assert TIERS["portable"]["runnable"]
    assert TIERS["portable"]["features"] == []


@pytest.mark.parametrize("tier", ALL_TIERS)
def test_runnable_means_compiled_and_every_feature(tier: str) -> None:
    row = ALL_TIERS[tier]
    found = _C.cpu_features()
    lacking = [feature for feature in row["features"] if not found.get(feature, False)]
    assert row["runnable"] == (row["compiled"] and not lacking)
    assert bool(row["reason"]) == (not row["runnable"])
    if row["compiled"] and lacking:
        assert row["reason"].endswith(" lacks " + " ".join(lacking))
    if not row["compiled"]:
        assert "compiler" in row["reason"]


@pytest.mark.skipif(not X86, reason=f"no CPUID on {platform.machine()}")
def test_features_are_those_the_kernel_reports() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("no /proc/cpuinfo to compare with")
    flags = next(line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")).split()
    for feature, present in _C.cpu_features().items():
        assert present == (PROC_CPUINFO.get(feature, feature) in flags), feature


@pytest.mark.skipif(not X86, reason=f"no CPUID on {platform.machine()}")
def test_every_required_feature_is_known() -> None:
    required = {feature for row in ALL_TIERS.values() for feature in row["features"]}
    assert required <= set(_C.cpu_features())


def test_active_tier_is_the_fastest_runnable() -> None:
    _C.set_max_isa(None)
    assert _C.active_tier() == next(name for name, row in TIERS.items() if row["runnable"])


@pytest.mark.parametrize("cap", TIERS)
def test_cap_is_an_upper_bound(cap: str) -> None:
    _C.set_max_isa(cap)
    assert _C.max_isa() == cap
    at_most = list(TIERS)[list(TIERS).index(cap) :]
    assert _C.active_tier() == next(name for name in at_most if TIERS[name]["runnable"])


def test_unknown_tier_is_refused_and_changes_nothing() -> None:
    before = _C.max_isa(), _C.active_tier()
    with pytest.raises(ValueError, match="'avx9'.*" + ", ".join(TIERS)):
        _C.set_max_isa("avx9")
    with pytest.raises(ValueError, match=f"'{FP16['name']}'"):  # is no rank
        _C.set_max_isa(FP16["name"])
    assert (_C.max_isa(), _C.active_tier()) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tier", TIERS)
def test_forced_tier_runs(tier: str, dtype: torch.dtype) -> None:
    needs(tier)
    x, *weights = block(dtype)
    _C.set_max_isa(tier)
    _C.reset_counters()
    y = torch.ops.mbv2.inverted_residual(x, *weights, *CONFIG)
    assert _C.counters() == {name: int(name == tier) for name in ALL_TIERS}
    expected = reference.inverted_residual(x.double(), *(weight.double() for weight in weights))
    bound = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert (y.double() - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("channels", "size"),
    [((64, 384, 32), 4), ((8, 32, 8), 21)],
    ids=["hidden channels shared out", "rows shared out"],
)
@pytest.mark.parametrize("tier", TIERS)
def test_threads_share_a_block(tier: str, channels: tuple[int, int, int], size: int, threads: int) -> None:
    """Both ways in which two threads share one image, and one thread alone."""
    needs(tier)
    x, weights = torch.randn(1, channels[0], size, size), make_weights(*channels)
    _C.set_max_isa(tier)
    torch.set_num_threads(threads)
    y = torch.ops.mbv2.inverted_residual(x, *weights, *CONFIG)
    expected = reference.inverted_residual(x.double(), *(weight.double() for weight in weights))
    assert relative_error(y, expected) < BOUNDS[torch.float32]


def forced(tier: str, x: Tensor, weights: list[Tensor | None], **options: Any) -> float:
    """The error of a block by that tier."""
    _C.set_max_isa(tier)
    _C.reset_counters()
    padding = options.pop("padding", 1)
    y = torch.ops.mbv2.inverted_residual(x, *weights, *make_config(padding=padding, **options))
    assert _C.counters()[tier] == 1
    return relative_error(y, reference.inverted_residual(*double([x, *weights]), padding=padding, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_channels", PAIRED_OUT)
@pytest.mark.parametrize("tier", TIERS)
def test_few_output_channels(tier: str, out_channels: int, dtype: torch.dtype) -> None:
    needs(tier)
    torch.set_num_threads(1)
    for hidden in PAIRED_HIDDEN:
        x = torch.randn(1, 5, 6, 5).to(dtype)
        assert forced(tier, x, make_weights(5, hidden, out_channels)) < BOUNDS[dtype], hidden


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("tier", TIERS)
def test_where_sums_of_few_output_channels_go(tier: str, name: str, dtype: torch.dtype) -> None:
    needs(tier)
    channels, size, options = PAIRED[name]
    options = dict(options)
    torch.set_num_threads(options.pop("threads", 1))
    x = torch.randn(1, channels[0], *size).to(dtype)
    assert forced(tier, x, make_weights(*channels), **options) < BOUNDS[dtype]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", PATCHES)
@pytest.mark.parametrize(
    ("channels", "expand", "dtype"),
    [(3, True, torch.float32), *((32, False, dtype) for dtype in DTYPES), (19, False, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("tier", TIERS)
def test_patches(tier: str, channels: int, expand: bool, dtype: torch.dtype, kernel: int, stride: int) -> None:
    """Of the depthwise pass: every height and width, with rows and columns in the padding on all sides."""
    needs(tier)
    torch.set_num_threads(1)
    weights = make_weights(channels, 32, 8, kernel, expand=expand)
    for height, width in PATCHES[kernel]:
        x = torch.randn(1, channels, (height - 1) * stride + 1, (width - 1) * stride + 1).to(dtype)
        error = forced(tier, x, weights, stride=stride, padding=kernel // 2)
        assert error < BOUNDS[dtype], (height, width)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_gaps_in_x_without_expand(tier: str, dtype: torch.dtype) -> None:
    needs(tier)
    x = torch.randn(2, 70, 9, 10).to(dtype).contiguous(memory_format=torch.channels_last)[:, 3:35]
    assert forced(tier, x, make_weights(32, 32, 16, expand=False)) < BOUNDS[dtype]


@pytest.mark.parametrize("tier", TIERS)
def test_packed_weights_stay_with_their_tier(tier: str) -> None:
    """Weights packed under one cap are run by the tier that packed them, whatever the cap says later."""
    needs(tier)
    x, *weights = block()
    _C.set_max_isa(tier)
    packed = torch.ops.mbv2.pack_inverted_residual(*weights)
    for cap in (None, *TIERS):
        _C.set_max_isa(cap)
        _C.reset_counters()
        y = torch.ops.mbv2.inverted_residual_packed(x, packed, 27, 11, 3, True, *CONFIG)
        assert _C.counters()[tier] == 1
        torch.testing.assert_close(y, reference.inverted_residual(x, *weights), rtol=1e-5, atol=1e-5)


def test_each_tier_is_code_of_its_own() -> None:
    """Layouts follow the tiers' vector widths: were two tiers one code, their packed weights would be equal."""
    _, *weights = block()
    packed = {}
    for tier in TIERS:
        if TIERS[tier]["runnable"]:
            _C.set_max_isa(tier)
            packed[tier] = tuple(torch.ops.mbv2.pack_inverted_residual(*weights).tolist())
    assert len(set(packed.values())) == len(packed)


@pytest.mark.parametrize("tier", ALL_TIERS)
def test_fma_peak(tier: str) -> None:
    if ALL_TIERS[tier]["runnable"]:
        # Above what two units of 512 bits give at 8 GHz, the loop was not run.
        assert 0.1 < _C.fma_peak(tier, 0.01) < 2 * 16 * 2 * 8 * (2 if tier == "avx512fp16" else 1)
    else:
        with pytest.raises(ValueError, match=f"'{tier}' cannot run here"):
            _C.fma_peak(tier, 0.01)


def test_fma_peak_of_unknown_tier() -> None:
    with pytest.raises(ValueError, match="'avx9'"):
        _C.fma_peak("avx9", 0.01)


# ---- MBV2_MAX_ISA, read when the package is imported -----------------------------------------------------------------

PROGRAM = """
import json, torch
from mbv2_kernels import _C, FusedInvertedResidual
_C.reset_counters()
with torch.inference_mode():
    FusedInvertedResidual(8, 8).eval()(torch.zeros(1, 8, 4, 4))
print(json.dumps([_C.max_isa(), _C.active_tier(), _C.counters()]))
"""


def run_with_cap(value: str | None) -> subprocess.CompletedProcess[str]:
    environment = {key: text for key, text in os.environ.items() if key != "MBV2_MAX_ISA"}
    if value is not None:
        environment["MBV2_MAX_ISA"] = value
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("cap", [None, "", *TIERS])
def test_environment_caps_the_tier(cap: str | None) -> None:
    result = run_with_cap(cap)
    assert result.returncode == 0, result.stderr
    max_isa, active, counters = json.loads(result.stdout)
    assert max_isa == (cap or None)
    _C.set_max_isa(cap or None)
    assert active == _C.active_tier()
    assert {name for name, calls in counters.items() if calls} == {active}


def test_unknown_environment_value_is_loud() -> None:
    result = run_with_cap("sse9")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "ImportError" in last
    assert "MBV2_MAX_ISA" in last
    assert "'sse9'" in last
    assert ", ".join(TIERS) in last
