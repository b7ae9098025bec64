"""The arithmetic of the tiers for AVX-512 and AMX on a CPU that lacks them: their files, compiled against emulated
intrinsics.

Without this, a change made on a lesser machine could break the fastest tiers unseen. Where the CPU has what a tier
needs, the other tests run the real thing.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from blocks import BOUNDS, DTYPES, PAIRED, PAIRED_HIDDEN, PAIRED_OUT, PATCHES, make_weights, relative_error
from test_bf16_numerics import CHANNELS, Config, short_block
from test_bf16x3 import DEPTHS, exact_block
from test_train_ops import LAYER_CASES, Case, arguments, layer_mistakes, layer_phases, mistakes, phases, results
from torch import Tensor
from torch.nn import functional as F

from mbv2_kernels import _C, backends, reference, training_reference

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "csrc/core"
EMULATION = ROOT / "tests/emulated_avx512"
COMPILER = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or "c++"]
TIERS = {tier["name"]: tier for tier in _C.all_tiers()}
#: The tiers that are emulated, and which dtypes they are for.
EMULATED = {"avx512": DTYPES, "avx512bf16x3": DTYPES, "avx512amx": (torch.bfloat16,)}
CLAMPS = ("none", "relu", "relu6")  # in the order of driver.cpp

pytestmark = [
    pytest.mark.skipif(not TIERS["avx2"]["runnable"], reason="the emulation is made of AVX2"),
    pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason=f"no C++ compiler ({COMPILER[0]})"),
]

Run = Callable[..., Tensor]


def lacking(tier: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(TIERS[tier]["runnable"], reason=f"the other tests run the tier {tier} itself")


each_tier = pytest.mark.parametrize(
    ("tier", "dtype"),
    [
        pytest.param(tier, dtype, marks=lacking(tier), id=f"{tier}-{dtype}")
        for tier, dtypes in EMULATED.items()
        for dtype in dtypes
    ],
)
each_dtype = pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=lacking("avx512")) for dtype in DTYPES])


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The core with the emulated tiers, and the C entries of driver.cpp."""
    folder = tmp_path_factory.mktemp("emulated")
    # avx512bf16x3 takes kernels from avx512 where it has none of its own.
    needed_by = {"avx512": "avx512bf16x3"}
    tiers = [tier for tier in EMULATED if not TIERS[needed_by.get(tier, tier)]["runnable"]]
    files = [f"x86_{tier}" for tier in tiers]
    # Not optimised: that would take a minute to compile.
    flags = ["-std=c++17", "-O0", "-fPIC", *(f"-DMBV2_HAVE_{tier.upper()}" for tier in tiers), "-I", str(CORE)]
    emulated = ["-mavx2", "-mfma", "-mf16c", "-Wno-psabi", "-isystem", str(EMULATION)]

    def compiled(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        own = emulated if source.stem in (*files, "driver") else []
        subprocess.run([*COMPILER, *flags, *own, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    sources = [path for path in CORE.glob("*.cpp") if not path.stem.startswith("x86") or path.stem in files]
    with ThreadPoolExecutor(2) as pool:  # the longest first
        by_size = sorted(sources, key=lambda path: path.stem not in files)
        objects = list(pool.map(compiled, [*by_size, EMULATION / "driver.cpp"]))
    subprocess.run([*COMPILER, "-shared", *objects, "-o", str(folder / "emulated.so")], check=True)
    return ctypes.CDLL(str(folder / "emulated.so"))


@pytest.fixture(scope="module")
def run(library: ctypes.CDLL) -> Run:
    """`run(tier, x, weights, stride=, ...)`: the block by an emulated tier."""

    def block(
        tier: str,
        x: Tensor,
        weights: list[Tensor | None],
        *,
        stride: int = 1,
        dilation: int = 1,
        padding: int = 1,
        residual: bool = False,
        final_activation: str = "none",
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
        numbers = (*sizes, int(residual), DTYPES.index(x.dtype), *out, CLAMPS.index(final_activation))
        library.run(
            tier.encode(),
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


@each_tier
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
    tier: str,
    dtype: torch.dtype,
) -> None:
    x = torch.randn(2, channels[0], *size).to(dtype)
    if config.get("threads") == 2:
        x = x[:1]
    weights = make_weights(*channels, kernel)
    error = relative_error(run(tier, x, weights, **config), expected(x, weights, **config))
    assert error < BOUNDS[dtype]


@each_tier
@pytest.mark.parametrize("channels", [16, 19])
def test_without_expand(run: Run, channels: int, tier: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, channels, 7, 6).to(dtype)
    weights = make_weights(channels, channels, 24, expand=False)
    assert relative_error(run(tier, x, weights), expected(x, weights)) < BOUNDS[dtype]


@each_tier
@pytest.mark.parametrize("out_channels", PAIRED_OUT)
def test_few_output_channels(run: Run, out_channels: int, tier: str, dtype: torch.dtype) -> None:
    for hidden in PAIRED_HIDDEN:
        x, weights = torch.randn(1, 5, 6, 5).to(dtype), make_weights(5, hidden, out_channels)
        assert relative_error(run(tier, x, weights), expected(x, weights)) < BOUNDS[dtype], hidden


@each_tier
@pytest.mark.parametrize("name", PAIRED)
def test_where_sums_of_few_output_channels_go(run: Run, name: str, tier: str, dtype: torch.dtype) -> None:
    channels, size, options = PAIRED[name]
    x, weights = torch.randn(1, channels[0], *size).to(dtype), make_weights(*channels)
    assert relative_error(run(tier, x, weights, **options), expected(x, weights, **options)) < BOUNDS[dtype]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", PATCHES)
@each_tier
def test_patches(run: Run, tier: str, dtype: torch.dtype, kernel: int, stride: int) -> None:
    weights = make_weights(16, 16, 8, kernel, expand=False)
    for height, width in PATCHES[kernel]:
        x = torch.randn(1, 16, (height - 1) * stride + 1, (width - 1) * stride + 1).to(dtype)
        config = {"stride": stride, "padding": kernel // 2}
        assert relative_error(run(tier, x, weights, **config), expected(x, weights, **config)) < BOUNDS[dtype], (
            height,
            width,
        )


@each_tier
def test_special_values(run: Run, tier: str, dtype: torch.dtype) -> None:
    """NaN passes the clamps and both roundings; infinities are clamped."""
    x = torch.randn(1, 8, 9, 9)
    x[0, 3, 1, 1] = torch.nan
    x[0, 5, 7, 7] = torch.inf
    x = x.to(dtype)
    weights = make_weights(8, 24, 17)
    y, wanted = run(tier, x, weights), expected(x, weights)
    assert torch.equal(y.isnan(), wanted.isnan())
    assert relative_error(y[~y.isnan()], wanted[~wanted.isnan()]) < BOUNDS[dtype]


@each_tier
def test_convolutions(library: ctypes.CDLL, tier: str, dtype: torch.dtype) -> None:
    """Of pictures in planes and in pixels, 1x1 with gaps and without, more pixels than are multiplied at a time."""
    for in_channels, out_channels, kernel, stride, size in (
        (3, 32, 3, 2, (2, 33, 35)),
        (3, 17, 3, 1, (1, 6, 5)),
        (4, 40, 5, 2, (1, 9, 12)),
        (11, 24, 3, 1, (1, 7, 6)),
        (32, 47, 1, 1, (2, 7, 7)),
        (33, 64, 1, 1, (1, 4, 4)),
        (6, 8, 1, 2, (1, 5, 5)),
    ):
        padding, whole = kernel // 2, torch.randn(size[0], in_channels + 2, *size[1:]).to(dtype)
        weight = torch.randn(out_channels, in_channels, kernel, kernel) * (in_channels * kernel**2) ** -0.5
        bias, activation = torch.randn(out_channels), "relu6"
        wanted = F.relu6(F.conv2d(whole[:, 1:-1].double(), weight.double(), bias.double(), stride, padding))
        for x in (
            whole[:, 1:-1],
            whole[:, 1:-1].contiguous(memory_format=torch.channels_last),
            whole.to(memory_format=torch.channels_last)[:, 1:-1],
        ):
            for threads in (1, 2):
                y = torch.full_like(wanted, torch.nan, dtype=dtype, memory_format=torch.channels_last)
                numbers = (
                    *(in_channels, out_channels, kernel, *size, *wanted.shape[2:], stride, padding),
                    *(DTYPES.index(dtype), CLAMPS.index(activation), *x.stride()),
                )
                pointers = (ctypes.c_void_p(t.data_ptr()) for t in (weight, bias, x, y))
                library.convolve(tier.encode(), (ctypes.c_int64 * len(numbers))(*numbers), *pointers, threads)
                assert relative_error(y, wanted) < BOUNDS[dtype]


@lacking("avx512bf16x3")
@pytest.mark.parametrize("part", ["expand", "project"])
@pytest.mark.parametrize("depth", DEPTHS[:11])
def test_bf16x3_to_the_last_bit(run: Run, depth: int, part: str) -> None:
    """As test_bf16x3.py has it: each part of a factor matters, and sums are exact in any order."""
    for channels, size in ((66, (3, 5)), (64, (4, 8)), (65, (7, 7))):  # as many as get the tier's own kernels
        block = exact_block(part, depth, channels, size, "relu6")
        assert torch.equal(run("avx512bf16x3", block.x, block.weights).double(), block.expected)


@lacking("avx512amx")
@pytest.mark.parametrize("index", range(len(CHANNELS)))
def test_amx_to_the_last_bit(run: Run, index: int) -> None:
    """As test_bf16_numerics.py has it: sums that are exact in any order."""
    channels = [CHANNELS[(index + offset) % len(CHANNELS)] for offset in (0, 4, 9)]
    for size, expand in itertools.product(((1, 3, 5), (1, 4, 8), (2, 7, 7)), (True, False)):
        block = short_block(*channels, 3, size, expand=expand)
        assert torch.equal(run("avx512amx", block.x, block.weights), block.expected(Config()))


# The tensors of `TrainArgs` (csrc/core/train.h), and which of them an op returns.
INPUTS = [
    "x",
    "d",
    "z",
    "gy",
    "g",
    "w1",
    "b1",
    "wd",
    "w2",
    "m",
    "c0",
    "scale2",
    "shift2",
    "a2",
    "b2",
    "c2",
    "scale3",
    "shift3",
    "a3",
    "b3",
    "c3",
]
OUTPUTS = ["d_out", "z_out", "y", "gh", "gx", "g_out", "sum", "sum_product", "gram", "gw2", "gwd", "t"]
RETURNED = {
    "train_gram": "sum gram",
    "train_depthwise": "d_out sum sum_product",
    "train_project": "z_out sum sum_product",
    "train_finish": "y",
    "train_finish_backward": "sum sum_product",
    "train_project_backward": "gw2 sum sum_product",
    "train_depthwise_backward": "g_out gwd t sum",
    "train_input_backward": "gx",
}


def emulated_phase(
    library: ctypes.CDLL, case: Case, name: str, values: tuple[object, ...], *, gh: bool = False
) -> list[Tensor]:
    """What the op `name` returns for `values`, by the emulated tier. gh: gw2 and gh, what a head wants of it."""
    schema = getattr(torch.ops.mbv2, name).default._schema
    given = {argument.name: value for argument, value in zip(schema.arguments, values, strict=True)}
    shapes = results(getattr(training_reference, name), values)
    x, z = given.get("x"), given.get("z")
    sizes = (case.height, case.width)
    reach = case.dilation * (case.kernel_size - 1) + 1
    out = [(size + 2 * case.padding - reach) // case.stride + 1 for size in sizes]
    hidden = case.hidden if case.expand else case.in_channels
    numbers = (
        *(backends.PHASES.index(name), case.in_channels, hidden, case.out_channels, case.kernel_size, case.expand),
        *(case.batch, *sizes, *out, case.stride, case.dilation, case.padding),
        DTYPES.index((z if x is None else x).dtype),
        *(CLAMPS.index(activation) for activation in (case.activation, case.final_activation)),
    )
    returned = [torch.full_like(t, torch.nan) for t in shapes]
    targets = dict(zip(RETURNED[name].split(), returned, strict=True))
    if gh:
        returned = [targets["gw2"], torch.full_like(x, torch.nan)]
        targets["gh"] = returned[1]

    def pointers(names: list[str], tensors: dict[str, object]) -> ctypes.Array:
        found = (tensors.get(name) for name in names)
        return (ctypes.c_void_p * len(names))(*(t.data_ptr() if isinstance(t, Tensor) else None for t in found))

    library.train((ctypes.c_int64 * len(numbers))(*numbers), pointers(INPUTS, given), pointers(OUTPUTS, targets))
    return returned


@each_dtype
@pytest.mark.parametrize(
    "case",
    [
        Case(in_channels=15, hidden=17, out_channels=16, height=5, width=7),
        Case(in_channels=24, hidden=144, out_channels=33, stride=2),
        Case(in_channels=33, hidden=65, out_channels=47, kernel_size=5, padding=2),
        Case(in_channels=16, expand=False, out_channels=17),
        Case(in_channels=19, expand=False, stride=2, final_activation="relu6"),
        Case(batch=1, in_channels=5, hidden=403, out_channels=33, height=14, width=14),
    ],
    ids=str,
)
def test_training_phases(library: ctypes.CDLL, case: Case, dtype: torch.dtype) -> None:
    for phase, (name, values) in phases(case, arguments(case, dtype)).items():
        actual = emulated_phase(library, case, name, values)
        assert not mistakes(case, phase, name, values, actual), phase


@each_dtype
@pytest.mark.parametrize("planes", [False, True])
def test_training_phases_of_stems(library: ctypes.CDLL, planes: bool, dtype: torch.dtype) -> None:
    for form in ("stem", "stride 1", "kernel 5", "kernel 7, stride 3", "several slots"):
        case = LAYER_CASES[form]
        for phase, (name, values) in enumerate(layer_phases(case, dtype, planes=planes).items()):
            backward = phase == 1
            gy, x, w1, b1 = values[:4] if backward else (None, values[0], None, None)
            actual = [torch.full_like(t, torch.nan) for t in results(getattr(training_reference, name), values)]
            t, sums = actual if backward else (None, actual[0])
            size = [(n + 2 * case.padding - case.kernel_size) // case.stride + 1 for n in x.shape[2:]]
            numbers = (
                *(phase, case.in_channels, case.out_channels, case.kernel_size, case.batch, case.height, case.width),
                *(*size, case.stride, case.padding, DTYPES.index(dtype), CLAMPS.index(case.activation), *x.stride()),
            )
            tensors = (x, gy, w1, b1, sums, None if backward else actual[1], t)
            pointers = (ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors)
            library.window((ctypes.c_int64 * len(numbers))(*numbers), *pointers)
            assert not layer_mistakes(name, values, actual), (form, name)


@each_dtype
def test_training_phases_of_heads(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """The blocks' phases with x for d: `train_pointwise` of train_ops.cpp."""
    case = LAYER_CASES["pointwise, several slots"]
    channels = case.in_channels
    shape = Case(case.batch, channels, channels, case.out_channels, case.height, case.width, 1, 1, 0, expand=False)
    shape = shape._replace(activation="none", final_activation=case.activation)
    identity = (torch.ones(channels), torch.zeros(channels))
    for name, values in layer_phases(case, dtype).items():
        wd = torch.ones(channels, 1, 1, 1)
        if name == "train_pointwise":
            x, w = values
            actual = emulated_phase(
                library, shape, "train_project", (x, x, None, None, wd, *identity, w, 1, 0, 1, "none")
            )
        else:
            *from_z, x, w, needs = values
            given = (*from_z, x, x, None, None, wd, *identity, w, 1, 0, 1, "none", needs)
            actual = emulated_phase(library, shape, "train_project_backward", given, gh=True)
        assert not layer_mistakes(name, values, actual), name


@lacking("avx512")
@pytest.mark.parametrize(
    ("name", "dtype", "columns", "bound"),
    [("multiply_doubles", torch.float64, 16, 1e-14), ("multiply_floats", torch.float32, 32, 1e-6)],
)
def test_products_between_phases(
    library: ctypes.CDLL, name: str, dtype: torch.dtype, columns: int, bound: float
) -> None:
    for rows, depth in ((1, 1), (4, 16), (11, 33)):
        a, b = torch.randn(rows, depth, dtype=dtype), torch.randn(depth, columns, dtype=dtype)
        out = torch.full((rows, columns), torch.nan, dtype=dtype)
        places = (ctypes.c_void_p(t.data_ptr()) for t in (a, b, out))
        getattr(library, name)(*places, ctypes.c_int64(rows), ctypes.c_int64(depth))
        assert relative_error(out.double(), a.double() @ b.double()) < bound
