"""torch.ops.mbv2.*: opcheck, fakes, autocast, and wrong arguments given directly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blocks import (
    BOUNDS,
    DTYPES,
    EPS,
    GRADIENT_BOUNDS,
    double,
    make_block,
    make_config,
    make_weights,
    relative_error,
    unfused,
    with_grad,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import mbv2_kernels
from mbv2_kernels import reference
from mbv2_kernels.fold import BlockTensors
from mbv2_kernels.functional import BlockConfig

ops = torch.ops.mbv2

BLOCKS = {
    "residual": ({}, make_config(residual=True)),
    "stride 2": ({"out_channels": 12}, make_config(stride=2)),
    "same": ({}, make_config(stride=2, padding=-1)),
    "MobileNetV1": ({"expand": False}, make_config(stride=2, final_activation="relu6")),
    "kernel 5, dilation 2": ({"kernel_size": 5}, make_config(padding=4, dilation=2, activation="relu")),
}


def image(dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 8, 9, 6).to(dtype)


def grad(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.requires_grad_() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_opcheck_inverted_residual(name: str, dtype: torch.dtype) -> None:
    shape, config = BLOCKS[name]
    opcheck(ops.inverted_residual, (*grad(image(dtype), *make_weights(**shape, dtype=dtype)), *config))


@pytest.mark.parametrize("batch", [0, 1])
def test_opcheck_small_batches(batch: int) -> None:
    opcheck(ops.inverted_residual, (*grad(image(batch=batch), *make_weights()), *make_config(residual=True)))


@pytest.mark.parametrize("name", BLOCKS)
def test_opcheck_inverted_residual_bn(name: str) -> None:
    shape, config = BLOCKS[name]
    tensors = make_block(**shape, requires_grad=True)
    opcheck(ops.inverted_residual_bn, (image().requires_grad_(), *tensors, EPS, *config))


@pytest.mark.parametrize(
    "variant", [{"affine": False}, {"conv_bias": True}, {"norm": False, "conv_bias": True}], ids=str
)
def test_opcheck_inverted_residual_bn_variants(variant: dict[str, bool]) -> None:
    tensors = make_block(**variant, requires_grad=True)
    opcheck(ops.inverted_residual_bn, (image().requires_grad_(), *tensors, EPS, *make_config()))


@pytest.mark.parametrize("name", BLOCKS)
def test_opcheck_pack_and_packed(name: str) -> None:
    shape, config = BLOCKS[name]
    weights = make_weights(**shape)
    opcheck(ops.pack_inverted_residual, tuple(weights))
    packed = ops.pack_inverted_residual(*weights)
    opcheck(ops.inverted_residual_packed, (image(), packed, *dims(weights), *config))


@pytest.mark.parametrize("needs", [(True,) * 7, (True,) + (False,) * 6, (False,) * 5 + (True, False)], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_opcheck_backward(name: str, needs: tuple[bool, ...]) -> None:
    shape, config = BLOCKS[name]
    x, weights = image(), make_weights(**shape)
    incoming = torch.randn_like(ops.inverted_residual(x, *weights, *config))
    # As the op is for first-order gradients only, its autograd formula is an error: tested in test_functional.
    tests = ("test_schema", "test_faketensor")
    opcheck(ops.inverted_residual_backward, (incoming, x, *weights, *config, needs), test_utils=tests)


def dims(weights: list[Tensor | None]) -> tuple[int, int, int, bool]:
    """hidden_channels, out_channels, kernel_size, expand: what the packed op takes beside the packed weights."""
    assert weights[2] is not None and weights[4] is not None
    return weights[2].shape[0], weights[4].shape[0], weights[2].shape[-1], weights[0] is not None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_bn_op_agrees_with_float64_and_its_gradients_too(name: str, dtype: torch.dtype) -> None:
    shape, config = BLOCKS[name]
    x, tensors = image(dtype).requires_grad_(), make_block(**shape, dtype=dtype, requires_grad=True)
    exact = BlockTensors(*double(tensors))
    leaves = [(x, x.detach().double().requires_grad_())] + [
        (t, e.requires_grad_()) for t, e in zip(tensors, exact, strict=True) if t is not None and t.requires_grad
    ]
    expected = unfused(leaves[0][1], exact, EPS, config)
    y = ops.inverted_residual_bn(x, *tensors, EPS, *config)
    assert relative_error(y, expected) < BOUNDS[dtype]
    incoming = torch.randn(y.shape).to(dtype)
    got = torch.autograd.grad(y, [leaf for leaf, _ in leaves], incoming)
    wanted = torch.autograd.grad(expected, [e for _, e in leaves], incoming.double())
    for g, w, (leaf, _) in zip(got, wanted, leaves, strict=True):
        assert g.dtype == leaf.dtype
        assert relative_error(g, w) < GRADIENT_BOUNDS[dtype]


@pytest.mark.parametrize(
    "variant",
    [{}, {"affine": False}, {"conv_bias": True}, {"norm": False, "conv_bias": True}, {"expand": False}],
    ids=str,
)
def test_gradcheck_bn_op(variant: dict[str, bool]) -> None:
    tensors = make_block(4, 6, 4, **variant, dtype=torch.float64, requires_grad=True)
    x = torch.randn(1, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    config = make_config(residual=True)

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        return ops.inverted_residual_bn(x, *tensors, EPS, *config)

    assert torch.autograd.gradcheck(run, (x, *tensors), fast_mode=True)
    assert relative_error(run(x, *tensors), unfused(x, tensors, EPS, config)) < 1e-12


def test_bn_op_double_backward_is_a_clear_error() -> None:
    x, tensors = image().requires_grad_(), make_block(requires_grad=True)
    y = ops.inverted_residual_bn(x, *tensors, EPS, *make_config())
    (g,) = torch.autograd.grad(y.sum(), tensors.expand_gamma, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        g.sum().backward()


class TestFakes:
    @pytest.mark.parametrize("name", BLOCKS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_shape_dtype_and_strides(self, name: str, dtype: torch.dtype) -> None:
        shape, config = BLOCKS[name]
        weights, block = make_weights(**shape), make_block(**shape)
        packed = ops.pack_inverted_residual(*weights)
        for size in ((2, 8, 9, 6), (1, 8, 1, 1), (1, 8, 7, 1), (0, 8, 4, 4)):
            x = torch.randn(size).to(dtype)
            calls: list[tuple[Any, list[Any]]] = [
                (ops.inverted_residual, [x, *weights, *config]),
                (ops.inverted_residual_packed, [x, packed, *dims(weights), *config]),
                (ops.inverted_residual_bn, [x, *block, EPS, *config]),
            ]
            for op, arguments in calls:
                if op is not ops.inverted_residual_packed and dtype != torch.float32:
                    arguments = [a.to(dtype) if isinstance(a, Tensor) else a for a in arguments]
                real = op(*arguments)
                with FakeTensorMode() as mode:
                    fake = op(*[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments])
                assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)

    def test_meta_tensors(self) -> None:
        weights = [None if t is None else t.to("meta") for t in make_weights()]
        y = ops.inverted_residual(torch.empty(2, 8, 9, 6, device="meta"), *weights, *make_config(stride=2))
        assert y.is_meta and y.shape == (2, 8, 5, 3)
        assert mbv2_kernels.inverted_residual(torch.empty(2, 8, 9, 6, device="meta"), *weights).shape == (2, 8, 9, 6)


class TestAutocast:
    """Against the unfused block under the same autocast: same dtype, and at least its accuracy."""

    @pytest.mark.parametrize("residual", [False, True])
    @pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_agrees(self, autocast_dtype: torch.dtype, x_dtype: torch.dtype, residual: bool) -> None:
        x, block, weights = image(x_dtype), make_block(), make_weights()
        config = make_config(residual=residual)
        exact = unfused(x.double(), BlockTensors(*double(block)), EPS, config)
        with torch.autocast("cpu", autocast_dtype):
            expected = unfused(x, block, EPS, config)
            y = ops.inverted_residual_bn(x, *block, EPS, *config)
            assert y.dtype == expected.dtype
            assert ops.inverted_residual(x, *weights, *config).dtype == expected.dtype
            packed = ops.pack_inverted_residual(*weights)
            assert ops.inverted_residual_packed(x, packed, *dims(weights), *config).dtype == expected.dtype
            assert mbv2_kernels.inverted_residual(x, *weights, residual=residual).dtype == expected.dtype
        assert (
            relative_error(y, exact)
            < BOUNDS[torch.bfloat16 if torch.bfloat16 in (x_dtype, autocast_dtype) else torch.float16]
        )
        assert relative_error(y, exact) <= relative_error(expected, exact)

    def test_the_residual_promotes(self) -> None:
        x, block = image(), make_block()
        with torch.autocast("cpu", torch.bfloat16):
            y = ops.inverted_residual_bn(x, *block, EPS, *make_config(residual=True))
            branch = ops.inverted_residual_bn(x, *block, EPS, *make_config())
        assert y.dtype == torch.float32
        assert branch.dtype == torch.bfloat16
        assert y.equal(branch + x)

    def test_gradients_arrive_in_the_parameters_dtype(self) -> None:
        x = image(torch.bfloat16).float().requires_grad_()  # what autocast rounds must not decide a clamp
        block = make_block(requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = ops.inverted_residual_bn(x, *block, EPS, *make_config(residual=True))
        exact = with_grad(BlockTensors(*double(block)))
        exact_x = x.detach().double().requires_grad_()
        unfused(exact_x, exact, EPS, make_config(residual=True)).sum().backward()
        y.sum().backward()
        for got, want in zip((x, *block), (exact_x, *exact), strict=True):
            if got is not None and got.requires_grad:
                assert got.grad is not None and want.grad is not None
                assert got.grad.dtype == torch.float32
                assert relative_error(got.grad, want.grad) < GRADIENT_BOUNDS[torch.bfloat16]

    def test_backward_inside_autocast(self) -> None:
        x, weights = image().requires_grad_(), make_weights()
        with torch.autocast("cpu", torch.bfloat16):
            y = ops.inverted_residual(x, *weights, *make_config())
            (got,) = torch.autograd.grad(y.float().square().sum(), x)
        assert got.dtype == torch.float32 and got.isfinite().all()

    def test_16_bit_weights_are_cast_and_float64_left_alone(self) -> None:
        config = make_config()
        with torch.autocast("cpu", torch.bfloat16):
            assert ops.inverted_residual(image(), *make_weights(dtype=torch.float16), *config).dtype == torch.bfloat16
            block = make_block(dtype=torch.float64)
            x = image(torch.float64)
            y = ops.inverted_residual_bn(x, *block, EPS, *config)
        assert y.dtype == torch.float64
        assert relative_error(y, unfused(x, block, EPS, config)) < 1e-12

    def test_disabled(self) -> None:
        with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
            assert ops.inverted_residual_bn(image(), *make_block(), EPS, *make_config()).dtype == torch.float32


NAMES = ("x", "w_expand", "b_expand", "w_depthwise", "b_depthwise", "w_project", "b_project")
SHAPES: dict[str, dict[str, Any]] = {
    "x 3-D": {"x": torch.zeros(8, 5, 5)},
    "x 5-D": {"x": torch.zeros(1, 8, 5, 5, 5)},
    "x channels": {"x": torch.zeros(1, 9, 5, 5)},
    "x no channels": {"x": torch.zeros(1, 0, 5, 5)},
    "x float64": {"x": torch.zeros(1, 8, 5, 5).double()},
    "x int": {"x": torch.zeros(1, 8, 5, 5, dtype=torch.int32)},
    "w_expand": {"w_expand": torch.zeros(24, 7, 1, 1)},
    "w_expand 2-D": {"w_expand": torch.zeros(24, 8)},
    "w_expand int": {"w_expand": torch.zeros(24, 8, 1, 1, dtype=torch.int8)},
    "b_expand": {"b_expand": torch.zeros(23)},
    "b_expand 2-D": {"b_expand": torch.zeros(24, 1)},
    "w_depthwise": {"w_depthwise": torch.zeros(24, 2, 3, 3)},
    "w_depthwise even": {"w_depthwise": torch.zeros(24, 1, 4, 4)},
    "w_depthwise empty": {"w_depthwise": torch.zeros(24, 1, 0, 0)},
    "hidden": {"w_depthwise": torch.zeros(25, 1, 3, 3)},
    "b_depthwise": {"b_depthwise": torch.zeros(0)},
    "w_project": {"w_project": torch.zeros(8, 23, 1, 1)},
    "w_project empty": {"w_project": torch.zeros(0, 24, 1, 1), "b_project": torch.zeros(0)},
    "w_project 3x3": {"w_project": torch.zeros(8, 24, 3, 3)},
    "b_project": {"b_project": torch.zeros(9)},
}
CONFIGS: dict[str, BlockConfig] = {
    "stride": make_config(stride=0),
    "stride negative": make_config(stride=-1),
    "padding": make_config(padding=-2),
    "dilation": make_config(dilation=0),
    "overflow": make_config(dilation=2**62),
    "wide": make_config(padding=2**62),
    "activation": make_config(activation="gelu"),
    "final_activation": make_config(final_activation=""),
    "residual, stride": make_config(stride=2, residual=True),
    "residual, final": make_config(residual=True, final_activation="relu"),
    "too small": make_config(padding=0, dilation=3),
}


class TestWrongArguments:
    """Straight into the ops: an exception, never a crash."""

    def arguments(self, **change: Any) -> list[Any]:
        given = dict(zip(NAMES, (torch.zeros(1, 8, 5, 5), *make_weights()), strict=True))
        return list((given | change).values())

    @pytest.mark.parametrize("name", SHAPES)
    def test_tensors(self, name: str) -> None:
        x, *weights = self.arguments(**SHAPES[name])
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            ops.inverted_residual(x, *weights, *make_config())
        if "x" in SHAPES[name]:
            if x.dtype != torch.float64:  # the reference's case, for the op with BatchNorms
                with pytest.raises((RuntimeError, ValueError, TypeError)):
                    ops.inverted_residual_bn(x, *make_block(), EPS, *make_config())
        elif name != "w_expand":  # that one fits the other weights, only not x
            with pytest.raises((RuntimeError, ValueError, TypeError)):
                ops.pack_inverted_residual(*weights)

    @pytest.mark.parametrize("name", CONFIGS)
    def test_configs(self, name: str) -> None:
        arguments = self.arguments()
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            ops.inverted_residual(*arguments, *CONFIGS[name])
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            ops.inverted_residual_bn(arguments[0], *make_block(), EPS, *CONFIGS[name])

    @pytest.mark.parametrize("field", [f for f in BlockTensors._fields if not f.endswith("weight")])
    def test_block_vectors(self, field: str) -> None:
        block = make_block(conv_bias=True)
        for wrong in (torch.zeros(1), torch.zeros(0), torch.zeros(24, 1), torch.zeros(1000)):
            with pytest.raises(ValueError, match=field):
                ops.inverted_residual_bn(image(), *block._replace(**{field: wrong}), EPS, *make_config())
        if field.endswith(("mean", "var")):
            with pytest.raises(ValueError, match="both or neither"):
                ops.inverted_residual_bn(image(), *block._replace(**{field: None}), EPS, *make_config())

    def test_block_weights(self) -> None:
        block = make_block()
        for field in ("expand_weight", "depthwise_weight", "project_weight"):
            weight = getattr(block, field)
            for wrong in (weight[:-1], weight.squeeze(), weight.double()):
                with pytest.raises((RuntimeError, ValueError, TypeError)):
                    ops.inverted_residual_bn(image(), *block._replace(**{field: wrong}), EPS, *make_config())
        with pytest.raises(ValueError, match="expand_weight is None"):
            ops.inverted_residual_bn(image(), *block._replace(expand_weight=None), EPS, *make_config())
        with pytest.raises(ValueError, match="eps must be 3 numbers"):
            ops.inverted_residual_bn(image(), *block, EPS[:2], *make_config())

    def test_packed(self) -> None:
        weights = make_weights()
        packed = ops.pack_inverted_residual(*weights)
        right = dims(weights)
        x, config = image(), make_config()
        assert ops.inverted_residual_packed(x, packed, *right, *config).shape == x.shape
        for wrong in (
            packed[:-1],
            packed[1:],
            torch.zeros(0),
            torch.zeros_like(packed),
            packed.double(),
            packed[None],
            packed[::2],
        ):
            with pytest.raises(RuntimeError):
                ops.inverted_residual_packed(x, wrong, *right, *config)
        for wrong_dims in (
            (25, 8, 3, True),
            (24, 9, 3, True),
            (24, 8, 5, True),
            (24, 8, 3, False),
            (-1, 8, 3, True),
            (24, 2**40, 3, True),
        ):
            with pytest.raises(RuntimeError):
                ops.inverted_residual_packed(x, packed, *wrong_dims, *config)

    def test_backward_with_wrong_shapes(self) -> None:
        x, *weights = self.arguments()
        with pytest.raises(RuntimeError):
            ops.inverted_residual_backward(torch.zeros(1, 8, 4, 5), x, *weights, *make_config(), [True] * 7)
        with pytest.raises(ValueError):
            ops.inverted_residual_backward(torch.zeros(1, 8, 5, 5), x, *weights, *make_config(), [True] * 6)


def test_reference_backward_is_what_autograd_finds() -> None:
    """The oracle of the backward kernels, over every branch, in float64."""
    for shape, config in BLOCKS.values():
        x, *weights = grad(*double([image(), *make_weights(**shape)]))
        options = config._asdict()
        y = reference.inverted_residual(x, *weights, **options)
        incoming = torch.randn_like(y)
        present = [t for t in (x, *weights) if t is not None]
        wanted = iter(torch.autograd.grad(y, present, incoming))
        got = reference.inverted_residual_backward(incoming, x.detach(), *weights, **options)
        for g, argument in zip(got, (x, *weights), strict=True):
            assert (g is None) == (argument is None)
            if g is not None:
                assert relative_error(g, next(wanted)) < 1e-13
