"""The Triton kernel's numbers, in Triton's interpreter, on any machine: fp16 and fp32 against an fp64 reference.

bf16 is not here: the interpreter computes bf16 `tl.dot` wrongly without saying so. It is compiled in
test_triton_offline.py and runs in test_gpu.py.

Whether Triton interprets is decided when it is imported, so the cases run in a worker process of their own; the other
Triton tests of the same session compile.
"""

from __future__ import annotations

import concurrent.futures
import gc
import importlib.util
import multiprocessing
from collections.abc import Iterator
from importlib import metadata
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mbv2_kernels import reference

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

BOUNDS = {torch.float16: 1e-3, torch.float32: 2e-6}
SMALL = {"outputs": 16, "in_block": 16, "in_step": 16, "chunk": 16, "columns": 64, "warps": 1, "resident": 1}


class Case(NamedTuple):
    """One call: x [batch, in_channels, height, width] and the weights are drawn from it."""

    batch: int = 1
    in_channels: int = 8
    hidden_channels: int = 16
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
    bias: bool = True
    dtype: torch.dtype = torch.float16
    weight_dtype: torch.dtype | None = None  # None: dtype
    tile: dict[str, Any] | None = None  # fields of configs.Tile over SMALL; None: the table's choice
    splits: int | None = None
    layout: str = "channels_last"
    wide: bool = False  # 64-bit offsets inside a tile

    def config(self) -> tuple[Any, ...]:
        padding = self.dilation * (self.kernel - 1) // 2 if self.padding is None else self.padding
        return self.stride, padding, self.dilation, self.activation, self.final_activation, self.residual

    def tensors(self) -> tuple[Tensor | None, ...]:
        torch.manual_seed(1)
        dtype = self.weight_dtype or self.dtype
        c, i, o, k = self.hidden_channels, self.in_channels, self.out_channels, self.kernel

        def bias(n: int) -> Tensor | None:
            return torch.randn(n) if self.bias else None

        x = torch.randn(self.batch, i, self.height, self.width).to(self.dtype)
        if self.layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        elif self.layout == "slice":  # channels of a wider tensor, so pixels have gaps and an odd start
            x = torch.cat([x[:, :1], x, x], 1).contiguous(memory_format=torch.channels_last)[:, 1 : i + 1]
        else:
            assert self.layout == "contiguous"
        return (
            x,
            (torch.randn(c, i, 1, 1) / i**0.5).to(dtype) if self.expand else None,
            bias(c) if self.expand else None,
            (torch.randn(c, 1, k, k) / k).to(dtype),
            bias(c),
            (torch.randn(o, c, 1, 1) / c**0.5).to(dtype),
            bias(o),
        )


def _set_up() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN, as tests/conftest.py
    torch.backends.cudnn.conv.fp32_precision = "ieee"


def _run(
    case: Case, edit: dict[str, float] | None = None, device: str = "cpu", small: dict[str, Any] = SMALL
) -> Tensor:
    """In the worker (or on a GPU): the kernel's result. `edit` writes values into x by "n,c,y,x"."""
    from mbv2_kernels.triton import configs, ops

    x, *weights = (None if t is None else t.to(device) for t in case.tensors())
    for place, value in (edit or {}).items():
        x[tuple(map(int, place.split(",")))] = value
    tile = None if case.tile is None else configs.Tile(**small | case.tile)
    plan, launched = configs.plan, []

    def planned(*args: Any) -> configs.Plan:
        launched.append(plan(*args)._replace(**{"wide": True} if case.wide else {}))
        return launched[-1]

    configs.plan = planned
    try:
        y = ops.inverted_residual(x, *weights, *case.config(), tile=tile, splits=case.splits)
    finally:
        configs.plan = plan
    if case.splits:
        assert launched[0].splits == case.splits
    return y


def _expected(case: Case, edit: dict[str, float] | None = None) -> Tensor:
    x, *weights = (None if t is None else t.double() for t in case.tensors())
    for place, value in (edit or {}).items():
        x[tuple(map(int, place.split(",")))] = value
    stride, padding, dilation, activation, final_activation, residual = case.config()
    return reference.inverted_residual(
        x, *weights, stride=stride, padding="same" if padding == -1 else padding, dilation=dilation,
        activation=activation, final_activation=final_activation, residual=residual,
    )  # fmt: skip


def _available() -> tuple[bool, str]:
    from mbv2_kernels.triton import ops

    return ops.available()


def skip_without_interpreter() -> None:
    """Triton 3.6's makes an int of a NumPy array of one element and one dimension, which NumPy 2.4 refuses."""
    triton, numpy = (tuple(map(int, metadata.version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if triton < (3, 7) and numpy >= (2, 4):
        pytest.skip("Triton 3.6's interpreter does not work with NumPy 2.4 or newer")


@pytest.fixture(scope="module")
def worker() -> Iterator[concurrent.futures.Executor]:
    skip_without_interpreter()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context, initializer=_set_up) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")  # read when the worker imports Triton
            assert pool.submit(_available).result()[0]
        yield pool


FP32 = torch.float32
CASES = {
    "plain": Case(),
    "plain fp32": Case(dtype=FP32),
    "residual": Case(residual=True),
    "residual, more pixels than a tile": Case(batch=2, height=9, width=7, residual=True, tile={}),
    "several chunks, none full": Case(hidden_channels=41, tile={}),
    "input channels over several steps": Case(in_channels=37, tile={}),
    "channels no multiple of anything": Case(in_channels=3, hidden_channels=7, out_channels=5, dtype=FP32),
    "one channel": Case(in_channels=1, hidden_channels=1, out_channels=1),
    "one pixel": Case(batch=3, height=1, width=1),
    "one row": Case(height=1, width=19, tile={}),
    "stride 2, even": Case(stride=2, height=8, width=6, tile={}),
    "stride 2, odd": Case(stride=2, height=7, width=9, tile={}, dtype=FP32),
    "stride 3": Case(stride=3, height=8, width=7),
    "same, stride 2, even": Case(stride=2, padding=-1, height=8, width=6),
    "same, stride 2, odd": Case(stride=2, padding=-1, height=7, width=5),
    "same, kernel 5": Case(kernel=5, stride=2, padding=-1, height=6, width=7, tile={"outputs": 16, "in_block": 32}),
    "kernel 5": Case(kernel=5, height=7, width=6, tile={"in_block": 32}),
    "kernel 1": Case(kernel=1),
    "kernel 7, window of several blocks": Case(kernel=7, height=7, width=7, tile={}),
    "no padding": Case(padding=0, height=6, width=7),
    "more padding than needed": Case(padding=3),
    "dilation 2": Case(dilation=2, height=9, width=7, tile={"in_block": 32}),
    "dilation 2, stride 2": Case(dilation=2, stride=2, height=9, width=8, dtype=FP32),
    "dilation 4 on a smaller image": Case(dilation=4, height=5, width=3),
    "same, dilation 3": Case(dilation=3, padding=-1, height=7, width=8),
    "several images a tile": Case(batch=5, height=3, width=3, tile={"outputs": 32, "in_block": 64}),
    "last tile of images not full": Case(batch=4, height=2, width=2, tile={"outputs": 16, "in_block": 64}, dtype=FP32),
    "tiles in turns": Case(batch=3, height=9, width=9, tile={"outputs": 16, "in_block": 32}),
    "columns in two parts": Case(out_channels=44, tile={}),
    "columns padded": Case(out_channels=44, tile={"two_parts": False}),
    "columns shared by programs": Case(out_channels=70, tile={"columns": 16}),
    "columns shared, residual": Case(in_channels=40, out_channels=40, residual=True, tile={"columns": 16}),
    "split over hidden channels": Case(hidden_channels=48, tile={}, splits=3),
    "split, residual, unequal parts": Case(hidden_channels=70, residual=True, tile={}, splits=3, batch=2),
    "split, final activation": Case(hidden_channels=32, final_activation="relu6", tile={}, splits=2, dtype=FP32),
    "split and shared columns": Case(hidden_channels=32, out_channels=33, tile={"columns": 16}, splits=2, height=9),
    "no expand": Case(in_channels=16, expand=False),
    "no expand, V1": Case(in_channels=16, expand=False, activation="relu", final_activation="relu", stride=2, height=7),
    "no expand, residual": Case(in_channels=24, hidden_channels=24, out_channels=24, expand=False, residual=True),
    "no expand, dilation, several tiles": Case(in_channels=16, expand=False, dilation=2, height=9, width=7, tile={}),
    "no expand, split": Case(in_channels=40, hidden_channels=40, expand=False, tile={}, splits=3, dtype=FP32),
    "relu": Case(activation="relu"),
    "no activation": Case(activation="none", dtype=FP32),
    "final relu6": Case(final_activation="relu6"),
    "final relu": Case(final_activation="relu", dtype=FP32),
    "no bias": Case(bias=False, residual=True),
    "no bias, split": Case(hidden_channels=32, bias=False, tile={}, splits=2),
    "fp32 weights": Case(weight_dtype=FP32),
    "NCHW input": Case(layout="contiguous", batch=2),
    "channel slice": Case(layout="slice", batch=2),
    "64-bit offsets": Case(batch=2, residual=True, wide=True, tile={}),
    "64-bit offsets, no expand": Case(in_channels=16, expand=False, wide=True, tile={}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_matches_fp64(worker: concurrent.futures.Executor, name: str) -> None:
    case = CASES[name]
    y, want = worker.submit(_run, case).result(), _expected(case)
    assert y.dtype == case.dtype and y.shape == want.shape
    assert y.stride() == torch.empty_like(want, memory_format=torch.channels_last).stride()
    error = ((y.double() - want).norm() / want.norm()).item()
    assert error < BOUNDS[case.dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize("activation", ["relu6", "relu", "none"])
@pytest.mark.parametrize(("expand", "hidden"), [(True, 16), (True, 19), (False, 16), (False, 19)])
def test_nan_and_infinity_as_in_torch(
    worker: concurrent.futures.Executor, activation: str, expand: bool, hidden: int
) -> None:
    """NaN spreads to exactly the pixels that torch's spreads to; ReLU6 of an infinity is 6 or 0. A last chunk that is
    not full must not turn an infinity into NaN."""
    case = Case(
        in_channels=hidden, hidden_channels=hidden, expand=expand, activation=activation, height=9, width=9,
        dtype=FP32, tile={},
    )  # fmt: skip
    edit = {"0,3,1,1": float("nan"), "0,2,6,6": float("inf")}
    y, want = worker.submit(_run, case, edit).result(), _expected(case, edit)
    assert 0 < want.isnan().sum() < want.numel()
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_split_is_reproducible(worker: concurrent.futures.Executor) -> None:
    case = CASES["split, residual, unequal parts"]
    first, second = (worker.submit(_run, case).result() for _ in range(2))
    assert torch.equal(first, second)


def test_empty_batch(worker: concurrent.futures.Executor) -> None:
    assert worker.submit(_run, Case(batch=0)).result().shape == (0, 8, 6, 5)


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        (Case(activation="swish"), ValueError, r"activation must be one of .* got 'swish'"),
        (Case(stride=0), ValueError, "stride must be at least 1, got 0"),
        (Case(dilation=0, padding=1), ValueError, "dilation must be at least 1, got 0"),
        (Case(padding=-2), ValueError, "padding must be at least 0"),
        (Case(padding=0, height=2), ValueError, "2 x 5 pixels, padded, is smaller than the depthwise kernel's 3 x 3"),
        (Case(residual=True, stride=2), ValueError, "residual needs y like x"),
        (Case(residual=True, out_channels=9), ValueError, "residual needs y like x"),
        (Case(residual=True, final_activation="relu"), ValueError, 'residual needs final_activation "none"'),
        (Case(expand=False), ValueError, "without w_expand x must have w_depthwise's 16 channels, got 8"),
        (Case(dtype=torch.float64), TypeError, "x must be float16, bfloat16 or float32, got torch.float64"),
        (Case(weight_dtype=torch.float64), TypeError, "w_expand must be float16, bfloat16 or float32"),
        (Case(dtype=torch.bfloat16), ValueError, "interpreter computes wrongly"),
    ],
)
def test_refuses(worker: concurrent.futures.Executor, case: Case, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        worker.submit(_run, case).result()


def _prepared(case: Case) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    from mbv2_kernels.triton import ops

    x, *weights = case.tensors()
    prepared = ops.prepare_weights(case.dtype, *weights)
    assert all(
        (a is None) == (b is None) and (a is None or a.shape == b.shape) for a, b in zip(weights, prepared, strict=True)
    )
    run = (ops.inverted_residual(x, *w, *case.config()) for w in (weights, prepared))
    return *run, prepared[2].stride()


def test_prepared_weights_give_the_same(worker: concurrent.futures.Executor) -> None:
    plain, prepared, strides = worker.submit(_prepared, Case(hidden_channels=32, kernel=3)).result()
    assert torch.equal(plain, prepared)
    assert strides[0] == 1  # neighbouring channels side by side


def _kept_and_left() -> tuple[int, int]:
    import mbv2_kernels as mbv2
    from mbv2_kernels.fold import memo

    mbv2.set_backend("triton")
    x, *weights = Case(dtype=FP32, kernel=1).tensors()
    mbv2.inverted_residual(x, *weights)
    kept = len(memo)
    del weights
    gc.collect()
    return kept, len(memo)


def test_prepared_weights_do_not_keep_the_callers_alive(worker: concurrent.futures.Executor) -> None:
    """Weights that are right as they come (fp32, contiguous, one tap) are copied: else the memo would hold them for
    ever."""
    assert worker.submit(_kept_and_left).result() == (1, 0)


def test_available_names_the_interpreter(worker: concurrent.futures.Executor) -> None:
    ok, reason = worker.submit(_available).result()
    assert ok and "interpreter" in reason
