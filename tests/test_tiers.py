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
BF16, FP16 = _C.bf16_tier(), _C.fp16_tier()
ALL_TIERS = {tier["name"]: tier for tier in _C.all_tiers()}
#: What the tiers for 16-bit images take.
DTYPE_OF = {BF16["name"]: torch.bfloat16, FP16["name"]: torch.float16}
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
    if not ALL_TIERS[tier]["runnable"]:
        pytest.skip(f"tier {tier} cannot run here: {ALL_TIERS[tier]['reason']}")


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
    assert registry("MBV2_BF16_TIER") == {BF16["name"]: BF16["features"]}
    assert registry("MBV2_FP16_TIER") == {FP16["name"]: FP16["features"]}
    assert _C.all_tiers() == [*_C.tiers(), BF16, FP16]
    assert list(_C.counters()) == list(ALL_TIERS)


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


@pytest.mark.parametrize("cap", [None, BF16["name"]])
def test_active_tiers_are_the_fastest_runnable(cap: str | None) -> None:
    """The cap that names the tier for bf16 is none, on CPUs that lack it, too."""
    _C.set_max_isa("portable")
    _C.set_max_isa(cap)
    assert _C.max_isa() == cap
    fastest = next(name for name, row in TIERS.items() if row["runnable"])
    assert _C.active_tier() == fastest
    assert _C.active_bf16_tier() == (BF16["name"] if BF16["runnable"] else fastest)


@pytest.mark.parametrize("cap", TIERS)
def test_cap_is_an_upper_bound(cap: str) -> None:
    _C.set_max_isa(cap)
    assert _C.max_isa() == cap
    at_most = list(TIERS)[list(TIERS).index(cap) :]
    assert _C.active_tier() == next(name for name in at_most if TIERS[name]["runnable"])
    assert _C.active_bf16_tier() == _C.active_tier()


def test_unknown_tier_is_refused_and_changes_nothing() -> None:
    before = _C.max_isa(), _C.active_tier(), _C.active_bf16_tier()
    for name in ("avx9", FP16["name"]):  # the latter is no rank
        with pytest.raises(ValueError, match=f"'{name}', expected one of {', '.join([*TIERS, BF16['name']])}$"):
            _C.set_max_isa(name)
    assert (_C.max_isa(), _C.active_tier(), _C.active_bf16_tier()) == before


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


def packed_by(tier: str, how: str, pack: str, *weights: Tensor | None) -> Tensor:
    """Weights packed for `tier`, which the op is told or finds as the active one."""
    cap = _C.max_isa()
    try:
        _C.set_max_isa("portable" if how == "named" else tier)
        return getattr(torch.ops.mbv2, pack)(*weights, *([tier] if how == "named" else []))
    finally:
        _C.set_max_isa(cap)


@pytest.mark.parametrize(
    ("tier", "how"), [*((tier, "active") for tier in TIERS), *((tier, "named") for tier in ALL_TIERS)]
)
def test_packed_weights_stay_with_their_tier(tier: str, how: str) -> None:
    """Packed weights are run by the tier that they were packed for, whatever the cap says then or later."""
    needs(tier)
    dtype = DTYPE_OF.get(tier, torch.float32)
    x, *weights = block(dtype)
    packed = packed_by(tier, how, "pack_inverted_residual", *weights)
    layer = packed_by(tier, how, "pack_conv", weights[0], weights[1])
    bound = 1e-5 if dtype is torch.float32 else 8e-3
    for cap in (None, *TIERS):
        _C.set_max_isa(cap)
        _C.reset_counters()
        y = torch.ops.mbv2.inverted_residual_packed(x, packed, 27, 11, 3, True, *CONFIG)
        z = torch.ops.mbv2.conv_act_packed(x, layer, 27, 1, 1, 0, "relu6")
        assert _C.counters() == {name: 2 * (name == tier) for name in ALL_TIERS}
        assert relative_error(y, reference.inverted_residual(*double([x, *weights]))) < bound
        expected = torch.nn.functional.conv2d(*double([x, *weights[:2]])).clamp(0, 6)
        assert relative_error(z, expected) < bound


@pytest.mark.parametrize("tier", DTYPE_OF)
def test_packed_for_16_bits_takes_that_dtype_only(tier: str) -> None:
    needs(tier)
    weights, name = make_weights(), str(DTYPE_OF[tier]).removeprefix("torch.")
    block = torch.ops.mbv2.pack_inverted_residual(*weights, tier)
    layer = torch.ops.mbv2.pack_conv(weights[0], None, tier)
    chain = torch.ops.mbv2.pack_chain([layer], [1, 0, 24, 1, 0, 1, 0, 1, 0, 0, 0])
    for dtype in set(DTYPES) - {DTYPE_OF[tier]}:
        x = torch.ones(1, 8, 4, 4, dtype=dtype)
        for op, arguments in (
            ("inverted_residual_packed", (block, 24, 8, 3, True, *CONFIG)),
            ("conv_act_packed", (layer, 24, 1, 1, 0, "none")),
            ("chain_packed", (chain,)),
        ):
            with pytest.raises(RuntimeError, match=f"packed was made for tier {tier}: x must be {name}"):
                getattr(torch.ops.mbv2, op)(x, *arguments)


@pytest.mark.parametrize("tier", ["avx9", *ALL_TIERS])
def test_packing_for_what_cannot_run_is_refused(tier: str) -> None:
    if tier == "avx9":
        message = f"unknown instruction-set tier 'avx9', expected one of {', '.join(ALL_TIERS)}$"
    elif ALL_TIERS[tier]["runnable"]:
        pytest.skip(f"tier {tier} can run here")
    else:
        message = re.escape(f"tier '{tier}' cannot run here: {ALL_TIERS[tier]['reason']}")
    with pytest.raises(RuntimeError, match=f"mbv2: {message}"):
        torch.ops.mbv2.pack_inverted_residual(*make_weights(), tier)
    with pytest.raises(RuntimeError, match=f"mbv2: {message}"):
        torch.ops.mbv2.pack_conv(torch.ones(1, 1, 1, 1), None, tier)


@pytest.mark.parametrize("tier", ALL_TIERS)
def test_opcheck_of_packing(tier: str) -> None:
    needs(tier)
    torch.library.opcheck(torch.ops.mbv2.pack_inverted_residual.default, (*make_weights(), tier))
    torch.library.opcheck(torch.ops.mbv2.pack_conv.default, (torch.randn(4, 3, 1, 1), None, tier))


def test_each_tier_is_code_of_its_own() -> None:
    """Layouts follow the tiers' registers: were two tiers one code, what is behind the header would be equal."""
    weights, packed = make_weights(160, 960, 320), {}
    for tier in TIERS:
        if TIERS[tier]["runnable"]:
            _C.set_max_isa(tier)
            packed[tier] = tuple(torch.ops.mbv2.pack_inverted_residual(*weights)[16:].tolist())
    assert len(set(packed.values())) == len(packed)


@pytest.mark.parametrize("tier", ALL_TIERS)
def test_fma_peak(tier: str) -> None:
    if ALL_TIERS[tier]["runnable"]:
        # Above what two units of 512 bits give at 8 GHz, the loop was not run. A unit for tiles does 16 x 16 x 32
        # multiply-adds in 16 cycles.
        most = {FP16["name"]: 2 * 32 * 2 * 8, BF16["name"]: 2 * 16 * 32 * 8}
        assert 0.1 < _C.fma_peak(tier, 0.01) < most.get(tier, 2 * 16 * 2 * 8)
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


@pytest.mark.parametrize("cap", [None, "", *TIERS, BF16["name"]])
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
