"""The phases of a training step in Triton: every one against the fp64 oracle, in Triton's interpreter, in fp32 and fp16;
and what the compiler makes of them for GPUs that are not here.

bf16 is compiled only: the interpreter computes bf16 `tl.dot` wrongly without saying so. test_gpu_training.py runs it.
Whether Triton interprets is decided when it is imported, so both kinds of test run in processes of their own.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import multiprocessing
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mbv2_kernels import training_reference as oracle

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

SMALL = {"rows": 16, "block": 16, "step": 16, "chunk": 16, "columns": 64, "warps": 1}
FORWARD_BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
GRADIENT_BOUNDS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


class Case(NamedTuple):
    """One block under training; its tensors are drawn from it."""

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
    tile: dict[str, Any] | None = {}  # noqa: RUF012  fields of Tile over SMALL; None: the chosen one
    programs: int = 3  # that share a phase: with few, a program has several tiles
    splits: int | None = None
    needs: tuple[bool, bool] = (True, True)
    layout: str = "channels_last"

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
        return torch.randn(shape) * scale + shift

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
    before = x, w1, b1, wd
    d = oracle.train_depthwise(*before, *config, True)[0]
    z = oracle.train_project(x, d, w1, b1, wd, scale2, shift2, w2, *config)[0]
    gy, d, z = images(torch.randn_like(z)), images(d), images(z)
    given = x, d if case.keep else None, w1, b1, wd
    final = scale3, shift3, case.final_activation
    gradient = gy, z, scale3, shift3, a3, b3, c3, case.final_activation
    g = images(torch.randn_like(x)).float()
    phases = {
        "train_gram": (x,),
        "train_depthwise": (*before, *config, case.keep),
        "train_project": (*given, scale2, shift2, w2, *config),
        "train_finish": (z, x if case.residual else None, *final),
        "train_finish_backward": (gy, z, *final),
        "train_project_backward": (*gradient, *given, scale2, shift2, w2, *config, case.needs),
        "train_depthwise_backward": (*gradient, *given, scale2, shift2, a2, b2, c2, w2, *config, case.needs),
        "train_input_backward": (
            (g, x, rand(i, i, scale=0.1), rand(i), gy if case.residual else None)
            if case.expand
            else (g, x, None, None, None)
        ),
    }
    to_device = (lambda a: a.to(device) if isinstance(a, Tensor) else a) if device != "cpu" else lambda a: a
    return {name: tuple(map(to_device, arguments)) for name, arguments in phases.items()}


def tensors(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def expected(phase: str, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    wide = (a.double() if isinstance(a, Tensor) else a for a in arguments)
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
    torch.backends.cudnn.conv.fp32_precision = "ieee"


def _run(case: Case, phases: list[str] | None = None) -> dict[str, tuple[Tensor, ...]]:
    """In the worker: the results of the phases."""
    from mbv2_kernels.triton import training_ops

    tile = None if case.tile is None else training_ops.Tile(**SMALL | case.tile)
    programs, training_ops.PROGRAMS = training_ops.PROGRAMS, case.programs
    results = {}
    try:
        for phase, arguments in draw(case).items():
            if phases is None or phase in phases:
                options: dict[str, Any] = {}
                if phase in ("train_depthwise", "train_project", "train_project_backward", "train_depthwise_backward"):
                    options["tile"] = tile
                if phase == "train_depthwise_backward":
                    options["splits"] = case.splits
                results[phase] = tensors(getattr(training_ops, phase)(*arguments, **options))
    finally:
        training_ops.PROGRAMS = programs
    return results


@pytest.fixture(scope="module")
def worker() -> Iterator[concurrent.futures.Executor]:
    context = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read when the workers import Triton
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=context, initializer=_set_up) as pool:
            yield pool


FP16 = torch.float16
CASES = {
    "plain": Case(),
    "plain fp16": Case(dtype=FP16),
}


@pytest.fixture(scope="module")
def computed(worker: concurrent.futures.Executor) -> dict[str, concurrent.futures.Future[Any]]:
    """All of them, begun at once so that both processes are busy."""
    return {name: worker.submit(_run, case) for name, case in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_matches_fp64(computed: dict[str, concurrent.futures.Future[Any]], name: str) -> None:
    case, results = CASES[name], computed[name].result()
    for phase, arguments in draw(case).items():
        like = tensors(getattr(oracle, phase)(*arguments))
        check(phase, case.dtype, results[phase], expected(phase, arguments), like)
