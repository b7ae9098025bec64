"""The functional form of the block, and what a fused module calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from . import _registrations, reference
from . import backends as _backends
from .backends import KERNEL_DTYPES, BlockConfig, LayerConfig, get_backend, set_backend
from .fold import NO_EPS, BlockTensors, Eps, FoldedWeights, Layer, Tensors, check_shapes, fold, fold_layer

__all__ = [
    "BlockConfig",
    "InvertedResidualFunction",
    "get_backend",
    "inverted_residual",
    "run_block",
    "run_layer",
    "set_backend",
]

_OP = torch.ops.mbv2.inverted_residual_bn.default
_LAYER_OP = torch.ops.mbv2.conv_bn_act.default


def inverted_residual(
    x: Tensor,
    w_expand: Tensor | None,
    b_expand: Tensor | None,
    w_depthwise: Tensor,
    b_depthwise: Tensor | None,
    w_project: Tensor,
    b_project: Tensor | None,
    *,
    stride: int = 1,
    padding: int | str | None = None,
    dilation: int = 1,
    activation: str | None = "relu6",
    final_activation: str | None = None,
    residual: bool = False,
) -> Tensor:
    """An inverted residual block as one fused kernel, BatchNorm already folded into weights and biases.

        hidden = activation(conv1x1(x, w_expand, b_expand))                      left out if w_expand is None
        hidden = activation(depthwise_kxk(hidden, w_depthwise, b_depthwise))     zero padding around `hidden`
        y = final_activation(conv1x1(hidden, w_project, b_project)) (+ x if residual)

    Args:
        x: [N, Cin, H, W], float32, bfloat16 or float16, any strides; N may be 0. float64 is computed in plain PyTorch
            operations, for gradcheck and as a reference.
        w_expand: [C, Cin, 1, 1], or None for the form without expansion (C = Cin): t = 1, MobileNetV1.
        w_depthwise: [C, 1, k, k], k odd.
        w_project: [Cout, C, 1, 1].
        b_expand, b_depthwise, b_project: [C], [C], [Cout], or None. Weights and biases have x's dtype, or float32 below
            a 16-bit x, the three weights all the same. All on x's device.
        stride, dilation: of the depthwise convolution, in pixels, the same both ways.
        padding: of the depthwise convolution, in pixels on every side; None for dilation * (k - 1) / 2; "same" as
            TensorFlow has it: ceil(size / stride) out, the odd zero at the bottom and right.
        activation: "relu6", "relu" or None, after the expand and the depthwise convolution.
        final_activation: the same choice, after the projection; not together with `residual`.
        residual: add x; needs Cout = Cin and an output of x's size.

    Returns:
        [N, Cout, Ho, Wo] in x's dtype with channels_last strides. Differentiable once in every tensor; nothing but x
        and the weights is kept for backward. An activation lets no gradient through at its edges (0 and 6) and beyond,
        and lets it through at a NaN. Without gradients the packed weights are kept until a weight changes.

        Computed in float32, whatever x's dtype, but for the forward on CPUs in float16 with `set_fp16_accumulation` and
        in bfloat16 with AMX, where sums are float32 and the 1x1 convolutions' factors are rounded to bfloat16.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Source: Sandler et al., MobileNetV2 (arXiv 1801.04381v4), section 3.3.
    """
    weights = FoldedWeights(w_expand, b_expand, w_depthwise, b_depthwise, w_project, b_project)
    tensors = BlockTensors.from_folded(weights)
    _check_tensors(x, weights)
    check_shapes(tensors, _NAMES)
    config = BlockConfig(
        _positive("stride", stride),
        reference.resolve_padding(padding, w_depthwise.shape[-1], _positive("dilation", dilation)),
        dilation,
        _activation("activation", activation),
        _activation("final_activation", final_activation),
        bool(residual),
    )
    _check_geometry(x, weights, config)
    return run_block(x, tensors, NO_EPS, config)


def run_block(x: Tensor, tensors: BlockTensors, eps: Eps, config: BlockConfig) -> Tensor:
    """A block with its BatchNorms in eval mode: what a fused module calls. Arguments as the op has them, unchecked.

    Goes through the op `mbv2::inverted_residual_bn`, except in eager inference, where it calls what is below the op:
    the way through the dispatcher and autograd in Python costs more than everything else here.
    """
    if torch.compiler.is_compiling():
        return _OP(x, *tensors, eps, *config)
    if is_transformed():
        return reference.inverted_residual(x, *fold(tensors, eps), **config._asdict())
    if _needs_op(x, tensors):
        return _OP(x, *tensors, eps, *config)
    return _backends.run_block(x, tensors, eps, config)


def run_layer(x: Tensor, layer: Layer, eps: float, config: LayerConfig) -> Tensor:
    """A dense convolution with its BatchNorm in eval mode and its activation (stem, head), as `run_block`."""
    if torch.compiler.is_compiling():
        return _LAYER_OP(x, *layer, eps, *config)
    if is_transformed():
        return reference.conv_act(x, *fold_layer(layer, eps), **config._asdict())
    if _needs_op(x, layer):
        return _LAYER_OP(x, *layer, eps, *config)
    return _backends.run_layer(x, layer, eps, config)


def _needs_op(x: Tensor, tensors: Tensors) -> bool:
    return (
        type(x) is not Tensor
        or not (x.is_cpu or x.is_cuda)
        or (torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in tensors)))
        or torch.is_autocast_enabled("cpu" if x.is_cpu else "cuda")
        or torch._C._get_tracing_state() is not None  # torch.jit.trace: packed weights are no constants to keep
    )


def is_transformed() -> bool:
    """Under forward-mode derivatives or torch.func: the ops know neither, and would drop a tangent without a word."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or peek_interpreter_stack() is not None


class InvertedResidualFunction(torch.autograd.Function):
    """The `torch.autograd.Function` behind the block, for code that wants the Function itself.

    `apply(x, w_expand, b_expand, w_depthwise, b_depthwise, w_project, b_project, stride, padding, dilation,
    activation, final_activation, residual)`: positional, as the op `mbv2::inverted_residual` has them: `padding` in
    pixels or -1 for "same", activations by name ("none", "relu", "relu6"). The same forward and backward as the op.
    """

    @staticmethod
    def forward(x: Tensor, *args: Any) -> Tensor:
        if x.dtype in KERNEL_DTYPES:
            return torch.ops.mbv2.inverted_residual.default(x, *args)
        return reference.inverted_residual(x, *args[:6], **BlockConfig(*args[6:])._asdict())

    setup_context = staticmethod(_registrations.setup_context)
    backward = staticmethod(_registrations.backward)


#: The arguments' names in the places of their tensors.
_NAMES: tuple[Any, ...] = BlockTensors.from_folded(FoldedWeights._fields)  # type: ignore[arg-type]


def _check_tensors(x: Tensor, weights: FoldedWeights) -> None:
    for name, tensor in (("x", x), *zip(FoldedWeights._fields, weights, strict=True)):
        if tensor is None and name not in ("x", "w_depthwise", "w_project"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in (*KERNEL_DTYPES, torch.float64):
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, got {tensor.device}")
        allowed = (x.dtype,) if x.dtype == torch.float64 else (x.dtype, torch.float32)
        if tensor.dtype not in allowed and not torch.is_autocast_enabled(x.device.type):
            expected = " or ".join(dict.fromkeys(map(str, allowed)))
            raise TypeError(f"{name} must be {expected} below x in {x.dtype}, got {tensor.dtype}")
    if x.dim() != 4:
        raise ValueError(f"x must be [N, Cin, H, W], got {x.dim()} dimensions: {list(x.shape)}")


def _check_geometry(x: Tensor, weights: FoldedWeights, config: BlockConfig) -> None:
    w_expand, w_depthwise, w_project = weights.w_expand, weights.w_depthwise, weights.w_project
    in_channels = w_depthwise.shape[0] if w_expand is None else w_expand.shape[1]
    if x.shape[1] != in_channels:
        source = "w_depthwise" if w_expand is None else "w_expand"
        raise ValueError(f"x must have {in_channels} channels, as {source} takes, got {x.shape[1]}")
    geometry = (w_depthwise.shape[-1], config.stride, config.padding, config.dilation)
    out = [reference.output_size(size, *geometry) for size in x.shape[2:]]
    if out[0] < 1 or out[1] < 1 or x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(
            f"x of {x.shape[2]} x {x.shape[3]} pixels leaves no output for kernel size {geometry[0]}, "
            f"stride {config.stride}, padding {config.padding}, dilation {config.dilation}"
        )
    if not config.residual:
        return
    if config.final_activation != "none":
        raise ValueError("residual cannot be combined with final_activation")
    if w_project.shape[0] != x.shape[1] or out[0] != x.shape[2] or out[1] != x.shape[3]:
        raise ValueError(
            f"residual needs an output of x's shape {list(x.shape[1:])}, got [{w_project.shape[0]}, {out[0]}, {out[1]}]"
        )


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def _activation(name: str, value: str | None) -> str:
    value = "none" if value is None else value
    if value not in reference.ACTIVATIONS:
        raise ValueError(f"{name} must be one of {', '.join(reference.ACTIVATIONS)} or None, got {value!r}")
    return value
