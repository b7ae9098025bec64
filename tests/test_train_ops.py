"""The phases of a training step: every tier's kernels against the phases in float64 (training_reference.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from blocks import BOUNDS, DTYPES, GRADIENT_BOUNDS
from torch import Tensor

from mbv2_kernels import _C, backends, training_reference

TIERS = [tier["name"] for tier in _C.tiers() if tier["runnable"]]
WIDTHS = {"portable": 4, "avx2": 8, "avx512": 16, "avx512bf16x3": 16}


@pytest.fixture(autouse=True)
def restored_cap() -> Iterator[None]:
    cap = _C.max_isa()
    yield
    _C.set_max_isa(cap)


class Case(NamedTuple):
    """Shapes and settings of a block."""

    batch: int = 2
    in_channels: int = 8
    hidden: int = 24
    out_channels: int = 12
    height: int = 9
    width: int = 7
    kernel_size: int = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    activation: str = "relu6"
    final_activation: str = "none"
    expand: bool = True

    @property
    def config(self) -> tuple[int, int, int, str]:
        return self.stride, self.padding, self.dilation, self.activation


class Arguments(NamedTuple):
    """What the phases take. Random, and independent of each other: a phase is tested alone."""

    x: Tensor
    w1: Tensor | None
    b1: Tensor | None
    wd: Tensor
    d: Tensor
    bn2: tuple[Tensor, Tensor]
    bn2_backward: tuple[Tensor, Tensor, Tensor]
    w2: Tensor
    z: Tensor
    bn3: tuple[Tensor, Tensor]
    bn3_backward: tuple[Tensor, Tensor, Tensor]
    gy: Tensor
    g: Tensor
    m: Tensor
    c0: Tensor


def arguments(case: Case, dtype: torch.dtype, *, integers: bool = False) -> Arguments:
    """`integers`: small integers, with which float32 arithmetic is exact and clamps are hit at their very edges."""

    def floats(*shape: int, scale: float = 1.0) -> Tensor:
        if integers:
            return torch.randint(-2, 3, shape).float()
        return torch.randn(shape) * scale

    def image(channels: int, height: int, width: int) -> Tensor:
        return floats(case.batch, channels, height, width).to(dtype).contiguous(memory_format=torch.channels_last)

    hidden = case.hidden if case.expand else case.in_channels
    wd = floats(hidden, 1, case.kernel_size, case.kernel_size, scale=3 / case.kernel_size)
    x = image(case.in_channels, case.height, case.width)
    w1 = floats(hidden, case.in_channels, scale=3 * case.in_channels**-0.5) if case.expand else None
    b1 = floats(hidden) if case.expand else None
    # D's own values, so that what is kept and what is computed again are the same but for rounding
    d, *_ = training_reference.train_depthwise(x.double(), *double((w1, b1, wd)), *case.config, True)
    out_height, out_width = d.shape[2:]
    return Arguments(
        x,
        w1,
        b1,
        wd,
        d.to(dtype),
        (floats(hidden), floats(hidden)),
        (floats(hidden), floats(hidden), floats(hidden)),
        floats(case.out_channels, hidden, scale=hidden**-0.5),
        image(case.out_channels, out_height, out_width),
        (floats(case.out_channels), floats(case.out_channels)),
        (floats(case.out_channels), floats(case.out_channels), floats(case.out_channels)),
        image(case.out_channels, out_height, out_width),
        floats(*x.shape).contiguous(memory_format=torch.channels_last),
        floats(case.in_channels, case.in_channels),
        floats(case.in_channels),
    )


def phases(case: Case, a: Arguments) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Every phase in every form: the op's name and its arguments."""
    expand = (a.w1, a.b1, a.wd)
    end = (a.gy, a.z, *a.bn3)
    backward = (*end, *a.bn3_backward, case.final_activation, a.x)
    both = (True, True)
    return {
        "gram": ("train_gram", (a.x,)),
        "depthwise": ("train_depthwise", (a.x, *expand, *case.config, True)),
        "depthwise, sums only": ("train_depthwise", (a.x, *expand, *case.config, False)),
        "project": ("train_project", (a.x, a.d, *expand, *a.bn2, a.w2, *case.config)),
        "project, lean": ("train_project", (a.x, None, *expand, *a.bn2, a.w2, *case.config)),
        "finish": ("train_finish", (a.z, None, *a.bn3, case.final_activation)),
        "finish, residual": ("train_finish", (a.z, a.gy, *a.bn3, case.final_activation)),
        "finish backward": ("train_finish_backward", (*end, case.final_activation)),
        **{
            f"{phase} backward{', lean' if d is None else ''}": (
                f"train_{phase}_backward",
                (*backward, d, *expand, *a.bn2, *more, a.w2, *case.config, both),
            )
            for phase, more in (("project", ()), ("depthwise", a.bn2_backward))
            for d in (a.d, None)
        },
        "input backward": ("train_input_backward", (a.g, a.x, a.m, a.c0, None)),
        "input backward, residual": ("train_input_backward", (a.g, a.x, a.m, a.c0, a.x)),
        "input backward, frozen": ("train_input_backward", (a.g, a.x, None, None, None)),
    }


def double(values: Any) -> Any:
    if isinstance(values, Tensor):
        return values.double()
    return tuple(map(double, values)) if isinstance(values, tuple) else values


def results(function: Callable[..., Any], values: tuple[Any, ...]) -> tuple[Tensor, ...]:
    result = function(*values)
    return (result,) if isinstance(result, Tensor) else tuple(result)


def op(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.mbv2, name)  # type: ignore[no-any-return]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def bound(phase: str, dtype: torch.dtype) -> float:
    """DESIGN section 10, by the dtype of what comes out: sums and weights' gradients are never rounded to 16 bits."""
    bounds = GRADIENT_BOUNDS if "backward" in phase else BOUNDS
    return bounds.get(dtype, bounds[torch.float32])


def mistakes(case: Case, phase: str, name: str, values: tuple[Any, ...], actual: Sequence[Tensor]) -> list[int]:
    """Which of a phase's results are further from float64 than the bound."""
    expected = results(getattr(training_reference, name), double(values))
    sizes = [result.norm() for result in expected]
    if phase.split(",")[0] in ("gram", "depthwise", "project"):
        # A mean may be near zero: the error of a sum counts against the values that were added.
        squares = expected[-1].diagonal() if name == "train_gram" else expected[-1]
        pixels = case.batch * case.height * case.width if name == "train_gram" else out_pixels(case)
        sizes[-2] = (pixels * squares).sqrt().norm()
    wrong = []
    for i, (result, exact, size) in enumerate(zip(actual, expected, sizes, strict=True)):
        assert result.shape == exact.shape, (phase, i)
        if result.numel() and not (result - exact).norm() < bound(phase, result.dtype) * size:
            wrong.append(i)
    return wrong


def out_pixels(case: Case) -> int:
    """Pixels of d."""
    x, wd = torch.empty(case.batch, 1, case.height, case.width), torch.empty(1, 1, case.kernel_size, case.kernel_size)
    d, *_ = training_reference.train_depthwise(x, None, None, wd, *case.config, True)
    return d.numel()


def check(case: Case, dtype: torch.dtype) -> None:
    for phase, (name, values) in phases(case, arguments(case, dtype)).items():
        assert not mistakes(case, phase, name, values, results(op(name), values)), phase


CASES = {
    "plain": Case(),
    "stride 2": Case(stride=2),
    "stride 2, even": Case(stride=2, height=8, width=10),
    "kernel 5": Case(kernel_size=5, padding=2),
    "kernel 5, stride 2": Case(kernel_size=5, padding=2, stride=2, height=11, width=14),
    "kernel 1": Case(kernel_size=1, padding=0),
    "kernel 7, stride 3": Case(kernel_size=7, padding=3, stride=3, height=13, width=11),
    "dilation 2": Case(padding=2, dilation=2),
    "dilation 3, stride 2": Case(padding=3, dilation=3, stride=2),
    "same padding": Case(padding=-1, stride=2, height=8, width=7),
    "no padding": Case(padding=0, stride=2),
    "wide padding": Case(padding=4, stride=2),
    "no expand": Case(expand=False, in_channels=24),
    "no expand, stride 2": Case(expand=False, in_channels=17, stride=2),
    "no expand, lone channel": Case(expand=False, in_channels=1, out_channels=1),
    "relu": Case(activation="relu", final_activation="relu"),
    "linear": Case(activation="none", final_activation="relu6"),
    "one pixel": Case(height=1, width=1, batch=3),
    "one column": Case(height=17, width=1, stride=2),
    "one row": Case(height=1, width=19),
    "several chunks": Case(in_channels=5, hidden=403, out_channels=33, height=14, width=14),
    "several groups and parts": Case(batch=1, height=57, width=61, in_channels=3, hidden=9, out_channels=4),
    "several groups, stride 2": Case(batch=1, height=57, width=60, in_channels=3, hidden=9, out_channels=4, stride=2),
    "several images a slot": Case(batch=70, height=5, width=5, stride=2),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("tier", TIERS)
def test_against_float64(tier: str, case: Case) -> None:
    _C.set_max_isa(tier)
    check(case, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_16_bit_storage(tier: str, dtype: torch.dtype) -> None:
    _C.set_max_isa(tier)
    for case in (
        Case(in_channels=9, hidden=27, out_channels=11),
        Case(stride=2, height=16, width=16, batch=4, in_channels=16, hidden=96, out_channels=24),
        Case(expand=False, in_channels=19, stride=2),
    ):
        check(case, dtype)


@pytest.mark.parametrize("tier", TIERS)
def test_channels_around_vectors_and_panels(tier: str) -> None:
    _C.set_max_isa(tier)
    width = WIDTHS[tier]
    for channels in {width - 1, width, width + 1, 2 * width + 1, 3 * width - 1, 4 * width + 1, 5 * width}:
        check(Case(in_channels=channels, hidden=channels + width, out_channels=channels, height=5, width=4), DTYPES[0])
        check(Case(in_channels=channels, expand=False, out_channels=channels, height=5, width=4), DTYPES[0])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("tier", TIERS)
def test_edges_of_clamps(tier: str, case: Case) -> None:
    """Integers: no rounding, so that values lie exactly on 0 and 6 and every result is exact.

    Except for the forward phases' sums, and T, which count from a mean.
    """
    _C.set_max_isa(tier)
    a = arguments(case, torch.float32, integers=True)
    for phase, (name, values) in phases(case, a).items():
        expected = results(getattr(training_reference, name), double(values))
        for i, (result, exact) in enumerate(zip(results(op(name), values), expected, strict=True)):
            if phase.startswith("depthwise backward") and i == 2 and case.expand:
                assert (result - exact).norm() <= 5e-7 * exact.norm(), phase  # a gradient on the wrong side is more
            elif result.dtype == torch.float32 or "backward" in phase:
                assert torch.equal(result.double(), exact), (phase, i)


@pytest.mark.parametrize("tier", TIERS)
def test_sums_round_off_little(tier: str) -> None:
    """What BatchNorms' gradients are made of, where nothing else rounds, or what does would be large.

    They are differences of such sums, and unfused training adds up in float64. Sums of many values in float32, of
    products with values far from zero, and sums that begin with a large bias are off by two to ten times these bounds.
    """
    _C.set_max_isa(tier)
    case = Case(in_channels=160, hidden=64, out_channels=24, height=28, width=28, activation="none")
    integers = arguments(case, torch.float32, integers=True)
    one, zero, narrow_one, narrow_zero = (v.expand(n) for n in (64, 24) for v in (torch.ones(1), torch.zeros(1)))
    exact = integers._replace(bn2_backward=(one, zero, zero), bn3_backward=(narrow_one, narrow_zero, narrow_zero))

    def both(case: Case, a: Arguments, phase: str) -> Iterator[tuple[Tensor, ...]]:
        name, values = phases(case, a)[phase]
        yield results(op(name), values)
        yield results(getattr(training_reference, name), double(values))

    far = exact._replace(x=exact.x + torch.randn(exact.x.shape) + 4)
    mean_x = far.x.double().mean((0, 2, 3))
    deviations = (t - sum_g[:, None] * mean_x for _, _, t, sum_g in both(case, far, "depthwise backward"))
    assert relative_error(*deviations) < 3e-7

    positive = exact._replace(**{name: torch.rand_like(getattr(exact, name)) for name in ("gy", "z", "d", "w2")})
    for phase in ("finish backward", "project backward"):
        for sums in zip(*(found[-2:] for found in both(case, positive, phase)), strict=True):
            assert relative_error(*sums) < 1e-8, phase

    alone = case._replace(kernel_size=1, padding=0)  # then d is e
    biased = arguments(alone, torch.float32)._replace(b1=torch.full((64,), 30.0), wd=torch.ones(64, 1, 1, 1))
    assert relative_error(*(d - 30 for d, *_ in both(alone, biased, "depthwise"))) < 1e-6


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_threads_change_nothing(case: Case) -> None:
    a = arguments(case, torch.float32)
    for phase, (name, values) in phases(case, a).items():
        torch.set_num_threads(1)
        alone = results(op(name), values)
        torch.set_num_threads(3)
        for i, (result, expected) in enumerate(zip(results(op(name), values), alone, strict=True)):
            assert torch.equal(result, expected), (phase, i)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(("channels", "in_channels"), [(1, 1), (24, 8), (33, 17), (70, 15), (960, 160)])
@pytest.mark.parametrize("tier", TIERS)
def test_between_phases(tier: str, channels: int, in_channels: int, fixed: bool) -> None:
    """BatchNorm's arithmetic in C++ against the same in PyTorch and float64: only a last digit may differ."""
    _C.set_max_isa(tier)
    x = torch.randn(in_channels + 100, in_channels, dtype=torch.float64) + 0.5
    weight, t, gamma, beta = (torch.randn(size) for size in ((channels, in_channels),) * 2 + ((channels,),) * 2)
    pixels = torch.full((1,), float(len(x)), dtype=torch.float64)
    of_x = (x.sum(0), x.T @ x)
    v = x @ weight.double().T
    statistics, mean_x = training_reference.train_linear_statistics(weight, *of_x, pixels)
    norm = (statistics[:2] if fixed else statistics, gamma)
    sums = tuple(torch.randn(4, channels, dtype=torch.float64))
    w1, _ = training_reference.train_fold_expand(weight, *norm, beta, 1e-3, mean_x)
    calls: dict[str, tuple[Any, ...]] = {
        "train_statistics": (v.sum(0), v.square().sum(0), pixels),
        "train_linear_statistics": (weight, *of_x, pixels),
        "train_norm": (*norm, beta, 1e-3),
        "train_fold_expand": (weight, *norm, beta, 1e-3, mean_x),
        "train_norm_backward": (*norm, 1e-3, *sums),
        "train_linear_sums": (weight, t),
        "train_expand_backward": (weight, w1, *norm, 1e-3, t, *sums, *of_x, mean_x),
    }
    assert calls.keys() == set(backends.BETWEEN_PHASES)
    for name, values in calls.items():
        expected = results(getattr(training_reference, name), values)
        alone: list[Tensor] = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            actual = results(op(name), values)
            for i, (result, exact) in enumerate(zip(actual, expected, strict=True)):
                assert result.shape == exact.shape and result.dtype == exact.dtype, (name, i)
                bound = 1e-11 if result.dtype == torch.float64 else 2e-7
                assert result.numel() == 0 or (result - exact).norm() <= bound * exact.norm(), (name, i)
            assert all(map(torch.equal, actual, alone or actual)), name
            alone = list(actual)


@pytest.mark.parametrize("case", [Case(batch=0), Case(batch=0, expand=False, stride=2)], ids=str)
def test_empty_batch(case: Case) -> None:
    a = arguments(case, torch.float32)
    for phase, (name, values) in phases(case, a).items():
        expected = results(getattr(training_reference, name), double(values))
        for i, (result, exact) in enumerate(zip(results(op(name), values), expected, strict=True)):
            assert torch.equal(result.double(), exact), (phase, i)


@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("tier", TIERS)
def test_nan_flows(tier: str, activation: str) -> None:
    """A NaN comes out where it does in the reference and nowhere else, and lets the gradient through a clamp.

    Where that is certain: inside the image, as a NaN in the gradient of d may or may not meet the zeros around it.
    """
    _C.set_max_isa(tier)
    case = Case(width=11, stride=2, activation=activation, final_activation=activation)
    a = arguments(case, torch.float32)
    for tensor, place in ((a.x, (0, 3, 4, 4)), (a.d, (0, 5, 1, 1)), (a.z, (1, 2, 2, 2)), (a.gy, (1, 7, 1, 3))):
        tensor[place] = torch.nan
    for phase, (name, values) in phases(case, a).items():
        expected = results(getattr(training_reference, name), double(values))
        for i, (result, exact) in enumerate(zip(results(op(name), values), expected, strict=True)):
            assert torch.allclose(result.double(), exact, rtol=1e-5, atol=1e-4, equal_nan=True), (phase, i)


@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_what_nobody_needs_is_empty(needs: tuple[bool, bool], expand: bool) -> None:
    case = Case(expand=expand)
    a = arguments(case, torch.float32)
    for phase, (name, values) in phases(case, a).items():
        if name not in ("train_project_backward", "train_depthwise_backward"):
            continue
        everything = results(op(name), values)
        expected = results(getattr(training_reference, name), (*values[:-1], needs))
        for i, (result, exact) in enumerate(zip(results(op(name), (*values[:-1], needs)), expected, strict=True)):
            assert result.shape == exact.shape, (phase, i)
            assert result.numel() == 0 or torch.equal(result, everything[i]), (phase, i)


class LayerCase(NamedTuple):
    """Shapes and settings of a dense layer."""

    in_channels: int = 3
    out_channels: int = 8
    kernel_size: int = 3
    stride: int = 2
    padding: int = 1
    activation: str = "relu6"
    batch: int = 2
    height: int = 11
    width: int = 8

    @property
    def depth(self) -> int:
        return self.in_channels * self.kernel_size**2


def layer_phases(
    case: LayerCase, dtype: torch.dtype, *, planes: bool = False, integers: bool = False
) -> dict[str, tuple[Any, ...]]:
    """The phases of a dense layer, a pointwise one where the kernel's size is 1. planes: x lies channel by channel."""

    def floats(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randint(-2, 3, shape).float() if integers else torch.randn(shape) * scale

    def image(*shape: int) -> Tensor:
        return floats(*shape).to(dtype).contiguous(memory_format=torch.channels_last)

    x = image(case.batch, case.in_channels, case.height, case.width)
    x = x.contiguous() if planes else x
    w1 = floats(case.out_channels, case.in_channels, case.kernel_size, case.kernel_size, scale=case.depth**-0.5)
    vectors = [floats(case.out_channels) for _ in range(5)]
    geometry = (case.stride, case.padding)
    y = training_reference.train_window(x.double(), w1.double(), vectors[0].double(), *geometry, case.activation)
    gy = image(*y.shape)
    if case.kernel_size == 1:
        from_z = (gy, image(*y.shape), *vectors, case.activation)
        return {
            "train_pointwise": (x, w1.flatten(1)),
            "train_pointwise_backward": (*from_z, x, w1.flatten(1), (True, True)),
        }
    return {
        "train_window_gram": (x, case.kernel_size, *geometry),
        "train_window_backward": (gy, x, w1, vectors[0], *geometry, case.activation),
    }


def layer_mistakes(name: str, values: tuple[Any, ...], actual: Sequence[Tensor]) -> list[int]:
    """Which of a phase's results are further from float64 than the bound.

    A sum's error counts against the values that were added, as it may be near zero.
    """
    double_values = double(values)
    expected = results(getattr(training_reference, name), double_values)
    magnitudes = [result.norm() for result in expected]
    if not name.endswith("backward"):
        squares = expected[-1].diagonal() if name == "train_window_gram" else expected[-1]
        pixels = (
            expected[0][:, 0].numel() if name == "train_pointwise" else len(training_reference._windows(*double_values))
        )
        magnitudes[-2] = (pixels * squares).sqrt().norm()
    wrong = []
    for i, (result, exact, size) in enumerate(zip(actual, expected, magnitudes, strict=True)):
        assert result.shape == exact.shape, (name, i)
        if result.numel() and not (result - exact).norm() < bound(name, result.dtype) * size:
            wrong.append(i)
    return wrong


LAYER_CASES = {
    "stem": LayerCase(),
    "odd": LayerCase(height=12, width=9, out_channels=13),
    "stride 1": LayerCase(stride=1, in_channels=4, out_channels=40),
    "kernel 5": LayerCase(kernel_size=5, padding=2, in_channels=1, out_channels=17),
    "kernel 7, stride 3": LayerCase(kernel_size=7, padding=3, stride=3, in_channels=2, activation="relu"),
    "same padding": LayerCase(padding=-1, height=8),
    "wide padding": LayerCase(padding=4, activation="none"),
    "no padding": LayerCase(padding=0, stride=4),
    "several slots": LayerCase(batch=5, height=61, width=64, out_channels=33),
    "one pixel": LayerCase(batch=3, height=1, width=1),
    "pointwise": LayerCase(kernel_size=1, stride=1, padding=0, in_channels=24, out_channels=65),
    "pointwise, several slots": LayerCase(
        kernel_size=1, stride=1, padding=0, in_channels=19, out_channels=33, batch=9, height=14, width=15
    ),
}


@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_layers_against_float64(tier: str, dtype: torch.dtype, planes: bool) -> None:
    _C.set_max_isa(tier)
    for form, case in LAYER_CASES.items():
        for name, values in layer_phases(case, dtype, planes=planes).items():
            assert not layer_mistakes(name, values, results(op(name), values)), (form, name)


@pytest.mark.parametrize("tier", TIERS)
def test_layers_with_channels_around_vectors_and_panels(tier: str) -> None:
    _C.set_max_isa(tier)
    width = WIDTHS[tier]
    for channels in {width - 1, width, width + 1, 2 * width + 1, 3 * width, 4 * width + 1}:
        for case in (
            LayerCase(out_channels=channels),
            LayerCase(channels, channels + 1, kernel_size=1, stride=1, padding=0),
        ):
            for name, values in layer_phases(case, torch.float32).items():
                assert not layer_mistakes(name, values, results(op(name), values)), (case, name)


@pytest.mark.parametrize("tier", TIERS)
def test_edges_of_a_layers_clamp(tier: str) -> None:
    """Integers, as for the blocks: values on 0 and 6, and exact results but for sums that count from a mean."""
    _C.set_max_isa(tier)
    for form, case in LAYER_CASES.items():
        for name, values in layer_phases(case, torch.float32, integers=True).items():
            expected = results(getattr(training_reference, name), double(values))
            for i, (result, exact) in enumerate(zip(results(op(name), values), expected, strict=True)):
                if name != "train_pointwise" or i == 0:
                    assert torch.equal(result.double(), exact), (form, name, i)


def test_layers_empty_needless_and_threads() -> None:
    """No image gives zeros; what nobody needs is empty; threads change nothing."""
    for form, case in LAYER_CASES.items():
        for name, values in layer_phases(case._replace(batch=0), torch.float32).items():
            expected = results(getattr(training_reference, name), double(values))
            for result, exact in zip(results(op(name), values), expected, strict=True):
                assert torch.equal(result.double(), exact), (form, name)
        for name, values in layer_phases(case, torch.float32).items():
            torch.set_num_threads(1)
            alone = results(op(name), values)
            torch.set_num_threads(3)
            assert all(map(torch.equal, results(op(name), values), alone)), (form, name)
            for needs in ((True, False), (False, True)) if name == "train_pointwise_backward" else ():
                for result, full, need in zip(results(op(name), (*values[:-1], needs)), alone, needs, strict=True):
                    assert torch.equal(result, full if need else full.new_empty(0)), (form, needs)


def test_nan_flows_through_layers() -> None:
    for case in (LAYER_CASES["odd"], LAYER_CASES["pointwise"]):
        for name, values in layer_phases(case, torch.float32).items():
            (x,) = (t for t in values if isinstance(t, Tensor) and t.shape[:2] == (case.batch, case.in_channels))
            x[0, 0, 4, 4] = torch.nan
            expected = results(getattr(training_reference, name), double(values))
            assert any(exact.isnan().any() for exact in expected), name
            for i, (result, exact) in enumerate(zip(results(op(name), values), expected, strict=True)):
                assert torch.allclose(result.double(), exact, rtol=1e-5, atol=1e-4, equal_nan=True), (name, i)


def test_strides_do_not_matter() -> None:
    """Images in any memory format, and slices; weights and vectors in any strides."""
    case = Case()
    a = arguments(case, torch.float32)

    def spread(values: Any) -> Any:
        if isinstance(values, Tensor):
            return values.contiguous().repeat_interleave(2, -1)[..., ::2]
        return tuple(map(spread, values)) if isinstance(values, tuple) else values

    for phase, (name, values) in phases(case, a).items():
        dense = results(op(name), values)
        for i, (result, expected) in enumerate(zip(results(op(name), spread(values)), dense, strict=True)):
            assert torch.equal(result, expected), (phase, i)


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("train_depthwise", 1, torch.zeros(24, 7), r"w1 must be a float32 CPU tensor \[24, 8\], got shape \[24, 7\]"),
        ("train_depthwise", 2, None, "w1 and b1 must be given or missing together"),
        ("train_depthwise", 3, torch.zeros(24, 1, 2, 2), "odd k"),
        ("train_depthwise", 4, 0, "stride must be at least 1, got 0"),
        ("train_depthwise", 7, "gelu", "activation must be 'none', 'relu' or 'relu6', got 'gelu'"),
        ("train_project", 1, torch.zeros(2, 24, 9, 6), r"d must be \[2, 24, 9, 7\]"),
        ("train_project", 7, torch.zeros(24), r"w2 must be \[out, 24\]"),
        (
            "train_finish_backward",
            0,
            torch.zeros(2, 12, 9, 7, dtype=torch.float16),
            "gy must be .* other tensors' type",
        ),
        ("train_project_backward", 4, torch.zeros(11), r"a3 must be a float32 CPU tensor \[12\], got shape \[11\]"),
        ("train_input_backward", 0, torch.zeros(2, 8, 9, 6), "g must be a float32 CPU tensor of x's shape"),
        ("train_pointwise", 1, torch.zeros(65, 23), r"w must be a float32 CPU tensor \[65, 24\], got shape \[65, 23\]"),
        ("train_pointwise_backward", 4, torch.zeros(1), r"a must be a float32 CPU tensor \[65\], got shape \[1\]"),
        ("train_pointwise_backward", 10, (True,), "Expected bool|needs must have 2 elements"),
        ("train_window_gram", 1, 32, "the kernel's size must be 1 to 31, got 32"),
        ("train_window_gram", 1, 21, "is smaller than the kernel with its padding"),
        ("train_window_backward", 0, torch.zeros(2, 8, 6, 5), r"gy must be \[2, 8, 6, 4\] in x's type"),
        ("train_window_backward", 2, torch.zeros(8, 2, 3, 3), r"w1 must be a float32 CPU tensor \[8, 3, 3, 3\]"),
        ("train_window_backward", 3, torch.zeros(7), r"b1 must be a float32 CPU tensor \[8\]"),
    ],
)
def test_wrong_arguments(name: str, index: int, value: Any, message: str) -> None:
    case = Case()
    of_layers = (layer_phases(LAYER_CASES[form], torch.float32).items() for form in ("stem", "pointwise"))
    calls = (*phases(case, arguments(case, torch.float32)).values(), *(call for calls in of_layers for call in calls))
    values = next(values for op_name, values in calls if op_name == name)
    with pytest.raises(RuntimeError, match=message):
        op(name)(*values[:index], value, *values[index + 1 :])
