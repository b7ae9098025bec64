"""The functional form: values, gradients, odd inputs, wrong inputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from blocks import BOUNDS, DTYPES, GRADIENT_BOUNDS, double, make_weights, relative_error
from torch import Tensor

from mbv2_kernels import _C, InvertedResidualFunction, inverted_residual, reference, set_backend
from mbv2_kernels.functional import get_backend

#: (weights, options, image): every branch of the block once.
CASES = {
    "residual": ({}, {"residual": True}, (2, 8, 9, 7)),
    "stride 2": ({"out_channels": 12}, {"stride": 2}, (2, 8, 9, 8)),
    "stride 2, same, even": ({}, {"stride": 2, "padding": "same"}, (1, 8, 8, 10)),
    "stride 2, same, odd": ({}, {"stride": 2, "padding": "same"}, (1, 8, 9, 7)),
    "kernel 5": ({"kernel_size": 5}, {"residual": True}, (1, 8, 6, 11)),
    "kernel 5, same, stride 3": ({"kernel_size": 5}, {"stride": 3, "padding": "same"}, (1, 8, 11, 13)),
    "dilation 2": ({}, {"dilation": 2, "residual": True}, (1, 8, 7, 9)),
    "no padding": ({}, {"padding": 0}, (1, 8, 5, 6)),
    "wide padding": ({}, {"padding": 3}, (1, 8, 4, 3)),
    "relu": ({}, {"activation": "relu"}, (1, 8, 6, 6)),
    "linear": ({}, {"activation": None}, (1, 8, 6, 6)),
    "no expand": ({"expand": False}, {"residual": True}, (2, 8, 6, 5)),
    "MobileNetV1": ({"expand": False, "out_channels": 20}, {"stride": 2, "final_activation": "relu6"}, (1, 8, 7, 7)),
    "no bias": ({"bias": False}, {}, (1, 8, 6, 6)),
    "one channel": ({"in_channels": 1, "hidden": 1, "out_channels": 1}, {"residual": True}, (1, 1, 5, 5)),
    "odd channels": ({"in_channels": 17, "hidden": 33, "out_channels": 9}, {}, (3, 17, 6, 5)),
    "one pixel": ({}, {"residual": True}, (1, 8, 1, 1)),
    "one row": ({}, {"stride": 2}, (2, 8, 1, 13)),
    "one column": ({}, {"residual": True}, (1, 8, 13, 1)),
}


def case(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor | None], dict[str, Any]]:
    weights, options, shape = CASES[name]
    return torch.randn(shape).to(dtype), make_weights(**weights, dtype=dtype), options


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_float64(name: str, dtype: torch.dtype) -> None:
    x, weights, options = case(name, dtype)
    expected = reference.inverted_residual(*double([x, *weights]), **options)
    with torch.no_grad():
        y = inverted_residual(x, *weights, **options)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y, expected) < BOUNDS[dtype]
    unfused = relative_error(reference.inverted_residual(x, *weights, **options), expected)
    assert relative_error(y, expected) < 2 * unfused + torch.finfo(dtype).eps


def run(function: Any, inputs: Any, options: dict[str, Any]) -> Tensor:
    if function is inverted_residual:
        return inverted_residual(*inputs, **options)
    return function.apply(*inputs, *positional(inputs[1:], options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name, function",
    [(name, inverted_residual) for name in CASES]
    + [(name, InvertedResidualFunction) for name in ("residual", "stride 2, same, even", "MobileNetV1")],
)
def test_gradients_agree_with_float64(name: str, function: Any, dtype: torch.dtype) -> None:
    x, weights, options = case(name, dtype)
    inputs = [None if t is None else t.requires_grad_() for t in (x, *weights)]
    exact = [None if t is None else t.requires_grad_() for t in double(inputs)]
    expected = reference.inverted_residual(*exact, **options)
    grad = torch.randn(expected.shape).to(dtype)
    y = run(function, inputs, options)
    leaves = [t for t in inputs if t is not None]
    wanted = torch.autograd.grad(expected, [t for t in exact if t is not None], grad.double())
    for got, want, leaf in zip(torch.autograd.grad(y, leaves, grad), wanted, leaves, strict=True):
        assert got.dtype == leaf.dtype
        assert got.shape == leaf.shape
        assert relative_error(got, want) < GRADIENT_BOUNDS[dtype] or want.norm() == 0 == got.norm()


def positional(weights: Any, options: dict[str, Any]) -> tuple[Any, ...]:
    """Keyword options as the op has them."""
    dilation = options.get("dilation", 1)
    kernel_size = weights[2].shape[-1]
    return (
        options.get("stride", 1),
        reference.resolve_padding(options.get("padding"), kernel_size, dilation),
        dilation,
        options.get("activation", "relu6") or "none",
        options.get("final_activation") or "none",
        options.get("residual", False),
    )


@pytest.mark.parametrize("name", ["residual", "stride 2, same, even", "MobileNetV1", "dilation 2", "no bias"])
@pytest.mark.parametrize("function", [inverted_residual, InvertedResidualFunction], ids=["function", "Function"])
def test_gradcheck(name: str, function: Any) -> None:
    x, weights, options = case(name)
    inputs = [None if t is None else t.double().requires_grad_() for t in (x[:1, :, :5, :4], *weights)]
    assert torch.autograd.gradcheck(lambda *inputs: run(function, inputs, options), inputs, fast_mode=True)


def test_only_needed_gradients_are_computed() -> None:
    x, weights, _ = case("residual")
    assert weights[2] is not None
    weights[2].requires_grad_()
    inverted_residual(x, *weights).sum().backward()
    assert weights[2].grad is not None
    assert x.grad is None
    assert weights[0] is not None and weights[0].grad is None


@pytest.mark.parametrize("activation", ["relu6", "relu"])
def test_the_gradient_at_the_edge_of_a_clamp_is_zero_as_torch_has_it(activation: str) -> None:
    edges = torch.tensor([-1.0, 0.0, 1e-6, 3.0, 6.0, 6.5]).reshape(1, 1, 1, 6).requires_grad_()
    one = torch.ones(1, 1, 1, 1)
    inverted_residual(edges, one, None, one, None, one, None, activation=activation).sum().backward()
    again = edges.detach().clone().requires_grad_()
    function = getattr(torch.nn.functional, activation)
    function(function(again)).sum().backward()
    assert again.grad is not None
    assert edges.grad is not None and edges.grad.equal(again.grad)


def test_double_backward_is_a_clear_error() -> None:
    x, weights, options = case("residual")
    x.requires_grad_()
    (grad,) = torch.autograd.grad(inverted_residual(x, *weights, **options).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_forward_mode_and_torch_func_give_true_derivatives() -> None:
    """The ops have neither: dropping a tangent would be silently wrong."""
    x, weights, options = case("residual")
    tangent = torch.randn_like(x)

    def fused(x: Tensor) -> Tensor:
        return inverted_residual(x, *weights, **options)

    def plain(x: Tensor) -> Tensor:
        return reference.inverted_residual(x, *weights, **options)

    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        got = torch.autograd.forward_ad.unpack_dual(fused(dual)).tangent
    assert got is not None
    wanted = torch.func.jvp(plain, (x,), (tangent,))[1]
    assert wanted.norm() > 0
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.func.jvp(fused, (x,), (tangent,))[1], wanted)
    images = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.vmap(fused)(images), torch.vmap(plain)(images))
    gradient = torch.func.grad(lambda x: fused(x).sum())(x)
    torch.testing.assert_close(gradient, torch.func.grad(lambda x: plain(x).sum())(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinities_go_through_as_in_torch(dtype: torch.dtype) -> None:
    x = torch.zeros(1, 1, 1, 4, dtype=dtype)
    x[0, 0, 0] = torch.tensor([math.nan, math.inf, -math.inf, 2.0])
    one = torch.ones(1, 1, 1, 1, dtype=dtype)
    y = inverted_residual(x, one, None, one, None, one, None)
    assert y.flatten()[0].isnan()
    assert y.flatten()[1:].tolist() == [6.0, 0.0, 2.0]
    assert inverted_residual(x, one, None, one, None, one, None, activation="relu").flatten()[1:].tolist() == [
        math.inf,
        0,
        2,
    ]
    assert inverted_residual(x, one, None, one, None, one, None, final_activation="relu6").flatten()[0].isnan()


def test_a_nan_pixel_reaches_its_neighbours_and_no_one_else() -> None:
    x, weights, _ = case("residual")
    x[0, 3, 4, 4] = math.nan
    bad = inverted_residual(x, *weights).isnan().any(1)
    expected = torch.zeros_like(bad)
    expected[0, 3:6, 3:6] = True
    assert bad.equal(expected)


@pytest.mark.parametrize("grad", [False, True])
def test_empty_batch(grad: bool) -> None:
    _, weights, _ = case("residual")
    x = torch.empty(0, 8, 6, 6, requires_grad=grad)
    y = inverted_residual(x, *weights, residual=True)
    assert y.shape == (0, 8, 6, 6)
    assert inverted_residual(x, *weights, stride=2).shape == (0, 8, 3, 3)
    if grad:
        y.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape


def _layouts() -> dict[str, Any]:
    return {
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "sliced channels": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[
            :, : x.shape[1]
        ],
        "sliced channels, NCHW": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        "every second row": lambda x: torch.stack([x, x], 3).flatten(2, 3)[:, :, ::2],
        "every second column": lambda x: torch.stack([x, x], 4).flatten(3, 4)[..., ::2],
        "flipped and back": lambda x: x.flip(3).contiguous().flip(3),
        "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": lambda x: x[:1].expand_as(x),
        "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", _layouts())
def test_any_strides_of_x(layout: str, dtype: torch.dtype) -> None:
    x, weights, options = case("residual", dtype)
    strided = _layouts()[layout](x)
    with torch.no_grad():
        assert inverted_residual(strided, *weights, **options).equal(
            inverted_residual(strided.contiguous(), *weights, **options)
        )


def test_any_strides_of_the_weights() -> None:
    x, weights, options = case("residual")
    strided = [None if t is None else torch.stack([t, t], -1)[..., 0] for t in weights]
    assert inverted_residual(x, *strided, **options).equal(inverted_residual(x, *weights, **options))
    square = torch.randn(8, 8, 1, 1)
    weights = make_weights(8, 8, 8)
    for tied in (square, square.transpose(0, 1)):  # the same memory, read differently
        y = inverted_residual(x, tied, *weights[1:])
        assert relative_error(y, reference.inverted_residual(*double([x, tied, *weights[1:]]))) < 2e-6


def test_float32_weights_below_a_16_bit_x() -> None:
    x, _, options = case("residual", torch.bfloat16)
    weights = make_weights()
    y = inverted_residual(x, *weights, **options)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, reference.inverted_residual(*double([x, *weights]), **options)) < 8e-3


def test_an_in_place_edit_of_a_weight_is_noticed() -> None:
    x, weights, options = case("residual")
    before = inverted_residual(x, *weights, **options)
    assert weights[4] is not None
    weights[4].mul_(2)
    after = inverted_residual(x, *weights, **options)
    assert not after.equal(before)
    assert relative_error(after, reference.inverted_residual(*double([x, *weights]), **options)) < 2e-6


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    x, weights, options = case("residual")
    two = inverted_residual(x, *weights, **options)
    torch.set_num_threads(1)
    assert inverted_residual(x, *weights, **options).equal(two)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x no tensor": ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    "x 3-D": ({"x": torch.zeros(8, 5, 5)}, ValueError, r"x must be \[N, Cin, H, W\], got 3 dimensions"),
    "x integers": ({"x": torch.zeros(1, 8, 5, 5, dtype=torch.int64)}, TypeError, "x must be float32.*int64"),
    "x channels": ({"x": torch.zeros(1, 7, 5, 5)}, ValueError, "x must have 8 channels, as w_expand takes, got 7"),
    "x without pixels": ({"x": torch.zeros(1, 8, 0, 5)}, ValueError, "leaves no output"),
    "x too small": ({"x": torch.zeros(1, 8, 2, 5), "padding": 0}, ValueError, "x of 2 x 5 pixels leaves no output"),
    "w_expand shape": ({"w_expand": torch.zeros(24, 8, 3, 3)}, ValueError, r"w_expand must be \[24, Cin, 1, 1\]"),
    "w_expand channels": ({"w_expand": torch.zeros(23, 8, 1, 1)}, ValueError, r"w_expand must be \[24.*got \[23"),
    "b_expand without w_expand": ({"w_expand": None}, ValueError, "b_expand is given, but w_expand is None"),
    "b_expand shape": ({"b_expand": torch.zeros(8)}, ValueError, r"b_expand must be \[24\], got \[8\]"),
    "w_depthwise missing": ({"w_depthwise": None}, TypeError, "w_depthwise must be a torch.Tensor, got NoneType"),
    "w_depthwise dense": (
        {"w_depthwise": torch.zeros(24, 24, 3, 3)},
        ValueError,
        r"w_depthwise must be \[C, 1, k, k\]",
    ),
    "w_depthwise even": ({"w_depthwise": torch.zeros(24, 1, 2, 2)}, ValueError, "w_depthwise .*odd"),
    "w_depthwise oblong": ({"w_depthwise": torch.zeros(24, 1, 3, 5)}, ValueError, "w_depthwise .*square"),
    "b_depthwise shape": ({"b_depthwise": torch.zeros(1)}, ValueError, r"b_depthwise must be \[24\], got \[1\]"),
    "w_project shape": ({"w_project": torch.zeros(8, 23, 1, 1)}, ValueError, r"w_project must be \[Cout, 24, 1, 1\]"),
    "b_project scalar": ({"b_project": torch.zeros(())}, ValueError, r"b_project must be \[8\], got \[\]"),
    "weight dtype": (
        {"w_project": torch.zeros(8, 24, 1, 1).double()},
        TypeError,
        "w_project must be torch.float32 below x",
    ),
    "float64 x, float32 weights": (
        {"x": torch.zeros(1, 8, 5, 5).double()},
        TypeError,
        "w_expand must be torch.float64",
    ),
    "device": ({"w_project": torch.zeros(8, 24, 1, 1, device="meta")}, ValueError, "w_project must be on cpu like x"),
    "stride 0": ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    "stride float": ({"stride": 1.5}, TypeError, "stride must be an int, got 1.5"),
    "stride pair": ({"stride": (1, 1)}, TypeError, "stride must be an int"),
    "dilation 0": ({"dilation": 0}, ValueError, "dilation must be at least 1, got 0"),
    "padding negative": ({"padding": -2}, ValueError, "padding must not be negative"),
    "padding word": ({"padding": "valid"}, TypeError, "padding must be None, an int or \"same\", got 'valid'"),
    "padding pair": ({"padding": (1, 1)}, TypeError, "padding must be None"),
    "activation": (
        {"activation": "gelu"},
        ValueError,
        "activation must be one of none, relu, relu6 or None, got 'gelu'",
    ),
    "final_activation": ({"final_activation": "silu"}, ValueError, "final_activation must be one of"),
    "both": ({"residual": True, "final_activation": "relu"}, ValueError, "residual cannot be combined"),
    "residual, stride": ({"residual": True, "stride": 2}, ValueError, "residual needs an output of x's shape"),
    "residual, channels": (
        {"residual": True, "w_project": torch.zeros(9, 24, 1, 1), "b_project": None},
        ValueError,
        r"residual needs an output of x's shape \[8, 5, 5\], got \[9, 5, 5\]",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    change, error, message = WRONG[name]
    names = ("w_expand", "b_expand", "w_depthwise", "b_depthwise", "w_project", "b_project")
    arguments = {"x": torch.zeros(1, 8, 5, 5), **dict(zip(names, make_weights(), strict=True)), **change}
    with pytest.raises(error, match=message):
        inverted_residual(**arguments)


class TestBackends:
    @pytest.fixture(autouse=True)
    def _auto_again(self) -> Any:
        yield
        set_backend("auto")

    def test_names(self) -> None:
        assert get_backend() == "auto"
        for name in ("cpu", "triton", "reference", "auto"):
            set_backend(name)
            assert get_backend() == name
        with pytest.raises(ValueError, match="backend must be one of auto, cpu, triton, reference, got 'cuda'"):
            set_backend("cuda")
        assert get_backend() == "auto"

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_reference_and_cpu_agree(self, dtype: torch.dtype) -> None:
        x, weights, options = case("residual", dtype)
        expected = reference.inverted_residual(*double([x, *weights]), **options)
        results = {}
        for name in ("reference", "cpu"):
            set_backend(name)
            _C.reset_counters()
            results[name] = inverted_residual(x, *weights, **options)
            assert sum(_C.counters().values()) == (name == "cpu")
            assert relative_error(results[name], expected) < BOUNDS[dtype]
        assert results["reference"].stride() == results["cpu"].stride()

    def test_triton_refuses_cpu_tensors_outside_its_interpreter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        x, weights, options = case("residual")
        set_backend("triton")
        with pytest.raises(RuntimeError, match="only in its interpreter"):
            inverted_residual(x, *weights, **options)

    def test_float64_runs_the_reference_whatever_is_set(self) -> None:
        x, weights, options = case("residual")
        inputs = double([x, *weights])
        set_backend("cpu")
        assert inverted_residual(*inputs, **options).equal(reference.inverted_residual(*inputs, **options))
