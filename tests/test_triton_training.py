"""The phases of a training step in Triton: every one against the fp64 oracle, in Triton's interpreter, in fp32 and
fp16; and what the compiler makes of them for GPUs that are not here.

bf16 is compiled only: the interpreter computes bf16 `tl.dot` wrongly without saying so. test_gpu_training.py runs it.
Whether Triton interprets is decided when it is imported, so both kinds of test run in processes of their own.
`pytest -s` prints the compiler's figures; MBV2_OFFLINE_ALL=1 compiles every block for sm_80, sm_89 and sm_90.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import multiprocessing
import os
import platform
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mbv2_kernels import training_reference as oracle

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from test_triton_interpreter import skip_without_interpreter

from mbv2_kernels.triton import offline, training_offline

SMALL = {"rows": 32, "block": 32, "step": 16, "chunk": 16, "columns": 64, "warps": 1}
FORWARD_BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
GRADIENT_BOUNDS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


TILED = ("train_depthwise", "train_project", "train_project_backward", "train_depthwise_backward")
STENCIL = ("train_depthwise", "train_depthwise_backward")  # those whose code knows neighbours
PIXELWISE = ("train_finish", "train_finish_backward", "train_project_backward")
ALL = ("train_gram", *TILED, "train_finish", "train_finish_backward", "train_input_backward")


class Case(NamedTuple):
    """One block under training; its tensors are drawn from it."""

    phases: tuple[str, ...] = ALL

    batch: int = 2
    in_channels: int = 8
    hidden_channels: int = 24
    out_channels: int = 8
    height: int = 6
    width: int = 5
    kernel: int = 3
    stride: int = 1
    padding: int | None = None  # None: dilation * (kernel - 1) // 2
    dilation: int = 1
    activation: str = "relu6"
    final_activation: str = "none"
    residual: bool = False
    expand: bool = True
    keep: bool = True  # D is given to the phases after the first
    dtype: torch.dtype = torch.float32
    tile: dict[str, Any] | None = {}  # noqa: RUF012  (never written) fields of Tile over SMALL; None: the chosen one
    programs: int = 3  # that share a phase: with few, a program has several tiles
    splits: int | None = None
    needs: tuple[bool, bool] = (True, True)
    layout: str = "channels_last"
    wide: bool = False  # 64-bit offsets inside a tile

    def config(self) -> tuple[Any, ...]:
        padding = self.dilation * (self.kernel - 1) // 2 if self.padding is None else self.padding
        return self.stride, padding, self.dilation, self.activation


def draw(case: Case, device: str = "cpu") -> dict[str, tuple[Any, ...]]:
    """The arguments of every phase, in the chain's order; what phases hand to each other comes from the oracle.

    Weights are rounded to x's dtype, so that the products on tensor cores are exact and masks fall as in fp64.
    """
    torch.manual_seed(3)
    n, i, c, o, k = case.batch, case.in_channels, case.hidden_channels, case.out_channels, case.kernel

    def rand(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return torch.randn(shape, device=device) * scale + shift

    def images(t: Tensor) -> Tensor:
        t = t.to(case.dtype).contiguous(memory_format=torch.channels_last)
        return t.contiguous() if case.layout == "contiguous" else t

    def weight(*shape: int, scale: float) -> Tensor:
        return rand(*shape, scale=scale).to(case.dtype).float()

    x = images(rand(n, i, case.height, case.width, scale=1.5, shift=0.5))
    w1, b1 = (weight(c, i, scale=2 * i**-0.5), rand(c)) if case.expand else (None, None)
    wd, w2 = rand(c, 1, k, k, scale=1.5 / k), weight(o, c, scale=c**-0.5)
    scale2, shift2 = 1 + rand(c, scale=0.2), 1 + rand(c)
    scale3, shift3 = 1 + rand(o, scale=0.2), rand(o)
    a3, b3, c3 = 1 + rand(o, scale=0.2), rand(o, scale=0.1), rand(o, scale=0.1)
    a2, b2, c2 = 1 + rand(c, scale=0.2), rand(c, scale=0.1), rand(c, scale=0.1)
    config = case.config()
    d = oracle.train_depthwise(x, w1, b1, wd, *config, True)[0]
    z = oracle.train_project(x, d, w1, b1, wd, scale2, shift2, w2, *config)[0]
    gy, d, z = images(torch.randn_like(z)), images(d), images(z)
    given = x, d if case.keep else None, w1, b1, wd
    final = scale3, shift3, case.final_activation
    gradient = gy, z, scale3, shift3, a3, b3, c3, case.final_activation
    g = images(torch.randn_like(x)).float()
    m, c0 = (rand(i, i, scale=0.1), rand(i)) if case.expand else (None, None)
    return {
        "train_gram": (x,),
        "train_depthwise": (x, w1, b1, wd, *config, case.keep),
        "train_project": (*given, scale2, shift2, w2, *config),
        "train_finish": (z, x if case.residual else None, *final),
        "train_finish_backward": (gy, z, *final),
        "train_project_backward": (*gradient, *given, scale2, shift2, w2, *config, case.needs),
        "train_depthwise_backward": (*gradient, *given, scale2, shift2, a2, b2, c2, w2, *config, case.needs),
        "train_input_backward": (g, x, m, c0, gy if case.residual else None),
    }


def tensors(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def expected(phase: str, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The oracle's results in fp64.

    Where the phase computes D itself, e is rounded to x's dtype as the kernels keep it: D then meets the edges of its
    activation at the same pixels, and what a clamp passes or stops is not left to a rounding.
    """
    wide = [a.double() if isinstance(a, Tensor) else a for a in arguments]
    first = {"train_project": 0, "train_project_backward": 8, "train_depthwise_backward": 8}.get(phase)
    if first is not None and arguments[first + 1] is None:
        x, _, w1, b1, wd = wide[first : first + 5]
        geometry = [a for a in arguments if isinstance(a, int)][:3]
        e = x
        if w1 is not None:
            activation = [a for a in arguments if isinstance(a, str)][-1]
            e = oracle._expand(x, w1, b1, activation)[1].to(arguments[first].dtype).double()
        wide[first + 1] = oracle.train_depthwise(e, None, None, wd, *geometry, "none", True)[0]
    return tensors(getattr(oracle, phase)(*wide))


def check(phase: str, dtype: torch.dtype, got: tuple[Tensor, ...], want: tuple[Tensor, ...], like: Any) -> None:
    """Shapes, dtypes and layouts as the oracle's in x's dtype, values within the bounds of DESIGN section 10."""
    bound = (GRADIENT_BOUNDS if "backward" in phase else FORWARD_BOUNDS)[dtype]
    for index, (g, w, form) in enumerate(zip(got, want, like, strict=True)):
        assert (g.shape, g.dtype) == (form.shape, form.dtype), f"{phase} {index}"
        assert g.is_contiguous(memory_format=torch.channels_last if g.dim() == 4 else torch.contiguous_format)
        if g.numel():
            error = ((g.double() - w).norm() / w.norm().clamp_min(1e-30)).item()
            # sums are of results before they are rounded: only the weights and inputs of products are
            assert error < bound, f"{phase} result {index}: relative error {error:.2e}"


# ---- Numbers, in the interpreter -------------------------------------------------------------------------------------


def _set_up() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN, as tests/conftest.py


def run(case: Case, arguments: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Tensor, ...]]:
    """The results of the case's phases in Triton."""
    from mbv2_kernels.triton import training_ops

    tile = None if case.tile is None else training_ops.Tile(**SMALL | case.tile)
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_ops, "PROGRAMS", case.programs)
        if case.wide:
            patch.setattr(training_ops, "_wide", lambda *_: True)
        for phase in case.phases:
            options: dict[str, Any] = {"tile": tile} if phase in TILED else {}
            if phase == "train_depthwise_backward":
                options["splits"] = case.splits
            results[phase] = tensors(getattr(training_ops, phase)(*arguments[phase], **options))
    return results


def _run(case: Case) -> dict[str, tuple[Tensor, ...]]:
    return run(case, draw(case))


@pytest.fixture(scope="module")
def worker() -> Iterator[concurrent.futures.Executor]:
    skip_without_interpreter()
    context = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read when the workers import Triton
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=context, initializer=_set_up) as pool:
            yield pool
            pool.shutdown(cancel_futures=True)  # what a selection of tests did not ask for


LEAN = Case(STENCIL, keep=False)  # D from x in every phase: windows around tiles, and around those
FP16 = torch.float16
CASES = {
    "plain": Case(),
    "plain fp16": Case(dtype=FP16, tile={"block": 16}),
    "lean": Case(TILED, keep=False),
    "lean fp16": Case(TILED, keep=False, dtype=FP16),
    "chosen tiles": Case(tile=None, programs=1024, dtype=FP16),
    "stride 2, even": LEAN._replace(stride=2, height=8, width=6),
    "stride 2, odd": LEAN._replace(stride=2, height=7, width=9, dtype=FP16),
    "stride 2, D given": Case(STENCIL, stride=2, height=7, width=9, tile={"block": 16}),
    "stride 3": LEAN._replace(stride=3, height=8, width=7),
    "same, stride 2, even": LEAN._replace(stride=2, padding=-1, height=8, width=6),
    "same, stride 2, odd": LEAN._replace(stride=2, padding=-1, height=7, width=5),
    "same, kernel 5": LEAN._replace(kernel=5, stride=2, padding=-1, height=6, width=7, batch=1),
    "kernel 5": LEAN._replace(kernel=5, height=7, width=6, batch=1, tile={"block": 64}, dtype=FP16),
    "kernel 1": LEAN._replace(kernel=1),
    "no padding": LEAN._replace(padding=0, height=6, width=7),
    "more padding than needed": LEAN._replace(padding=3, batch=1),
    "dilation 2": LEAN._replace(dilation=2, height=9, width=7, batch=1, tile={"block": 64}),
    "dilation 2, stride 2": LEAN._replace(dilation=2, stride=2, height=9, width=8),
    "dilation 4 on a smaller image": LEAN._replace(dilation=4, height=5, width=3),
    "same, dilation 3": LEAN._replace(dilation=3, padding=-1, height=7, width=8, batch=1),
    "several images a tile, the last not full": LEAN._replace(batch=5, height=3, width=3, dtype=FP16),
    "one pixel": LEAN._replace(batch=3, height=1, width=1),
    "one row": LEAN._replace(height=1, width=19),
    "channels no multiple of anything": Case(in_channels=3, hidden_channels=7, out_channels=5, keep=False),
    "one channel": Case(in_channels=1, hidden_channels=1, out_channels=1, dtype=FP16),
    "channels over several steps": Case(in_channels=37, out_channels=21, height=4, dtype=FP16),
    "columns shared by programs": Case(in_channels=40, out_channels=37, height=3, tile={"columns": 16}, programs=8),
    "many input channels": Case(("train_gram", "train_input_backward"), in_channels=150, height=9, width=9),
    "split over hidden channels": Case(STENCIL, hidden_channels=40, splits=3, height=4),
    "no expand, split": Case(STENCIL, in_channels=40, hidden_channels=40, expand=False, splits=3, height=4),
    "no expand": Case(in_channels=24, expand=False),
    "no expand, lean": Case(TILED, in_channels=24, expand=False, keep=False, dtype=FP16),
    "no expand, stride 2": LEAN._replace(in_channels=24, expand=False, stride=2, height=7, activation="relu"),
    "relu": Case(TILED, activation="relu"),
    "no activation": Case(TILED, activation="none", dtype=FP16),
    "final relu6": Case(PIXELWISE, final_activation="relu6", out_channels=80),
    "final relu": Case(PIXELWISE, final_activation="relu", dtype=FP16),
    "residual": Case(("train_finish", "train_input_backward"), residual=True, dtype=FP16),
    "only w2": Case(("train_project_backward",), needs=(True, False)),
    "only sums": Case(("train_project_backward",), needs=(False, True)),
    "only x": Case(("train_depthwise_backward",), needs=(True, False)),
    "only wd": Case(("train_depthwise_backward",), needs=(False, True)),
    "only wd, no expand": Case(("train_depthwise_backward",), in_channels=24, expand=False, needs=(False, True)),
    "NCHW": Case(layout="contiguous", height=4, width=3),
    "64-bit offsets": Case(TILED, keep=False, wide=True, height=4),
    "64-bit offsets, no expand": Case(TILED, in_channels=24, expand=False, keep=False, wide=True, height=4),
}


@pytest.fixture(scope="module")
def computed(worker: concurrent.futures.Executor) -> dict[str, concurrent.futures.Future[Any]]:
    """All of them, begun at once so that both processes are busy."""
    return {name: worker.submit(_run, case) for name, case in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_matches_fp64(computed: dict[str, concurrent.futures.Future[Any]], name: str) -> None:
    case, results = CASES[name], computed[name].result()
    arguments = draw(case)
    for phase in case.phases:
        like = tensors(getattr(oracle, phase)(*arguments[phase]))
        check(phase, case.dtype, results[phase], expected(phase, arguments[phase]), like)


def _edges(activation: str) -> dict[str, tuple[Any, ...]]:
    """Arguments that put values exactly on the edges of every clamp, and a NaN into z and into D."""
    case = Case(in_channels=16, hidden_channels=16, activation=activation, final_activation=activation)
    values = torch.tensor([0.0, 6.0, -0.0, 5.999, 1e-6, -1.0, 7.0])
    arguments = draw(case)

    def drawn(like: Tensor) -> Tensor:
        return values[torch.randint(len(values), like.shape)].contiguous(memory_format=torch.channels_last)

    x, _, _, wd = arguments["train_depthwise"][:4]
    gy, z, scale3, shift3, a3, b3, c3, final = arguments["train_project_backward"][:8]
    x, z, d, w2 = drawn(x), drawn(z), drawn(arguments["train_project"][1]), arguments["train_project"][7]
    z[1, 3, 2, 2], d[0, 5, 1, 1] = float("nan"), float("nan")
    one, none = torch.ones(16), torch.zeros(16)
    scale3, shift3 = torch.ones_like(scale3), torch.zeros_like(shift3)
    gradient = gy, torch.nan_to_num(z), scale3, shift3, a3, b3, c3, final  # gz of a NaN would reach every channel
    given = x, d, torch.eye(16), none, wd, one, none
    end = w2, *case.config(), (True, True)
    return {
        "train_finish": (z, None, scale3, shift3, activation),
        "train_finish_backward": (gy, z, scale3, shift3, activation),
        "train_project_backward": (*gradient, *given, *end),
        "train_depthwise_backward": (*gradient, *given, one, none, none, *end),
    }


def _run_edges(activation: str) -> dict[str, tuple[Tensor, ...]]:
    arguments = _edges(activation)
    return run(Case(tuple(arguments)), arguments)


@pytest.mark.parametrize("activation", ["relu6", "relu", "none"])
def test_clamps_edges_and_nan_as_in_torch(worker: concurrent.futures.Executor, activation: str) -> None:
    """No gradient at exactly 0 and 6; NaN spreads to exactly the results that the reference's spreads to."""
    results = worker.submit(_run_edges, activation).result()
    for phase, arguments in _edges(activation).items():
        wanted = expected(phase, arguments)
        assert any(0 < want.isnan().sum() < want.numel() for want in wanted)
        for got, want in zip(results[phase], wanted, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5, equal_nan=True)


def _with_infinity() -> tuple[Case, dict[str, tuple[Any, ...]]]:
    case = Case(("train_project", "train_depthwise_backward"), hidden_channels=20, keep=False)
    arguments = draw(case)
    for phase, index in (("train_project", 0), ("train_depthwise_backward", 8)):
        x = arguments[phase][index].clone(memory_format=torch.channels_last)
        x[0, :, 2, 2] = float("inf")
        # one sign, so that no product with the infinity is a NaN
        w1 = arguments[phase][index + 2].abs()
        arguments[phase] = (*arguments[phase][:index], x, None, w1, *arguments[phase][index + 3 :])
    return case, arguments


def _run_with_infinity() -> dict[str, tuple[Tensor, ...]]:
    return run(*_with_infinity())


def test_infinity_does_not_reach_past_the_last_channel(worker: concurrent.futures.Executor) -> None:
    """ReLU6 makes a 6 of it. Channels that only fill up the last chunk have weights of 0, and 0 * inf is NaN."""
    results = worker.submit(_run_with_infinity).result()
    case, arguments = _with_infinity()
    for phase, compared in zip(case.phases, ((0, 1, 2), (0, 1, 3)), strict=True):  # T is a sum of x itself
        want = expected(phase, arguments[phase])
        for index in compared:
            assert want[index].isfinite().all()
            torch.testing.assert_close(results[phase][index].double(), want[index], rtol=2e-5, atol=1e-4)


def _far_from_zero() -> tuple[Case, dict[str, tuple[Any, ...]]]:
    case = Case(("train_gram", "train_depthwise", "train_project"), activation="none", programs=2)
    arguments = draw(case)
    x, w1, b1, wd, *config = arguments["train_depthwise"]
    arguments["train_gram"] = (x + 300.0,)
    # padding 0: at the border D would lack taps, and with them the large mean
    config[1] = 0
    arguments["train_depthwise"] = x, w1, b1 + 300.0, wd.abs(), *config
    x, d, *rest = arguments["train_project"]
    scale2, shift2 = rest[3:5]
    arguments["train_project"] = x, d, *rest[:3], scale2, shift2 + 300.0, rest[5].abs(), *rest[6:]
    return case, arguments


def _run_far_from_zero() -> dict[str, tuple[Tensor, ...]]:
    return run(*_far_from_zero())


def test_variances_do_not_cancel(worker: concurrent.futures.Executor) -> None:
    """Means far larger than the standard deviation: sums of raw fp32 squares would lose digits of the variance."""
    results = worker.submit(_run_far_from_zero).result()
    case, arguments = _far_from_zero()
    for phase in case.phases:
        *_, total, square = results[phase]
        *_, want_total, want_square = expected(phase, arguments[phase])
        x = arguments[phase][0]
        n = x.numel() // x.shape[1] if phase != "train_depthwise" else x.shape[0] * 4 * 3
        if square.dim() == 2:
            square, want_square = square.diagonal(), want_square.diagonal()
        got, want = (s / n - (t / n) ** 2 for t, s in ((total, square), (want_total, want_square)))
        assert (want.sqrt() * 30 < (want_total / n).abs()).all()  # far indeed
        torch.testing.assert_close(got, want, rtol=1e-4, atol=0)


def _run_empty(expand: bool) -> list[tuple[Tensor, ...]]:
    case = Case(batch=0, in_channels=8 if expand else 24, expand=expand)
    return list(run(case, draw(case)).values())


@pytest.mark.parametrize("expand", [True, False])
def test_empty_batch(worker: concurrent.futures.Executor, expand: bool) -> None:
    """Zero sums, empty images; shapes as of a full batch."""
    case = Case(batch=0, in_channels=8 if expand else 24, expand=expand)
    for phase, results in zip(case.phases, worker.submit(_run_empty, expand).result(), strict=True):
        for got, want in zip(results, expected(phase, draw(case)[phase]), strict=True):
            assert got.shape == want.shape and not got.any()


def _refuse(phase: str, index: int, value: Any) -> None:
    case = Case((phase,))
    arguments = draw(case)
    changed = list(arguments[phase])
    changed[index] = value
    run(case, {phase: tuple(changed)})


@pytest.mark.parametrize(
    ("phase", "index", "value", "error", "message"),
    [
        ("train_depthwise", 0, torch.zeros(1, 8, 4, 4, dtype=torch.bfloat16), ValueError, "interpreter"),
        ("train_depthwise", 0, torch.zeros(1, 8, 4, 4).double(), TypeError, "x must be float16, bfloat16 or float32"),
        ("train_depthwise", 1, torch.zeros(24, 9), ValueError, r"w1 must be \[24, 8\], got \[24, 9\]"),
        ("train_depthwise", 2, None, ValueError, "w1 and b1 are given together"),
        ("train_depthwise", 4, 0, ValueError, "stride"),
        ("train_depthwise", 7, "swish", ValueError, r"activation must be one of .* got 'swish'"),
        ("train_project", 1, torch.zeros(2, 24, 6, 6), ValueError, r"d must be \[2, 24, 6, 5\]"),
        ("train_project", 5, torch.zeros(24).half(), TypeError, "scale2 must be float32"),
        ("train_project_backward", 1, torch.zeros(2, 8, 3, 3), ValueError, r"z must be \[2, 8, 6, 5\]"),
        ("train_depthwise_backward", 0, torch.zeros(2, 8, 3, 3), ValueError, "gy must be like z"),
        ("train_input_backward", 4, torch.zeros(2, 8, 3, 3), ValueError, "gy must be like x"),
    ],
)
def test_refuses(
    worker: concurrent.futures.Executor, phase: str, index: int, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        worker.submit(_refuse, phase, index, value).result()


# ---- What the compiler makes of the kernels for GPUs that are not here -----------------------------------------------

TILED_KERNELS = ("depthwise", "project", "project_gradient", "depthwise_gradient")
Key = tuple[str, int, str, str, tuple[str, ...]]  # block, sm, dtype, memory, kernels
KEYS: list[Key] = [
    ("b3", 90, "float16", "fast", training_offline.PRODUCTS),
    ("b15", 90, "float16", "fast", ("project_gradient", "depthwise_gradient")),
    ("b2", 80, "float16", "fast", TILED_KERNELS),
    ("b3", 80, "bfloat16", "lean", ("project", "depthwise_gradient")),
    ("b1", 89, "float16", "fast", ("depthwise", "depthwise_gradient")),
    ("b3", 90, "float32", "fast", ("project_gradient", "depthwise_gradient")),
]
if os.environ.get("MBV2_OFFLINE_ALL") == "1":
    KEYS = [
        (name, sm, dtype, memory, training_offline.PRODUCTS)
        for name in offline.BLOCKS
        for sm in (80, 89, 90)
        for dtype, memory in (("float16", "fast"), ("bfloat16", "lean"), ("float32", "fast"))
    ]


def _figures(key: Key) -> list[training_offline.Figures]:
    name, sm, dtype, memory, kernels = key
    return training_offline.figures(name, sm, dtype, memory, kernels)


@pytest.fixture(scope="module")
def compiled(compiler: concurrent.futures.Executor) -> dict[Key, concurrent.futures.Future[Any]]:
    return {key: compiler.submit(_figures, key) for key in KEYS}


assembler = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the assembler in Triton's wheel was tried on x86-64 only"
)


@assembler
@pytest.mark.parametrize("key", KEYS, ids=lambda key: "-".join(map(str, key[:4])))
def test_compiles_well(compiled: dict[Key, concurrent.futures.Future[Any]], key: Key) -> None:
    """No spills, tensor cores wherever matrices are multiplied, shared memory within the device's limit."""
    found = compiled[key].result()
    assert [f.kernel for f in found] == [kernel for kernel in training_offline.PRODUCTS if kernel in key[-1]]
    block = offline.BLOCKS[key[0]]
    for f in found:
        print(f.row())
        assert f.spills == 0, f.row()
        assert f.shared <= offline.DEVICES[f.sm][1] and f.resident >= 1, f.row()
        assert f.loads_128 > 0 and f.loads_narrow == 0, f.row()
        # fp32 has them only where torch's switch allows TF32; Gram matrices never round
        multiplies = block.expand or f.kernel != "depthwise"
        assert (f.tensor_core > 0) == (multiplies and (f.dtype != "float32" or f.kernel != "gram")), f.row()


def _spilling() -> int:
    too_large = {"rows": 256, "chunk": 64, "warps": 4}
    return training_offline.figures("b3", 80, kernels=["project_gradient"], **too_large)[0].spills


@assembler
def test_a_tile_too_large_is_seen_to_spill(compiler: concurrent.futures.Executor) -> None:
    """The checks above can fail."""
    assert compiler.submit(_spilling).result() > 0
