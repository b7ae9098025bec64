"""The AVX-512 tier's arithmetic on a CPU that lacks AVX-512: its file, compiled against emulated intrinsics.

Without this, a change made on a lesser machine could break the fastest tier unseen. Where the CPU has AVX-512 the
other tests run the real thing.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from blocks import BOUNDS, DTYPES, make_weights, relative_error
from torch import Tensor

from mbv2_kernels import _C, reference

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "csrc/core"
EMULATION = ROOT / "tests/emulated_avx512"
COMPILER = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or "c++"]
TIERS = {tier["name"]: tier for tier in _C.tiers()}

pytestmark = [
    pytest.mark.skipif(not TIERS["avx2"]["runnable"], reason="the emulation is made of AVX2"),
    pytest.mark.skipif(TIERS["avx512"]["runnable"], reason="the other tests run the tier itself"),
    pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason=f"no C++ compiler ({COMPILER[0]})"),
]

Run = Callable[..., Tensor]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`run(x, weights, stride=, ...)`: the block by the emulated tier."""
    folder = tmp_path_factory.mktemp("emulated")
    # Not optimised: that would take a minute to compile.
    flags = ["-std=c++17", "-O0", "-fPIC", "-DMBV2_HAVE_AVX512", "-I", str(CORE)]
    emulated = ["-mavx2", "-mfma", "-mf16c", "-Wno-psabi", "-isystem", str(EMULATION)]

    def compiled(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        own = emulated if source.stem == "x86_avx512" else []
        subprocess.run([*COMPILER, *flags, *own, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    sources = [path for path in CORE.glob("*.cpp") if path.stem != "x86_avx2"]
    with ThreadPoolExecutor(2) as pool:  # the longest first
        by_size = sorted(sources, key=lambda path: path.stem != "x86_avx512")
        objects = list(pool.map(compiled, [*by_size, EMULATION / "driver.cpp"]))
    subprocess.run([*COMPILER, "-shared", *objects, "-o", str(folder / "emulated.so")], check=True)
    library = ctypes.CDLL(str(folder / "emulated.so"))

    def block(
        x: Tensor,
        weights: list[Tensor | None],
        *,
        stride: int = 1,
        dilation: int = 1,
        padding: int = 1,
        residual: bool = False,
        threads: int = 1,
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        batch, in_channels, height, width = x.shape
        depthwise, project = weights[2], weights[4]
        assert depthwise is not None
        assert project is not None
        kernel = depthwise.shape[-1]
        out = [(size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for size in (height, width)]
        y = torch.full((batch, len(project), *out), torch.nan, dtype=x.dtype)
        y = y.to(memory_format=torch.channels_last)
        sizes = (in_channels, len(depthwise), len(project), kernel, batch, height, width, stride, dilation, padding)
        numbers = (*sizes, int(residual), DTYPES.index(x.dtype), *out)
        library.run(
            (ctypes.c_int64 * len(numbers))(*numbers),
            (ctypes.c_void_p * 6)(*(None if w is None else w.data_ptr() for w in weights)),
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_void_p(y.data_ptr()),
            threads,
        )
        return y

    return block


def expected(x: Tensor, weights: list[Tensor | None], *, threads: int = 1, **config: object) -> Tensor:
    doubles = (None if w is None else w.double() for w in weights)
    return reference.inverted_residual(x.double(), *doubles, **config)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("channels", "size", "kernel", "config"),
    [
        # Channels around a vector of 16 and around panels of 1 to 4 vectors: Cin, hidden, Cout.
        ((15, 17, 16), (5, 7), 3, {}),
        ((16, 96, 24), (9, 9), 3, {"stride": 2}),
        ((24, 144, 24), (9, 9), 3, {"residual": True}),
        ((3, 47, 33), (6, 5), 3, {}),
        ((20, 80, 47), (7, 7), 3, {}),
        ((33, 65, 65), (7, 7), 3, {}),
        # A tall tile of every panel width, and several chunks.
        ((64, 384, 64), (14, 14), 3, {"residual": True}),
        ((40, 240, 80), (7, 7), 3, {}),
        # The other depthwise forms.
        ((16, 48, 16), (11, 12), 5, {"padding": 2, "residual": True}),
        ((16, 48, 16), (11, 12), 5, {"padding": 2, "stride": 2}),
        ((16, 48, 16), (9, 9), 3, {"padding": 2, "dilation": 2}),
        # Two threads: hidden channels split, and rows.
        ((64, 384, 32), (4, 4), 3, {"threads": 2}),
        ((8, 32, 8), (21, 21), 3, {"threads": 2}),
    ],
)
def test_emulated_tier(
    run: Run,
    channels: tuple[int, int, int],
    size: tuple[int, int],
    kernel: int,
    config: dict[str, int],
    dtype: torch.dtype,
) -> None:
    x = torch.randn(2, channels[0], *size).to(dtype)
    if config.get("threads") == 2:
        x = x[:1]
    weights = make_weights(*channels, kernel)
    error = relative_error(run(x, weights, **config), expected(x, weights, **config))
    assert error < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [16, 19])
def test_without_expand(run: Run, channels: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, channels, 7, 6).to(dtype)
    weights = make_weights(channels, channels, 24, expand=False)
    assert relative_error(run(x, weights), expected(x, weights)) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(run: Run, dtype: torch.dtype) -> None:
    """NaN passes the clamps and both roundings; infinities are clamped."""
    x = torch.randn(1, 8, 9, 9)
    x[0, 3, 1, 1] = torch.nan
    x[0, 5, 7, 7] = torch.inf
    x = x.to(dtype)
    weights = make_weights(8, 24, 17)
    y, wanted = run(x, weights), expected(x, weights)
    assert torch.equal(y.isnan(), wanted.isnan())
    assert relative_error(y[~y.isnan()], wanted[~wanted.isnan()]) < BOUNDS[dtype]
